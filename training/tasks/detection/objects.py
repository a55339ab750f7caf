"""The objects of annotated images: what every reader makes of them, and what training takes."""

import json
from typing import Any, NamedTuple

import datasets
import torch
from PIL import Image

from training.tasks.detection.segmentations import are_finite, run_lengths

NUM_NAMED = 3
"""Of what was left out, these many are named."""


class Annotated(NamedTuple):
    """A split as it was read: its images, for each of them its objects as `read_objects` takes them, and notes."""

    images: datasets.Dataset
    objects: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    notes: "Notes"


class Notes:
    """What was left out of a file or changed, by kind."""

    def __init__(self, source: str):
        self.source, self.found = source, dict[str, list]()

    def add(self, kind: str, name: Any) -> None:
        """Note one more of a kind, such as "boxes without area, left out"."""
        self.found.setdefault(kind, []).append(name)

    def sentences(self) -> list[str]:
        """One sentence per kind, with the number and the first names."""
        return [
            f"{self.source}: {kind} ({len(names):,}): {', '.join(map(str, names[:NUM_NAMED]))}"
            + (", …" if len(names) > NUM_NAMED else ".")
            for kind, names in self.found.items()
        ]


def create_object(name: str, where: str, box: Any, label: int, details: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """Make an object as `read_objects` takes it.

    Args:
        name: What messages call it, such as "annotation 7".
        where: The same, with the file that it is from.
        box: [left, top, width, height] in pixels.
        label: The place of its category.
        details: Its `iscrowd` and `area` in pixels, where they are given.
        notes: Takes what is replaced.

    Raises:
        ValueError: One of these is not what it should be.
    """
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


def size_inside(box: list[float], size: list[int]) -> tuple[float, float]:
    """Width and height of the part of a box that lies inside of an image."""
    return min(box[2], size[0]) - max(box[0], 0), min(box[3], size[1]) - max(box[1], 0)


def dump_objects(image: dict[str, Any]) -> str:
    """What `read_objects` needs of the objects of an image, as JSON."""
    entries = [{key: value for key, value in entry.items() if key != "name"} for entry in image["annotations"]]
    return json.dumps({**image, "annotations": entries})


def read_objects(image: Image.Image, objects: str, masks: bool) -> dict[str, Any]:
    """Read the annotations of an image.

    Args:
        image: The upright image.
        objects: An entry of the column `objects`, JSON.
        masks: Whether segmentations are read too.

    Returns:
        `boxes` (n, 4), [left, top, right, bottom] in pixels, `labels` (n,), `iscrowd`, `area`, `image_id`, and with
        `masks` the run-length encoded `masks`.

    Raises:
        ValueError: The annotations are made for an image of another size.
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
