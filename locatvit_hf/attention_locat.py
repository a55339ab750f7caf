# SPDX-License-Identifier: MIT
"""How masks and Gaussians reach the softmax: one function per backend, and the table of backends.

Only functions of the table are ever used: one of the library would take the `gaussian` keyword, drop it, and compute
another model without a word.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface
from transformers.utils import logging

from .locat import Gaussian

logger = logging.get_logger(__name__)


def additive_attention_mask(
    attention_mask: torch.Tensor | None, num_heads: int, dtype: torch.dtype, batch_size: int, num_tokens: int
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


def additive_bias(
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
    """Attention step by step, softmax in at least float32; the only backend that returns the attention maps.

    query, key, value: (batch, heads, tokens, head_dim). attention_mask: additive, broadcastable to
    (batch, heads, tokens, tokens). Returns (batch, tokens, heads, head_dim) and (batch, heads, tokens, tokens).
    """
    scores = query @ key.transpose(-2, -1) * scaling
    bias = additive_bias(query, attention_mask, gaussian)
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
    """PyTorch's attention with the Gaussians materialized as its mask. Shapes as in `eager_attention_forward`."""
    if kwargs.get("output_attentions"):
        logger.warning_once("Attention maps need `attn_implementation='eager'`; 'sdpa' returns none.")
    bias = additive_bias(query, attention_mask, gaussian)
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
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling, dropout, gaussian, **kwargs)
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
            bias = rows[batch, head, patch // width, query_index] * columns[batch, head, patch % width, query_index]  # type: ignore[index] # set with the Gaussian
            score = score + torch.where(key_index >= prefix, bias, 0.0).to(score.dtype)
        if attention_mask is not None:
            score = score + attention_mask[batch, head, query_index, key_index]
        return score

    attend = torch.compile(flex_attention) if query.device.type == "cuda" else flex_attention
    output = attend(query, key, value, score_mod=add_bias, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


class LocAtAttentionInterface(AttentionInterface):
    """The table of backends that apply the Gaussian. A name outside it is refused, never looked up elsewhere.

    The functions of this file serve every family. A family names further ones of its own, or others for the same name,
    where it makes its table. To add one for all: `LocAtAttentionInterface.register("name", function)`, with the
    signature of `eager_attention_forward`; for one family: `ALL_ATTENTION_FUNCTIONS["name"] = function` of its module.
    """

    _global_mapping = {
        "eager": eager_attention_forward,
        "sdpa": sdpa_attention_forward,
        "flex_attention": flex_attention_forward,
    }

    def __init__(self, **functions):
        super().__init__()
        self.update(functions)

    def get_interface(self, attn_implementation: str | None, default=None):
        """The function of that name; ValueError where there is none that adds the Gaussian."""
        attn_implementation = attn_implementation or "eager"
        if attn_implementation not in self:
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is not known to add the Gaussian to the attention "
                f"logits; use one of {', '.join(sorted(self))}."
            )
        return self[attn_implementation]
