"""The scenes of `scenes.py` in COCO's format, for detection: `python -m examples.digits.scenes_to_coco SCENES FOLDER`.

Every connected piece of a digit's pixels is an object.
"""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from examples.digits.scenes import DIGITS

SMALLEST = 30
"""Pixels below which a piece is no digit, but a stroke of one that stands apart."""


def find_pieces(segmentation: Image.Image) -> list[tuple[int, np.ndarray]]:
    """Label and mask (height, width) of every connected piece of a map of pixel labels, 0 being none."""
    pieces, rest = [], segmentation.copy()
    while (pixels := np.argwhere(np.asarray(rest))).size:
        row, column = pixels[0].tolist()
        label, before = rest.getpixel((column, row)), np.asarray(rest)
        ImageDraw.floodfill(rest, (column, row), 0)
        mask = before != np.asarray(rest)
        if mask.sum() >= SMALLEST:
            pieces.append((label, mask))
    return pieces


def write_coco(scenes: datasets.DatasetDict, folder: Path) -> None:
    """Images as FOLDER/SPLIT/NUMBER.png, their objects in FOLDER/annotations/instances_SPLIT.json."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, rows in scenes.items():
        (folder / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for number, row in enumerate(rows):
            name, (width, height) = f"{number:05d}.png", row["image"].size
            row["image"].save(folder / split / name)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            for label, mask in find_pieces(row["segmentation"]):
                runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
                annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": label, "iscrowd": 0}
                annotation |= {"bbox": coco_mask.toBbox(runs).tolist(), "area": int(mask.sum())}
                runs = {"size": runs["size"], "counts": runs["counts"].decode()}
                annotations.append({**annotation, "segmentation": runs})
        categories = [{"id": 1 + label, "name": name} for label, name in enumerate(DIGITS)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    write_coco(datasets.load_from_disk(sys.argv[1]), Path(sys.argv[2]))
