"""From the name of a data set to its splits and the names of its classes."""

import hashlib
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import PIL.Image

from locatvit_hf.utils.io import read_json
from locatvit_hf.writing import one_line
from training.arguments import DataArguments

from .streaming import StreamedRows, open_shards

FILE_FORMATS = {".parquet": "parquet", ".tar": "webdataset", ".tar.gz": "webdataset", ".tgz": "webdataset"}

Split = datasets.Dataset | StreamedRows


class MissingSplitError(ValueError):
    """A data set has no split of that name."""


class Splits(NamedTuple):
    """train, validation: with the image and the label column. label_names: in the order of the label ids, if known."""

    train: Split
    validation: Split
    label_names: list[str] | None


def load_splits(arguments: DataArguments, segmentation: bool = False) -> Splits:
    """Load both splits, check their columns and name their classes.

    segmentation: labels are images of class ids rather than one class each.
    Raises ValueError for a data set, split, file or column that is not there, and for an empty split.
    """
    columns = [arguments.image_column, arguments.label_column]
    if columns[0] == columns[1]:
        raise ValueError(f"The images and their labels cannot both be in the column {columns[0]!r}.")
    images = columns if segmentation else columns[:1]
    if arguments.validation_share is None:
        train = load_split(arguments, arguments.train_split, columns, images, arguments.max_train_samples)
        limit = arguments.max_validation_samples
        try:
            validation = load_split(arguments, arguments.validation_split, columns, images, limit)
        except MissingSplitError as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"{reason}; --validation_share 0.1 takes a tenth of the training split instead.") from None
    else:
        train, validation = _divide(load_split(arguments, arguments.train_split, columns, images), arguments)
    if arguments.dataset_hash is not None:
        _check_hash(arguments, train, validation)
    label_names = read_label_names(arguments)
    if not segmentation:
        train, validation, label_names = _number_labels(train, validation, arguments.label_column, label_names)
    return Splits(train, validation, label_names)


def load_split(
    arguments: DataArguments, split: str, columns: list[str], images: list[str], limit: int | None = None
) -> Split:
    """The columns of one split, checked; with `streaming`, rows that stay where they are until they are used.

    split: name, or pattern of the files in the data set; patterns may hold ranges as {000..099}.
    images: the columns that are images.
    limit: keep no more rows, see `spread`.
    Raises ValueError for what is not there, for images that are none, and for an empty split.
    """
    paired = _pair_folders(arguments, split, columns) if images == columns else None
    rows = paired if paired is not None else _load_split(arguments, split)
    if len(rows) == 0 or (limit is not None and limit < 1):
        raise ValueError(f"The split {split!r} of {arguments.dataset} is empty.")
    for column in columns:
        if column not in rows.column_names:
            raise ValueError(
                f"The split {split!r} of {arguments.dataset} has no column {column!r}, only "
                f"{', '.join(map(repr, rows.column_names))}; see --image_column and --label_column."
            )
    for column in images:
        if not _may_hold_images(rows.features[column]):
            raise ValueError(
                f"The column {column!r} of the split {split!r} of {arguments.dataset} must hold images, but it holds "
                f"{_describe(rows.features[column])}; see --image_column and --label_column."
            )
    if isinstance(rows, StreamedRows):
        rows.features = datasets.Features(rows.features | dict.fromkeys(images, datasets.Image(decode=False)))
        if limit is not None:
            rows.limit(limit)
        return rows
    rows = rows.select_columns(columns)
    for column in images:
        if not isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image())
    return spread(rows, limit)


