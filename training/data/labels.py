"""Labels of any kind as class ids from 0, and the names of the classes."""

import math
from collections.abc import Hashable
from typing import Any, TypeAlias

import datasets

from .streaming import StreamedRows

Split: TypeAlias = datasets.Dataset | StreamedRows
MAX_NAMED = 5
"""Names of classes in a sentence."""


def number_labels(
    splits: dict[str, Split], column: str, label_names: list[str] | None, evaluation: bool = False
) -> tuple[list[Split], list[str]]:
    """Number the classes of all splits alike, whether labels are names, numbers, true and false, or `ClassLabel`.

    Args:
        splits: What a split is for to its rows; the first, usually of training, says which classes there are.
        label_names: Names of the classes in the order of their ids; None takes those of the first split, where names
            are in alphabetical order.
        evaluation: Nothing is learned: one class will do, and numbers may have gaps.

    Returns:
        The splits with labels from 0 to the number of classes less one, and the names of the classes in this order.

    Raises:
        ValueError: A label names no class, labels are of a kind that cannot, or there is a single class.
    """
    for name, split in splits.items():
        _check_kind(split, column, name)
    first_name, first = next(iter(splits.items()))
    names = label_names or _class_names(first, column)
    names = names or _names_of(_distinct(first, column), column, first_name, evaluation)
    if len(names) < 2 and not evaluation:
        raise ValueError(f"The {first_name} labels hold a single class, {names[0]!r}: training needs two or more.")
    numbered: list[Split] = []
    for name, split in splits.items():
        streamed = isinstance(split, StreamedRows)
        values = None if streamed else _distinct(split, column)
        ids = _ids(values, split, column, names, name, given=label_names is not None)
        if streamed:
            split.number_labels(column, ids)
        numbered.append(split if streamed else _apply(split, column, ids, names))
    return numbered, list(names)


def missing_classes(train: Split, column: str, names: list[str]) -> list[str]:
    """A sentence about classes of which no image is in numbered rows, or none; nobody looks through a stream for it."""
    if isinstance(train, StreamedRows):
        return []
    missing = sorted(set(range(len(names))) - set(_distinct(train, column)))
    if not missing:
        return []
    shown = ", ".join(repr(names[label]) for label in missing[:MAX_NAMED]) + (", …" if len(missing) > MAX_NAMED else "")
    return [f"No training image is of {len(missing)} of the {len(names)} classes: {shown}."]


def refuse_repeated(names: list[str]) -> None:
    """Raises ValueError where several classes have one name, by which labels that are names cannot be told apart."""
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"label_names gives several classes the name {repeated!r}, by which labels that are names cannot be told "
            "apart: name each by its own."
        )


def names_alike(names: list[str]) -> list[str]:
    """A sentence about classes whose names are equal or differ in case alone, or none."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.casefold(), []).append(name)
    groups = [" and ".join(map(repr, found)) for found in alike.values() if len(found) > 1]
    if not groups:
        return []
    shown = ", ".join(groups[:MAX_NAMED]) + (", …" if len(groups) > MAX_NAMED else "")
    return [f"Names of classes are equal or differ in case alone, which may be one class given twice: {shown}."]


def _distinct(split: Split, column: str) -> list:
    if isinstance(split, StreamedRows):
        return list(split.unique(column))
    # The method `unique` of `datasets` would first copy all columns of a selection.
    return split.select_columns(column).with_format("arrow")[:][column].unique().to_pylist()


def _class_names(split: Split, column: str) -> list[str] | None:
    feature = split.features[column]
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _holds_names(split: Split, column: str) -> bool:
    return getattr(split.features[column], "dtype", "") in ("string", "large_string")


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


def _odd_one(values: list, name: str, column: str) -> ValueError:
    """What to say of labels that are not all of one kind: which one is not a label at all, if there is one."""
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


def _names_of(values: list, column: str, name: str, evaluation: bool) -> list[str]:
    """Names of the classes from all labels: these in alphabetical order, or their numbers."""
    if values and all(isinstance(value, str) for value in values):
        return sorted(values)
    if values and all(isinstance(value, bool) for value in values):
        return ["False", "True"] if len(values) > 1 or evaluation else [str(*values)]
    if not values or not all(map(_is_whole, values)):
        raise _odd_one(values, name, column)
    numbers = {int(value) for value in values}
    if min(numbers) < 0:
        raise ValueError(
            f"The {name} labels in {column!r} run from {min(numbers)} to {max(numbers)}, but class ids begin at 0."
        )
    if max(numbers) + 1 > 2 * len(numbers) and len(numbers) > 1 and not evaluation:
        raise ValueError(
            f"The {name} labels in {column!r} are {len(numbers)} numbers from {min(numbers)} to {max(numbers)}, but "
            "class ids run from 0 without large gaps: renumber them, or make them text, which is taken as names."
        )
    if len(numbers) == 1 and not evaluation:
        return [str(*numbers)]
    return [str(label) for label in range(max(numbers) + 1)]


def _ids(
    values: list | None, split: Split, column: str, names: list[str], name: str, given: bool
) -> dict[Hashable, int]:
    """The class id of each value of a split.

    Args:
        values: All that occur; None where nobody has looked, and any that may occur gets an id.
        given: Whether the user gave the names, which may rename the classes of the data in their order.
    """
    by_name: dict[Hashable, int] = {label_name: label for label, label_name in enumerate(names)}
    own = _class_names(split, column)
    if own is not None or _holds_names(split, column):
        refuse_repeated(names)
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


def _ids_of_classes(own: list[str], by_name: dict[Hashable, int], name: str, given: bool) -> dict[Hashable, int]:
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
    # Without the names, of which two may be equal.
    return split.remove_columns(column).add_column(column, labels, feature=datasets.ClassLabel(num_classes=len(names)))
