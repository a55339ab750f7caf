"""How a Gaussian reaches the softmax: one function a back-end.

Every entry of `ALL_ATTENTION_FUNCTIONS` is written here, and no other is ever used: a library function would take the
`gaussian` keyword, drop it, and compute another model without a word.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface
from transformers.utils import logging

from .locat import Gaussian

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
    """PyTorch's fused attention with the bias as its floating-point mask. Shapes as in `eager_attention_forward`."""
    if kwargs.get("output_attentions"):
        logger.warning_once("Attention maps need `attn_implementation='eager'`; 'sdpa' returns none.")
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
                f"attn_implementation={attn_implementation!r} cannot add the Gaussian to the attention logits; "
                f"use one of {', '.join(sorted(self._local_mapping))}."
            )
        return self._local_mapping[attn_implementation]


ALL_ATTENTION_FUNCTIONS = LocAtAttentionInterface()
ALL_ATTENTION_FUNCTIONS["eager"] = eager_attention_forward
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward
ALL_ATTENTION_FUNCTIONS["flex_attention"] = flex_attention_forward


__all__ = ["ALL_ATTENTION_FUNCTIONS", "eager_attention_forward", "flex_attention_forward", "sdpa_attention_forward"]