def spread(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """As many rows as `limit` says, evenly spread: of rows that are sorted by class, each class gives its share."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(np.arange(limit) * len(rows) // limit)


def _check_hash(arguments: DataArguments, *splits: Split) -> None:
    """Raises ValueError where the data is not that of `dataset_hash`."""
    if any(isinstance(split, StreamedRows) for split in splits):
        raise ValueError("dataset_hash needs all of the data at hand: leave out --streaming.")
    found = hash_rows(*splits)
    if found != arguments.dataset_hash:
        raise ValueError(
            f"{arguments.dataset} is not the data that these settings were made for: the SHA-256 of its images and "
            f"labels is {found}, not {arguments.dataset_hash}; give --dataset_hash null to use it all the same."
        )


def hash_rows(*splits: datasets.Dataset) -> str:
    """SHA-256 of all rows in their order, images as the bytes of their files."""
    digest = hashlib.sha256()
    for split in splits:
        images = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
        for name in images:
            split = split.cast_column(name, datasets.Image(decode=False))
        for row in split:
            for name, value in sorted(row.items()):
                if name in images:
                    value = value["bytes"] or Path(value["path"]).read_bytes()
                content = value if isinstance(value, bytes) else str(value).encode()
                digest.update(b"%d:" % len(content) + content)
    return digest.hexdigest()


def _may_hold_images(feature: Any) -> bool:
    """Whether `datasets.Image` can read a column: image files, their names, or pixels."""
    if isinstance(feature, datasets.Value):
        return feature.dtype.removeprefix("large_") in ("string", "binary")
    return not isinstance(feature, datasets.ClassLabel) and (not isinstance(feature, dict) or "bytes" in feature)


def _describe(feature: Any) -> str:
    if isinstance(feature, datasets.ClassLabel):
        return "class labels"
    return f"values of type {feature.dtype}" if isinstance(feature, datasets.Value) else "something else"


def _pair_folders(arguments: DataArguments, split: str, columns: list[str]) -> datasets.Dataset | None:
    """Images beside label maps of the same name, where the data set is folders with the names of the columns.

    They stand in SPLIT/COLUMN or COLUMN/SPLIT; or in COLUMN, where the split is a text file that lists names line by
    line, or where `validation_share` divides the only split.
    Returns None for any other data set. Raises ValueError for an image without a map and for a map without an image.
    """
    root = Path(arguments.dataset or "")
    listed = (root / split).is_file() and split.endswith(".txt")
    layouts = [] if listed else ["{split}/{column}", "{column}/{split}"]
    for layout in [*layouts, *(["{column}"] if listed or arguments.validation_share is not None else [])]:
        folders = [root / layout.format(split=split, column=column) for column in columns]
        if all(folder.is_dir() for folder in folders):
            break
    else:
        if not listed and all((root / column).is_dir() for column in columns):
            raise ValueError(
                f"{root} holds the folders {' and '.join(columns)}, but no splits: give --validation_share 0.1, "
                "or list the names of the files in text files, as --train_split train.txt --validation_split val.txt."
            )
        return None
    extensions = set(PIL.Image.registered_extensions())
    files = [
        {str(p.relative_to(f).with_suffix("")): str(p) for p in f.rglob("*") if p.suffix.lower() in extensions}
        for f in folders
    ]
    names = (root / split).read_text(encoding="utf-8").split() if listed else sorted(set().union(*files))
    for folder, found in zip(folders, files, strict=True):
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{folder} has no file {missing[0]!r} (of {len(missing)} that are missing there).")
    rows = {column: [found[name] for name in names] for column, found in zip(columns, files, strict=True)}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(dict.fromkeys(columns, datasets.Image())))


def _divide(whole: Split, arguments: DataArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and validation split of a data set without the second one, the same in every run."""
    if isinstance(whole, StreamedRows):
        raise ValueError("validation_share needs all of the data at hand: leave out --streaming.")
    if not 1 <= arguments.validation_share * len(whole) < len(whole):
        raise ValueError(f"validation_share={arguments.validation_share} leaves nothing of {len(whole)} images.")
    parts = whole.train_test_split(test_size=float(arguments.validation_share), seed=0)
    limits = arguments.max_train_samples, arguments.max_validation_samples
    return spread(parts["train"], limits[0]), spread(parts["test"], limits[1])


def _load_split(arguments: DataArguments, split: str) -> Split:
    if arguments.dataset is None:
        raise ValueError("Name a data set with --dataset: a Hub name or a local folder.")
    folder = Path(arguments.dataset)
    if (folder / "dataset_dict.json").is_file():  # memory-mapped: rows stay where they are, streaming or not
        splits = datasets.load_from_disk(str(folder))
        if split not in splits:
            raise MissingSplitError(f"{folder} has no split {split!r}, only {', '.join(map(repr, splits))}.")
        return splits[split]
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name its folder, and the file as --train_split or --validation_split.")
    if not folder.exists() and arguments.dataset.startswith((".", "/", "~")):
        raise ValueError(f"There is no data set at {folder}.")
    try:
        builder, name = _create_builder(arguments, split)
        if arguments.streaming:
            return open_shards(builder, name)
        builder.download_and_prepare()
        return builder.as_dataset(split=name)
    except (ValueError, OSError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error)
        if "at least one table" in reason:  # what pyarrow says where the first tar file holds nothing
            reason = "the first file is empty"
        kind = MissingSplitError if reason.startswith("Unknown split") else ValueError
        raise kind(f"Cannot load the split {split!r} of {arguments.dataset}: {reason}.") from None


def _create_builder(arguments: DataArguments, split: str) -> tuple[datasets.DatasetBuilder, str]:
    """What reads the data set, and the name that the split has there."""
    if "*" not in split and "{" not in split and not split.endswith(tuple(FILE_FORMATS)):
        return datasets.load_dataset_builder(arguments.dataset, arguments.dataset_config), split
    files = _expand_ranges(split)
    if "://" not in arguments.dataset:
        try:
            return datasets.load_dataset_builder(
                arguments.dataset, arguments.dataset_config, data_files={"files": files}
            ), "files"
        except FileNotFoundError:
            raise ValueError(f"no file there matches {split!r}") from None
    extension = next((e for e in FILE_FORMATS if split.endswith(e)), None)
    if extension is None:
        raise ValueError(f"{split!r} must end in one of {', '.join(FILE_FORMATS)}")
    addresses = [f"{arguments.dataset.rstrip('/')}/{file}" for file in files]
    return datasets.load_dataset_builder(FILE_FORMATS[extension], data_files={"files": addresses}), "files"


def _expand_ranges(pattern: str) -> list[str]:
    """`a-{08..10}.tar` as [`a-08.tar`, `a-09.tar`, `a-10.tar`]."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if not numbers:
        raise ValueError(f"the range {match[0]} is empty")
    return [
        file
        for number in numbers
        for file in _expand_ranges(pattern[: match.start()] + number + pattern[match.end() :])
    ]


def read_label_names(arguments: DataArguments) -> list[str] | None:
    """The names that the settings give, themselves or in a JSON file; None where they leave them to the data.

    Raises ValueError for a file that does not name the labels from 0 on.
    """
    if not isinstance(arguments.label_names, str):
        return arguments.label_names
    try:
        id2label = read_json(arguments.label_names)
    except OSError as error:
        reason = f"a list of names, as [cat, dog], nor a JSON file: {error.strerror}"
        raise ValueError(f"label_names is {arguments.label_names!r}, neither {reason}.") from None
    try:
        if isinstance(id2label, list):
            return list(map(str, id2label))
        return [id2label[str(label_id)] for label_id in range(len(id2label))]
    except (KeyError, TypeError):
        raise ValueError(f"{arguments.label_names} is not a JSON file of the form {{'0': name, '1': name}}.") from None


def _number_labels(
    train: Split, validation: Split, column: str, label_names: list[str] | None
) -> tuple[Split, Split, list[str]]:
    """Both splits with labels from 0 to the number of classes less one, and the names of these."""
    feature = train.features[column]
    if label_names is not None and isinstance(feature, datasets.ClassLabel) and feature.num_classes != len(label_names):
        raise ValueError(f"The data has {feature.num_classes} classes, but label_names gives {len(label_names)} names.")
    if label_names is None:
        label_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else _find_names(train, column)
    if isinstance(train, StreamedRows):
        ids = {label: label for label in range(len(label_names))}
        if not isinstance(feature, datasets.ClassLabel):
            ids |= {name: label for label, name in enumerate(label_names)}
        train.number_labels(column, ids)
        validation.number_labels(column, ids)
        return train, validation, label_names
    numbered = []
    for name, split in (("training", train), ("validation", validation)):
        labels = split.unique(column)
        if all(isinstance(label, str) for label in labels):
            if unknown := sorted(set(labels) - set(label_names)):
                raise ValueError(f"The {name} label {unknown[0]!r} is none of the {len(label_names)} classes.")
            split, labels = split.cast_column(column, datasets.ClassLabel(names=label_names)), [0]
        if not all(isinstance(label, int) for label in labels):
            raise ValueError(f"The {name} labels must be numbers or names, but some are {_odd_one(labels)!r}.")
        if not 0 <= min(labels) <= max(labels) < len(label_names):
            raise ValueError(
                f"The {name} labels run from {min(labels)} to {max(labels)}, outside the {len(label_names)} classes "
                f"that are named."
            )
        numbered.append(split)
    return *numbered, label_names


def _find_names(train: Split, column: str) -> list[str]:
    """Names of the classes from all labels: these themselves in alphabetical order, or their numbers."""
    found = train.unique(column)
    if all(isinstance(label, str) for label in found):
        return sorted(found)
    if not all(isinstance(label, int) for label in found):
        raise ValueError(f"The labels in {column!r} must be numbers or names, but some are {_odd_one(found)!r}.")
    return [str(label) for label in range(max(found) + 1)]


def _odd_one(labels: list) -> object:
    return next(label for label in labels if not isinstance(label, int))
