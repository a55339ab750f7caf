"""Annotated images: COCO files, and datasets with a column `objects`, read and checked before training begins."""

import io
import json
import os
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import pyarrow as pa
import torch
from huggingface_hub.dataclasses import strict
from PIL import Image

from locatvit_hf.utils.images import list_files, readable_name
from locatvit_hf.utils.io import read_json
from training.data import load_split, read_label_names, subsample_evenly
from training.data.images import CorruptImageError, Header, read_header
from training.detection.segmentations import (
    are_finite,
    check_segmentation,
    run_lengths,
    turn_points,
    turn_segmentation,
)
from training.engine.settings import DataArguments

BOX_FIELDS = ("bbox", "bboxes", "box", "boxes")
CATEGORY_FIELDS = ("category", "category_id", "label", "categories", "category_ids", "labels")
NUM_NAMED = 3
"""Of what was left out, these many are named."""


@strict
@dataclass(kw_only=True)
class DetectionDataArguments(DataArguments):
    """Where images and annotations are: a folder laid out as COCO's or Roboflow's, or a Hub dataset with `objects`.

    Boxes are [left, top, width, height] in pixels, as in COCO.
    """

    train_split: str = "train2017"
    validation_split: str = "val2017"
    train_images: str | None = field(default=None, metadata={"help": "Folder; by default DATASET/TRAIN_SPLIT."})
    train_annotations: str | None = field(
        default=None, metadata={"help": "COCO file; by default DATASET/annotations/instances_TRAIN_SPLIT.json."}
    )
    validation_images: str | None = field(default=None, metadata={"help": "As `train_images`."})
    validation_annotations: str | None = field(default=None, metadata={"help": "As `train_annotations`."})
    label_orientation: Literal["turned", "stored"] | None = field(
        default=None,
        metadata={
            "help": "Whether boxes belong to images turned as their EXIF orientation says, or to their pixels as they "
            "are stored and are to be turned too, where sizes do not tell; by default the first, with a warning."
        },
    )


