"""The colors of classes: one table for the command line, the page, figures, trackers and dry runs."""

import colorsys

import numpy as np
from PIL import Image

IGNORED_COLOR = (128, 128, 128)
"""Of pixels without a class."""


def label_colors(num_labels: int, background: int | None = None) -> np.ndarray:
    """Colors that differ from their neighbors, and do not depend on how many follow.

    Args:
        num_labels: number of classes.
        background: this class is black.

    Returns:
        (num_labels, 3) uint8.

    Raises:
        ValueError: there is no class.
    """
    if num_labels < 1:
        raise ValueError(f"There must be at least one label, not {num_labels}.")
    # Steps of the golden ratio around the hue circle keep any prefix of the sequence spread out.
    hues = (np.arange(num_labels) * 0.61803398875) % 1.0
    levels = [(0.62, 1.0), (0.85, 0.85), (0.45, 0.95)]
    colors = [colorsys.hsv_to_rgb(hue, *levels[label % 3]) for label, hue in enumerate(hues)]
    colors = (255 * np.asarray(colors)).round().astype(np.uint8)
    if background is not None:
        colors[background] = 0
    return colors


def background_class(id2label: dict[int, str]) -> int | None:
    """0 where that class is named background: overlays leave it as it is, since it is not a thing of its own."""
    return 0 if id2label.get(0, "").lower() == "background" else None


def class_colors(id2label: dict[int, str]) -> np.ndarray:
    """The color of each class by its id, (largest id + 1, 3) uint8; a class 0 that is named background is black."""
    return label_colors(max(id2label, default=-1) + 1, background_class(id2label))


def overlay_segmentation(
    image: Image.Image,
    label_map: np.ndarray,
    colors: np.ndarray,
    opacity: float = 0.75,
    background: int | None = None,
    ignore_index: int | None = 255,
) -> Image.Image:
    """Lay a label map over a greyed image.

    Args:
        label_map: (height, width) label ids of the image's size.
        colors: (labels, 3) uint8, from `class_colors`.
        background: this label stays transparent.
        ignore_index: pixels of this id are grey; None where every id is a label.

    Raises:
        ValueError: the map has another size than the image.
    """
    label_map = np.asarray(label_map)
    if label_map.shape != (image.height, image.width):
        raise ValueError(f"A map of {label_map.shape} does not fit an image of {image.height} x {image.width} pixels.")
    ignored = label_map == ignore_index if ignore_index is not None else np.zeros_like(label_map, bool)
    painted = np.where(ignored[..., None], IGNORED_COLOR, colors[np.where(ignored, 0, label_map)])
    weight = np.where(label_map == background, 0.0, opacity)[..., None] if background is not None else opacity
    grey = np.asarray(image.convert("L").convert("RGB"), np.float64) * 0.6
    return Image.fromarray((weight * painted + (1 - weight) * grey).round().astype(np.uint8))


__all__ = ["IGNORED_COLOR", "background_class", "class_colors", "label_colors", "overlay_segmentation"]
