# SPDX-License-Identifier: MIT
"""The two ideas of LocAt (Locality-Attending Vision Transformer, ICLR 2026): the Gaussian and the refinement.

Words used throughout: `grid` is (height, width) in patches; `native grid` is the grid of the size a model was built
for; `prefix tokens` stand before the patches (class token, registers, jumbo tokens); `variance` is in patches squared.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import is_tracing
from transformers.utils.generic import maybe_autocast

# Both bounds keep half-precision arithmetic of the reference finite; they are part of the function that was trained.
LARGEST_SQUARED_DISTANCE = 13100.0
LARGEST_HALF_EXPONENT = 32500.0
COARSE_BLOCK_SIZE = 2
# Of a factor: e^-40 of an amplitude is lost in any logit, and products of smaller factors would be subnormal numbers,
# on which processors are a hundred times slower.
LOWEST_EXPONENT = -40.0


class Gaussian(NamedTuple):
    """The Gaussians of all query patches, before they are materialized as an attention bias.

    inverse_variance: (batch, heads, patches, 2), 1 / (V + epsilon) along rows and columns, in 1 / patches squared.
    amplitude: (batch, heads, patches), the height of each Gaussian, above zero.
    grid: (height, width) of the patches, row-major.
    num_prefix_tokens: tokens before the patches; their rows and columns of the bias are zero.
    distance_cap: largest squared distance along one axis, in patches squared.
    block_size: distances are taken between the top-left patches of blocks of this side; 1 is exact.
    """

    inverse_variance: torch.Tensor
    amplitude: torch.Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int
    distance_cap: float
    block_size: int = 1

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (batch, heads, height, tokens), amplitude included, and columns (batch, heads, width, tokens).

        The bias of query p and the key in row y, column x is `rows[y, p] * columns[x, p]`: an axis-aligned Gaussian is
        an outer product, and so is its distance cap, which acts on each axis alone. The amplitude of a prefix token is
        zero. Queries come last, so that work on all keys of many queries runs along memory.
        """
        prefix = (self.num_prefix_tokens, 0)
        row_exponent, column_exponent = F.pad(self.inverse_variance.permute(3, 0, 1, 2) * -0.5, prefix)[:, :, :, None]
        squared_rows, squared_columns = self._squared_distances()
        rows = (row_exponent * squared_rows).clamp_(min=LOWEST_EXPONENT).exp_()
        columns = (column_exponent * squared_columns).clamp_(min=LOWEST_EXPONENT).exp_()
        return rows * F.pad(self.amplitude, prefix)[:, :, None], columns

    def factor_gradients(self, rows, columns, grad_rows, grad_columns) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of `inverse_variance` and `amplitude` from those of the factors, whose memory is reused."""
        squared_rows, squared_columns = self._squared_distances()
        grad_rows, grad_columns = grad_rows.mul_(rows), grad_columns.mul_(columns)  # of the exponents
        # Rows are a multiple of the amplitude; where that is zero, so is what it was computed from by softplus.
        amplitude = self.amplitude.clamp(min=torch.finfo(self.amplitude.dtype).tiny)
        grad_amplitude = grad_rows.sum(dim=2)[..., self.num_prefix_tokens :] / amplitude
        exponents = (grad_rows.mul_(squared_rows).sum(dim=2), grad_columns.mul_(squared_columns).sum(dim=2))
        return torch.stack(exponents, dim=-1)[:, :, self.num_prefix_tokens :] * -0.5, grad_amplitude

    def bias(self) -> torch.Tensor:
        """The bias added to the attention logits, (batch, heads, tokens, tokens), prefix rows and columns zero."""
        rows, columns = (factor.transpose(-1, -2) for factor in self.factors())
        patches = (rows[..., :, None] * columns[..., None, :]).flatten(-2)
        return F.pad(patches, (self.num_prefix_tokens, 0))

    def _squared_distances(self) -> tuple[torch.Tensor, torch.Tensor]:
        """From each token to each row (height, tokens) and column (width, tokens), capped; zero for prefix tokens."""
        height, width = self.grid
        squared_rows = self._squared_axis(height)[:, :, None].expand(-1, -1, width).flatten(1)
        squared_columns = self._squared_axis(width)[:, None, :].expand(-1, height, -1).flatten(1)
        return tuple(F.pad(squared, (self.num_prefix_tokens, 0)) for squared in (squared_rows, squared_columns))

    def _squared_axis(self, length: int) -> torch.Tensor:
        """(length, length) capped squared distances along an axis, in patches squared."""
        like = self.inverse_variance
        positions = torch.arange(length, device=like.device, dtype=like.dtype)
        if self.block_size > 1:
            positions = positions // self.block_size * self.block_size
        return (positions[:, None] - positions).square().clamp(max=self.distance_cap)


class PromotedLinear(nn.Linear):
    """A linear map computed in at least float32: half types are promoted, float64 stays float64."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(states.dtype, torch.float32)
        return F.linear(states.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class LocAtGaussian(nn.Module):
    """Predicts a Gaussian for every query patch from the query itself (paper, Gaussian-augmented attention).

    Two linear maps on the head dimension, shared by all heads of a layer. With C the longer side of the native grid,
    squared: `V = C * sigmoid(variance(q) - ln(C - 1))`, which is 1 where the map gives 0; `a = softplus(amplitude(q))`.
    On another grid V is scaled by the ratio of the short sides; the cap and the epsilon stay those of the native grid.

    head_dim: channels of a head.
    native_grid: (height, width) in patches.
    coarse_training: in training mode, predict one Gaussian for each 2x2 block of patches and measure distances
        between blocks. Evaluation is always exact.
    """

    def __init__(self, head_dim: int, native_grid: tuple[int, int], coarse_training: bool = False):
        super().__init__()
        self.variance = PromotedLinear(head_dim, 2)
        self.amplitude = PromotedLinear(head_dim, 1)
        self.coarse_training = coarse_training

        longest = max(native_grid)
        self.native_short_side = min(native_grid)
        self.largest_variance = float(longest**2)
        self.variance_shift = math.log(longest**2 - 1) if longest**2 > 2 else 0.0
        self.distance_cap = min(float(longest - 1) ** 2, LARGEST_SQUARED_DISTANCE)
        self.epsilon = 0.1
        while 0.5 * (longest - 1) ** 2 / self.epsilon**2 > LARGEST_HALF_EXPONENT:
            self.epsilon *= 2

    def forward(self, query: torch.Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0) -> Gaussian:
        """query: (batch, heads, prefix + patches, head_dim), before rotary embedding and before scaling."""
        block_size = COARSE_BLOCK_SIZE if self.coarse_training and self.training else 1
        with maybe_autocast(query.device.type, enabled=False):
            variance, amplitude = (
                _map_patches(linear, query, num_prefix_tokens) for linear in (self.variance, self.amplitude)
            )
            if block_size > 1:
                # A mean over queries and a linear map commute, so three channels are averaged instead of head_dim.
                variance = _average_blocks(variance, grid, block_size)
                amplitude = _average_blocks(amplitude, grid, block_size)
            variance = self.largest_variance * torch.sigmoid(variance - self.variance_shift)
            variance = variance * (_short_side(grid) / self.native_short_side)
            amplitude = F.softplus(amplitude).squeeze(-1)
        inverse_variance = 1.0 / (variance + self.epsilon)
        return Gaussian(inverse_variance, amplitude, grid, num_prefix_tokens, self.distance_cap, block_size)


def _short_side(grid: tuple[int, int]) -> int | torch.SymInt | torch.Tensor:
    """The smaller side of a grid: a number, or in a graph that is made for any size what stands for one there.

    `min` would tie such a graph to the orientation of its example: it compares once, while the graph is made.
    """
    if any(isinstance(side, torch.Tensor) for side in grid):  # TorchScript traces sizes as tensors
        return torch.minimum(*(torch.as_tensor(side) for side in grid))
    # Compilers know only `min`, symbols only `sym_min`.
    return min(grid) if all(isinstance(side, int) for side in grid) else torch.sym_min(*grid)


def _map_patches(linear: nn.Module, query: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """`linear` of the patches of (batch, heads, prefix + patches, head_dim)."""
    if is_tracing():
        return linear(query[:, :, num_prefix_tokens:])
    # In the order in which projections lie in memory, the map needs no copy of the query.
    return linear(query.transpose(1, 2))[:, num_prefix_tokens:].transpose(1, 2)


def _average_blocks(values: torch.Tensor, grid: tuple[int, int], block_size: int) -> torch.Tensor:
    """(batch, heads, patches, channels) with each square block replaced by its mean; at the edge, of what it holds."""
    batch, heads, _, channels = values.shape
    height, width = grid
    values = values.flatten(0, 1).unflatten(1, grid).permute(0, 3, 1, 2)
    values = F.avg_pool2d(values, block_size, ceil_mode=True)
    values = values.repeat_interleave(block_size, dim=2).repeat_interleave(block_size, dim=3)[..., :height, :width]
    return values.permute(0, 2, 3, 1).reshape(batch, heads, height * width, channels)


def refine(
    tokens: torch.Tensor,
    num_heads: int,
    attention_mask: torch.Tensor | None = None,
    num_queries: int | None = None,
) -> torch.Tensor:
    """Patch representation refinement: self-attention with queries = keys = values = tokens and no parameter.

    It lets the loss on the class token reach every patch. No projection, no residual, no dropout.

    tokens: (batch, tokens, channels), channels divisible by num_heads.
    attention_mask: additive, broadcastable to (batch, heads, tokens, tokens).
    num_queries: compute only the first so many rows; the task may read no more than the class token.
    Returns (batch, num_queries or tokens, channels).
    """
    heads = tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    queries = heads
    if num_queries is not None:
        queries = heads[:, :, :num_queries]
        if attention_mask is not None and attention_mask.shape[-2] != 1:
            attention_mask = attention_mask[..., :num_queries, :]
    refined = F.scaled_dot_product_attention(queries, heads, heads, attn_mask=attention_mask)
    return refined.transpose(1, 2).flatten(2)
