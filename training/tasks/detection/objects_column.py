"""Datasets of the Hub with a column `objects`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import datasets

from training.data import load_split, read_label_names
from training.data.labels import refuse_repeated
from training.engine.settings import DataArguments
from training.tasks.detection.frames import fit_to_images
from training.tasks.detection.objects import Annotated, Notes, create_object

if TYPE_CHECKING:
    from training.tasks.detection.splits import DetectionDataArguments

BOX_FIELDS = ("bbox", "bboxes", "box", "boxes")
CATEGORY_FIELDS = ("category", "category_id", "label", "categories", "category_ids", "labels")


def read_objects_column(
    arguments: "DetectionDataArguments", name: str, categories: list[dict[str, Any]] | None
) -> Annotated:
    """Read a split in the layout of the Hub: `objects` with `bbox` as [left, top, width, height] and `category`.

    Args:
        arguments: Where the dataset is.
        name: The name of the split.
        categories: Those of the training split, for the other one.

    Raises:
        ValueError: The column does not hold a box and a category for every object, or they do not fit the images.
    """
    split: datasets.Dataset = load_split(arguments, name, [arguments.image_column, "objects"], [arguments.image_column])
    source = f"the split {name!r} of {arguments.dataset}"
    inner = _inner(split.features["objects"])
    if not isinstance(inner, dict):
        raise ValueError(f"The column objects of {source} must hold a bbox and a category for every object.")
    boxes, labels = (next((name for name in names if name in inner), None) for names in (BOX_FIELDS, CATEGORY_FIELDS))
    if boxes is None or labels is None:
        lacking = BOX_FIELDS[0] if boxes is None else CATEGORY_FIELDS[0]
        raise ValueError(f"The column objects of {source} has no {lacking!r}, only {', '.join(inner)}.")
    rows = [_as_lists(row["objects"], inner) for row in split.remove_columns(arguments.image_column)]
    names = [category["name"] for category in categories] if categories else None
    names = names or _name_categories(arguments, _inner(inner[labels]), (row[labels] for row in rows))
    notes, objects = Notes(f"The split {name!r} of {arguments.dataset}"), []
    for index, row in enumerate(rows):
        if len(row[boxes]) != len(row[labels]):
            raise ValueError(f"Row {index} of {source} has {len(row[boxes])} boxes, but {len(row[labels])} categories.")
        image: dict[str, Any] = {"image_id": index, "name": f"row {index}", "size": None, "annotations": []}
        for number, (box, label) in enumerate(zip(row[boxes], row[labels], strict=True)):
            where = f"Object {number} of row {index} of {source}"
            details = {key: row[key][number] for key in ("area", "iscrowd") if len(row.get(key, ())) == len(row[boxes])}
            label = _number_of(label, names, where)
            name = f"object {number} of row {index}"
            image["annotations"].append(create_object(name, where, box, label, details, notes))
        objects.append(image)
    images = split.select_columns([arguments.image_column]).rename_columns({arguments.image_column: "image"})
    annotated = Annotated(images, objects, [{"id": label, "name": n} for label, n in enumerate(names)], notes)
    fit_to_images(annotated, source, arguments.label_orientation)
    return annotated


def _inner(feature: Any) -> Any:
    """What a list of `datasets` holds, or the feature itself."""
    while hasattr(feature, "feature") or isinstance(feature, list):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature


def _as_lists(objects: Any, names: Iterable[str]) -> dict[str, list]:
    """The objects of one image as a list for each field: of these, of a list of dicts, or of None for no objects."""
    if isinstance(objects, list):
        return {name: [(entry or {}).get(name) for entry in objects] for name in names}
    return {name: (objects or {}).get(name) or [] for name in names}


def _name_categories(arguments: DataArguments, feature: Any, labels: Iterable[list]) -> list[str]:
    """Names as the settings or the data have them, or all texts that occur, in alphabetical order."""
    names, given = getattr(feature, "names", None), read_label_names(arguments)
    if names is not None and given is not None and len(names) != len(given):
        raise ValueError(f"The data has {len(names)} categories, but label_names gives {len(given)} names.")
    names = given or names
    if names:
        refuse_repeated(names)
        return list(names)
    found = {label for row in labels for label in row}
    if not found or not all(isinstance(label, str) for label in found):
        raise ValueError("The data does not name its categories: give --label_names as a list.")
    return sorted(found)


def _number_of(label: Any, names: list[str], where: str) -> int:
    """The place of a category, given by number or by name."""
    if isinstance(label, str):
        if label not in names:
            raise ValueError(f"{where} has category {label!r}, which is none of the {len(names)} that are named.")
        return names.index(label)
    if type(label) is not int or not 0 <= label < len(names):
        raise ValueError(f"{where} has category {label!r}, outside the {len(names)} that are named.")
    return label
