"""The loop that every program shares: steps, evaluation points, checkpoints, export."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from training.data import TrainingSamples, create_training_loader
from training.data.samplers import seed_everything
from training.engine.arguments import public_settings
from training.engine.checkpoints import Checkpoints, list_checkpoints
from training.engine.distributed import reduce_losses
from training.engine.dry_run import ActivationMeter, describe_dry_run, dry_run_settings
from training.engine.export import open_repository, save_model, save_pretrained, write_results
from training.engine.guard import REMEDY, FiniteGuard
from training.engine.optimization import set_learning_rate, set_weight_decay
from training.engine.placement import Placement
from training.engine.plotting import tile
from training.engine.progress import ProgressLog, RunState
from training.engine.resuming import FILE, compare_runs, describe_run, program_of
from training.engine.run_folder import INTERRUPTED, OVERWRITTEN, SETTINGS, open_run_folder, stored_settings
from training.engine.schedule import Schedule
from training.engine.settings import ProgramArguments
from training.engine.shutdown import GracefulShutdown, ended_loader, report_ended_loaders_late
from training.engine.tracking import GaussianReader, Trackers


class TrainingLoop:
    """A run from its newest checkpoint, or from its start, to its end.

    Open it with `with` and iterate over it for batches on the device; call `update(loss)` for each, and
    `record(metrics)` where `evaluation_due` says so. A checkpoint in `output_dir` is continued at the exact step.
    While the loop is open, SIGTERM, SIGUSR1 and Ctrl-C end it after the current step, with a checkpoint.

    A loss or a gradient that is not finite ends the run before the weights move; with fp16, whose loss scaler skips
    such steps until its scale fits, only a long row of them does. Weights that are not finite are neither exported nor
    kept in a checkpoint.

    Args:
        accelerator: From `create_accelerator`.
        arguments: Settings of the program.
        schedule: Of the run, resolved from the settings.
        model: Not yet prepared by the accelerator.
        processor: Exported beside the model.
        optimizer: Of the model.
        samples: Addressed by (epoch, index).
        metric: Name of the entry of `record` whose largest value is the best model.
        collate: Makes a batch of a list of samples; by default tensors are stacked. A batch may nest lists and dicts.
        mix: Applied to the entries of every batch on the device, such as mixup; returns the entries of the batch.
        evaluated: What is evaluated and exported instead of `model` or its average, such as a teacher.
        data: Describes the data of the run, see `describe_data`; a checkpoint of other data is not continued.
        state: Objects with `state_dict` and `load_state_dict` of tensors that checkpoints keep too, by name.
        before_step: Called between the backward pass and the clipping of gradients of every step.
        save: Writes the evaluated model and its processor into an empty folder; by default with `save_pretrained`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: ProgramArguments,
        schedule: Schedule,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        optimizer: torch.optim.Optimizer,
        samples: TrainingSamples,
        metric: str,
        *,
        collate: Callable[[list[tuple]], Any] | None = None,
        mix: Callable[..., tuple] | None = None,
        evaluated: PreTrainedModel | None = None,
        data: Callable[[], dict[str, Any]] | None = None,
        state: Mapping[str, Any] | None = None,
        before_step: Callable[[], None] | None = None,
        save: Callable[[nn.Module, BaseImageProcessor, Path], None] = save_pretrained,
    ):
        self.accelerator, self.arguments, self.schedule = accelerator, arguments, schedule
        self.processor, self.metric = processor, metric
        self.mix, self.before_step, self.save = mix, before_step, save
        self._held = contextlib.ExitStack()
        self.output = open_run_folder(accelerator, arguments, self._held)
        if arguments.push_to_hub is not None and accelerator.is_main_process and not arguments.dry_run:
            open_repository(arguments.push_to_hub)
        self.state = RunState()
        self.log = ProgressLog(accelerator, arguments, schedule, self.state)
        self.print = self.log.print
        if not arguments.dry_run:
            described = data() if data is not None else {}
            self._described = describe_run(accelerator, arguments, model, optimizer, described)
        self.placement = Placement(accelerator, arguments, schedule, model, optimizer, evaluated)
        self.model = self.placement.model
        self.guard = FiniteGuard(self.placement, self.state, self.output, state or {})
        kept = {**self.placement.states(), **(state or {})}
        self.checkpoints = Checkpoints(accelerator, self.output / "checkpoints", self.state, kept)
        if not arguments.dry_run:
            try:
                self._resume()
            except ValueError:
                self._end_run()
                raise
        settings = dry_run_settings(arguments, schedule, accelerator) if arguments.dry_run else arguments
        self.loader = create_training_loader(samples, settings, accelerator, self.state.step, schedule.total, collate)
        self._counted_corrupt, self._step_complete, self._began = 0, False, 0.0
        self._between_steps, self._saved_step = True, self.state.step

    def __enter__(self) -> "TrainingLoop":
        self._open = contextlib.ExitStack()
        self._shutdown = self._open.enter_context(GracefulShutdown())
        if not self.arguments.dry_run:
            self.trackers = Trackers(self.accelerator, self.arguments, self.output, self.state.step)
            self._open.callback(self.trackers.close)
            self._open.enter_context(self.log.opened(self.trackers))
            self._gaussians = GaussianReader(self.placement.evaluated) if self.arguments.trackers else None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self._open.close()
        with self._held if error is not None else contextlib.nullcontext():
            if self.arguments.num_workers and ended_loader(error):
                raise ValueError(
                    f"A process that loads data was ended from outside. {self._keep_last_step()}"
                ) from None
            if isinstance(error, Exception):
                self._end_run()

    @property
    def step_complete(self) -> bool:
        """Whether the last call of `update` moved the weights, rather than adding to their gradients."""
        return self._step_complete

    @property
    def evaluation_due(self) -> bool:
        """Whether a step was just completed after which `record` is to be called."""
        done = self.state.step
        return self._step_complete and (done % self.schedule.evaluate_every == 0 or done == self.schedule.total)

    @property
    def evaluation_model(self) -> PreTrainedModel:
        """The weights that are evaluated and exported: the averaged ones where there are such, never sharded."""
        return self.placement.gather_evaluated(self.state.step)

    def __iter__(self) -> Iterator[Any]:
        if self.arguments.dry_run:
            yield from self._dry_run()
            return
        batches, accumulation = iter(self.loader), self.arguments.gradient_accumulation_steps
        while self.state.step < self.schedule.total:
            self._begin_step()
            for micro_step in range(accumulation):
                self._last_micro_step = micro_step == accumulation - 1
                began = time.perf_counter()
                batch = next(batches)
                self.state.waited += time.perf_counter() - began
                if self.arguments.num_workers:
                    report_ended_loaders_late()
                self._batches.append(batch)
                with self.accelerator.accumulate(self.model):
                    yield self._to_device(batch)
                if self._step_complete != self._last_micro_step:
                    raise RuntimeError("Call update(loss) once for every batch of the loop.")
            self._end_step()

    def update(self, loss: torch.Tensor, parts: dict[str, torch.Tensor] | None = None) -> None:
        """Propagate the mean loss of a batch back; after the last batch of a step, move the weights.

        Args:
            loss: A scalar.
            parts: Scalars that the curves show beside the loss, such as the terms that it adds up.
        """
        for name, value in {"loss": loss, **(parts or {})}.items():
            value = torch.as_tensor(value, device=self.accelerator.device).detach().float()
            self._losses[name] = self._losses.get(name, 0.0) + value / self.accelerator.gradient_accumulation_steps
        self.accelerator.backward(loss)
        if not self._last_micro_step or self.arguments.dry_run:
            return
        if self.before_step is not None:
            self.before_step()
        # The norm travels to the host together with the loss: asking for it costs no transfer of its own.
        corrupt, self._counted_corrupt = self.loader.num_corrupt - self._counted_corrupt, self.loader.num_corrupt
        norm, signal = self.placement.gradient_norm(), self._shutdown.signal or 0
        losses, norm, corrupt, self._signal = reduce_losses(self.accelerator, self._losses, norm, corrupt, signal)
        self.state.num_corrupt += corrupt
        self.guard.check_step(self._losses, losses["loss"], norm, self._batches)
        self.placement.clip_gradients(norm)
        self._between_steps = False
        self.placement.step(self.state.step + 1)
        self.state.step += 1
        self.state.seconds += time.perf_counter() - self._began
        self.state.images += self.arguments.batch_size
        self.log.log_step(losses, norm)
        self._step_complete = True

    def record(self, metrics: dict[str, Any], examples: Callable[[], list[Image.Image]] | None = None) -> None:
        """Note the metrics of this point of the run; export the model where they are the best so far.

        Args:
            metrics: By name; numbers among them are points of the validation curve.
            examples: Draws predictions for the trackers; called in every process, and only where there are trackers.
        """
        state = self.state
        state.metrics = metrics
        scalars = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        state.validation_curve.append({**self.log.position(), **scalars})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scalars.items())
        self.print(f"epoch {self.schedule.epochs(state.step):.1f}, step {state.step}: {shown}")
        self.trackers.log("validation", scalars, state.step)
        if self._gaussians is not None:
            self.trackers.log("gaussians", self._gaussians.take(), state.step)
        if self.arguments.trackers and examples is not None:
            self.trackers.log_image("examples", tile(examples()), state.step)
        # A metric that is nan is never best; the last model is exported where there would be none.
        best, last = metrics[self.metric] > state.best, state.step == self.schedule.total
        if best:
            state.best, state.best_step = metrics[self.metric], state.step
        wanted = best if self.arguments.export == "best" else last
        if wanted or (last and state.exported_step is None):
            self._export()

    def finish(self, **details: Any) -> dict[str, Any]:
        """Write `all_results.json` with metrics, curves, settings, throughput and `details`, and the card of the model.

        Pushes the exported model where `push_to_hub` asks for it.

        Returns:
            The content of `all_results.json`; of a dry run, what it found.
        """
        if self.arguments.dry_run:
            return {"dry_run": self._report, **details}
        state = self.state
        results = {
            "metrics": state.metrics,
            f"best_{self.metric}": state.best,
            "exported": {"step": state.exported_step, "metrics": state.exported},
            "train_curve": state.train_curve,
            "validation_curve": state.validation_curve,
            "updates": state.step,
            "seconds": state.seconds,
            "images_per_second": state.images_per_second,
            "data_wait_share": state.data_wait,
            "num_corrupt_images": state.num_corrupt,
            "num_skipped_steps": state.num_skipped,
            "parameters": sum(p.numel() for p in self.placement.evaluated.parameters()),
            "num_processes": self.accelerator.num_processes,
            "seed": self.arguments.seed,
            "program": program_of(self.arguments),
            "arguments": public_settings(self.arguments),
            **details,
        }
        if self.accelerator.is_main_process:
            write_results(self.output, self.arguments, results, self.print)
        self.accelerator.wait_for_everyone()
        self._end_run()
        self._held.close()
        return results

    def _end_run(self) -> None:
        """A run that has ended is not continued by the command that began it with `overwrite`."""
        if self.accelerator.is_main_process and not self.arguments.dry_run:
            (self.output / OVERWRITTEN).unlink(missing_ok=True)

    def _resume(self) -> None:
        """Go on from the newest checkpoint, where there is one and it is of this run."""
        self.checkpoints.drop_damaged(self.print)
        checkpoints = list_checkpoints(self.checkpoints.folder)
        if not checkpoints:
            return
        for line in compare_runs(checkpoints[-1], self._described):
            self.print(line)
        self.checkpoints.load_newest(self.guard.weights_are_finite, self.print, REMEDY)
        self.print(f"Continuing at step {self.state.step} of {self.schedule.total}.")

    def _to_device(self, batch: Any) -> Any:
        batch = self.placement.to_device(batch)
        return self.mix(*batch) if self.mix is not None else batch

    def _begin_step(self) -> None:
        # Dropout, drop path and mixing depend on the step alone, so a continued run repeats them.
        seed_everything(self.arguments.seed, self.state.step, self.accelerator.process_index)
        self._losses, self._batches = dict[str, torch.Tensor](), list[Any]()
        self._step_complete = False
        self._began = time.perf_counter()
        optimizer = self.placement.optimizer
        set_learning_rate(optimizer, self.schedule.learning_rate_at(self.state.step))
        if self.arguments.final_weight_decay is not None:
            set_weight_decay(optimizer, self.schedule.weight_decay_at(self.state.step))
        self.model.train()

    def _end_step(self) -> None:
        step, total = self.state.step, self.schedule.total
        best = self.arguments.export == "best" and step == self.state.best_step
        if self._signal or best or step % self.schedule.checkpoint_every == 0 or step == total:
            self._save_checkpoint()
        self._between_steps = True
        if self._signal and step < total:
            if self.accelerator.is_main_process:
                (self.output / INTERRUPTED).touch()
            self.print(f"Stopped after step {step} of {total}; the same command continues there.")
            raise SystemExit(128 + self._signal)

    def _save_checkpoint(self) -> None:
        self.guard.check_weights()
        texts = {SETTINGS: stored_settings(self.arguments), FILE: json.dumps(self._described, indent=1)}
        self.checkpoints.save(self.arguments.keep_checkpoints, texts)
        self._saved_step = self.state.step

    def _keep_last_step(self) -> str:
        """Save the last step where it is whole and no other process is waited for; says from where the run goes on."""
        if self._between_steps and self.accelerator.num_processes == 1 and self._saved_step != self.state.step:
            self._save_checkpoint()
        advice = "Where the system did so because memory ran out, fewer --num_workers need less of it."
        return f"The same command continues after step {self._saved_step}. {advice}"

    def _export(self) -> None:
        self.guard.check_weights()
        model = self.evaluation_model
        if self.accelerator.is_main_process:
            save_model(self.output / "model", model, self.processor, self.save)
        self.state.exported, self.state.exported_step = self.state.metrics, self.state.step
        self.accelerator.wait_for_everyone()

    def _dry_run(self) -> Iterator[Any]:
        """One small batch without a step, and what can be told from it about the run."""
        self._begin_step()
        self._last_micro_step, meter = True, ActivationMeter(self.model)
        batch = self._to_device(next(iter(self.loader)))
        with meter.measure():
            yield batch
        self._report = describe_dry_run(
            self.placement, self.arguments, self.schedule, meter, batch, self.processor, self._losses["loss"].item()
        )
