"""Images of what a model sees: attention maps, Gaussians, features, segmentations."""

from .activations import Layer, read_layers
from .attention import attention_map, draw_attention, read_attentions
from .gaussians import draw_gaussians, read_gaussians
from .html_report import build_report
from .segmentation import draw_legend, draw_segmentation, legend_figure

__all__ = [
    "Layer",
    "attention_map",
    "build_report",
    "draw_attention",
    "draw_gaussians",
    "draw_legend",
    "draw_segmentation",
    "legend_figure",
    "read_attentions",
    "read_gaussians",
    "read_layers",
]
