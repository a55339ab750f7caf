"""Pictures of what a model sees: attention maps, Gaussians, features, segmentations."""

from .attention import attention_map, draw_attention, read_attentions
from .gaussians import draw_gaussians, read_gaussians
from .layers import Layer, read_layers
from .page import build_page
from .segmentation import draw_legend, draw_segmentation, legend_figure

__all__ = [
    "Layer",
    "attention_map",
    "build_page",
    "draw_attention",
    "draw_gaussians",
    "draw_legend",
    "draw_segmentation",
    "legend_figure",
    "read_attentions",
    "read_gaussians",
    "read_layers",
]
