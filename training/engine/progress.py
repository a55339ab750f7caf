"""How far a run is: what its checkpoints keep of that, its curves, and the line that a terminal shows."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from training.engine.arguments import console
from training.engine.schedule import Schedule
from training.engine.settings import ProgramArguments
from training.engine.tracking import Trackers


@dataclass
class RunState:
    """What a checkpoint keeps beside weights and optimizer.

    Args:
        step: Steps that are done.
        images: Images that were trained on.
        seconds: Of training, without evaluations and checkpoints.
        waited: Seconds of these in which the run waited for data.
        num_corrupt: Images that could not be decoded, over all processes, and that others replaced.
        num_skipped: Steps in which the loss scaler of fp16 kept the weights.
        skipped_in_a_row: How many of them are the last ones.
        window: Sums since the last point of the training curve, and of how many steps (`updates`).
        best: Largest value of the metric.
        best_step: After how many steps.
        exported: Metrics of the exported weights.
        exported_step: Their step.
        metrics: Of the last evaluation.
        train_curve: Points of the training curve.
        validation_curve: Points of the evaluations.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    num_corrupt: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    window: dict = field(default_factory=dict)
    best: float = -math.inf
    best_step: int | None = None
    exported: dict = field(default_factory=dict)
    exported_step: int | None = None
    metrics: dict = field(default_factory=dict)
    train_curve: list = field(default_factory=list)
    validation_curve: list = field(default_factory=list)

    def to_json(self) -> str:
        """All fields as JSON, which spells numbers that are not finite as Python does."""
        return json.dumps(dataclasses.asdict(self), default=lambda number: number.item(), indent=1)

    def load_json(self, text: str) -> None:
        """Take the fields over. Raises ValueError for anything that `to_json` does not write."""
        state = json.loads(text)
        fresh = dataclasses.asdict(RunState())
        if not isinstance(state, dict) or state.keys() != fresh.keys():
            raise ValueError("the state of the run has other entries than this version writes")
        for name, value in state.items():
            kinds = (int, type(None)) if fresh[name] is None else (int, float) if name == "best" else type(fresh[name])
            if not isinstance(value, kinds):
                raise ValueError(f"the entry {name} of the state of the run is {value!r}")
            setattr(self, name, value)

    @property
    def images_per_second(self) -> float:
        """Throughput of the training, without evaluations and checkpoints."""
        return self.images / max(self.seconds, 1e-9)

    @property
    def data_wait(self) -> float:
        """Fraction of the training in which the run waited for data."""
        return self.waited / max(self.seconds, 1e-9)


class ProgressLog:
    """The training curve of a run, its trackers and its progress bar; open it with `opened`.

    Args:
        accelerator: Of the run.
        arguments: Settings of the program.
        schedule: Of the run.
        state: Of the run, which holds the curve.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: ProgramArguments,
        schedule: Schedule,
        state: RunState,
    ):
        self.accelerator, self.arguments, self.schedule, self.state = accelerator, arguments, schedule, state
        hidden = not (accelerator.is_main_process and console.is_terminal) or arguments.dry_run
        columns = SpinnerColumn(), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(
            *columns, TextColumn("{task.fields[status]}"), console=console, transient=True, disable=hidden
        )

    @contextlib.contextmanager
    def opened(self, trackers: Trackers) -> Iterator[None]:
        """The bar is shown, and the trackers receive the curve, inside this block."""
        self.trackers = trackers
        with self._bar:
            self._task = self._bar.add_task("train", total=self.schedule.total, completed=self.state.step, status="")
            yield

    def log_step(self, losses: dict[str, float], norm: float) -> None:
        """Add a step that was just done to the window, and the window to the curve where a point is due.

        Args:
            losses: Mean losses of the step by name, `loss` among them.
            norm: Of the gradients before they were clipped.
        """
        state, step = self.state, self.state.step
        norms = {"grad_norm": norm, "norms": 1} if math.isfinite(norm) else {}
        for name, value in {**losses, **norms, "updates": 1}.items():
            state.window[name] = state.window.get(name, 0) + value
        rate = self.schedule.learning_rate_at(step - 1)
        due = step % self.arguments.log_every == 0 or step == self.schedule.total
        if due:
            point = self._close_window() | {
                "learning_rate": rate,
                "images_per_second": state.images_per_second,
                "data_wait_share": state.data_wait,
            }
            state.train_curve.append({**self.position(), **point})
            self.trackers.log("train", point, step)
        status = f"loss {losses['loss']:.3f} · grad norm {norm:.2g} · lr {rate:.1e}"
        status += f" · {state.images_per_second:.0f} images/s · {state.data_wait:.0%} waiting for data"
        if due and not console.is_terminal:
            self.print(f"{step}/{self.schedule.total} · {status}")
        self._bar.update(self._task, completed=step, status=status)

    def position(self) -> dict[str, float]:
        """Where the run is, as the points of its curves say it."""
        return {"step": self.state.step, "epoch": self.schedule.epochs(self.state.step)}

    def print(self, text: str) -> None:
        """One line, from one process."""
        if self.accelerator.is_main_process:
            console.print(text, markup=False)

    def _close_window(self) -> dict[str, Any]:
        """The means over the window, which then starts anew."""
        window, self.state.window = self.state.window, {}
        steps, norms, norm = window.pop("updates"), window.pop("norms", 0), window.pop("grad_norm", 0.0)
        means = {name: value / steps for name, value in window.items()}
        means["grad_norm"] = norm / norms if norms else math.nan
        if self.accelerator.mixed_precision == "fp16":
            means["skipped_steps"] = self.state.num_skipped
        return means