class DetectionSplits(NamedTuple):
    """train, validation: columns `image` and `objects`, JSON with the annotations of an image, see `read_objects`.

    categories: {"id": as in the annotations, "name": …}; a label is a place in this list.
    notes: what was left out or changed, counted and named, a sentence a kind.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    categories: list[dict[str, Any]]
    notes: list[str]


class Annotated(NamedTuple):
    """A split as it was read: its images, for each of them its objects as `read_objects` takes them, and notes."""

    images: datasets.Dataset
    objects: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    notes: "Notes"


class Notes:
    """What was left out of a file or changed, by kind."""

    def __init__(self, source: str):
        self.source, self.found = source, {}

    def add(self, kind: str, name: Any) -> None:
        """Note one more of a kind, such as "boxes without area, left out"."""
        self.found.setdefault(kind, []).append(name)

    def sentences(self) -> list[str]:
        """One a kind, with the number and the first names."""
        return [
            f"{self.source}: {kind} ({len(names):,}): {', '.join(map(str, names[:NUM_NAMED]))}"
            + (", …" if len(names) > NUM_NAMED else ".")
            for kind, names in self.found.items()
        ]


def load_detection_splits(arguments: DetectionDataArguments, masks: bool) -> DetectionSplits:
    """Read both splits. Crowds stay in the validation split alone, and so do images without an object.

    masks: whether every object needs a segmentation.
    Raises ValueError where annotations and images do not fit each other.
    """
    if arguments.streaming or arguments.validation_share is not None:
        raise ValueError("Detection reads two splits from local files: leave out --streaming and --validation_share.")
    annotated = []
    for split, images, annotations in (
        (arguments.train_split, arguments.train_images, arguments.train_annotations),
        (arguments.validation_split, arguments.validation_images, arguments.validation_annotations),
    ):
        found = _find_coco(arguments.dataset, split, images, annotations)
        if found is not None:
            annotated.append(read_coco(*found, masks, arguments.label_orientation))
        elif arguments.dataset is None:
            raise ValueError("Name a dataset with --dataset, or --train_annotations and --validation_annotations.")
        elif masks:
            raise ValueError(
                f"There are no COCO annotations of the split {split!r} in {arguments.dataset}; "
                f"a dataset with a column `objects` holds boxes alone and needs --masks false."
            )
        else:
            annotated.append(_read_objects_column(arguments, split, annotated[0].categories if annotated else None))
    train, validation = annotated
    _compare_categories(train.categories, validation.categories)
    used = _keep_what_teaches(train)
    notes = [sentence for split in annotated for sentence in split.notes.sentences()]
    if not used:
        raise ValueError(
            " ".join([f"No image of the split {arguments.train_split!r} has an object to learn from.", *notes])
        )
    if not validation.objects:
        raise ValueError(f"The split {arguments.validation_split!r} has no image.")
    limits = arguments.max_train_samples, arguments.max_validation_samples
    chosen = used, list(range(len(validation.objects)))
    return DetectionSplits(
        *(
            subsample_evenly(
                split.images.select(rows).add_column("objects", [_dump(split.objects[i]) for i in rows]), limit
            )
            for split, rows, limit in zip(annotated, chosen, limits, strict=True)
        ),
        train.categories,
        notes,
    )


def _compare_categories(train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    if train == validation:
        return
    for kind, ours, theirs in ("training", train, validation), ("validation", validation, train):
        if alone := [category for category in ours if category not in theirs]:
            raise ValueError(
                f"The training and the validation annotations list different categories: {alone[0]['name']!r} with id "
                f"{alone[0]['id']!r} is in the {kind} annotations alone."
            )


def _keep_what_teaches(train: Annotated) -> list[int]:
    """Leave out objects that nothing is learned from; returns the numbers of the images that still have one."""
    used, labels = [], set()
    for number, image in enumerate(train.objects):
        kept = []
        for entry in image["annotations"]:
            width, height = _inside(entry["box"], image["size"])
            if entry["iscrowd"]:
                train.notes.add("crowds, left out of training", entry["name"])
            elif width < 1 or height < 1:
                train.notes.add("boxes of less than a pixel, left out of training", entry["name"])
            else:
                kept.append(entry)
        image["annotations"] = kept
        labels |= {entry["label"] for entry in kept}
        if kept:
            used.append(number)
        else:
            train.notes.add("images without an object, left out of training", image["name"])
    for label, category in enumerate(train.categories):
        if label not in labels and used:
            train.notes.add("categories without an object to learn from", category["name"])
    return used


def _find_coco(
    dataset: str | None, split: str, images: str | None, annotations: str | None
) -> tuple[Path, Path] | None:
    """Folder of images and annotation file of a split, or None where there are no such annotations."""
    if annotations is not None:
        if images is None and dataset is None:
            raise ValueError(f"Name the folder with the images of {annotations}: --train_images, --validation_images.")
        return Path(images) if images is not None else Path(dataset) / split, Path(annotations)
    if dataset is None:
        return None
    folder = Path(images) if images is not None else Path(dataset) / split
    for file in (Path(dataset) / "annotations" / f"instances_{split}.json", folder / "_annotations.coco.json"):
        if file.is_file():
            return folder, file
    return None


def read_coco(folder: Path, file: Path, masks: bool, label_orientation: str | None = None) -> Annotated:
    """The images of a COCO annotation file with their objects.

    label_orientation: see `DetectionDataArguments`.
    Raises ValueError for a file that is not such, one that names images which are not in the folder or have another
    size, annotations of unknown images or categories, boxes that are no four numbers, and with `masks` objects without
    a segmentation or with one that cannot be decoded.
    """
    images, annotations, listed = _parse_coco(file)
    notes = Notes(file.name)
    categories = _read_categories(listed, file)
    labels = {category["id"]: label for label, category in enumerate(categories)}
    find, rows, paths, missing = _Finder(folder), {}, [], []
    for image in images:
        number, name = image.get("id"), image.get("file_name")
        if type(number) not in (int, str) or type(number) is not type(images[0]["id"]):
            raise ValueError(
                f"{file} has an image with the id {number!r}: all ids must be numbers, or all must be text."
            )
        if number in rows:
            raise ValueError(f"{file} gives one id to several images: {number!r}.")
        if not isinstance(name, str) or not name:
            raise ValueError(f"The image {number!r} of {file} has no file_name.")
        path = find(name)
        if path is None:
            missing.append(name)
        size = _read_size(image)
        if size is None:
            notes.add("images without width and height, whose size is taken from their file", name)
        rows[number] = {"image_id": number, "name": name, "size": size, "annotations": []}
        paths.append(path)
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(rows)} images of {file} are not in {folder}, for example {missing[0]}."
        )
    seen = {}
    for place, annotation in enumerate(annotations):
        number = annotation.get("id")
        name = f"annotation {number}" if number is not None else f"annotation at place {place}"
        where = f"The {name} of {file}"
        image = _look_up(rows, annotation.get("image_id"))
        if image is None:
            raise ValueError(f"{where} belongs to image {annotation.get('image_id')!r}, which the file does not list.")
        label = _look_up(labels, annotation.get("category_id"))
        if label is None:
            raise ValueError(f"{where} has category {annotation.get('category_id')!r}, which the file does not list.")
        entry = _annotation(name, where, annotation.get("bbox"), label, annotation, notes)
        if masks:
            entry["segmentation"] = annotation.get("segmentation")
            if _is_empty(entry["segmentation"]):
                raise ValueError(f"{where} has no segmentation: give --masks false to learn boxes alone.")
        earlier = seen.setdefault(str(number), (image["image_id"], entry)) if number is not None else None
        if earlier == (image["image_id"], entry) and earlier[1] is not entry:
            notes.add("annotations that repeat another, left out", name)
            continue
        if earlier is not None and earlier[1] is not entry:
            notes.add("annotations that have the id of another, kept", name)
        image["annotations"].append(entry)
    files = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))
    annotated = Annotated(files, list(rows.values()), categories, notes)
    _fit_to_images(annotated, str(file), label_orientation)
    return annotated


class _Finder:
    """The files of a folder by the names that annotations give them.

    Names may be in another Unicode form than the file system's, and have folders separated as on Windows.
    """

    def __init__(self, folder: Path):
        self.folder, self.similar = folder, None
        self.present = set(os.listdir(folder)) if folder.is_dir() else set()

    def __call__(self, name: str) -> str | None:
        """The path of a file, None where there is no such."""
        if name in self.present or (self.folder / name).is_file():
            return str(self.folder / name)
        if self.similar is None:
            files = list_files(self.folder).files if self.folder.is_dir() else []
            self.similar = {_plain(readable_name(file)): file for file in files}
        found = self.similar.get(_plain(name))
        if found is not None and readable_name(found) != found:
            raise ValueError(
                f"The name of the file {readable_name(found)} in {self.folder} is not in UTF-8: rename it."
            )
        return str(self.folder / found) if found is not None else None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _is_empty(segmentation: Any) -> bool:
    return not segmentation or (
        isinstance(segmentation, list) and all(polygon in ([], None) for polygon in segmentation)
    )


def _look_up(found: dict, key: Any) -> Any:
    return found.get(key) if type(key) in (int, str, float) else None


def _parse_coco(file: Path) -> list[list[dict[str, Any]]]:
    """The lists of images, annotations and categories in a file."""
    refusal = f"{file} is no COCO annotation file with images, annotations and categories"
    try:
        content = read_json(file)
    except OSError as error:
        raise ValueError(f"Cannot read the annotations {file}: {error.strerror}.") from None
    except RecursionError:
        raise ValueError(f"{refusal}: it holds lists in lists without end.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{refusal}: it holds a {type(content).__name__}.")
    lists = []
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not all(isinstance(entry, dict) for entry in content[key]):
            found = "has no" if key not in content else "does not hold objects in"
            raise ValueError(f"{refusal}: it {found} {key!r}.")
        lists.append(content[key])
    return lists


def _read_categories(listed: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """Categories in the order of their ids."""
    for key in ("id", "name"):
        values = [category.get(key) for category in listed]
        if not values or any(type(value) not in (int, str) for value in values):
            raise ValueError(f"{file} lists no categories with {key!r}.")
        if repeated := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{file} lists several categories with the {key} {repeated[0]!r}.")
    if len({type(category["id"]) for category in listed}) > 1:
        raise ValueError(f"{file} lists categories with numbers and with text as ids.")
    return sorted(({"id": c["id"], "name": str(c["name"])} for c in listed), key=lambda c: c["id"])


def _read_size(image: dict[str, Any]) -> list[int] | None:
    """Width and height in pixels, or None where a tool left them out or wrote 0."""
    size = [image.get("width"), image.get("height")]
    return size if all(type(side) is int and side > 0 for side in size) else None


def _read_objects_column(arguments: DataArguments, name: str, categories: list[dict[str, Any]] | None) -> Annotated:
    """A split in the layout of the Hub: `objects` with `bbox` as [left, top, width, height] and `category`.

    categories: those of the training split, for the other one.
    """
    split = load_split(arguments, name, [arguments.image_column, "objects"], [arguments.image_column])
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
        image = {"image_id": index, "name": f"row {index}", "size": None, "annotations": []}
        for number, (box, label) in enumerate(zip(row[boxes], row[labels], strict=True)):
            where = f"Object {number} of row {index} of {source}"
            details = {key: row[key][number] for key in ("area", "iscrowd") if len(row.get(key, ())) == len(row[boxes])}
            label = _number_of(label, names, where)
            name = f"object {number} of row {index}"
            image["annotations"].append(_annotation(name, where, box, label, details, notes))
        objects.append(image)
    images = split.select_columns([arguments.image_column]).rename_columns({arguments.image_column: "image"})
    annotated = Annotated(images, objects, [{"id": label, "name": n} for label, n in enumerate(names)], notes)
    _fit_to_images(annotated, source, arguments.label_orientation)
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
    if names and len(set(names)) < len(names):
        raise ValueError("Several categories have one name.")
    if names:
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


def _annotation(name: str, where: str, box: Any, label: int, details: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """An object as `read_objects` takes it, from a box [left, top, width, height]."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not are_finite(box) or min(box[2:]) < 0:
        raise ValueError(f"{where} has the box {box}, which is not [left, top, width, height] in pixels.")
    crowd, area = details.get("iscrowd"), details.get("area")
    if crowd not in (None, 0, 1):
        raise ValueError(f"{where} has iscrowd {crowd!r}, which is neither 0 nor 1.")
    if area is not None and not are_finite([area]):
        raise ValueError(f"{where} has the area {area!r}, which is no number.")
    if area is not None and area <= 0 < box[2] * box[3]:
        notes.add("areas that are not positive, replaced by those of the boxes", name)
        area = None
    return {
        "name": name,
        "box": [box[0], box[1], box[0] + box[2], box[1] + box[3]],
        "label": label,
        "iscrowd": int(crowd or 0),
        "area": area if area is not None else box[2] * box[3],
    }


