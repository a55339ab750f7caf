"""Tensor names: a table of two columns, and the bookkeeping that leaves no tensor unaccounted for."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from .errors import ConversionError

# Name in the source -> our names. A tensor with several names of ours is split into equal parts along its first axis.
KeyTable = dict[str, tuple[str, ...]]

NAMES_IN_A_MESSAGE = 3


def expand(modules: Mapping[str, str | tuple[str, ...]], num_layers: int) -> KeyTable:
    """Writes `{i}` out for every layer, and both parameters of each module.

    A row "norm" stands for "norm.weight" and "norm.bias"; a row whose name starts with "=" is a parameter itself.
    """
    table: KeyTable = {}
    for source, ours in modules.items():
        ours = (ours,) if isinstance(ours, str) else ours
        endings = ("",) if source.startswith("=") else (".weight", ".bias")
        source = source.removeprefix("=")
        for i in range(num_layers) if "{i}" in source else (0,):
            for ending in endings:
                table[source.format(i=i) + ending] = tuple(name.format(i=i) + ending for name in ours)
    return table


def without(table: KeyTable, absent: Mapping[str, bool]) -> KeyTable:
    """The rows of a table but those whose source name contains a key of `absent` whose value is true."""
    gone = [part for part, is_absent in absent.items() if is_absent]
    return {source: ours for source, ours in table.items() if not any(part in source for part in gone)}


def restrict(table: KeyTable, names: Iterable[str], prefix: str = "") -> KeyTable:
    """The rows whose tensors a model has. `names` are the model's, without `prefix` where the table writes it."""
    names = set(names)
    restricted: KeyTable = {}
    for source, ours in table.items():
        stripped = tuple(name.removeprefix(prefix) for name in ours)
        if all(name in names for name in stripped):
            restricted[source] = stripped
    return restricted


def source_shapes(table: KeyTable, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor of the source must have, from the shapes of ours."""
    result = {}
    for source, ours in table.items():
        first, *rest = shapes[ours[0]] or (1,)
        result[source] = (first * len(ours), *rest) if shapes[ours[0]] else ()
    return result


def rename(
    state: Mapping[str, torch.Tensor], table: KeyTable, shapes: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Our state dict from the source's.

    Args:
        state: Name in the source -> tensor.
        table: Every tensor that the source must hold, and no other. Rows with the same names of ours are copies of one
            shared tensor: one of them is enough, and those that are there must agree.
        shapes: Name -> shape of each of our tensors in the table.

    Raises:
        ConversionError: Tensors are missing, unknown, of another shape or not finite; the message names them.
    """
    found = {ours for name, row in table.items() if name in state for ours in row}
    missing = [name for name, row in table.items() if name not in state and not found.issuperset(row)]
    unknown = [name for name in state if name not in table]
    if missing or unknown:
        problems = []
        if missing:
            problems.append(f"lacks {_listed(missing)}")
        if unknown:
            problems.append(f"holds {_listed(unknown)}, for which the model has no place")
        raise ConversionError(f"The checkpoint {' and '.join(problems)}.")
    renamed: dict[str, torch.Tensor] = {}
    for source, shape in source_shapes(table, shapes).items():
        if source not in state:
            continue
        tensor = state[source]
        if tuple(tensor.shape) != shape:
            raise ConversionError(
                f"The tensor {source} has shape {tuple(tensor.shape)}, but the configuration asks for {shape}."
            )
        if not torch.isfinite(tensor).all():
            raise ConversionError(f"The tensor {source} holds numbers that are not finite.")
        ours = table[source]
        parts = tensor.chunk(len(ours)) if len(ours) > 1 else (tensor,)
        for name, part in zip(ours, parts, strict=True):
            if name in renamed and not torch.equal(renamed[name], part):
                raise ConversionError(f"The tensor {source} differs from its other copies in the checkpoint.")
            renamed.setdefault(name, part.contiguous())
    return renamed


def load_renamed(model: PreTrainedModel, state: Mapping[str, torch.Tensor], table: KeyTable) -> PreTrainedModel:
    """`model`, built on the meta device, with the weights of the source in float32 and in evaluation mode."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    renamed = rename(state, table, shapes)
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in renamed.items()}
    model.load_state_dict(floats, assign=True)
    return model.eval()


def _listed(names: list[str]) -> str:
    """The first few names, and how many there are besides."""
    rest = len(names) - NAMES_IN_A_MESSAGE
    listed = ", ".join(names[:NAMES_IN_A_MESSAGE])
    return f"{listed} and {rest} more" if rest > 0 else listed


__all__ = ["KeyTable", "expand", "load_renamed", "rename", "restrict", "source_shapes", "without"]
