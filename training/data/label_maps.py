"""Label maps: which class each pixel of an image has, as files name it and as the programs do."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from locatvit_hf.utils.images import TURNS, orientation_of
from locatvit_hf.utils.io import read_json
from training.engine.arguments import option

IGNORE_INDEX = 255


@strict
@dataclass(kw_only=True)
class LabelArguments:
    """How the pixels of a label map name their classes: as ids from 0, unless one of these says otherwise."""

    reduce_labels: bool = option(False, "Label 0 means no class: 0 becomes 255, every other goes down by one.")
    label_mapping: dict | str | None = option(
        None,
        "Class id of every id or, quoted as '#804080', of every color in the masks, or a JSON file with "
        "that; what it leaves out becomes 255, no class.",
    )
    label_orientation: Literal["turned", "stored"] | None = option(
        None,
        "Whether masks belong to images turned as their EXIF orientation says, or to their pixels as they "
        "are stored and are to be turned too; by default the first, with a warning where it cannot be seen.",
    )


@strict
@dataclass(kw_only=True)
class ResizedLabelArguments(LabelArguments):
    """Label maps that are resized with their images."""

    label_interpolation: Literal["nearest-exact", "nearest"] = option(
        "nearest-exact",
        "How label maps are resized: nearest-exact takes the pixel around the same center as the image "
        "does; nearest is that of OpenCV and mmsegmentation, which lies up to half a pixel beside it.",
    )


class LabelReader:
    """Reads the label map of an image as (height, width) int64: class ids, and 255 for pixels without a class.

    Maps hold one number per pixel, in 1, 8, 16 or 32 bits; those of a palette image are its indices. Maps in colors
    need `label_mapping`.
    Calling it raises ValueError where the sizes differ, or a label is neither a class nor 255.

    Args:
        num_labels: Number of classes; None where any id is taken.
    """

    def __init__(self, arguments: LabelArguments, num_labels: int | None):
        self.reduce_labels, self.num_labels = arguments.reduce_labels, num_labels
        self.of_stored_pixels = arguments.label_orientation == "stored"
        self.mapping = _parse_label_mapping(arguments.label_mapping)
        if self.mapping is not None and self.reduce_labels:
            raise ValueError("Give reduce_labels or label_mapping, not both: the mapping can leave label 0 out.")
        if num_labels is not None and num_labels < 2:
            raise ValueError("A segmentation tells at least two classes apart, such as a background and an object.")
        classes = [] if self.mapping is None else self.mapping.classes.tolist()
        highest = max((label for label in classes if label != IGNORE_INDEX), default=-1)
        if num_labels is not None and highest >= num_labels:
            raise ValueError(f"label_mapping names class {highest}, outside the {num_labels} classes of --label_names.")
        if num_labels is not None and num_labels > IGNORE_INDEX:
            raise ValueError(
                f"Label {IGNORE_INDEX} marks pixels without a class, so there are at most {IGNORE_INDEX} classes, not "
                f"{num_labels}."
            )

    def __call__(self, image: Image.Image, label_map: Image.Image) -> torch.Tensor:
        orientation = orientation_of(image)
        if self.of_stored_pixels and orientation in TURNS and orientation_of(label_map) == 1:
            label_map = label_map.transpose(TURNS[orientation])
        if label_map.size != image.size:
            reason = ""
            if orientation >= 5 and label_map.size == image.size[::-1]:
                stored = "turned" if self.of_stored_pixels else "stored"
                reason = f" after the turn that its EXIF orientation asks for: give --label_orientation {stored}"
            raise ValueError(
                f"the label map is {label_map.width} x {label_map.height} pixels, but its image {image.width} x "
                f"{image.height}{reason}."
            )
        if self.mapping is not None and self.mapping.of_colors:
            red, green, blue = tvF.pil_to_tensor(label_map.convert("RGB")).to(torch.int64)
            labels = (red << 16) + (green << 8) + blue
        elif label_map.mode in ("1", "L", "P", "I", "F") or label_map.mode.startswith("I;"):
            wide = label_map.mode.startswith("I;")  # torchvision reads 16 bits as signed, or not at all
            labels = tvF.pil_to_tensor(label_map.convert("I") if wide else label_map).squeeze(0)
            if label_map.mode == "F" and not (labels == labels.round()).all():
                raise ValueError(
                    "a label map holds one class id per pixel, but this one holds fractions or no numbers."
                )
            labels = labels.to(torch.int64)
        else:
            raise ValueError(
                f"a label map holds one class id per pixel, but this one is an {label_map.mode} image: name the class "
                "of each color with --label_mapping '{\"#804080\": 0}'."
            )
        if self.mapping is not None:
            position = torch.searchsorted(self.mapping.keys, labels).clamp(max=len(self.mapping.keys) - 1)
            known = self.mapping.keys[position] == labels
            labels = torch.where(known, self.mapping.classes[position], IGNORE_INDEX)
        elif self.reduce_labels:
            labels = torch.where((labels == 0) | (labels == IGNORE_INDEX), IGNORE_INDEX, labels - 1)
        known = labels[labels != IGNORE_INDEX]
        if self.num_labels is not None and known.numel() and not 0 <= known.min() <= known.max() < self.num_labels:
            raise ValueError(
                f"labels run from {known.min()} to {known.max()}, outside the {self.num_labels} classes; see "
                "--label_names, --reduce_labels and --label_mapping."
            )
        return labels


class LabelMapping(NamedTuple):
    """keys: ids, or colors as 0xRRGGBB, in ascending order. classes: the class of each. of_colors: which they are."""

    keys: torch.Tensor
    classes: torch.Tensor
    of_colors: bool


def _parse_label_mapping(mapping: dict | str | None) -> LabelMapping | None:
    if isinstance(mapping, str):
        path = mapping
        try:
            mapping = read_json(path)
        except OSError as error:
            raise ValueError(f"{path} is not a JSON file: {error.strerror}.") from None
    if not mapping:
        return None
    if not isinstance(mapping, dict) or len({str(key).startswith("#") for key in mapping}) > 1:
        raise ValueError("label_mapping must map ids, or colors like '#804080', to class ids.")
    pairs: dict[int, int] = {}
    for key, value in mapping.items():
        number, label = _parse_key(str(key)), _parse_class(key, value)
        if pairs.setdefault(number, label) != label:
            raise ValueError(f"label_mapping maps {key} to {pairs[number]} and to {label}.")
    keys, classes = torch.tensor(sorted(pairs.items())).unbind(dim=1)
    return LabelMapping(keys.contiguous(), classes.contiguous(), str(key).startswith("#"))


def _parse_key(key: str) -> int:
    """An id, or a color of three or six hexadecimal digits as 0xRRGGBB."""
    if re.fullmatch("#[0-9a-fA-F]{3}", key):
        key = "#" + "".join(2 * digit for digit in key[1:])
    if re.fullmatch("#[0-9a-fA-F]{6}", key):
        return int(key[1:], 16)
    if not re.fullmatch("[0-9]+", key):
        reason = "colors have three or six hexadecimal digits" if key.startswith("#") else "ids are whole numbers"
        raise ValueError(f"label_mapping must map ids, or colors like '#804080', to class ids, not {key!r}: {reason}.")
    return int(key)


def _parse_class(key: Any, value: Any) -> int:
    if value is None:
        return IGNORE_INDEX
    if isinstance(value, bool) or not re.fullmatch("[0-9]+", str(value)) or int(value) > IGNORE_INDEX:
        raise ValueError(
            f"label_mapping maps {key} to {value!r}, but a class is a whole number of at most {IGNORE_INDEX - 1}, or "
            "null where there is none."
        )
    return int(value)


def resize_labels(labels: torch.Tensor, size: Sequence[int], interpolation: str = "nearest-exact") -> torch.Tensor:
    """Resize a label map without mixing its ids.

    Args:
        labels: Class ids (height, width).
        size: Height and width in pixels.
        interpolation: "nearest-exact" or "nearest", see `ResizedLabelArguments`.

    Returns:
        Class ids of that size.
    """
    mode = InterpolationMode(interpolation)
    return tvF.resize_image(labels.as_subclass(torch.Tensor)[None], list(size), interpolation=mode)[0]
