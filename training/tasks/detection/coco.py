"""Annotation files in the format of COCO."""

import os
import unicodedata
from pathlib import Path
from typing import Any

import datasets

from locatvit_hf.utils.images import list_files, readable_name
from locatvit_hf.utils.io import read_json
from training.tasks.detection.frames import fit_to_images
from training.tasks.detection.objects import Annotated, Notes, create_object


def read_coco(folder: Path, file: Path, masks: bool, label_orientation: str | None = None) -> Annotated:
    """Read the images of a COCO annotation file with their objects.

    Args:
        folder: The folder with the images.
        file: The annotation file.
        masks: Whether every object needs a segmentation.
        label_orientation: See `DetectionDataArguments`.

    Raises:
        ValueError: The file is not such, or names images that are not in the folder or have another size; annotations
            are of unknown images or categories; boxes are not four numbers; with `masks`, objects have no
            segmentation, or one that cannot be decoded.
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
    seen: dict[str, tuple[Any, dict[str, Any]]] = {}
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
        entry = create_object(name, where, annotation.get("bbox"), label, annotation, notes)
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
    fit_to_images(annotated, str(file), label_orientation)
    return annotated


class _Finder:
    """The files of a folder by the names that annotations give them.

    Names may be in another Unicode form than the file system's, and have folders separated as on Windows.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.similar: dict[str, str] | None = None
        self.present = set(os.listdir(folder)) if folder.is_dir() else set()

    def __call__(self, name: str) -> str | None:
        """The path of a file, or None where there is none of that name."""
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
    refusal = f"{file} is not a COCO annotation file with images, annotations and categories"
    try:
        content = read_json(file)
    except OSError as error:
        raise ValueError(f"Cannot read the annotations {file}: {error.strerror}.") from None
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
    size = [image.get("width", 0), image.get("height", 0)]
    return size if all(type(side) is int and side > 0 for side in size) else None
