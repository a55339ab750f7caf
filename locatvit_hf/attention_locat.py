"""How a Gaussian reaches the softmax: one function a back-end.

Every entry of `ALL_ATTENTION_FUNCTIONS` is written here, and no other is ever used: a library function would take the
`gaussian` keyword, drop it, and compute another model without a word.
"""

from collections.abc import Iterator

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
        scores = scores + bias
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
    """The fastest way there: the fused kernel on CUDA, blockwise on CPU, else PyTorch's attention with a written bias.

    Shapes as in `eager_attention_forward`.
    """
    if kwargs.get("output_attentions"):
        logger.warning_once("Attention maps need `attn_implementation='eager'`; 'sdpa' returns none.")
    if gaussian is not None and query.is_cuda:
        reason = unsupported_reason(query, key, value, gaussian, attention_mask, dropout)
        if reason is None:
            return fused_attention(query, key, value, gaussian, scaling), None
        logger.warning_once(f"The fused kernel is not used: {reason}")
    if gaussian is not None and attention_mask is None and dropout == 0.0 and runs_blockwise(query):
        rows, columns = gaussian.factors()
        return BlockwiseAttention.apply(query, key, value, rows, columns, gaussian.num_prefix_tokens, scaling), None
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
            patch_query = (query_index - prefix).clamp(min=0)
            patch_key = (key_index - prefix).clamp(min=0)
            bonus = rows[batch, head, patch_query, patch_key // width]
            bonus = bonus * columns[batch, head, patch_query, patch_key % width]
            score = score + torch.where((query_index >= prefix) & (key_index >= prefix), bonus, 0.0).to(score.dtype)
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


# Attention logits that are held at a time, about what a core's cache takes; fewer logits than the second number a
# sample are quicker written out at once.
BLOCK_LOGITS = 2**19
FEWEST_BLOCKWISE_LOGITS = 2**16


def runs_blockwise(query: torch.Tensor) -> bool:
    """Whether `BlockwiseAttention` serves this query (batch, heads, tokens, head_dim), and pays."""
    if is_tracing() or query.device.type != "cpu" or query.dtype not in (torch.float32, torch.float64):
        return False
    return query.shape[1] * query.shape[2] ** 2 >= FEWEST_BLOCKWISE_LOGITS


class BlockwiseAttention(torch.autograd.Function):
    """Attention with a Gaussian on CPU: logits exist only for a block of heads and queries, forward and backward.

    The Gaussian is added in place as the product of its factors, and the backward pass contracts the gradient of the
    logits with the other factor at once: nothing of size tokens x tokens is kept, padded or allocated anew.
    """

    @staticmethod
    def forward(ctx, query, key, value, rows, columns, num_prefix_tokens: int, scaling: float) -> torch.Tensor:
        """query, key, value: (batch, heads, tokens, head_dim). rows, columns: `Gaussian.factors()`.

        Returns (batch, tokens, heads, head_dim).
        """
        ctx.save_for_backward(query, key, value, rows, columns)
        ctx.num_prefix_tokens, ctx.scaling = num_prefix_tokens, scaling
        output = _tokens_first(value)
        for sample, block, _, weights in _blocks_of_weights(query, key, rows, columns, num_prefix_tokens, scaling):
            torch.bmm(weights, value[sample][block[0]], out=output[sample][block])
        return output.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, rows, columns = ctx.saved_tensors
        prefix, scaling, width = ctx.num_prefix_tokens, ctx.scaling, columns.shape[-1]
        grad_output = grad_output.transpose(1, 2)
        grad_query, grad_key, grad_value = (
            _tokens_first(query),
            _tokens_first(key).zero_(),
            _tokens_first(value).zero_(),
        )
        grad_rows, grad_columns = torch.empty_like(rows), torch.empty_like(columns)
        buffer = None
        for sample, block, patches, weights in _blocks_of_weights(query, key, rows, columns, prefix, scaling):
            heads, queries = block
            if buffer is None:
                buffer = torch.empty_like(weights).flatten()  # the first block is the largest
            gradient = grad_output[sample][block]
            _accumulate(grad_value[sample][heads], weights.transpose(1, 2), gradient)
            grad_weights = buffer[: weights.numel()].view_as(weights)
            torch.bmm(gradient, value[sample][heads].transpose(1, 2), out=grad_weights)
            grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            torch.baddbmm(
                grad_query[sample][block], grad_logits, key[sample][heads], beta=0, alpha=scaling,
                out=grad_query[sample][block],
            )  # fmt: skip
            _accumulate(grad_key[sample][heads], grad_logits.transpose(1, 2), query[sample][block], scaling)
            grad_bias = grad_logits[:, max(prefix - queries.start, 0) :, prefix:].unflatten(-1, (-1, width))
            grad_rows[sample][heads, patches] = (grad_bias @ columns[sample][heads, patches, :, None]).squeeze(-1)
            grad_columns[sample][heads, patches] = (rows[sample][heads, patches, None, :] @ grad_bias).squeeze(-2)
        return grad_query, grad_key, grad_value, grad_rows, grad_columns, None, None


def _blocks_of_weights(
    query, key, rows, columns, num_prefix_tokens: int, scaling: float
) -> Iterator[tuple[int, tuple[slice, slice], slice, torch.Tensor]]:
    """Attention weights a block at a time, in one buffer: index of the sample, (heads, queries), the patches among the
    queries, and (heads, queries, tokens) weights that are valid until the next block.
    """
    batch, num_heads, tokens, _ = query.shape
    heads_at_once = max(1, min(num_heads, BLOCK_LOGITS // tokens**2))
    queries_at_once = tokens
    if heads_at_once == 1:
        num_blocks = -(-tokens * tokens // BLOCK_LOGITS)
        queries_at_once = -(-tokens // num_blocks)
    buffer = query.new_empty(heads_at_once * queries_at_once * tokens)
    for sample in range(batch):
        for head in range(0, num_heads, heads_at_once):
            for first in range(0, tokens, queries_at_once):
                heads = slice(head, min(head + heads_at_once, num_heads))
                queries = slice(first, min(first + queries_at_once, tokens))
                shape = (heads.stop - heads.start, queries.stop - queries.start, tokens)
                logits = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
                keys = key[sample, heads].transpose(1, 2)
                torch.baddbmm(logits, query[sample, heads, queries], keys, beta=0, alpha=scaling, out=logits)
                patches = slice(max(first - num_prefix_tokens, 0), max(queries.stop - num_prefix_tokens, 0))
                bias = logits[:, max(num_prefix_tokens - first, 0) :, num_prefix_tokens:]
                bias.unflatten(-1, (-1, columns.shape[-1])).addcmul_(
                    rows[sample, heads, patches, :, None], columns[sample, heads, patches, None, :]
                )
                yield sample, (heads, queries), patches, torch.softmax(logits, dim=-1, out=logits)


def _tokens_first(states: torch.Tensor) -> torch.Tensor:
    """Room for (batch, heads, tokens, head_dim) that lies as (batch, tokens, heads, head_dim) in memory."""
    return states.new_empty(states.transpose(1, 2).shape).transpose(1, 2)


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float = 1.0) -> None:
    """total += factor * left @ right, in place also where `total` is a strided view."""
    torch.baddbmm(total, left, right, alpha=factor, out=total)


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


__all__ = ["ALL_ATTENTION_FUNCTIONS", "eager_attention_forward", "flex_attention_forward", "sdpa_attention_forward"]
