"""Pictures of what a model sees: attention maps, Gaussians, features, segmentations."""

from ..utils.colors import class_colors, label_colors
from ..utils.images import CorruptImageError, read_image
from .attention import attention_map, draw_attention, read_attentions
from .gaussians import draw_gaussians, read_gaussians
from .layers import Layer, read_layers
from .page import build_page
from .segmentation import draw_legend, draw_segmentation, legend_figure, overlay_segmentation

__all__ = [
    "CorruptImageError",
    "Layer",
    "attention_map",
    "build_page",
    "class_colors",
    "draw_attention",
    "draw_gaussians",
    "draw_legend",
    "draw_segmentation",
    "label_colors",
    "legend_figure",
    "overlay_segmentation",
    "read_attentions",
    "read_gaussians",
    "read_image",
    "read_layers",
]
