# SPDX-License-Identifier: MIT
"""The layers that the families share, and how tokens lie on the grid."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth
from transformers.activations import ACT2FN
from transformers.utils import is_tracing


class DropPath(StochasticDepth):
    """Stochastic depth: in training, a sample's residual branch is dropped with this probability, else scaled up."""

    def __init__(self, probability: float):
        super().__init__(probability, mode="row")


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch."""

    def __init__(self, hidden_size: int, init_value: float):
        super().__init__()
        self.init_value = float(init_value)
        self.scale = nn.Parameter(torch.full((hidden_size,), float(init_value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.scale


def drop_path_rates(rate: float, num_layers: int) -> list[float]:
    """Stochastic depth grows linearly from zero at the first layer to `rate` at the last."""
    return [rate * index / max(num_layers - 1, 1) for index in range(num_layers)]


class ScaledInitLinear(nn.Linear):
    """A linear map whose fresh weights are drawn with `init_scale` times the standard deviation of the others."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_scale: float = 1.0):
        super().__init__(in_features, out_features, bias)
        self.init_scale = init_scale


class MLP(nn.Module):
    """Two linear maps around an activation, on the last dimension."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, dropout: float = 0.0, init_scale: float = 1.0
    ):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = ScaledInitLinear(intermediate_size, hidden_size, init_scale=init_scale)
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down_proj(self.dropout(self.activation(self.up_proj(hidden_states)))))


class MultiHeadProjections(nn.Module):
    """The parameters of multi-head attention. A family's attention adds how tokens meet.

    init_scale: of the output projection, see `ScaledInitLinear`.
    """

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool, dropout: float, init_scale: float = 1.0):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.o_proj = ScaledInitLinear(hidden_size, hidden_size, init_scale=init_scale)
        self.scaling = self.head_dim**-0.5
        self.dropout = dropout

    def project(self, hidden_states: torch.Tensor, sources: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """(batch, tokens, hidden_size) to query, key and value, each (batch, heads, tokens, head_dim).

        sources: what keys and values are read from, (batch, sources, hidden_size); the tokens themselves where None.
        """
        sources = hidden_states if sources is None else sources
        projected = (self.q_proj(hidden_states), self.k_proj(sources), self.v_proj(sources))
        return tuple(states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for states in projected)


def check_pixel_values(pixel_values: torch.Tensor, num_channels: int) -> None:
    """Raises ValueError unless `pixel_values` is (batch, num_channels, height, width) with at least one pixel."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values must be (batch, {num_channels}, height, width), got {tuple(pixel_values.shape)}; "
            "prepare images with the image processor of the checkpoint."
        )
    if pixel_values.shape[2] == 0 or pixel_values.shape[3] == 0:
        raise ValueError(f"pixel_values holds no pixels: its shape is {tuple(pixel_values.shape)}.")


def for_one_image_size() -> bool:
    """Whether a graph is made for the size of its example alone.

    So does `torch.onnx.export(dynamo=False)`, which knows no antialiased resampling. Other graphs serve every size.
    """
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def image_sides(pixel_values: torch.Tensor) -> tuple[int, int]:
    """(height, width) of (batch, channels, height, width); in a graph for any size, what stands for these there."""
    height, width = pixel_values.shape[-2:]
    return (int(height), int(width)) if for_one_image_size() else (height, width)


def patch_grid(pixel_values: torch.Tensor, patch_shape: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in patches of (batch, channels, height, width), patches at the edge counted whole."""
    height, width = image_sides(pixel_values)
    return -(-height // patch_shape[0]), -(-width // patch_shape[1])


def pad_to_multiple(pixel_values: torch.Tensor, multiple: tuple[int, int]) -> torch.Tensor:
    """Zeros on the right and at the bottom of (batch, channels, height, width) until both sides are multiples."""
    height, width = image_sides(pixel_values)
    bottom, right = -height % multiple[0], -width % multiple[1]
    if (not is_tracing() or for_one_image_size()) and bottom == 0 and right == 0:
        return pixel_values
    return F.pad(pixel_values, (0, right, 0, bottom))


def patch_feature_map(tokens: torch.Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0) -> torch.Tensor:
    """(batch, tokens, channels) without its prefix tokens as (batch, channels, grid height, grid width)."""
    return channels_last_map(tokens[:, num_prefix_tokens:], grid).contiguous()


def channels_last_map(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(batch, patches, channels) seen as (batch, channels, grid height, grid width): nothing is copied.

    Channels stay last in memory, where convolutions take and leave them.
    """
    return patches.unflatten(1, grid).permute(0, 3, 1, 2)


def feature_map_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    """(batch, channels, height, width) as (batch, patches, channels), row by row: `patch_feature_map` undone."""
    return feature_map.flatten(2).transpose(1, 2)


def resample_position_embeddings(
    position_embeddings: torch.Tensor, native_grid: tuple[int, int], grid: tuple[int, int], num_prefix_tokens: int
) -> torch.Tensor:
    """Position embeddings of `grid` from those of `native_grid`: antialiased bicubic, in at least float32.

    position_embeddings: (1, prefix + patches, channels); the first `num_prefix_tokens` rows are kept as they are.
    """
    # Resampling to the same grid is the identity; while tracing it stays, so that a graph serves every size.
    if (not is_tracing() or for_one_image_size()) and tuple(grid) == tuple(native_grid):
        return position_embeddings
    dtype = torch.promote_types(position_embeddings.dtype, torch.float32)
    prefix, patches = position_embeddings[:, :num_prefix_tokens], position_embeddings[:, num_prefix_tokens:]
    patches = channels_last_map(patches.to(dtype), native_grid)
    patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, feature_map_tokens(patches).to(prefix.dtype)], dim=1)


class ProbeHead(nn.Sequential):
    """The paper's segmentation probe: 1x1 convolution, GroupNorm(1), GELU, 1x1 convolution.

    Takes (batch, in_channels, height, width) to (batch, num_labels, height, width). GroupNorm(1) takes its mean and
    variance over all channels and positions of a sample.
    """

    def __init__(self, in_channels: int, hidden_channels: int, num_labels: int):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, hidden_channels, kernel_size=1, bias=False)
        self.norm = nn.GroupNorm(1, hidden_channels)
        self.activation = nn.GELU()
        self.classifier = nn.Conv2d(hidden_channels, num_labels, kernel_size=1)


class FeaturePyramid(nn.Module):
    """Brings four maps of one stride to 1/4, 1/2, 1 and 2 times that stride (4, 8, 16, 32 for patches of 16)."""

    def __init__(self, channels: int):
        super().__init__()

        def twice() -> nn.Module:
            return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)

        four_times = nn.Sequential(twice(), nn.GroupNorm(1, channels), nn.GELU(), twice())
        half = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)
        self.levels = nn.ModuleList([four_times, twice(), nn.Identity(), half])

    def forward(self, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [level(feature_map) for level, feature_map in zip(self.levels, feature_maps, strict=True)]