class _Frame(NamedTuple):
    """What the annotations of an image are made for, and what makes that upright.

    size: of the image as annotated. orientation: EXIF's, where the annotations are for the stored pixels, otherwise 1.
    upright: the size of the image as `decode_image` gives it. All sizes are [width, height] in pixels.
    """

    size: list[int]
    orientation: int
    upright: list[int]


def _fit_to_images(annotated: Annotated, source: str, label_orientation: str | None) -> None:
    """Compare annotations with the files of their images: leave out what covers nothing, turn what EXIF turns.

    Afterwards sizes and coordinates are those of the images as `decode_image` gives them, upright. Boxes may still
    reach over the edge, as evaluation has them; training cuts them.
    Raises ValueError for annotations that are made for images of another size, and for segmentations that are none.
    """
    numbers = [number for number, image in enumerate(annotated.objects) if image["annotations"]]
    for image in annotated.objects:
        image["size"] = image["size"] if image["annotations"] else None  # nothing depends on it
    frames, wrong = [], []
    for number, header in zip(numbers, _read_headers(annotated.images, numbers), strict=True):
        image = annotated.objects[number]
        frame = _find_frame(image, header, label_orientation, annotated.notes)
        if frame is None:
            image["annotations"] = []
        elif image["size"] not in (None, frame.size):
            wrong.append((image, header, frame))
        else:
            frames.append((image, frame))
    if wrong:
        image, header, frame = wrong[0]
        stored = f", {list(header.size)} before EXIF turns it" if list(header.size) != frame.upright else ""
        raise ValueError(
            f"The annotations are for an image of {image['size']} pixels, but {image['name']} of {source} has "
            f"{frame.upright}{stored}. It is one of {len(wrong)} such of {len(numbers)} images."
        )
    _refuse_other_boxes(frames, source)
    for image, frame in frames:
        kept = (_fit(entry, frame, source, annotated.notes) for entry in image["annotations"])
        image.update(size=frame.upright, annotations=[entry for entry in kept if entry is not None])


