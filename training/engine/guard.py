"""Ends a run before a loss, a gradient or a weight that is not finite spoils what the run keeps."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from locatvit_hf.utils.io import atomic_write
from training.engine.checkpoints import list_checkpoints
from training.engine.finite import are_finite, first_not_finite
from training.engine.placement import Placement
from training.engine.progress import RunState

MAX_SKIPPED_IN_A_ROW = 30
"""Steps that the loss scaler of fp16 may skip one after the other: each halves its scale, 65,536 at first."""
REMEDY = "a lower learning_rate, a longer warmup or a smaller max_gradient_norm"


class FiniteGuard:
    """Checks steps and weights of a run, alike in all processes.

    Args:
        placement: The model and its average.
        state: Of the run.
        output: The folder of the run.
        holders: What else has a state that checkpoints keep, by name.
    """

    def __init__(self, placement: Placement, state: RunState, output: Path, holders: Mapping[str, Any]):
        self.placement, self.state, self.output, self.holders = placement, state, output, holders
        self.accelerator = placement.accelerator
        self._checked_step: int | None = None

    def check_step(self, losses: dict[str, torch.Tensor], loss: float, norm: float, batches: list[Any]) -> None:
        """Refuse a step that would spoil the weights, and write what led to it.

        Args:
            losses: Of this process, by name.
            loss: Mean over the processes.
            norm: Of the gradients of all processes.
            batches: Of this process, one a micro-step.

        Raises:
            ValueError: The loss is not finite, or the gradients are not; with fp16, whose loss scaler skips such steps,
                only after many in a row.
        """
        state, step = self.state, self.state.step + 1
        if not math.isfinite(loss):
            self._end(f"The loss became {loss} at step {step}", losses, batches)
        if math.isfinite(norm):
            state.skipped_in_a_row = 0
            return
        where = ""
        if self.accelerator.mixed_precision == "fp16":
            state.num_skipped, state.skipped_in_a_row = state.num_skipped + 1, state.skipped_in_a_row + 1
            if state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
                return
            where = f", and so it was in the {MAX_SKIPPED_IN_A_ROW} steps up to this one, at every loss scale"
        gradients = ((n, p.grad) for n, p in self.placement.unwrapped.named_parameters() if p.grad is not None)
        first = _first(gradients)
        self._end(
            f"The norm of the gradients became {norm}{first} at step {step}, although the loss is {loss:.4g}{where}",
            losses,
            batches,
        )

    def check_weights(self) -> None:
        """Raises ValueError where weights that are about to be kept are not finite."""
        if self._checked_step != self.state.step and not self.weights_are_finite():
            raise ValueError(
                f"The weights are not finite after step {self.state.step}{_first(self._kept_tensors())}, so they were "
                f"not kept. {self._way_back()}"
            )
        self._checked_step = self.state.step

    def weights_are_finite(self) -> bool:
        """Whether all weights that a checkpoint keeps are finite, in all processes."""
        mine = are_finite(tensor for _, tensor in self._kept_tensors())
        return bool(self.accelerator.gather(torch.tensor([mine], device=self.accelerator.device)).all())

    def _kept_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of the model, of its average, and of what else has a state."""
        yield from self.placement.unwrapped.state_dict().items()
        if (ema := self.placement.ema) is not None:
            yield from ((f"average of {name}", tensor) for name, tensor in ema.module.state_dict().items())
        for holder, kept in self.holders.items():
            yield from ((f"{name} of the {holder}", tensor) for name, tensor in kept.state_dict().items())

    def _end(self, what: str, losses: dict[str, torch.Tensor], batches: list[Any]) -> NoReturn:
        folder = self._dump_batch(losses, batches)
        raise ValueError(f"{what}; its batch is in {folder}. {self._way_back()}")

    def _dump_batch(self, losses: dict[str, torch.Tensor], batches: list[Any]) -> Path:
        """Write what led to a loss or a gradient that is not finite, one file per process; returns their folder."""
        folder, step = self.output / "not_finite", self.state.step + 1
        content = {"update": step, "batches": batches, "losses": losses}
        folder.mkdir(parents=True, exist_ok=True)
        name = f"update_{step}_process_{self.accelerator.process_index}.pt"
        atomic_write(folder / name, lambda path: torch.save(content, path))
        return folder

    def _way_back(self) -> str:
        """From where the run can go on, and what to change where it ends in the same way again."""
        checkpoints = list_checkpoints(self.output / "checkpoints")
        way = "There is no checkpoint yet, so the same command starts anew."
        if checkpoints:
            way = (
                f"The newest checkpoint is {checkpoints[-1]}, whose weights are finite: the same command goes on there."
            )
        return f"{way} Where the run ends here again, start in another --output_dir with {REMEDY}."


def _first(tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
    name = first_not_finite(tensors)
    return f" (first in {name})" if name is not None else ""
