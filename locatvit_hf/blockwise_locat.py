# SPDX-License-Identifier: MIT
"""Attention with a Gaussian on CPU, a block of logits at a time, forward and backward."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import is_tracing

from .attention_locat import sdpa_attention_forward
from .locat import Gaussian

# Attention logits that are held at a time; fewer logits than the second number are quicker materialized at once.
BLOCK_LOGITS = 2**20
FEWEST_BLOCKWISE_LOGITS = 2**16


def blockwise_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    gaussian: Gaussian | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`BlockwiseAttention` where it serves, else PyTorch's attention. Shapes as in `eager_attention_forward`."""
    if gaussian is not None and attention_mask is None and dropout == 0.0 and runs_blockwise(query):
        parameters = gaussian.inverse_variance, gaussian.amplitude
        return BlockwiseAttention.apply(query, key, value, *parameters, gaussian, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling, dropout, gaussian, **kwargs)


def runs_blockwise(query: torch.Tensor) -> bool:
    """Whether `BlockwiseAttention` serves this query (batch, heads, tokens, head_dim), and pays.

    It writes into memory of its own and has one derivative: the transforms of `torch.func` need PyTorch's attention.
    """
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.float64):
        return False
    if is_tracing(query) or torch._C._are_functorch_transforms_active():
        return False
    batch, heads, tokens, _ = query.shape
    return batch * heads * tokens**2 >= FEWEST_BLOCKWISE_LOGITS


class BlockwiseAttention(torch.autograd.Function):
    """Attention whose logits exist only for a block of slices and queries; a slice is one head of one sample.

    Logits are written with the keys first, (slices, keys, queries), so that the product of the factors and all that
    follows runs along memory; nothing of size tokens x tokens is kept, padded or allocated anew, and the backward pass
    contracts the gradient of the logits with the other factor at once.
    """

    @staticmethod
    def forward(ctx, query, key, value, inverse_variance, amplitude, gaussian: Gaussian, scaling: float):
        """query, key, value: (batch, heads, tokens, head_dim). The two tensors of the Gaussian, and the Gaussian.

        Returns (batch, tokens, heads, head_dim).
        """
        rows, columns = gaussian.factors()
        output, sums = value.new_empty(value.transpose(1, 2).shape), query.new_empty(query.shape[:3])
        largest, is_shifted = torch.zeros_like(sums), False
        blocks = _Blocks(query)
        per_query = (query, output.transpose(1, 2), sums, largest)
        for (k, v), queries, factors in blocks.walk((key, value), per_query, (rows, columns)):
            q, attended, total, maximum = queries
            weights = _write_logits(blocks.buffer, q, k, scaling, *factors).exp_()
            torch.sum(weights, dim=1, out=total)
            # Taking off the largest logit first would cost two passes. A sum in range proves that no exponential
            # overflowed, and that what underflowed is nothing beside it; where it is not, do as softmax does.
            smallest, greatest = (value.item() for value in torch.aminmax(total))
            if not (smallest > 1e-20 and greatest < 1e20):  # nan, or no room left for products with the values
                is_shifted = True
                weights = _write_logits(blocks.buffer, q, k, scaling, *factors)
                torch.amax(weights, dim=1, out=maximum)
                torch.sum(weights.sub_(maximum[:, None]).exp_(), dim=1, out=total)
            torch.div(torch.bmm(weights.transpose(1, 2), v), total[..., None], out=attended)
        ctx.save_for_backward(query, key, value, inverse_variance, amplitude, rows, columns, output, sums, largest)
        ctx.geometry, ctx.scaling = gaussian._replace(inverse_variance=None, amplitude=None), scaling
        ctx.is_shifted = is_shifted
        return output

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, inverse_variance, amplitude, rows, columns, output, sums, largest = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True: what follows has no derivative of its own
            return *_differentiable_backward(ctx, grad_output, *ctx.saved_tensors[:5]), None, None
        # With weights w = exp(logits) and p = w / sum(w), the gradient of softmax is p * (g - sum(p * g)): the sum of
        # weights divides g here instead of every weight, and sum(p * g) is the product with the output.
        gradient = grad_output.transpose(1, 2) / sums[..., None]
        expected = (gradient * output.transpose(1, 2)).sum(dim=-1)
        grad_query, grad_key, grad_value = (torch.zeros_like(tensor) for tensor in (query, key, value))
        grad_rows, grad_columns = torch.empty_like(rows), torch.empty_like(columns)
        blocks = _Blocks(query)
        second_buffer = torch.empty_like(blocks.buffer)
        per_key = (key, value, grad_key, grad_value)
        per_query = (query, gradient, expected, largest, grad_query)
        all_factors = (rows, columns, grad_rows, grad_columns)
        for (k, v, grad_k, grad_v), queries, factors in blocks.walk(per_key, per_query, all_factors):
            q, g, mean, maximum, grad_q = queries
            weights = _write_logits(blocks.buffer, q, k, ctx.scaling, *factors[:2])
            weights = (weights.sub_(maximum[:, None]) if ctx.is_shifted else weights).exp_()
            grad_v += torch.bmm(weights, g)
            grad_logits = second_buffer[: weights.numel()].view_as(weights)
            torch.bmm(v, g.transpose(1, 2), out=grad_logits).sub_(mean[:, None]).mul_(weights)
            grad_k.add_(torch.bmm(grad_logits, q), alpha=ctx.scaling)
            torch.mul(torch.bmm(grad_logits.transpose(1, 2), k), ctx.scaling, out=grad_q)
            # The weights have served: their memory takes the products with a factor before these are summed.
            _contract(grad_logits, weights, *factors)
        gaussian = ctx.geometry._replace(inverse_variance=inverse_variance, amplitude=amplitude)
        grad_gaussian = gaussian.factor_gradients(rows, columns, grad_rows, grad_columns)
        return grad_query, grad_key, grad_value, *grad_gaussian, None, None