def _find_frame(
    image: dict[str, Any], header: Header | None, label_orientation: str | None, notes: Notes
) -> _Frame | None:
    """The frame of an image, None where nothing is known of it."""
    if header is None:  # it cannot be decoded either, and is counted where it is met
        if image["size"] is None:
            notes.add("images that cannot be read, without their objects", image["name"])
            return None
        return _Frame(image["size"], 1, image["size"])
    stored, orientation = list(header.size), header.orientation
    upright = stored[::-1] if orientation > 4 else stored
    if orientation == 1:
        return _Frame(upright, 1, upright)
    # The annotations, too, may know which way they are meant: by the size of run lengths, or by boxes beyond the edge.
    masks = [entry.get("segmentation") for entry in image["annotations"]]
    sizes = [mask.get("size") for mask in masks if isinstance(mask, dict)]
    known = [image["size"], *(size[::-1] for size in sizes if isinstance(size, list))]
    fitting = [size for size in (upright, stored) if size in known]
    if not fitting and image["size"] is None:
        fitting = [size for size in (upright, stored) if _fits(image["annotations"], size)]
    unclear = upright == stored or len(fitting) != 1
    as_stored = label_orientation == "stored" if unclear else fitting == [stored]
    if as_stored:
        notes.add(
            "images that EXIF turns and whose annotations are for the stored pixels, turned with them", image["name"]
        )
        return _Frame(stored, orientation, upright)
    if unclear and label_orientation is None:
        notes.add(
            "images that EXIF turns and whose annotations are taken as for the turned image; give --label_orientation "
            "stored where they belong to the pixels as they are stored, turned where this is right",
            image["name"],
        )
    return _Frame(upright, 1, upright)


