"""Labels of any kind as class ids from 0, and the names of the classes."""

import math
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import datasets

from .streaming import StreamedRows

Split = datasets.Dataset | StreamedRows
MAX_NAMED = 5
"""Names of classes in a sentence."""


class NumberedSplits(NamedTuple):
    """Both splits with labels from 0 to the number of classes less one.

    label_names: In the order of the ids.
    remarks: A sentence about classes that do not occur.
    """

    train: Split
    validation: Split
    label_names: list[str]
    remarks: list[str]


def number_labels(
    train: Split, validation: Split, column: str, label_names: list[str] | None, evaluation: bool = False
) -> NumberedSplits:
    """Number the classes of both splits alike, whether labels are names, numbers, true and false, or `ClassLabel`.

    Args:
        label_names: Names of the classes in the order of their ids; None takes those of the training split, where names
            are in alphabetical order.
        evaluation: Nothing is learned: one class will do, and not every class has to occur.

    Raises:
        ValueError: A label names no class, labels are of a kind that cannot, or there is a single class.
    """
    for name, split in (("training", train), ("validation", validation)):
        _check_kind(split, column, name)
    values = None
    if not isinstance(train, StreamedRows) or not (label_names or _class_names(train, column)):
        values = train.unique(column)
    names = label_names or _class_names(train, column) or _names_of(values, column, evaluation)
    if len(names) < 2 and not evaluation:
        raise ValueError(f"The training labels hold a single class, {names[0]!r}: training needs two or more.")
    numbered, remarks = [], []
    for name, split in (("training", train), ("validation", validation)):
        given = label_names is not None
        if isinstance(split, StreamedRows):
            ids = _ids(None, split, column, names, name, given)
            split.number_labels(column, ids)
            numbered.append(split)
            continue
        found = values if split is train else split.unique(column)
        ids = _ids(found, split, column, names, name, given)
        unused = sorted(set(range(len(names))) - set(ids.values()))
        if split is train and unused and not evaluation:
            shown = ", ".join(repr(names[label]) for label in unused[:MAX_NAMED]) + ", …" * (len(unused) > MAX_NAMED)
            remarks.append(f"No training image is of {len(unused)} of the {len(names)} classes: {shown}.")
        numbered.append(_apply(split, column, ids, names))
    return NumberedSplits(*numbered, list(names), remarks)


