"""Pictures of what a model sees: attention maps, Gaussians, segmentations. Needs matplotlib."""

from .attention import attention_map, draw_attention, read_attentions
from .gaussians import draw_gaussians, read_gaussians
from .segmentation import draw_legend, draw_segmentation, label_colors, overlay_segmentation

__all__ = [
    "attention_map",
    "draw_attention",
    "draw_gaussians",
    "draw_legend",
    "draw_segmentation",
    "label_colors",
    "overlay_segmentation",
    "read_attentions",
    "read_gaussians",
]
