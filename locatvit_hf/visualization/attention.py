"""Where one token looks."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from transformers import PreTrainedModel

from .panels import frame_patch, image_extent


@torch.no_grad()
def read_attentions(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """Read the attention of every layer, the Gaussian included.

    Args:
        model: A model of transformers. It is in evaluation mode and on the "eager" backend meanwhile, and as before
            afterwards.
        pixel_values: Prepared images (batch, channels, height, width).

    Returns:
        The weights (batch, heads, tokens, tokens) of each layer, first layer first; rows sum to 1.
    """
    with eager_evaluation(model):
        return list(model(pixel_values=pixel_values, output_attentions=True).attentions)


def attention_map(
    attention: torch.Tensor, query: int, grid: tuple[int, int], num_prefix_tokens: int, head: int | None = None
) -> np.ndarray:
    """Attention of one query over the patches of the first image.

    Args:
        attention: Weights (batch, heads, tokens, tokens), one entry of `read_attentions`.
        query: The index of the token that looks; patch p of the row-major grid is `num_prefix_tokens + p`.
        grid: The (height, width) in patches.
        num_prefix_tokens: Tokens before the patches.
        head: One head, or None for the mean of all.

    Returns:
        The weights (height, width).

    Raises:
        ValueError: The grid does not fit the tokens.
    """
    row = attention[0, :, query, num_prefix_tokens:]
    row = row.mean(dim=0) if head is None else row[head]
    if row.numel() != grid[0] * grid[1]:
        raise ValueError(f"A grid of {grid[0]} x {grid[1]} patches does not fit {row.numel()} patch tokens.")
    return row.reshape(grid).float().cpu().numpy()


def draw_attention(
    axes: Axes,
    image: Image.Image,
    heat: np.ndarray,
    query: int | None = None,
    opacity: float = 0.8,
    top: float | None = None,
) -> None:
    """Lay an attention map over its image, and frame the patch that looks.

    Args:
        axes: Where to draw.
        image: The image, of any size.
        heat: Values (height, width) over the patches, from 0.
        query: The index of the looking patch in the row-major grid; None for a class token, which has no place.
        opacity: Of the map, in 0 to 1.
        top: The value of the brightest color; by default the maximum of `heat`.
    """
    extent = image_extent(image)
    axes.imshow(image.convert("L"), cmap="gray", extent=extent)
    axes.imshow(heat, cmap="inferno", vmin=0, vmax=top, alpha=opacity, extent=extent, interpolation="bilinear")
    if query is not None:
        frame_patch(axes, image, query, heat.shape)
    axes.set_axis_off()


@contextlib.contextmanager
def eager_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and the "eager" backend, which alone returns attention maps; afterwards as before."""
    implementation, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
