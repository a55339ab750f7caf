"""From the name of a dataset to its splits and the names of its classes."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from locatvit_hf.utils.images import NamedImages, left_out, list_images, remark_on_repeats, stem_of
from locatvit_hf.utils.io import read_json, read_lines, sha256
from locatvit_hf.utils.layouts import split_word
from locatvit_hf.utils.splits import MissingSplitError, failures_named, find_split, image_entry, read_split
from training.engine.arguments import console
from training.engine.settings import DataArguments

from .labels import Split, missing_classes, names_alike, number_labels
from .streaming import StreamedRows, find_file, open_shards


class Splits(NamedTuple):
    """train, validation: with the image and the label column. label_names: in the order of the label ids, if known."""

    train: Split
    validation: Split
    label_names: list[str] | None


def load_splits(arguments: DataArguments, segmentation: bool = False, evaluation: bool = False) -> Splits:
    """Load both splits, check their columns and name their classes; print what was left out of folders.

    Args:
        segmentation: Labels are images of class ids rather than one class each.
        evaluation: Nothing is learned: a single class will do, and not every class has to occur.

    Raises:
        ValueError: A dataset, split, file or column is not there, a split is empty, or labels name no classes.
    """
    columns = [arguments.image_column, arguments.label_column]
    if columns[0] == columns[1]:
        raise ValueError(f"The images and their labels cannot both be in the column {columns[0]!r}.")
    images = columns if segmentation else columns[:1]
    remarks: list[str] = []
    if arguments.validation_share is None:
        train = load_split(arguments, arguments.train_split, columns, images, arguments.max_train_samples, remarks)
        limit = arguments.max_validation_samples
        try:
            validation = load_split(arguments, arguments.validation_split, columns, images, limit, remarks)
        except MissingSplitError as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"{reason}; --validation_share 0.1 takes a tenth of the training split instead.") from None
    else:
        whole = load_split(arguments, arguments.train_split, columns, images, remarks=remarks)
        train, validation = _divide(whole, arguments)
    if arguments.dataset_hash is not None:
        _check_hash(arguments, train, validation)
    label_names = read_label_names(arguments)
    if not segmentation:
        column = arguments.label_column
        if arguments.validation_share is None:
            splits = {"training": train, "validation": validation}
            (train, validation), label_names = number_labels(splits, column, label_names, evaluation)
        else:  # before it is divided: of a part, all columns would be copied
            (whole,), label_names = number_labels({"training": whole}, column, label_names, evaluation)
            train, validation = _divide(whole, arguments)
        remarks += [] if evaluation else missing_classes(train, column, label_names)
    announce(remarks + names_alike(label_names or []))
    return Splits(train, validation, label_names)


def announce(remarks: list[str]) -> None:
    """Print each sentence once, in one of the processes."""
    if os.environ.get("RANK", "0") == "0":
        for sentence in dict.fromkeys(remarks):
            console.print(sentence, markup=False, style="yellow")


def load_split(
    arguments: DataArguments,
    split: str,
    columns: list[str],
    images: list[str],
    limit: int | None = None,
    remarks: list[str] | None = None,
) -> Split:
    """The columns of one split, checked; with `streaming`, rows that stay where they are until they are used.

    Args:
        split: Name, or pattern of the files in the dataset; patterns may hold ranges as {000..099}.
        columns: Those that are needed.
        images: The columns that are images.
        limit: Keep no more rows, see `subsample_evenly`.
        remarks: Receives a sentence for each kind of files that were left out; None prints them.

    Raises:
        ValueError: Something is not there, a column of images holds none, or the split is empty.
    """
    said: list[str] = []
    rows = _pair_folders(arguments, split, columns, said) if images == columns else None
    no_label, folder = "", None
    if rows is None:
        rows, no_label, folder = _read_rows(arguments, split, said)
    if len(rows) == 0 or (limit is not None and limit < 1):
        raise ValueError(f"The split {split!r} of {arguments.dataset} is empty.")
    for column in columns:
        if column not in rows.column_names:
            if no_label and column == arguments.label_column:
                raise ValueError(
                    f"The images of the split {split!r} of {arguments.dataset} have no labels: {no_label}. Give every "
                    "class a folder, all at one depth, or name labels in a metadata.csv."
                )
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
    named = [column for column in images if _holds_text(rows.features[column])]
    if images[0] in named and not isinstance(rows, StreamedRows):
        said += remark_on_repeats(rows[images[0]][:])
    if remarks is None:
        announce(said)
    else:
        remarks += said
    if isinstance(rows, StreamedRows):
        rows.features = datasets.Features(rows.features | dict.fromkeys(images, datasets.Image(decode=False)))
        rows.files = dict.fromkeys(named, folder)
        if limit is not None:
            rows.limit(limit)
        return rows
    rows = rows.select_columns(columns)
    for column in named:
        files = [find_file(folder, name) for name in rows[column][:]]
        rows = rows.remove_columns(column).add_column(column, files)
    for column in images:
        if not isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image())
    return subsample_evenly(rows, limit)


def _read_rows(arguments: DataArguments, split: str, remarks: list[str]) -> tuple[Split, str, Path | None]:
    """The rows of a split, why images in folders have no labels, and what names of files are relative to."""
    if arguments.dataset is None:
        raise ValueError("Name a dataset with --dataset: a Hub name or a local folder.")
    found = find_split(arguments.dataset, split, arguments.dataset_config)
    remarks += found.remarks
    if arguments.streaming and found.builder is None:
        remarks.append(
            f"The split {split!r} of {arguments.dataset} names its images, which are read one by one in any case: "
            "--streaming changes nothing."
        )
    with failures_named(arguments.dataset, split):
        streamed = arguments.streaming and found.builder is not None
        rows = open_shards(found.builder, found.name) if streamed else read_split(found)
    return rows, found.no_label, found.folder


def subsample_evenly(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """As many rows as `limit` says, evenly spaced: of rows that are sorted by class, each class gives its part."""
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
    return sha256(_pieces(splits))


def _pieces(splits: Iterable[datasets.Dataset]) -> Iterator[bytes]:
    for split in splits:
        images = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
        for name in images:
            split = split.cast_column(name, datasets.Image(decode=False))
        for row in split:
            for name, value in sorted(row.items()):
                if name in images:
                    value = value["bytes"] or Path(value["path"]).read_bytes()
                content = value if isinstance(value, bytes) else str(value).encode()
                yield b"%d:" % len(content) + content


def _holds_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _may_hold_images(feature: Any) -> bool:
    """Whether `datasets.Image` can read a column: image files, their names, or pixels."""
    if isinstance(feature, datasets.Value):
        return feature.dtype.removeprefix("large_") in ("string", "binary")
    return not isinstance(feature, datasets.ClassLabel) and (not isinstance(feature, dict) or "bytes" in feature)


def _describe(feature: Any) -> str:
    if isinstance(feature, datasets.ClassLabel):
        return f"class labels, {', '.join(feature.names[:3])}{', …' if len(feature.names) > 3 else ''}"
    return f"values of type {feature.dtype}" if isinstance(feature, datasets.Value) else "something else"


def _pair_folders(
    arguments: DataArguments, split: str, columns: list[str], remarks: list[str]
) -> datasets.Dataset | None:
    """Images beside label maps of the same name, where the dataset is folders with the names of the columns.

    They stand in SPLIT/COLUMN or COLUMN/SPLIT; or in COLUMN, where the split is a text file that lists names line by
    line, or where `validation_share` divides the only split.
    Returns None for any other dataset. Raises ValueError for an image without a map and for a map without an image.
    """
    root = Path(arguments.dataset or "").expanduser()
    listed = (root / split).is_file() and split.endswith(".txt")
    layouts = [] if listed else [(split, None), (None, split)]
    for before, after in [*layouts, *([(None, None)] if listed or arguments.validation_share is not None else [])]:
        folders = [
            _child(_child(root, before) / column, after) if after else _child(root, before) / column
            for column in columns
        ]
        if all(folder.is_dir() for folder in folders):
            break
    else:
        if not listed and all((root / column).is_dir() for column in columns):
            raise ValueError(
                f"{root} holds the folders {' and '.join(columns)}, but no splits: give --validation_share 0.1, "
                "or list the names of the files in text files, as --train_split train.txt --validation_split val.txt."
            )
        return None
    found, loops = [], []
    for folder in folders:
        images = list_images(folder)
        remarks += images.remarks
        found.append(NamedImages(folder, images.images))
        loops += images.loops
    if listed:
        names = read_lines(root / split)
    else:
        names = sorted(set().union(*(files.by_stem for files in found)))
        # A link to a folder above is not entered on its side, so nothing on the other side has a partner there.
        cut = [name for name in names if any(name.startswith(f"{stem_of(loop)}/") for loop in loops)]
        if cut:
            kinds = "image whose partner is behind such a link", "images whose partners are behind such links"
            remarks.append(left_out(cut, *kinds))
            names = [name for name in names if name not in set(cut)]
    rows = {
        column: [image_entry(files.folder, file) for file in files.find(names)]
        for column, files in zip(columns, found, strict=True)
    }
    remarks += remark_on_repeats(found[0].find(names))
    return datasets.Dataset.from_dict(rows, features=datasets.Features(dict.fromkeys(columns, datasets.Image())))


def _child(parent: Path, split: str | None) -> Path:
    """The folder of a split: that of its name, or the only one that means the same, as val for validation."""
    if split is None or (parent / split).is_dir() or split_word(split) is None or not parent.is_dir():
        return parent / split if split else parent
    alike = [path for path in parent.iterdir() if path.is_dir() and split_word(path.name) == split_word(split)]
    return alike[0] if len(alike) == 1 else parent / split


def _divide(whole: Split, arguments: DataArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and validation split of a dataset without the second one, the same in every run."""
    if isinstance(whole, StreamedRows):
        raise ValueError("validation_share needs all of the data at hand: leave out --streaming.")
    share = float(arguments.validation_share or 0)
    if not 1 <= share * len(whole) < len(whole):
        raise ValueError(f"validation_share={arguments.validation_share} leaves nothing of {len(whole)} images.")
    parts = whole.train_test_split(test_size=share, seed=0)
    limits = arguments.max_train_samples, arguments.max_validation_samples
    return subsample_evenly(parts["train"], limits[0]), subsample_evenly(parts["test"], limits[1])


def read_label_names(arguments: DataArguments) -> list[str] | None:
    """The names that the settings give, themselves or in a JSON file; None where they leave them to the data.

    Raises:
        ValueError: For a file that does not name the labels from 0 on.
    """
    names: Any = arguments.label_names
    if isinstance(names, str):
        try:
            names = read_json(names)
        except OSError as error:
            reason = f"a list of names, as [cat, dog], nor a JSON file: {error.strerror}"
            raise ValueError(f"label_names is {names!r}, neither {reason}.") from None
        if isinstance(names, dict):
            names = [names.get(str(label_id)) for label_id in range(len(names))]
        if not isinstance(names, list) or any(type(name) not in (str, int, float) for name in names):
            raise ValueError(
                f"{arguments.label_names} is not a JSON file of the form {{'0': name, '1': name}}, or [name, name]."
            )
        names = [str(name) for name in names]
    return names
