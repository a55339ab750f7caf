"""Both splits of a detection dataset, read and checked before training begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
from huggingface_hub.dataclasses import strict

from training.data import subsample_evenly
from training.engine.arguments import option
from training.engine.settings import DataArguments
from training.tasks.detection.coco import read_coco
from training.tasks.detection.objects import Annotated, dump_objects, size_inside
from training.tasks.detection.objects_column import read_objects_column


@strict
@dataclass(kw_only=True)
class DetectionDataArguments(DataArguments):
    """Where images and annotations are: a folder laid out as COCO's or Roboflow's, or a Hub dataset with `objects`.

    Boxes are [left, top, width, height] in pixels, as in COCO.
    """

    train_split: str = "train2017"
    validation_split: str = "val2017"
    train_images: str | None = option(None, "Folder; by default DATASET/TRAIN_SPLIT.")
    train_annotations: str | None = option(
        None, "COCO file; by default DATASET/annotations/instances_TRAIN_SPLIT.json."
    )
    validation_images: str | None = option(None, "As `train_images`.")
    validation_annotations: str | None = option(None, "As `train_annotations`.")
    label_orientation: Literal["turned", "stored"] | None = option(
        None,
        "Whether boxes belong to images turned as their EXIF orientation says, or to their pixels as they "
        "are stored and are to be turned too, where sizes do not tell; by default the first, with a warning.",
    )


class DetectionSplits(NamedTuple):
    """The two splits of a dataset.

    Attributes:
        train: Columns `image` and `objects`, JSON with the annotations of an image, see `read_objects`.
        validation: The same.
        categories: `{"id": as in the annotations, "name": …}` of each; a label is a place in this list.
        notes: What was left out or changed, counted and named, a sentence per kind.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    categories: list[dict[str, Any]]
    notes: list[str]


def load_detection_splits(arguments: DetectionDataArguments, masks: bool) -> DetectionSplits:
    """Read both splits. Crowds stay in the validation split alone, and so do images without an object.

    Args:
        arguments: Where images and annotations are.
        masks: Whether every object needs a segmentation.

    Raises:
        ValueError: There are no such annotations, or they do not fit the images or each other.
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
            annotated.append(read_objects_column(arguments, split, annotated[0].categories if annotated else None))
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
    train_rows, validation_rows = (
        subsample_evenly(
            split.images.select(rows).add_column("objects", [dump_objects(split.objects[i]) for i in rows]), limit
        )
        for split, rows, limit in zip(annotated, chosen, limits, strict=True)
    )
    return DetectionSplits(train_rows, validation_rows, train.categories, notes)


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
            width, height = size_inside(entry["box"], image["size"])
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
        return Path(images if images is not None else f"{dataset}/{split}"), Path(annotations)
    if dataset is None:
        return None
    folder = Path(images) if images is not None else Path(dataset) / split
    for file in (Path(dataset) / "annotations" / f"instances_{split}.json", folder / "_annotations.coco.json"):
        if file.is_file():
            return folder, file
    return None
