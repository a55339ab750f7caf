"""The loop that every program shares: updates, progress, evaluation points, checkpoints, export."""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from transformers import BaseImageProcessor, PreTrainedModel

from training.arguments import RUNTIME_OPTIONS, OptimizationArguments, RunArguments, console
from training.checkpointing import Interruption, atomic_folder, list_checkpoints, save_checkpoint, write_json
from training.data import TrainingSamples, create_training_loader
from training.data.batches import seed_everything
from training.optimization import create_ema, learning_rate_at, parse_duration, set_learning_rate


@dataclasses.dataclass
class RunState:
    """What a checkpoint keeps beside weights and optimiser.

    window: sum and number of the losses since the last point of the training curve.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    window: tuple[float, int] = (0.0, 0)
    best: float = -math.inf
    metrics: dict = dataclasses.field(default_factory=dict)
    train_curve: list = dataclasses.field(default_factory=list)
    validation_curve: list = dataclasses.field(default_factory=list)

    def state_dict(self) -> dict:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def create_accelerator(arguments: OptimizationArguments | RunArguments) -> Accelerator:
    """The processes and devices that `accelerate launch` gives, with the precision that the recipe asks for."""
    return Accelerator(mixed_precision=arguments.mixed_precision)


class TrainingLoop:
    """A run from its newest checkpoint, or from its start, to its end.

    Open it with `with` and iterate over it for batches on the device; call `update(loss)` for each, and
    `record(metrics)` where `evaluation_due` says so. A checkpoint in `output_dir` is continued at the exact update.
    While the loop is open, SIGTERM and Ctrl-C end it after the current update, with a checkpoint.

    arguments: settings of the program, a dataclass with those of `OptimizationArguments` and `RunArguments`.
    model: not yet prepared by the accelerator.
    processor: exported beside the model.
    samples: addressed by (epoch, index).
    metric: name of the entry of `record` whose largest value is the best model.
    collate: makes a batch of a list of samples; by default tensors are stacked. A batch may nest lists and dicts.
    mix: applied to the entries of every batch on the device, such as mixup; returns the entries of the batch.
    evaluated: what is evaluated and exported instead of `model` or its average, such as a teacher.
    state: objects with `state_dict` and `load_state_dict` that checkpoints keep too, such as a teacher.
    before_step: called between the backward pass and the clipping of gradients of every update.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: OptimizationArguments | RunArguments,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        optimizer: torch.optim.Optimizer,
        samples: TrainingSamples,
        metric: str,
        *,
        collate: Callable[[list[tuple]], Any] | None = None,
        mix: Callable[..., tuple] | None = None,
        evaluated: PreTrainedModel | None = None,
        state: Sequence[Any] = (),
        before_step: Callable[[], None] | None = None,
    ):
        self.mix, self.evaluated, self.before_step = mix, evaluated, before_step
        self.accelerator, self.arguments, self.metric, self.processor = accelerator, arguments, metric, processor
        self.output = prepare_output(accelerator, arguments)

        self.updates_per_epoch = max(len(samples) // arguments.batch_size, 1)
        self.total = parse_duration(arguments.length, self.updates_per_epoch)
        self.warmup = parse_duration(arguments.warmup, self.updates_per_epoch, self.total)
        self.evaluate_every = max(parse_duration(arguments.evaluate_every, self.updates_per_epoch, self.total), 1)
        self.checkpoint_every = max(parse_duration(arguments.checkpoint_every, self.updates_per_epoch, self.total), 1)
        if not 0 <= self.warmup <= self.total or self.total == 0:
            raise ValueError(f"A run of {self.total} updates cannot warm up for {self.warmup}.")

        self.state, self.ema = RunState(), create_ema(model, arguments)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.state, *([self.ema] if self.ema is not None else []), *state)
        checkpoints = list_checkpoints(self.output / "checkpoints")
        if checkpoints:
            accelerator.load_state(str(checkpoints[-1]))
            self.print(f"Continuing at update {self.state.step} of {self.total}.")
        self.loader = create_training_loader(
            samples, arguments, accelerator, start=self.state.step, stop=self.total, collate=collate
        )

    def __enter__(self) -> "TrainingLoop":
        self._interruption, self._bar = Interruption(), self._progress_bar()
        self._open = contextlib.ExitStack()
        self._open.enter_context(self._interruption)
        self._open.enter_context(self._bar)
        return self

    def __exit__(self, *exception) -> None:
        self._open.close()

    @property
    def update_complete(self) -> bool:
        """Whether the last call of `update` moved the weights, rather than adding to their gradients."""
        return self._update_complete

    @property
    def evaluation_due(self) -> bool:
        """Whether an update was just completed after which `record` is to be called."""
        done = self.state.step
        return self._update_complete and (done % self.evaluate_every == 0 or done == self.total)

    @property
    def evaluation_model(self) -> PreTrainedModel:
        """The weights that are evaluated and exported: the averaged ones where there are such."""
        if self.evaluated is not None:
            return self.evaluated
        return self.ema.module if self.ema is not None else self.accelerator.unwrap_model(self.model)

    def __iter__(self) -> Iterator[Any]:
        batches, accumulation = iter(self.loader), self.arguments.gradient_accumulation_steps
        self._task = self._bar.add_task("train", total=self.total, completed=self.state.step, status="")
        while self.state.step < self.total:
            self._begin_update()
            for micro_step in range(accumulation):
                self._last_micro_step = micro_step == accumulation - 1
                batch = send_to_device(next(batches), self.accelerator.device, non_blocking=True)
                yield self.mix(*batch) if self.mix is not None else batch
                if self._update_complete != self._last_micro_step:
                    raise RuntimeError("Call update(loss) once for every batch of the loop.")
            self._end_update()

    def update(self, loss: torch.Tensor, parts: dict[str, torch.Tensor] | None = None) -> None:
        """Propagate the mean loss of a batch back; after the last one of an update, move the weights.

        parts: scalars that the curves show beside the loss, such as the terms that it adds up.
        """
        self._loss += loss.detach().float() / self.arguments.gradient_accumulation_steps
        scaled = loss / self.arguments.gradient_accumulation_steps
        if not self._last_micro_step:
            with self.accelerator.no_sync(self.model):
                self.accelerator.backward(scaled)
            return
        self.accelerator.backward(scaled)
        loss, stop = self._agree()
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss became {loss} at update {self.state.step + 1}: lower learning_rate, or lengthen warmup; "
                f"the checkpoints in {self.output / 'checkpoints'} are from before."
            )
        if self.before_step is not None:
            self.before_step()
        if self.arguments.max_gradient_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.model), step=self.state.step)
        self._account(loss)
        self._stop, self._update_complete = stop, True

    def record(self, metrics: dict[str, Any], examples: Callable[[], list[Image.Image]] | None = None) -> None:
        """Note the metrics of this point of the run; export the model where they are the best so far.

        examples: draws predictions for the trackers; called in every process, and only where there are trackers.
        """
        state = self.state
        state.metrics = metrics
        scalars = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        state.validation_curve.append({**self._position(), **scalars})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scalars.items())
        self.print(f"epoch {state.step / self.updates_per_epoch:.1f}, update {state.step}: {shown}")
        # A metric that is nan is never best; the last model is exported where there would be none.
        best, last = metrics[self.metric] > state.best, state.step == self.total
        state.best = metrics[self.metric] if best else state.best
        if (best and self.arguments.export == "best") or (last and self.arguments.export == "last"):
            self._export()
        elif last and not (self.output / "model").exists():
            self._export()
        self._clock = time.perf_counter()

    def finish(self, **details: Any) -> dict[str, Any]:
        """Write `all_results.json` with metrics, curves, settings, throughput and `details`; return its content."""
        state = self.state
        results = {
            "metrics": state.metrics,
            f"best_{self.metric}": state.best,
            "train_curve": state.train_curve,
            "validation_curve": state.validation_curve,
            "updates": state.step,
            "seconds": state.seconds,
            "images_per_second": state.images / max(state.seconds, 1e-9),
            "parameters": sum(p.numel() for p in self.evaluation_model.parameters()),
            "num_processes": self.accelerator.num_processes,
            "seed": self.arguments.seed,
            "arguments": dataclasses.asdict(self.arguments),
            **details,
        }
        if self.accelerator.is_main_process:
            write_json(self.output / "all_results.json", results)
            self.print(f"Model in {self.output / 'model'}, results in {self.output / 'all_results.json'}.")
        return results

    def print(self, text: str) -> None:
        """One line, from one process."""
        if self.accelerator.is_main_process:
            console.print(text, markup=False)

    def _begin_update(self) -> None:
        # Dropout, drop path and mixing depend on the update alone, so a continued run repeats them.
        seed_everything(self.arguments.seed, self.state.step, self.accelerator.process_index)
        self._loss, self._update_complete = torch.zeros((), device=self.accelerator.device), False
        self._clock = time.perf_counter()
        set_learning_rate(self.optimizer, self._learning_rate())
        self.model.train()

    def _end_update(self) -> None:
        step = self.state.step
        if self._stop or step % self.checkpoint_every == 0 or step == self.total:
            save_checkpoint(self.accelerator, self.output / "checkpoints", step, self.arguments.keep_checkpoints)
        if self._stop and step < self.total:
            self.print(f"Stopped after update {step} of {self.total}; the same command continues there.")
            raise SystemExit(128 + self._stop)

    def _agree(self) -> tuple[float, int]:
        """The mean loss over the processes, and the largest signal that any of them received (0 for none)."""
        mine = torch.stack([self._loss, torch.tensor(float(self._interruption.signal or 0), device=self._loss.device)])
        everyone = self.accelerator.gather(mine[None])
        return everyone[:, 0].mean().item(), int(everyone[:, 1].max().item())

    def _account(self, loss: float) -> None:
        state, log_every = self.state, self.arguments.log_every
        now = time.perf_counter()
        state.seconds, state.images = state.seconds + now - self._clock, state.images + self.arguments.batch_size
        state.window = (state.window[0] + loss, state.window[1] + 1)
        speed = state.images / state.seconds
        if state.step % log_every == 0 or state.step == self.total:
            mean = state.window[0] / state.window[1]
            state.window = (0.0, 0)
            point = {"loss": mean, "learning_rate": self._learning_rate(-1), "images_per_second": speed}
            state.train_curve.append({**self._position(), **point})
        status = f"loss {loss:.3f} · lr {self._learning_rate(-1):.1e} · {speed:.0f} images/s"
        if not console.is_terminal and (state.step % log_every == 0 or state.step == self.total):
            self.print(f"{state.step}/{self.total} · {status}")
        self._bar.update(self._task, completed=state.step, status=status)

    def _learning_rate(self, offset: int = 0) -> float:
        return learning_rate_at(self.state.step + offset, self.total, self.warmup, self.arguments)

    def _position(self) -> dict[str, float]:
        return {"step": self.state.step, "epoch": self.state.step / self.updates_per_epoch}

    def _export(self) -> None:
        if self.accelerator.is_main_process:
            with atomic_folder(self.output / "model") as folder:
                self.evaluation_model.save_pretrained(folder)
                self.processor.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    def _progress_bar(self) -> Progress:
        columns = (
            SpinnerColumn(),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        hidden = not (self.accelerator.is_main_process and console.is_terminal)
        return Progress(*columns, console=console, transient=True, disable=hidden)


def prepare_output(accelerator: Accelerator, arguments: RunArguments) -> Path:
    """The output folder, holding `arguments.yaml`; a folder of another run is refused unless `overwrite`.

    Raises ValueError where the folder cannot be written, or holds a run with other settings.
    """
    if arguments.output_dir is None:
        raise ValueError("Name a folder for the results with --output_dir.")
    output = Path(arguments.output_dir)
    settings = {k: v for k, v in dataclasses.asdict(arguments).items() if k not in RUNTIME_OPTIONS | {"output_dir"}}
    stored = output / "arguments.yaml"
    started = (output / "all_results.json").is_file() or list_checkpoints(output / "checkpoints")
    if started and stored.is_file() and not arguments.overwrite:
        earlier = yaml.safe_load(stored.read_text(encoding="utf-8"))
        changed = sorted(k for k in settings if settings[k] != earlier.get(k))
        if changed:
            raise ValueError(
                f"{output} holds a run with other settings ({', '.join(changed)}): choose another --output_dir, or "
                f"--overwrite it."
            )
    if accelerator.is_main_process:
        try:
            if arguments.overwrite:
                shutil.rmtree(output / "checkpoints", ignore_errors=True)
                (output / "all_results.json").unlink(missing_ok=True)
            output.mkdir(parents=True, exist_ok=True)
            stored.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"Cannot write to the output folder {output}: {error.strerror}.") from None
    accelerator.wait_for_everyone()
    return output
