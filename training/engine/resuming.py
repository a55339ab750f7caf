"""Whether a run may be continued: a checkpoint says with what it was written, and what differs is named."""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from locatvit_hf.utils.io import read_json
from training.data.description import changed_times, compare_data

FILE = "run.json"
LIBRARIES = ("locatvit-hf", "torch", "transformers", "accelerate", "timm")
# Of a configuration, what says nothing about how the model computes, or is compared by its own name.
NOT_COMPARED = {"id2label", "label2id", "num_labels", "transformers_version", "dtype", "architectures", "_name_or_path"}


def describe_run(
    accelerator: Accelerator, arguments: Any, model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint keeps about its run beside the settings, as JSON holds it.

    Args:
        arguments: Settings of the program.
        model: Not yet prepared by the accelerator.
        data: From `describe_data`; may hold more, such as a `teacher`.

    Returns:
        `data`, `computed` (must stay) and `surroundings` (may change, which is then said).
    """
    encoder = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    config = {} if encoder is None else encoder.config.to_dict()
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    computed = {
        "program": program_of(arguments),
        "model": type(model).__name__,
        "optimizer": type(optimizer).__name__,
        "attention": None if encoder is None else encoder.config._attn_implementation,
        "sharding": accelerator.distributed_type.value if sharded else "none",
        **{f"configuration.{name}": value for name, value in config.items() if name not in NOT_COMPARED},
    }
    surroundings = {
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        **{library: _version(library) for library in LIBRARIES},
    }
    described = {"data": data, "computed": computed, "surroundings": surroundings}
    return json.loads(json.dumps(described, default=str))


def program_of(arguments: Any) -> str:
    """The name of the program that these settings belong to."""
    return Path(sys.modules[type(arguments).__module__].__file__ or "").stem


def compare_runs(checkpoint: Path, now: dict[str, Any]) -> list[str]:
    """What to say about continuing a checkpoint, line by line.

    Args:
        now: From `describe_run`.

    Raises:
        ValueError: For other data or another way to compute; the message names what differs.
    """
    then = read_json(checkpoint / FILE)
    differences = compare_data(then["data"], now["data"])
    # A field that only one side has belongs to another version of the library.
    for part in ("data", "computed"):
        before, after = then[part], now[part]
        names = [name for name in before if name in after and name not in ("classes", "splits")]
        differences += [
            f"{name} was {_short(before[name])} and is {_short(after[name])}"
            for name in names
            if before[name] != after[name]
        ]
    if differences:
        raise ValueError(
            f"{checkpoint} was written by another run: {'; '.join(differences)}. Choose another --output_dir, or "
            "--overwrite the run."
        )
    lines = [
        f"Files of the {split} split have other times than when {checkpoint} was written; their names, sizes and what "
        "was compared of their content are the same, so they are taken for the same data."
        for split in changed_times(then["data"], now["data"])
    ]
    before, after = then["surroundings"], now["surroundings"]
    changed = [f"{name} {before[name]} (now {after[name]})" for name in before if before[name] != after.get(name)]
    if changed:
        lines.append(
            f"The checkpoint was written with {', '.join(changed)}: steps may differ from those of a run in one go."
        )
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
