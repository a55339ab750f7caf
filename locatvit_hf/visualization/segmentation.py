"""Label maps as colors."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ..utils.colors import overlay_segmentation


def draw_segmentation(axes: Axes, image: Image.Image, label_map: np.ndarray, colors: np.ndarray, **options) -> None:
    """Draw an `overlay_segmentation`, which takes the same arguments, on matplotlib axes."""
    axes.imshow(overlay_segmentation(image, label_map, colors, **options), interpolation="nearest")
    axes.set_axis_off()


def draw_legend(axes: Axes, id2label: dict[int, str], colors: np.ndarray, labels: list[int] | None = None) -> None:
    """Draw a row of color patches with the names of the labels.

    Args:
        axes: Where to draw.
        id2label: The names of the classes by their ids.
        colors: Colors (labels, 3) in uint8, from `class_colors`.
        labels: The ids to show; by default all.
    """
    labels = sorted(id2label) if labels is None else labels
    handles = [Patch(facecolor=colors[label] / 255, label=_literal(id2label[label])) for label in labels]
    axes.legend(handles=handles, ncols=len(handles), loc="center", frameon=False, handlelength=1, columnspacing=1.2)
    axes.set_axis_off()


def _literal(name: str) -> str:
    """A name as it is, not as a formula between dollar signs."""
    return name.replace("$", r"\$")


def legend_figure(id2label: dict[int, str], colors: np.ndarray) -> Figure:
    """Draw all labels with their ids and colors, in as many columns as keep the figure about square.

    Args:
        id2label: The names of the classes by their ids.
        colors: Colors (labels, 3) in uint8, from `class_colors`.

    Returns:
        A figure to be saved with `bbox_inches="tight"`.
    """
    handles = [
        Patch(facecolor=colors[label] / 255, label=f"{label}  {_literal(name)}") for label, name in id2label.items()
    ]
    columns = max(round(math.sqrt(len(handles) / 6)), 1)
    figure = Figure(figsize=(1, 1))
    figure.legend(handles=handles, ncols=columns, loc="center", frameon=False, handlelength=1.4, handleheight=1.4)
    return figure
