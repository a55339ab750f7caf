"""How masks and Gaussians reach the softmax: one function a back-end.

Every entry of `ALL_ATTENTION_FUNCTIONS` is written here, and no other is ever used: a library function would take the
`gaussian` keyword, drop it, and compute another model without a word.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface
from transformers.utils import is_tracing, logging

from .locat import Gaussian
from .triton_locat import fused_attention, unsupported_reason

logger = logging.get_logger(__name__)


def additive_attention_mask(
    attention_mask: torch.Tensor | None, batch_size: int, num_tokens: int, num_heads: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """An additive mask of `dtype`, broadcastable to (batch, heads, tokens, tokens).

    attention_mask: (batch, tokens) of bool or 0/1 over the keys, or anything broadcastable to (batch, heads, tokens,
        tokens): bool or integer (true attends), or additive float of 3 or 4 axes. Tokens count the prefix tokens.
    Raises ValueError for any other shape.
    """
    if attention_mask is None:
        return None
    lowest = torch.finfo(dtype).min
    shape = tuple(attention_mask.shape)
    axes = (3, 4) if attention_mask.is_floating_point() else (0, 1, 2, 3, 4)
    sizes = zip(shape[::-1], (num_tokens, num_tokens, num_heads, batch_size), strict=False)
    if shape == (batch_size, num_tokens):
        attention_mask = attention_mask.bool()[:, None, None, :]
    elif len(shape) not in axes or any(size not in (1, allowed) for size, allowed in sizes):
        raise ValueError(
            f"attention_mask must be (batch, tokens) = ({batch_size}, {num_tokens}), or broadcast to "
            f"(batch, heads, tokens, tokens), prefix tokens counted, floats with 3 or 4 axes; got {shape}."
        )
    attention_mask = attention_mask[(None,) * (4 - attention_mask.ndim)]
    if attention_mask.is_floating_point():
        # Infinities are made finite, so that a query whose keys are all masked gets a mean and not a NaN.
        return attention_mask.to(dtype).clamp(min=lowest)
    blocked = ~attention_mask.bool()
    return torch.zeros_like(blocked, dtype=dtype).masked_fill(blocked, lowest)


def _additive_bias(
    query: torch.Tensor, attention_mask: torch.Tensor | None, gaussian: Gaussian | None
) -> torch.Tensor | None:
    """What is added to the attention logits, in the type of the query; None where nothing is."""
    if gaussian is None:
        return attention_mask
    bias = gaussian.bias().to(query.dtype)
    return bias if attention_mask is None else bias + attention_mask


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    gaussian: Gaussian | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Written out, softmax in at least float32; the only back-end that returns the attention maps.

    query, key, value: (batch, heads, tokens, head_dim). attention_mask: additive, broadcastable to
    (batch, heads, tokens, tokens). Returns (batch, tokens, heads, head_dim) and (batch, heads, tokens, tokens).
    """
    scores = query @ key.transpose(-2, -1) * scaling
    bias = _additive_bias(query, attention_mask, gaussian)
    if bias is not None:
        # A mask's lowest number and a negative score are -inf together in half precision.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + bias
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    output = F.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


