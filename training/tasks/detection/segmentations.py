"""Segmentations of COCO files: polygons and run lengths in their two forms, checked, decoded and turned.

pycocotools decodes them in C and trusts what it is given: it reads a polygon of two points as a box, and where run
lengths end before their image does, the rest of the mask is memory that nobody wrote. So all is checked beforehand.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from locatvit_hf.utils.images import TURNS

MIN_NUMBERS = 6
"""Coordinates of a polygon: three points."""


def check_segmentation(segmentation: Any, size: list[int]) -> tuple[list | dict | None, int]:
    """A segmentation without the polygons that cover nothing of the image, and the number of these.

    Args:
        segmentation: Polygons `[[x1, y1, x2, y2, …], …]` in pixels, or run lengths `{"size": [height, width],
            "counts": …}`, whose counts are a list of numbers or COCO's text.
        size: The (width, height) of the image in pixels.

    Returns:
        The segmentation, or None where it covers nothing of the image; and how many of its polygons were left out.

    Raises:
        ValueError: It is anything else; the message says what, such as "run lengths without size".
    """
    if isinstance(segmentation, dict):
        return (segmentation if _covers_pixels(segmentation, size) else None), 0
    if not isinstance(segmentation, list):
        raise ValueError(f"a segmentation of type {type(segmentation).__name__}, which is not a list of polygons")
    kept = [polygon for polygon in segmentation if _has_area(polygon, size)]
    return kept or None, len(segmentation) - len(kept)


def _has_area(polygon: Any, size: list[int]) -> bool:
    """Whether a polygon has three points, an extent, and a part inside of the image."""
    if type(polygon) in (int, float):
        raise ValueError("a polygon that is not in a list of polygons, [[x1, y1, x2, y2, …], …]")
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
        raise ValueError("a polygon that is not a flat list of numbers, [x1, y1, x2, y2, …]")
    if len(polygon) % 2:
        raise ValueError(f"a polygon of {len(polygon)} numbers, which are not pairs of x and y")
    if not are_finite(polygon):
        raise ValueError("a polygon with a coordinate that is not finite")
    if len(polygon) < MIN_NUMBERS:
        return False
    inside = True
    for name, values, side in ("x", polygon[::2], size[0]), ("y", polygon[1::2], size[1]):
        low, high = min(values), max(values)
        if low < -side or high > 2 * side:
            raise ValueError(f"a polygon that reaches from {name} = {low} to {high} in an image of {size} pixels")
        inside = inside and low < high and low < side and high > 0
    return inside


def _covers_pixels(segmentation: dict, size: list[int]) -> bool:
    """Whether run lengths, which must fit the image, have a pixel that is set."""
    for key in ("size", "counts"):
        if key not in segmentation:
            raise ValueError(f"run lengths without {key}")
    width, height = size
    if segmentation["size"] != [height, width]:
        raise ValueError(
            f"run lengths of size {segmentation['size']}, but its image is [{height}, {width}] (height and width)"
        )
    runs = _read_counts(segmentation["counts"])
    if len(runs) and runs.min() < 0:
        raise ValueError("run lengths with a negative count")
    if runs.sum() != width * height:
        raise ValueError(f"run lengths that sum to {runs.sum()}, but its image has {width * height} pixels")
    return bool(runs[1::2].any())  # runs of 0 and of 1 take turns, and the first is of 0


def _read_counts(counts: Any) -> np.ndarray:
    """The run lengths of a list or of COCO's text, which packs 5 bits a character and stores most as differences."""
    if isinstance(counts, list):
        if not set(map(type, counts)) <= {int} or any(abs(count) > 2**31 for count in counts):
            raise ValueError("run lengths that are no list of whole numbers")
        return np.array(counts, np.int64)
    if not isinstance(counts, str | bytes):
        raise ValueError(f"run lengths with counts of type {type(counts).__name__}")
    text = counts if isinstance(counts, bytes) else counts.encode("utf-8", "replace")
    values = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((values & 32) == 0)  # bit 6 says that the number goes on
    lengths = np.diff(ends, prepend=-1)
    if not len(values) or values.min() < 0 or values.max() > 63 or ends.size == 0 or ends[-1] != len(values) - 1:
        raise ValueError("run lengths with counts that are no text of COCO's encoding")
    if lengths.max() > 7:  # more than 32 bits
        raise ValueError("run lengths with counts that are no text of COCO's encoding")
    starts = ends - lengths + 1
    places = np.arange(len(values)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((values & 31) << (5 * places), starts)
    runs -= np.where(values[ends] & 16, np.int64(1) << (5 * lengths), 0)  # the highest bit is the sign
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()  # each but the first two less the last but one
    return runs


def are_finite(values: Sequence) -> bool:
    """Whether all values are numbers, as JSON has them, and none is nan, infinite, or more than a float holds."""
    try:
        return set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))
    except OverflowError:
        return False


def run_lengths(segmentation: list | dict, size: list[int]) -> dict[str, Any]:
    """A checked segmentation, in any form, as compressed run lengths of pycocotools.

    Args:
        segmentation: As `check_segmentation` returns it.
        size: The (width, height) of the image in pixels.
    """
    width, height = size
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def turn_points(points: list[float], size: list[int], orientation: int) -> list[float]:
    """Where points of the stored pixels of an image lie once it is turned upright.

    Args:
        points: `[x1, y1, x2, y2, …]` in pixels.
        size: The (width, height) of the stored pixels.
        orientation: The EXIF orientation, 2 to 8.
    """
    xs, ys, (width, height) = points[::2], points[1::2], size
    # As `TURNS`: swap the axes, then mirror left-right, then top-bottom.
    if orientation >= 5:
        xs, ys, width, height = ys, xs, height, width
    xs = [width - x for x in xs] if orientation in (2, 3, 6, 7) else xs
    ys = [height - y for y in ys] if orientation in (3, 4, 7, 8) else ys
    return [value for point in zip(xs, ys, strict=True) for value in point]


def turn_segmentation(segmentation: list | dict, size: list[int], orientation: int) -> list | dict:
    """A checked segmentation of the stored pixels as that of the upright image; for the arguments see `turn_points`."""
    if isinstance(segmentation, list):
        return [turn_points(polygon, size, orientation) for polygon in segmentation]
    mask = Image.fromarray(coco_mask.decode(run_lengths(segmentation, size)))
    runs = coco_mask.encode(np.asfortranarray(mask.transpose(TURNS[orientation])))
    return {"size": runs["size"], "counts": runs["counts"].decode()}
