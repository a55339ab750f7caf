"""What a run would be like, from one small forward and backward pass: `--dry_run`."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table
from torch import nn
from transformers import BaseImageProcessor

from locatvit_hf.utils.io import atomic_write
from training.engine.arguments import console
from training.engine.finite import own_shard, tensors_in
from training.engine.placement import Placement
from training.engine.plotting import draw_batch
from training.engine.schedule import Schedule

MEBIBYTE = 2**20
NUM_IMAGES = 8


def dry_run_settings(arguments: Any, schedule: Schedule, accelerator: Accelerator) -> Any:
    """The settings with a batch of as few images as show what there is to see."""
    repeats = getattr(arguments, "repeated_augmentation", 1)
    images = min(schedule.images_per_pass, repeats * -(-NUM_IMAGES // repeats))
    return dataclasses.replace(arguments, batch_size=images * accelerator.num_processes, gradient_accumulation_steps=1)


def describe_dry_run(
    placement: Placement,
    arguments: Any,
    schedule: Schedule,
    meter: "ActivationMeter",
    batch: Any,
    processor: BaseImageProcessor,
    loss: float,
) -> dict[str, Any]:
    """Print what a run would be like, and draw a batch into `dry_run.png`.

    Args:
        placement: The model after a backward pass.
        arguments: Settings of the program.
        schedule: Of the run.
        meter: Of the forward pass.
        batch: As the model saw it.
        processor: With the mean and the standard deviation of the images.
        loss: Of the batch.

    Returns:
        What was printed, by name; memory in bytes.
    """
    accelerator, model, ema = placement.accelerator, placement.unwrapped, placement.ema
    placement.optimizer.step()  # nothing of it is kept; it makes the state whose size is asked for
    images = dry_run_settings(arguments, schedule, accelerator).batch_size // accelerator.num_processes
    parameters = list(placement.model.parameters())
    memory = {
        "weights": tensor_bytes(parameters),
        "gradients": tensor_bytes([p.grad for p in parameters if p.grad is not None]),
        "optimizer": tensor_bytes(list(placement.optimizer.state.values())),
        "averaged weights": tensor_bytes(list(ema.module.parameters())) if ema is not None else 0,
        "activations": round(meter.bytes / images * schedule.images_per_pass),
    }
    middle = schedule.warmup + (schedule.total - schedule.warmup) // 2
    points = sorted({0, schedule.warmup, middle, *schedule.milestones, schedule.total - 1})
    path = Path(arguments.output_dir) / "dry_run.png"
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss,
        "steps": schedule.total,
        "steps_per_epoch": schedule.steps_per_epoch,
        "learning_rates": {step: schedule.learning_rate_at(step) for step in points if step < schedule.total},
        "memory": memory,
        "image": str(path),
    }
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    image = draw_batch(batch, processor.image_mean, processor.image_std, names)
    if accelerator.is_main_process:
        atomic_write(path, image.save)
        _show(report, model, arguments, schedule, accelerator.num_processes)
    return report


def _show(report: dict[str, Any], model: nn.Module, arguments: Any, schedule: Schedule, num_processes: int) -> None:
    console.print(model_table(model))
    console.print(memory_table(report["memory"]))
    rates = ", ".join(f"{rate:.2e} at {step:,}" for step, rate in report["learning_rates"].items())
    for line in (
        f"Schedule: {schedule.total:,} steps, {schedule.steps_per_epoch:,} per epoch, of {arguments.batch_size:,} "
        f"images: {num_processes} processes x {arguments.gradient_accumulation_steps} passes of "
        f"{schedule.images_per_pass:,}.",
        f"Learning rate: {rates}",
        f"Loss of a fresh batch: {report['loss']:.4f}. The batch as the model sees it: {report['image']}",
    ):
        console.print(line, markup=False)


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
    """Bytes of all tensors in nested containers; of a sharded tensor those of its shard."""
    return sum(tensor.numel() * tensor.element_size() for tensor in map(own_shard, tensors_in(content)))


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