def sdpa_attention_forward(
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
    """PyTorch's attention with a written bias; on CPU blockwise, where that pays.

    Shapes as in `eager_attention_forward`. The fused kernel is never chosen here: it is asked for by its name,
    'locat_fused', until a table measured on a GPU (`python -m benchmarks.gpu_check`) says that it is right and faster.
    """
    if kwargs.get("output_attentions"):
        logger.warning_once("Attention maps need `attn_implementation='eager'`; 'sdpa' returns none.")
    if gaussian is not None and attention_mask is None and dropout == 0.0 and runs_blockwise(query):
        scalars = gaussian.inverse_variance, gaussian.amplitude
        return BlockwiseAttention.apply(query, key, value, *scalars, gaussian, scaling), None
    bias = _additive_bias(query, attention_mask, gaussian)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def flex_attention_forward(
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
    """FlexAttention: the two factors are multiplied inside the kernel and the bias never exists as a tensor.

    Shapes as in `eager_attention_forward`. It has no dropout, and on CPU no backward: there 'sdpa' steps in.
    """
    needs_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (query, key, value, attention_mask, gaussian.amplitude if gaussian else None)
    )
    if dropout > 0.0 or (needs_gradient and query.device.type == "cpu"):
        logger.warning_once("'flex_attention' has no dropout, and on CPU no backward pass: using 'sdpa' here.")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, gaussian=gaussian, **kwargs
        )
    tokens = query.shape[2]
    if attention_mask is not None:
        attention_mask = attention_mask.expand(query.shape[0], query.shape[1], tokens, tokens)
    # Set in any case: the compiler reads every name of a closure.
    rows, columns, prefix, width = None, None, 0, 1
    if gaussian is not None:
        rows, columns = gaussian.factors()
        prefix, width = gaussian.num_prefix_tokens, gaussian.grid[1]

    def add_bias(score, batch, head, query_index, key_index):
        if gaussian is not None:
            patch = (key_index - prefix).clamp(min=0)
            bonus = rows[batch, head, patch // width, query_index] * columns[batch, head, patch % width, query_index]
            score = score + torch.where(key_index >= prefix, bonus, 0.0).to(score.dtype)
        if attention_mask is not None:
            score = score + attention_mask[batch, head, query_index, key_index]
        return score

    attend = torch.compile(flex_attention) if query.device.type == "cuda" else flex_attention
    output = attend(query, key, value, score_mod=add_bias, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def fused_attention_forward(
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
    """The Triton kernel, which never writes the bias out; where it cannot run, 'sdpa' and one line that says why.

    Shapes as in `eager_attention_forward`.
    """
    reason = unsupported_reason(query, key, value, gaussian, attention_mask, dropout)
    if reason is None:
        return fused_attention(query, key, value, gaussian, scaling), None
    logger.warning_once(f"'locat_fused' is not used: {reason}")
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, gaussian=gaussian, **kwargs
    )


# Attention logits that are held at a time; fewer logits than the second number are quicker written out at once.
BLOCK_LOGITS = 2**20
FEWEST_BLOCKWISE_LOGITS = 2**16


def runs_blockwise(query: torch.Tensor) -> bool:
    """Whether `BlockwiseAttention` serves this query (batch, heads, tokens, head_dim), and pays."""
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.float64) or is_tracing(query):
        return False
    batch, heads, tokens, _ = query.shape
    return batch * heads * tokens**2 >= FEWEST_BLOCKWISE_LOGITS


class BlockwiseAttention(torch.autograd.Function):
    """Attention with a Gaussian on CPU: logits exist only for a block of maps and queries, forward and backward.

    A map is one head of one sample. Logits are written with the keys first, (maps, keys, queries), so that the product
    of the factors and all that follows runs along memory; nothing of size tokens x tokens is kept, padded or allocated
    anew, and the backward pass contracts the gradient of the logits with the other factor at once.
    """

    @staticmethod
    def forward(ctx, query, key, value, inverse_variance, amplitude, gaussian: Gaussian, scaling: float):
        """query, key, value: (batch, heads, tokens, head_dim). The two tensors of the Gaussian, and the Gaussian.

        Returns (batch, tokens, heads, head_dim).
        """
        rows, columns = gaussian.factors()
        output, sums = value.new_empty(value.transpose(1, 2).shape), query.new_empty(query.shape[:3])
        largest, ctx.is_shifted = torch.zeros_like(sums), False
        ctx.save_for_backward(query, key, value, inverse_variance, amplitude, rows, columns, output, sums, largest)
        ctx.gaussian, ctx.scaling = gaussian._replace(inverse_variance=None, amplitude=None), scaling
        maps_at_once, queries_at_once, buffer = _block_of(query)
        of_maps = (key, value, query, output.transpose(1, 2), sums, largest, rows, columns)
        for key, value, *of_queries in _by_maps(of_maps, maps_at_once):
            for block in _by_queries(of_queries[:4], of_queries[4:], queries_at_once):
                query, attended, sums, largest, rows, columns = block
                weights = _write_logits(buffer, query, key, rows, columns, scaling).exp_()
                torch.sum(weights, dim=1, out=sums)
                # Taking off the largest logit first would cost two passes. A sum in range proves that no exponential
                # overflowed, and that what underflowed is nothing beside it; where it is not, do as softmax does.
                if not _is_in_range(sums):
                    ctx.is_shifted = True
                    weights = _write_logits(buffer, query, key, rows, columns, scaling)
                    torch.amax(weights, dim=1, out=largest)
                    torch.sum(weights.sub_(largest[:, None]).exp_(), dim=1, out=sums)
                torch.div(torch.bmm(weights.transpose(1, 2), value), sums[..., None], out=attended)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *scalars, rows, columns, output, sums, largest = ctx.saved_tensors
        # With weights w = exp(logits) and p = w / sum(w), the gradient of softmax is p * (g - sum(p * g)): the sum of
        # weights divides g here instead of every weight, and sum(p * g) is the product with the output.
        gradient = grad_output.transpose(1, 2) / sums[..., None]
        expected = (gradient * output.transpose(1, 2)).sum(dim=-1)
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        grad_rows, grad_columns = torch.empty_like(rows), torch.empty_like(columns)
        maps_at_once, queries_at_once, buffer = _block_of(query)
        second_buffer = torch.empty_like(buffer)
        of_maps = (key, value, *gradients[1:], query, gradient, expected, largest, gradients[0])
        for block in _by_maps((*of_maps, rows, columns, grad_rows, grad_columns), maps_at_once):
            key, value, grad_key, grad_value, *of_queries = block
            for block in _by_queries(of_queries[:5], of_queries[5:], queries_at_once):
                query, gradient, expected, largest, grad_query, *factors = block
                weights = _write_logits(buffer, query, key, *factors[:2], ctx.scaling)
                weights = (weights.sub_(largest[:, None]) if ctx.is_shifted else weights).exp_()
                grad_value += torch.bmm(weights, gradient)
                grad_logits = second_buffer[: weights.numel()].view_as(weights)
                torch.bmm(value, gradient.transpose(1, 2), out=grad_logits).sub_(expected[:, None]).mul_(weights)
                grad_key.add_(torch.bmm(grad_logits, query), alpha=ctx.scaling)
                torch.mul(torch.bmm(grad_logits.transpose(1, 2), key), ctx.scaling, out=grad_query)
                # The weights have served: their memory takes the products with a factor before these are summed.
                _contract(grad_logits, weights, *factors)
        gaussian = ctx.gaussian._replace(inverse_variance=scalars[0], amplitude=scalars[1])
        return *gradients, *gaussian.factor_gradients(rows, columns, grad_rows, grad_columns), None, None


def _block_of(query: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    """Maps and queries of a block of this query (batch, heads, tokens, head_dim), and memory for its logits."""
    batch, heads, tokens, _ = query.shape
    maps_at_once = min(max(1, BLOCK_LOGITS // tokens**2), max(batch, heads))
    queries_at_once = -(-tokens // max(1, round(tokens**2 / BLOCK_LOGITS)))
    return maps_at_once, queries_at_once, query.new_empty(maps_at_once * tokens * queries_at_once)


def _by_maps(tensors: Sequence[torch.Tensor], size: int) -> Iterator[Sequence[torch.Tensor]]:
    """Tensors (batch, heads, ...) cut down to `size` maps (maps, ...), map after map: views, nothing is copied."""
    # Maps lie evenly in memory along the batch or along the heads, not along both.
    along = 1 if tensors[0].shape[0] >= tensors[0].shape[1] else 0
    for group in zip(*(tensor.unbind(along) for tensor in tensors), strict=True):
        yield from [group] if len(group[0]) <= size else zip(*(t.split(size) for t in group), strict=True)


def _by_queries(tensors: Sequence, factors: Sequence, size: int) -> Iterator[Sequence[torch.Tensor]]:
    """Of tensors (maps, tokens, ...) and factors (maps, height or width, tokens), `size` tokens at a time."""
    if tensors[0].shape[1] <= size:
        return iter([(*tensors, *factors)])
    return zip(*(t.split(size, dim=1) for t in tensors), *(f.split(size, dim=2) for f in factors), strict=True)


def _write_logits(buffer, query, key, rows, columns, scaling: float) -> torch.Tensor:
    """scaling * key @ query + bias into `buffer`, (maps, keys, queries)."""
    shape = (key.shape[0], key.shape[1], query.shape[1])
    logits = buffer[: math.prod(shape)].view(shape)
    torch.baddbmm(logits, key, query.transpose(1, 2), beta=0, alpha=scaling, out=logits)
    _biased(logits, rows, columns).addcmul_(rows[:, :, None], columns[:, None])
    return logits


def _contract(grad_logits, products, rows, columns, grad_rows, grad_columns) -> None:
    """The gradient of each factor: that of the bias times the other factor, summed. `products` is overwritten."""
    grad_bias, products = _biased(grad_logits, rows, columns), _biased(products, rows, columns)
    torch.sum(torch.mul(grad_bias, columns[:, None], out=products), dim=2, out=grad_rows)
    torch.sum(torch.mul(grad_bias, rows[:, :, None], out=products), dim=1, out=grad_columns)


def _biased(logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The keys of (maps, keys, queries) that a bias reaches, as (maps, key rows, key columns, queries)."""
    height, width = rows.shape[1], columns.shape[1]
    return logits[:, -height * width :].unflatten(1, (height, width))


def _is_in_range(sums: torch.Tensor) -> bool:
    """Whether sums of exponentials are far from zero and from overflow; false for nan."""
    smallest, largest = (value.item() for value in torch.aminmax(sums))
    return smallest > 1e-20 and largest < 1e20  # which leaves room for products with the values


class LocAtAttentionInterface(AttentionInterface):
    """The back-ends that apply the Gaussian. A name outside this table is refused, never looked up elsewhere.

    To add one: `ALL_ATTENTION_FUNCTIONS["name"] = function`, with the signature of `eager_attention_forward`.
    """

    _global_mapping: dict = {}

    def get_interface(self, attn_implementation: str | None, default=None):
        """The function of that name; ValueError where it is not one of ours."""
        attn_implementation = attn_implementation or "eager"
        if attn_implementation not in self._local_mapping:
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is not known to add the Gaussian to the attention "
                f"logits; use one of {', '.join(sorted(self._local_mapping))}."
            )
        return self._local_mapping[attn_implementation]


ALL_ATTENTION_FUNCTIONS = LocAtAttentionInterface()
ALL_ATTENTION_FUNCTIONS["eager"] = eager_attention_forward
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward
ALL_ATTENTION_FUNCTIONS["flex_attention"] = flex_attention_forward
ALL_ATTENTION_FUNCTIONS["locat_fused"] = fused_attention_forward
# Makes the name legal in transformers; which function runs is decided by the table above.
AttentionInterface.register("locat_fused", fused_attention_forward)


__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "additive_attention_mask",
    "eager_attention_forward",
    "flex_attention_forward",
    "sdpa_attention_forward",
]