def _fit(entry: dict[str, Any], frame: _Frame, source: str, notes: Notes) -> dict[str, Any] | None:
    """An object of the upright image, or None where it covers nothing of it."""
    name, (left, top, right, bottom) = entry["name"], entry["box"]
    if right <= left or bottom <= top:
        notes.add("boxes without area, left out", name)
        return None
    if min(_inside(entry["box"], frame.size)) <= 0:
        notes.add("boxes outside of their image, left out", name)
        return None
    if not _fits([entry], frame.size):
        notes.add("boxes that reach over the edge of their image, cut there in training", name)
    entry = dict(entry)
    if "segmentation" in entry:
        try:
            segmentation, num_left_out = check_segmentation(entry["segmentation"], frame.size)
        except ValueError as error:
            raise ValueError(f"The {name} of {source} has {error}.") from None
        if segmentation is None:
            notes.add("segmentations that cover nothing of their image, left out", name)
            return None
        if num_left_out:
            notes.add("segmentations with polygons that cover nothing, used without these", name)
        entry["segmentation"] = segmentation
    if frame.orientation != 1:
        x1, y1, x2, y2 = turn_points(entry["box"], frame.size, frame.orientation)
        entry["box"] = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
        if "segmentation" in entry:
            entry["segmentation"] = turn_segmentation(entry["segmentation"], frame.size, frame.orientation)
    return entry


def _inside(box: list[float], size: list[int]) -> tuple[float, float]:
    """Width and height of the part of a box that lies inside of an image."""
    return tuple(min(box[2 + axis], size[axis]) - max(box[axis], 0) for axis in range(2))


def _fits(entries: list[dict[str, Any]], size: list[int]) -> bool:
    """Whether boxes lie inside of an image, or less than a pixel beyond."""
    boxes = [entry["box"] for entry in entries]
    return all(min(box[:2]) >= -1 and box[2] <= size[0] + 1 and box[3] <= size[1] + 1 for box in boxes)


