"""Label maps as colours."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ..utils.colors import IGNORED_COLOR


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


def draw_segmentation(axes: Axes, image: Image.Image, label_map: np.ndarray, colors: np.ndarray, **options) -> None:
    """`overlay_segmentation` on matplotlib axes."""
    axes.imshow(overlay_segmentation(image, label_map, colors, **options), interpolation="nearest")
    axes.set_axis_off()


def draw_legend(axes: Axes, id2label: dict[int, str], colors: np.ndarray, labels: list[int] | None = None) -> None:
    """A row of colour patches with the names of the labels, of all or of those in `labels`."""
    labels = sorted(id2label) if labels is None else labels
    handles = [Patch(facecolor=colors[label] / 255, label=_literal(id2label[label])) for label in labels]
    axes.legend(handles=handles, ncols=len(handles), loc="center", frameon=False, handlelength=1, columnspacing=1.2)
    axes.set_axis_off()


def _literal(name: str) -> str:
    """A name as it is, not as a formula between dollar signs."""
    return name.replace("$", r"\$")


def legend_figure(id2label: dict[int, str], colors: np.ndarray) -> Figure:
    """All labels with their ids and colours, in as many columns as keep the figure about square; save it with
    `bbox_inches="tight"`."""
    handles = [
        Patch(facecolor=colors[label] / 255, label=f"{label}  {_literal(name)}") for label, name in id2label.items()
    ]
    columns = max(round(math.sqrt(len(handles) / 6)), 1)
    figure = Figure(figsize=(1, 1))
    figure.legend(handles=handles, ncols=columns, loc="center", frameon=False, handlelength=1.4, handleheight=1.4)
    return figure
