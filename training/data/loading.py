"""From the name of a data set to its two splits and the names of its classes."""

import json
from pathlib import Path
from typing import NamedTuple

import datasets

from training.arguments import DataArguments


class Splits(NamedTuple):
    """train, validation: with the image and the label column. label_names: in the order of the label ids, if known."""

    train: datasets.Dataset
    validation: datasets.Dataset
    label_names: list[str] | None


def load_splits(arguments: DataArguments, segmentation: bool = False) -> Splits:
    """Load both splits, check their columns and name their classes.

    segmentation: labels are images of class ids rather than one class each.
    Raises ValueError for a data set, split or column that is not there, and for an empty split.
    """
    if arguments.dataset is None:
        raise ValueError("Name a data set with --dataset: a Hub name or a local folder.")
    train, validation = (_load_split(arguments, split) for split in (arguments.train_split, arguments.validation_split))
    for name, split, limit in (
        (arguments.train_split, train, arguments.max_train_samples),
        (arguments.validation_split, validation, arguments.max_validation_samples),
    ):
        if (limit if limit is not None else len(split)) < 1 or len(split) == 0:
            raise ValueError(f"The split {name!r} of {arguments.dataset} is empty.")
        for column in (arguments.image_column, arguments.label_column):
            if column not in split.column_names:
                raise ValueError(
                    f"The split {name!r} of {arguments.dataset} has no column {column!r}, only "
                    f"{', '.join(map(repr, split.column_names))}; see --image_column and --label_column."
                )

    def prepare(split: datasets.Dataset, limit: int | None) -> datasets.Dataset:
        split = split.select_columns([arguments.image_column, arguments.label_column])
        for column in (arguments.image_column, *([arguments.label_column] if segmentation else [])):
            if not isinstance(split.features[column], datasets.Image):
                split = split.cast_column(column, datasets.Image())
        return split.select(range(min(limit, len(split)))) if limit is not None else split

    label_names = _read_label_names(arguments)
    train = prepare(train, arguments.max_train_samples)
    validation = prepare(validation, arguments.max_validation_samples)
    if not segmentation:
        train, validation, label_names = _number_labels(train, validation, arguments.label_column, label_names)
    return Splits(train, validation, label_names)


def _load_split(arguments: DataArguments, split: str) -> datasets.Dataset:
    folder = Path(arguments.dataset)
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(folder))
        if split not in splits:
            raise ValueError(f"{folder} has no split {split!r}, only {', '.join(map(repr, splits))}.")
        return splits[split]
    if not folder.exists() and arguments.dataset.startswith((".", "/", "~")):
        raise ValueError(f"There is no data set at {folder}.")
    try:
        return datasets.load_dataset(arguments.dataset, arguments.dataset_config, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"Cannot load the split {split!r} of {arguments.dataset}: {reason}.") from None


def _read_label_names(arguments: DataArguments) -> list[str] | None:
    if not isinstance(arguments.label_names, str):
        return arguments.label_names
    try:
        id2label = json.loads(Path(arguments.label_names).read_text(encoding="utf-8"))
        return [id2label[str(label_id)] for label_id in range(len(id2label))]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{arguments.label_names} is not a JSON file of the form {{'0': name, '1': name}}.") from None


def _number_labels(
    train: datasets.Dataset, validation: datasets.Dataset, column: str, label_names: list[str] | None
) -> tuple[datasets.Dataset, datasets.Dataset, list[str]]:
    """Both splits with labels from 0 to the number of classes less one, and the names of these."""
    feature = train.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        found = sorted(set(train.unique(column)))
        if all(isinstance(label, str) for label in found):
            label_names = label_names or found
            feature = datasets.ClassLabel(names=label_names)
            train, validation = train.cast_column(column, feature), validation.cast_column(column, feature)
        else:
            label_names = label_names or [str(label) for label in range(max(found) + 1)]
    label_names = label_names or list(feature.names)
    for name, split in (("training", train), ("validation", validation)):
        labels = split.unique(column)
        if not 0 <= min(labels) <= max(labels) < len(label_names):
            raise ValueError(
                f"The {name} labels run from {min(labels)} to {max(labels)}, outside the {len(label_names)} classes "
                f"that are named."
            )
    return train, validation, label_names