def _class_names(split: Split, column: str) -> list[str] | None:
    feature = split.features[column]
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _check_kind(split: Split, column: str, name: str) -> None:
    """Raises ValueError for labels that are lists, dictionaries or anything else than one name or number per image."""
    feature = split.features[column]
    dtype = getattr(feature, "dtype", "")
    if isinstance(feature, datasets.ClassLabel | datasets.Value) and (
        dtype == "bool" or dtype.startswith(("int", "uint", "float")) or dtype in ("string", "large_string", "null")
    ):
        return
    value = split.first(column) if isinstance(split, StreamedRows) else split.select_columns([column])[0][column]
    kind = "lists: several labels per image are not supported" if isinstance(value, list) else f"of type {dtype}"
    kind = "dictionaries" if isinstance(value, dict) else kind
    raise ValueError(
        f"The {name} labels in {column!r} must be one name or number per image, but they are {kind}; the first is "
        f"{_shown(value)}."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _odd_one(values: Iterable, name: str, column: str) -> ValueError:
    """What to say of labels that are not all of one kind: the one that is no label at all, or else the rarer kind."""
    values = list(values)
    if any(value is None for value in values):
        return ValueError(f"Some {name} labels in {column!r} are None: every image needs a label.")
    fractions = [value for value in values if isinstance(value, float) and not value.is_integer()]
    if fractions:
        return ValueError(
            f"The {name} labels in {column!r} must be names or whole numbers, but some are {fractions[0]!r}, which is "
            "no whole number."
        )
    return ValueError(f"The {name} labels in {column!r} are partly names and partly numbers, such as {values[0]!r}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value.is_integer())


def _names_of(values: Iterable, column: str, evaluation: bool) -> list[str]:
    """Names of the classes from all labels: these in alphabetical order, or their numbers."""
    values = list(values)
    if values and all(isinstance(value, str) for value in values):
        return sorted(values)
    if values and all(isinstance(value, bool) for value in values):
        return ["False", "True"] if len(values) > 1 or evaluation else [str(*values)]
    if not values or not all(map(_is_whole, values)):
        raise _odd_one(values, "training", column)
    numbers = {int(value) for value in values}
    if min(numbers) < 0:
        raise ValueError(
            f"The training labels in {column!r} run from {min(numbers)} to {max(numbers)}, but class ids begin at 0."
        )
    if max(numbers) + 1 > 2 * len(numbers) and len(numbers) > 1 and not evaluation:
        raise ValueError(
            f"The training labels in {column!r} are {len(numbers)} numbers from {min(numbers)} to {max(numbers)}, but "
            "class ids run from 0 without large gaps: renumber them, or make them text, which is taken as names."
        )
    if len(numbers) == 1 and not evaluation:
        return [str(*numbers)]
    return [str(label) for label in range(max(numbers) + 1)]


def _ids(
    values: Iterable | None, split: Split, column: str, names: list[str], name: str, given: bool
) -> dict[Hashable, int]:
    """The class id of each value of a split.

    values: All that occur; None where nobody has looked, and any that may occur gets an id.
    given: Whether the user gave the names, which may rename the classes of the data in their order.
    """
    by_name = {label_name: label for label, label_name in enumerate(names)}
    own = _class_names(split, column)
    if own is not None:
        ids = _ids_of_classes(own, by_name, name, given)
    elif values is None or all(isinstance(value, bool) for value in values):
        ids = {label: label for label in range(len(names))}
        ids |= by_name if values is None else {}
    elif all(isinstance(value, str) for value in values):
        ids = by_name
    elif all(map(_is_whole, values)):
        ids = {label: label for label in range(len(names))}
    else:
        raise _odd_one(values, name, column)
    if values is None:
        return ids
    unknown = [value for value in values if value not in ids]
    if None in unknown:
        raise _odd_one(unknown, name, column)
    if unknown and isinstance(unknown[0], str):
        raise ValueError(f"The {name} label {min(unknown)!r} is none of the {len(names)} classes.")
    if unknown:
        raise ValueError(
            f"The {name} labels run from {min(values)} to {max(values)}, outside the {len(names)} classes that are "
            "named."
        )
    return {value: ids[value] for value in values}


def _ids_of_classes(own: list[str], by_name: dict[str, int], name: str, given: bool) -> dict[Hashable, int]:
    """The ids of classes that the data names: by name, or where the user names them otherwise by number or place."""
    if all(class_name in by_name for class_name in own):
        return {place: by_name[class_name] for place, class_name in enumerate(own)}
    if not given:
        unknown = next(class_name for class_name in own if class_name not in by_name)
        raise ValueError(f"The {name} label {unknown!r} is none of the {len(by_name)} classes of the training split.")
    if len(own) != len(by_name):
        raise ValueError(f"The data has {len(own)} classes, but label_names gives {len(by_name)} names.")
    if all(class_name.isdecimal() for class_name in own) and {int(n) for n in own} == set(range(len(own))):
        return {place: int(class_name) for place, class_name in enumerate(own)}  # 10 stands before 2 among folders
    return {place: place for place in range(len(own))}


def _apply(split: datasets.Dataset, column: str, ids: dict[Hashable, int], names: list[str]) -> datasets.Dataset:
    feature = split.features[column]
    whole = isinstance(feature, datasets.ClassLabel) or feature.dtype.startswith(("int", "uint"))
    if whole and all(value == label for value, label in ids.items()):
        return split
    labels = [ids[value] for value in split[column][:]]
    return split.remove_columns(column).add_column(column, labels, feature=datasets.ClassLabel(names=list(names)))