def _differentiable_backward(ctx, grad_output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the five inputs of `BlockwiseAttention`, from the formula, for a second derivative."""
    # Views: the Gaussian is computed from the query, and what it adds to the gradient of the query is not ours to add.
    views = [tensor.view_as(tensor) for tensor in inputs]
    query, key, value, inverse_variance, amplitude = views
    gaussian = ctx.geometry._replace(inverse_variance=inverse_variance, amplitude=amplitude)
    weights = F.softmax(query @ key.transpose(-2, -1) * ctx.scaling + gaussian.bias(), dim=-1)
    needed = [view for view, is_needed in zip(views, ctx.needs_input_grad, strict=False) if is_needed]
    found = iter(torch.autograd.grad((weights @ value).transpose(1, 2), needed, grad_output, create_graph=True))
    return tuple(next(found) if is_needed else None for is_needed in ctx.needs_input_grad[:5])


class _Blocks:
    """How a query (batch, heads, tokens, head_dim) is cut, and `buffer`, flat memory for the logits of a block."""

    def __init__(self, query: torch.Tensor):
        batch, heads, tokens, _ = query.shape
        self.num_slices = min(max(1, BLOCK_LOGITS // tokens**2), max(batch, heads))
        self.num_queries = -(-tokens // max(1, round(tokens**2 / BLOCK_LOGITS)))
        self.buffer = query.new_empty(self.num_slices * tokens * self.num_queries)

    def walk(self, per_key: Sequence, per_query: Sequence, factors: Sequence) -> Iterator[tuple]:
        """The parts of three groups of tensors for each block, with slices in the place of batch and heads: views.

        Tensors `per_key` are (batch, heads, keys, ...), and a block has them whole. Those `per_query` are (batch,
        heads, queries, ...), and `factors` (batch, heads, height or width, queries).
        """
        tensors = (*per_key, *per_query, *factors)
        # Slices lie evenly in memory along the batch or along the heads, not along both.
        along = 1 if tensors[0].shape[0] >= tensors[0].shape[1] else 0
        first_query, first_factor = len(per_key), len(per_key) + len(per_query)
        for group in zip(*(tensor.unbind(along) for tensor in tensors), strict=True):
            for slices in zip(*(tensor.split(self.num_slices) for tensor in group), strict=True):
                whole, cut = slices[:first_query], slices[first_query:first_factor]
                pieces = [tensor.split(self.num_queries, dim=1) for tensor in cut]
                pieces += [tensor.split(self.num_queries, dim=2) for tensor in slices[first_factor:]]
                for block in zip(*pieces, strict=True):
                    yield whole, block[: len(per_query)], block[len(per_query) :]


def _write_logits(buffer, query, key, scaling: float, rows, columns) -> torch.Tensor:
    """scaling * key @ query + bias into `buffer`, (slices, keys, queries)."""
    shape = (key.shape[0], key.shape[1], query.shape[1])
    logits = buffer[: math.prod(shape)].view(shape)
    torch.baddbmm(logits, key, query.transpose(1, 2), beta=0, alpha=scaling, out=logits)
    _on_grid(logits, rows, columns).addcmul_(rows[:, :, None], columns[:, None])
    return logits


def _contract(grad_logits, products, rows, columns, grad_rows, grad_columns) -> None:
    """The gradient of each factor: that of the bias times the other factor, summed. `products` is overwritten."""
    grad_bias, products = _on_grid(grad_logits, rows, columns), _on_grid(products, rows, columns)
    torch.sum(torch.mul(grad_bias, columns[:, None], out=products), dim=2, out=grad_rows)
    torch.sum(torch.mul(grad_bias, rows[:, :, None], out=products), dim=1, out=grad_columns)


def _on_grid(logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The patch keys of (slices, keys, queries), which a bias reaches, as (slices, rows, columns, queries)."""
    height, width = rows.shape[1], columns.shape[1]
    return logits[:, -height * width :].unflatten(1, (height, width))
