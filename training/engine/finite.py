"""Whether gradients and weights are finite, told without a transfer to the host for every tensor."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def gradient_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> torch.Tensor:
    """Euclidean norm of all gradients as one vector, over the shards of all processes; a float32 scalar.

    It is not finite where a gradient is not, and where the sum of their squares exceeds float32.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    groups = [[g for g in gradients if isinstance(g, DTensor) == sharded] for sharded in (False, True)]
    norms = [get_total_norm(group) for group in groups if group]
    norms = [(norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device, torch.float32) for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients by a number."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether every value of the tensors is finite; of sharded ones, of the shards of this process."""
    own = [own_shard(tensor) for tensor in tensors if tensor.is_floating_point()]
    own = [tensor for tensor in own if tensor.numel()]
    return not own or math.isfinite(get_total_norm(own, math.inf).item())


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor with a value that is not finite, if there is one in this process."""
    return next((name for name, tensor in tensors if not are_finite([tensor])), None)


def tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested containers."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(part)


def own_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is in this process: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