def _refuse_other_boxes(frames: list[tuple[dict[str, Any], _Frame]], source: str) -> None:
    """Raises ValueError where all boxes look like fractions, or like the corners that other formats have."""
    entries = [(entry, frame.size) for image, frame in frames for entry in image["annotations"]]
    # Left, top, width and height, as they were given.
    given = [([x1, y1, x2 - x1, y2 - y1], size) for (x1, y1, x2, y2), size in ((e["box"], size) for e, size in entries)]
    if any(box[2] > 0 < box[3] for box, _ in given) and all(max(box) <= 1 for box, _ in given):
        raise ValueError(
            f"The boxes of {source} are all within 1 pixel, so they seem to be fractions of the image: give them as "
            "[left, top, width, height] in pixels."
        )
    num_beyond = sum(not _fits([entry], size) for entry, size in entries)
    if num_beyond > 1 and all(
        box[0] < box[2] <= size[0] + 1 and box[1] < box[3] <= size[1] + 1 and min(box) >= 0 for box, size in given
    ):
        raise ValueError(
            f"The boxes of {source} seem to be [left, top, right, bottom], as which all fit their images: as [left, "
            f"top, width, height] in pixels, which they must be, {num_beyond} of {len(given)} reach over the edge."
        )


class _Memory(io.RawIOBase):
    """Bytes in a table as a file: what is not read of them stays on the disk."""

    def __init__(self, content: pa.Buffer):
        self.content, self.place = memoryview(content).cast("B"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = max(offset + (0, self.place, len(self.content))[whence], 0)
        return self.place

    def readinto(self, target: memoryview) -> int:
        read = self.content[self.place : self.place + len(target)]
        target[: len(read)] = read
        self.place += len(read)
        return len(read)


def _read_headers(images: datasets.Dataset, numbers: list[int]) -> list[Header | None]:
    """Size and orientation of these images, None for files that cannot be read; their pixels stay where they are."""

    def read(entry: pa.StructScalar) -> Header | None:
        content = entry["bytes"].as_buffer() if entry["bytes"].is_valid else None
        try:
            path = entry["path"].as_py()
            return read_header(io.BufferedReader(_Memory(content)) if content is not None else path)
        except CorruptImageError:
            return None

    wanted, headers = set(numbers), []
    rows = images.select_columns(["image"]).with_format("arrow")
    with ThreadPoolExecutor(8) as pool:  # files on a network answer late, but many at once
        for start in range(0, len(rows), 1000):
            stop = min(start + 1000, len(rows))
            if chosen := [number - start for number in range(start, stop) if number in wanted]:
                entries = rows[start:stop]["image"]
                headers += pool.map(read, [entries[place] for place in chosen])
    return headers


def _dump(image: dict[str, Any]) -> str:
    """What `read_objects` needs of the objects of an image, as JSON."""
    entries = [{key: value for key, value in entry.items() if key != "name"} for entry in image["annotations"]]
    return json.dumps({**image, "annotations": entries})


def read_objects(image: Image.Image, objects: str, masks: bool) -> dict[str, Any]:
    """The annotations of an image as `boxes` (n, 4), `labels` (n,), and with `masks` run-length encoded `masks`.

    Also `iscrowd`, `area` and `image_id`. Boxes are [left, top, right, bottom] in pixels.
    Raises ValueError where the annotations are made for an image of another size.
    """
    content = json.loads(objects)
    if content["size"] is not None and tuple(content["size"]) != image.size:
        raise ValueError(f"the annotations are for an image of {content['size']} pixels, but it has {image.size}.")
    entries = content["annotations"]
    read = {
        "image_id": content["image_id"],
        "boxes": torch.tensor([entry["box"] for entry in entries], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([entry["label"] for entry in entries], dtype=torch.int64),
        "iscrowd": [entry["iscrowd"] for entry in entries],
        "area": [entry["area"] for entry in entries],
    }
    if masks:
        read["masks"] = [run_lengths(entry["segmentation"], image.size) for entry in entries]
    return read
