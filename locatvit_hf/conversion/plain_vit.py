"""A plain ViT, whatever library it is of: what `from_vit` starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration_locatvit import LocAtViTConfig
from .key_mapping import KeyTable


@dataclass
class PlainViT:
    """A plain ViT, whatever library it is of.

    Attributes:
        description: Its subject in messages.
        fields: Of `LocAtViTConfig` for the same function.
        state: Its tensors, head left out.
        key_table: configuration -> its names -> ours.
        position_name: The tensor of its position embeddings.
        resample: (configuration, (height, width) of the new native grid) -> its position embeddings there, as the
            source itself would compute them.
        head: Weight and bias of a linear head on what our classifier reads, or None.
        missing_head_reason: Why there is none, for a sentence.
    """

    description: str
    fields: dict[str, Any]
    state: dict[str, torch.Tensor]
    key_table: Callable[[LocAtViTConfig], KeyTable]
    position_name: str
    resample: Callable[[LocAtViTConfig, tuple[int, int]], torch.Tensor]
    head: dict[str, torch.Tensor] | None = None
    missing_head_reason: str = "has no classifier"


__all__ = ["PlainViT"]
