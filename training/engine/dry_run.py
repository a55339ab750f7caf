"""What a run would be like, from one small forward and backward pass: `--dry_run`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table
from torch import nn

MEBIBYTE = 2**20


class ActivationMeter:
    """Counts the bytes that a forward pass keeps for its backward pass, parameters and buffers apart."""

    def __init__(self, model: nn.Module):
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.storages: dict[int, int] = {}

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Counts inside this block."""
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor):
            yield

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested containers; of a sharded tensor those of its share."""
    if isinstance(content, torch.Tensor):
        content = content.to_local() if hasattr(content, "to_local") else content
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(tensor_bytes(part) for part in content.values())
    if isinstance(content, list | tuple):
        return sum(tensor_bytes(part) for part in content)
    return 0


def model_table(model: nn.Module) -> Table:
    """Parameters of the model and of its parts, two levels deep."""
    table = Table("part", "class", "parameters", "trained", title=type(model).__name__, title_justify="left", box=None)
    rows = [("all", model)]
    for name, child in model.named_children():
        rows.append((name, child))
        rows += [(f"  {name}.{part}", grandchild) for part, grandchild in child.named_children()]
    for name, module in rows:
        counts = [
            sum(p.numel() for p in module.parameters() if p.requires_grad or not trained) for trained in (False, True)
        ]
        table.add_row(name, type(module).__name__, *(f"{count:,}" for count in counts))
    return table


def memory_table(entries: dict[str, int]) -> Table:
    """Bytes by what they hold, and their sum."""
    table = Table("memory of a process", "MiB", title_justify="left", box=None)
    for name, size in {**entries, "together": sum(entries.values())}.items():
        table.add_row(name, f"{size / MEBIBYTE:,.1f}")
    return table
