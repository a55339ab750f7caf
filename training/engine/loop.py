"""The loop that every program shares: updates, progress, evaluation points, checkpoints, export."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration, recursively_apply, send_to_device
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import BaseImageProcessor, PreTrainedModel

from locatvit_hf.writing import write_complete
from training.data import TrainingSamples, create_training_loader
from training.data.samplers import seed_everything
from training.engine.arguments import console, runtime_options
from training.engine.checkpoints import Interruption, list_checkpoints, load_checkpoint, save_checkpoint, write_json
from training.engine.distributed import create_processes
from training.engine.dry_run import ActivationMeter, memory_table, model_table, tensor_bytes
from training.engine.export import open_repository, push, save_model, save_pretrained, write_card
from training.engine.finite import are_finite, first_not_finite, gradient_norm, scale_gradients, tensors_in
from training.engine.optimization import create_ema, set_learning_rate, set_weight_decay
from training.engine.plotting import draw_batch, tile
from training.engine.resuming import FILE, compare_runs, describe_run, program_of
from training.engine.schedule import Schedule
from training.engine.settings import OptimizationArguments, RunArguments
from training.engine.tracking import GaussianReader, Trackers, check_trackers

DRY_RUN_IMAGES = 8

MAX_SKIPPED_IN_A_ROW = 30
"""Steps that the loss scaler of fp16 may skip one after the other: each halves its scale, 65,536 at first."""


@dataclasses.dataclass
class RunState:
    """What a checkpoint keeps beside weights and optimiser.

    seconds: of training, without evaluations and checkpoints; waited: of these, for data.
    num_corrupt: images that could not be decoded, over all processes, and that others replaced.
    num_skipped: steps in which the loss scaler of fp16 kept the weights, and how many of them are the last ones
        (`skipped_in_a_row`).
    window: sums since the last point of the training curve, and of how many updates (`updates`).
    best, best_step: largest value of the metric, and after how many updates.
    exported, exported_step: metrics of the exported weights, and their update.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    num_corrupt: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    window: dict = dataclasses.field(default_factory=dict)
    best: float = -math.inf
    best_step: int | None = None
    exported: dict = dataclasses.field(default_factory=dict)
    exported_step: int | None = None
    metrics: dict = dataclasses.field(default_factory=dict)
    train_curve: list = dataclasses.field(default_factory=list)
    validation_curve: list = dataclasses.field(default_factory=list)

    def state_dict(self) -> dict:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def create_accelerator(arguments: OptimizationArguments | RunArguments) -> Accelerator:
    """The processes and devices that `accelerate launch` gives, with the precision that the recipe asks for.

    Raises ValueError for trackers that are not there, and for ways of sharding that are not supported.
    """
    check_trackers(arguments.trackers)
    accelerator = create_processes(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        dynamo_backend="inductor" if arguments.compile and not arguments.dry_run else None,
        log_with=list(arguments.trackers) or None,
        project_config=ProjectConfiguration(project_dir=arguments.output_dir, logging_dir=arguments.output_dir),
    )
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # Accelerate shards on devices alone; over gloo it works just as well on CPU.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("Only FSDP2 is supported: set fsdp_version: 2 in the configuration of accelerate.")
    if state.distributed_type == DistributedType.DEEPSPEED:
        if state.deepspeed_plugin.zero_stage > 2:
            raise ValueError("DeepSpeed stage 3 is not supported: use stage 2, or FSDP2, which shards weights too.")
        state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = arguments.max_gradient_norm or 0.0
    return accelerator


class TrainingLoop:
    """A run from its newest checkpoint, or from its start, to its end.

    Open it with `with` and iterate over it for batches on the device; call `update(loss)` for each, and
    `record(metrics)` where `evaluation_due` says so. A checkpoint in `output_dir` is continued at the exact update.
    While the loop is open, SIGTERM, SIGUSR1 and Ctrl-C end it after the current update, with a checkpoint.

    A loss or a gradient that is not finite ends the run before the weights move; with fp16, whose loss scaler skips
    such steps until its scale fits, only a long row of them does. Weights that are not finite are neither exported nor
    kept in a checkpoint.

    accelerator: from `create_accelerator`.
    arguments: settings of the program, a dataclass with those of `OptimizationArguments` and `RunArguments`.
    schedule: of the run, resolved from the settings.
    model: not yet prepared by the accelerator.
    processor: exported beside the model.
    samples: addressed by (epoch, index).
    metric: name of the entry of `record` whose largest value is the best model.
    collate: makes a batch of a list of samples; by default tensors are stacked. A batch may nest lists and dicts.
    mix: applied to the entries of every batch on the device, such as mixup; returns the entries of the batch.
    evaluated: what is evaluated and exported instead of `model` or its average, such as a teacher.
    data: describes the data of the run, see `describe_data`; a checkpoint of other data is not continued.
    state: objects with `state_dict` and `load_state_dict` that checkpoints keep too, such as a teacher.
    before_step: called between the backward pass and the clipping of gradients of every update.
    save: writes the evaluated model and its processor into an empty folder; by default with their `save_pretrained`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: OptimizationArguments | RunArguments,
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
        state: Sequence[Any] = (),
        before_step: Callable[[], None] | None = None,
        save: Callable[[nn.Module, BaseImageProcessor, Path], None] = save_pretrained,
    ):
        self.accelerator, self.arguments, self.schedule = accelerator, arguments, schedule
        self.metric, self.processor = metric, processor
        self.mix, self.evaluated, self.before_step, self.save = mix, evaluated, before_step, save
        self.output = prepare_output(accelerator, arguments)
        if arguments.push_to_hub is not None and accelerator.is_main_process and not arguments.dry_run:
            open_repository(arguments.push_to_hub)

        self.state, self._holders, self._checked_step = RunState(), state, None
        if not arguments.dry_run:
            described = data() if data is not None else {}
            self._described = describe_run(accelerator, arguments, model, optimizer, described)
        self._prepare_model(model, optimizer)
        accelerator.register_for_checkpointing(self.state, *([self._averaged_state()] if self.ema else []), *state)
        checkpoints = list_checkpoints(self.output / "checkpoints")
        if checkpoints and not arguments.dry_run:
            for line in compare_runs(checkpoints[-1], self._described):
                self.print(line)
            self._load_newest(checkpoints)
            self.print(f"Continuing at update {self.state.step} of {self.schedule.total}.")
        self.loader = create_training_loader(
            samples,
            self._loader_arguments(),
            accelerator,
            start=self.state.step,
            stop=self.schedule.total,
            collate=collate,
        )
        self._counted_corrupt = 0

    def __enter__(self) -> "TrainingLoop":
        self._open = contextlib.ExitStack()
        self._interruption = self._open.enter_context(Interruption())
        self._bar = self._open.enter_context(self._progress_bar())
        if not self.arguments.dry_run:
            self.trackers = Trackers(self.accelerator, self.arguments, self.output, self.state.step)
            self._open.callback(self.trackers.close)
            self._gaussians = GaussianReader(self._evaluated_module()) if self.arguments.trackers else None
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
        return self._update_complete and (done % self.schedule.evaluate_every == 0 or done == self.schedule.total)

    @property
    def evaluation_model(self) -> PreTrainedModel:
        """The weights that are evaluated and exported: the averaged ones where there are such, never sharded."""
        module = self._evaluated_module()
        if module is self._whole_model and self._gathered_step != self.state.step:
            sharded = self.ema.module if self.ema is not None else self.model
            weights = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
            module.load_state_dict(weights)
            self._gathered_step = self.state.step
        return module

    def __iter__(self) -> Iterator[Any]:
        if self.arguments.dry_run:
            yield from self._rehearse()
            return
        batches, accumulation = iter(self.loader), self.arguments.gradient_accumulation_steps
        self._task = self._bar.add_task("train", total=self.schedule.total, completed=self.state.step, status="")
        while self.state.step < self.schedule.total:
            self._begin_update()
            for micro_step in range(accumulation):
                self._last_micro_step = micro_step == accumulation - 1
                began = time.perf_counter()
                batch = next(batches)
                self.state.waited += time.perf_counter() - began
                self._batches.append(batch)
                with self.accelerator.accumulate(self.model):
                    yield self._to_device(batch)
                if self._update_complete != self._last_micro_step:
                    raise RuntimeError("Call update(loss) once for every batch of the loop.")
            self._end_update()

    def update(self, loss: torch.Tensor, parts: dict[str, torch.Tensor] | None = None) -> None:
        """Propagate the mean loss of a batch back; after the last one of an update, move the weights.

        parts: scalars that the curves show beside the loss, such as the terms that it adds up.
        """
        for name, value in {"loss": loss, **(parts or {})}.items():
            share = torch.as_tensor(value, device=self.accelerator.device).detach().float()
            self._losses[name] = self._losses.get(name, 0.0) + share / self.accelerator.gradient_accumulation_steps
        self.accelerator.backward(loss)
        if not self._last_micro_step or self.arguments.dry_run:
            return
        if self.before_step is not None:
            self.before_step()
        # The norm travels to the host together with the loss: asking for it costs no transfer of its own.
        losses, norm, stop = self._agree(self._gradient_norm())
        self._check_finite(losses["loss"], norm)
        self._clip_gradients(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        if self.ema is not None:
            self.ema.update(self._unwrapped(), step=self.state.step)
        self._account(losses, norm)
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
        self.print(f"epoch {self.schedule.epochs(state.step):.1f}, update {state.step}: {shown}")
        self.trackers.log("validation", scalars, state.step)
        if self._gaussians is not None:
            self.trackers.log("gaussians", self._gaussians.take(), state.step)
        if self.arguments.trackers and examples is not None:
            self.trackers.log_image("examples", tile(examples()), state.step)
        # A metric that is nan is never best; the last model is exported where there would be none.
        best, last = metrics[self.metric] > state.best, state.step == self.schedule.total
        if best:
            state.best, state.best_step = metrics[self.metric], state.step
        if (best and self.arguments.export == "best") or (last and self.arguments.export == "last"):
            self._export()
        elif last and state.exported_step is None:
            self._export()

    def finish(self, **details: Any) -> dict[str, Any]:
        """Write `all_results.json` with metrics, curves, settings, throughput and `details`, and the card of the model.

        Returns the content of `all_results.json`. Pushes the exported model where `push_to_hub` asks for it.
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
            "images_per_second": state.images / max(state.seconds, 1e-9),
            "data_wait_share": state.waited / max(state.seconds, 1e-9),
            "num_corrupt_images": state.num_corrupt,
            "num_skipped_steps": state.num_skipped,
            "parameters": sum(p.numel() for p in self._evaluated_module().parameters()),
            "num_processes": self.accelerator.num_processes,
            "seed": self.arguments.seed,
            "program": program_of(self.arguments),
            "arguments": dataclasses.asdict(self.arguments),
            **details,
        }
        if self.accelerator.is_main_process:
            folder, repository = self.output / "model", self.arguments.push_to_hub
            write_json(self.output / "all_results.json", results)
            write_card(folder, self.arguments, results)
            self.print(f"Model in {folder}, results in {self.output / 'all_results.json'}.")
            if repository is not None:
                self.print(f"Pushed to {push(folder, repository)}")
        self.accelerator.wait_for_everyone()
        return results

    def print(self, text: str) -> None:
        """One line, from one process."""
        if self.accelerator.is_main_process:
            console.print(text, markup=False)

    def _prepare_model(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Place, average and shard the model as the settings and the launcher ask."""
        arguments, accelerator = self.arguments, self.accelerator
        accelerator.gradient_accumulation_steps = arguments.gradient_accumulation_steps
        if arguments.gradient_checkpointing:
            if not getattr(model, "supports_gradient_checkpointing", False):
                raise ValueError(f"A {type(model).__name__} does not support gradient_checkpointing.")
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        if arguments.dtype != "float32" and arguments.ema_decay is not None:
            raise ValueError(f"ema_decay needs --dtype float32: in {arguments.dtype} the average would hardly move.")
        model.to(accelerator.device, getattr(torch, arguments.dtype))
        if arguments.channels_last:
            model.to(memory_format=torch.channels_last)
        self.ema = create_ema(model, arguments)
        self._whole_model, self._gathered_step = None, None
        if accelerator.is_fsdp2 and self.evaluated is None:
            # A sharded model runs in all processes at once or not at all, but these evaluate shares of their own.
            self._whole_model = copy.deepcopy(model).eval()
        if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = _sharded_layers(model)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            settings = accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = self.schedule.images_per_pass
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if accelerator.is_fsdp2 and self.ema is not None:
            self.ema.module, self.ema.foreach = fsdp2_prepare_model(accelerator, self.ema.module), False

    def _averaged_state(self) -> Any:
        return ShardedState(self.ema) if self.accelerator.is_fsdp2 else self.ema

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _evaluated_module(self) -> nn.Module:
        """As `evaluation_model`, but a gathered model has the weights that it was last given."""
        if self.evaluated is not None:
            return self.evaluated
        if self._whole_model is not None:
            return self._whole_model
        return self.ema.module if self.ema is not None else self._unwrapped()

    def _to_device(self, batch: Any) -> Any:
        batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
        if self.arguments.channels_last:
            batch = recursively_apply(_channels_last, batch)
        return self.mix(*batch) if self.mix is not None else batch

    def _begin_update(self) -> None:
        # Dropout, drop path and mixing depend on the update alone, so a continued run repeats them.
        seed_everything(self.arguments.seed, self.state.step, self.accelerator.process_index)
        self._losses, self._batches, self._update_complete = {}, [], False
        self._clock = time.perf_counter()
        set_learning_rate(self.optimizer, self.schedule.learning_rate_at(self.state.step))
        if self.arguments.final_weight_decay is not None:
            set_weight_decay(self.optimizer, self.schedule.weight_decay_at(self.state.step))
        self.model.train()

    def _end_update(self) -> None:
        step = self.state.step
        best = self.arguments.export == "best" and step == self.state.best_step
        if self._stop or best or step % self.schedule.checkpoint_every == 0 or step == self.schedule.total:
            self._check_weights()
            save_checkpoint(
                self.accelerator,
                self.output / "checkpoints",
                step,
                self.arguments.keep_checkpoints,
                self.state.best_step,
                {"arguments.yaml": stored_settings(self.arguments), FILE: json.dumps(self._described, indent=1)},
            )
        if self._stop and step < self.schedule.total:
            if self.accelerator.is_main_process:
                # Launchers have exit codes of their own: a scheduler reads from this file that the run wants to go on.
                (self.output / "interrupted").touch()
            self.print(f"Stopped after update {step} of {self.schedule.total}; the same command continues there.")
            raise SystemExit(128 + self._stop)

    def _agree(self, norm: torch.Tensor) -> tuple[dict[str, float], float, int]:
        """The mean losses over the processes, the norm of the gradients, and the largest signal received (0 for none).

        Counts the corrupt images of all processes, too.
        """
        own = [float(self._interruption.signal or 0), float(self.loader.num_corrupt - self._counted_corrupt)]
        self._counted_corrupt = self.loader.num_corrupt
        own = torch.tensor(own, device=self.accelerator.device)
        values = torch.stack([*self._losses.values(), norm])
        everyone = self.accelerator.gather(torch.cat([own, values])[None])
        self.state.num_corrupt += int(everyone[:, 1].sum().item())
        *losses, norm = everyone.mean(dim=0)[2:].tolist()
        return dict(zip(self._losses, losses, strict=True)), norm, int(everyone[:, 0].max().item())

    def _gradient_norm(self) -> torch.Tensor:
        """Norm of the gradients of all parameters, before they are clipped; a scalar on the device."""
        device = self.accelerator.device
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # The engine clips, and moves the weights, in its backward pass.
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_gradient_norm or 0.0)
            return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=device)
        self.accelerator.unscale_gradients()
        return gradient_norm(self.model.parameters(), device)

    def _clip_gradients(self, norm: float) -> None:
        most = self.arguments.max_gradient_norm
        if most is None or not math.isfinite(norm) or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return
        factor = most / (norm + 1e-6)
        if factor < 1:
            scale_gradients(self.model.parameters(), factor)

    def _check_finite(self, loss: float, norm: float) -> None:
        """Raises ValueError where a step with this loss and this norm of the gradients would spoil the weights."""
        state, step = self.state, self.state.step + 1
        if not math.isfinite(loss):
            self._end_not_finite(f"The loss became {loss} at step {step}")
        if math.isfinite(norm):
            state.skipped_in_a_row = 0
            return
        where = ""
        if self.accelerator.mixed_precision == "fp16":
            state.num_skipped, state.skipped_in_a_row = state.num_skipped + 1, state.skipped_in_a_row + 1
            if state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
                return
            where = f", and so it was in the {MAX_SKIPPED_IN_A_ROW} steps up to this one, at every loss scale"
        gradients = ((n, p.grad) for n, p in self._unwrapped().named_parameters() if p.grad is not None)
        name = first_not_finite(gradients)
        first = f" (first in {name})" if name is not None else ""
        self._end_not_finite(
            f"The norm of the gradients became {norm}{first} at step {step}, although the loss is {loss:.4g}{where}"
        )

    def _end_not_finite(self, what: str) -> NoReturn:
        folder = self._keep_batches()
        raise ValueError(f"{what}; its batch is in {folder}. {self._way_back()}")

    def _way_back(self) -> str:
        """From where the run can go on, and what to change where it ends in the same way again."""
        checkpoints = list_checkpoints(self.output / "checkpoints")
        way = "There is no checkpoint yet, so the same command starts anew."
        if checkpoints:
            way = (
                f"The newest checkpoint is {checkpoints[-1]}, whose weights are finite: the same command goes on there."
            )
        return (
            f"{way} Where the run ends here again, start in another --output_dir with a lower learning_rate, a longer "
            "warmup or a smaller max_gradient_norm."
        )

    def _check_weights(self) -> None:
        """Raises ValueError where weights that are about to be kept are not finite, the same in all processes."""
        if self._checked_step != self.state.step and not self._weights_are_finite():
            name = first_not_finite(self._kept_tensors())
            first = f" (first in {name})" if name is not None else ""
            raise ValueError(
                f"The weights are not finite after step {self.state.step}{first}, so they were not kept. "
                f"{self._way_back()}"
            )
        self._checked_step = self.state.step

    def _weights_are_finite(self) -> bool:
        mine = are_finite(tensor for _, tensor in self._kept_tensors())
        return bool(self.accelerator.gather(torch.tensor([mine], device=self.accelerator.device)).all())

    def _kept_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights that a checkpoint keeps: those of the model, of its average, and of what else has a state."""
        yield from self._unwrapped().state_dict().items()
        if self.ema is not None:
            yield from ((f"average of {name}", tensor) for name, tensor in self.ema.module.state_dict().items())
        for holder in self._holders:
            yield from ((type(holder).__name__, tensor) for tensor in tensors_in(holder.state_dict()))

    def _load_newest(self, checkpoints: list[Path]) -> None:
        """Load the newest checkpoint with finite weights; newer ones, which earlier versions wrote, are set aside.

        Raises ValueError where there is none.
        """
        left = list(checkpoints)
        while left:
            load_checkpoint(self.accelerator, left[-1])
            if self._weights_are_finite():
                break
            left.pop()
        else:
            raise ValueError(
                f"No checkpoint in {checkpoints[0].parent} holds finite weights: --overwrite the run, with a lower "
                "learning_rate, a longer warmup or a smaller max_gradient_norm."
            )
        for bad in checkpoints[len(left) :]:
            aside = bad.with_name(f"not_finite_{bad.name}")
            self.print(f"{bad} holds weights that are not finite: it is now {aside.name}, and {left[-1].name} goes on.")
            if self.accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
                bad.rename(aside)
        self.accelerator.wait_for_everyone()

    def _keep_batches(self) -> Path:
        """Write what led to a loss or a gradient that is not finite, one file a process; returns their folder."""
        folder = self.output / "not_finite"
        content = {"update": self.state.step + 1, "batches": self._batches, "losses": self._losses}
        folder.mkdir(parents=True, exist_ok=True)
        name = f"update_{self.state.step + 1}_process_{self.accelerator.process_index}.pt"
        write_complete(folder / name, lambda path: torch.save(content, path))
        return folder

    def _account(self, losses: dict[str, float], norm: float) -> None:
        state, log_every = self.state, self.arguments.log_every
        state.seconds += time.perf_counter() - self._clock
        state.images += self.arguments.batch_size
        norms = {"grad_norm": norm, "norms": 1} if math.isfinite(norm) else {}
        for name, value in {**losses, **norms, "updates": 1}.items():
            state.window[name] = state.window.get(name, 0) + value
        rate = self.schedule.learning_rate_at(state.step - 1)
        speed, wait = state.images / state.seconds, state.waited / state.seconds
        due = state.step % log_every == 0 or state.step == self.schedule.total
        if due:
            count, norms = state.window.pop("updates"), state.window.pop("norms", 0)
            mean_norm = state.window.pop("grad_norm", 0.0) / norms if norms else math.nan
            point = {name: value / count for name, value in state.window.items()} | {"grad_norm": mean_norm}
            if self.accelerator.mixed_precision == "fp16":
                point["skipped_steps"] = state.num_skipped
            point |= {"learning_rate": rate, "images_per_second": speed, "data_wait_share": wait}
            state.window = {}
            state.train_curve.append({**self._position(), **point})
            self.trackers.log("train", point, state.step)
        status = f"loss {losses['loss']:.3f} · grad norm {norm:.2g} · lr {rate:.1e}"
        status += f" · {speed:.0f} images/s · {wait:.0%} waiting for data"
        if due and not console.is_terminal:
            self.print(f"{state.step}/{self.schedule.total} · {status}")
        self._bar.update(self._task, completed=state.step, status=status)

    def _position(self) -> dict[str, float]:
        return {"step": self.state.step, "epoch": self.schedule.epochs(self.state.step)}

    def _export(self) -> None:
        self._check_weights()
        model = self.evaluation_model
        if self.accelerator.is_main_process:
            save_model(self.output / "model", model, self.processor, self.save)
        self.state.exported, self.state.exported_step = self.state.metrics, self.state.step
        self.accelerator.wait_for_everyone()

    def _progress_bar(self) -> Progress:
        columns = (
            SpinnerColumn(),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        hidden = not (self.accelerator.is_main_process and console.is_terminal) or self.arguments.dry_run
        return Progress(*columns, console=console, transient=True, disable=hidden)

    def _loader_arguments(self) -> Any:
        """For a dry run, as few images as show what there is to see."""
        if not self.arguments.dry_run:
            return self.arguments
        repeats = getattr(self.arguments, "repeated_augmentation", 1)
        images = min(self.schedule.images_per_pass, repeats * -(-DRY_RUN_IMAGES // repeats))
        return dataclasses.replace(
            self.arguments, batch_size=images * self.accelerator.num_processes, gradient_accumulation_steps=1
        )

    def _rehearse(self) -> Iterator[Any]:
        """One small batch without an update, and what can be told from it about the run."""
        self._begin_update()
        self._last_micro_step, meter = True, ActivationMeter(self.model)
        batch = self._to_device(next(iter(self.loader)))
        with meter.measure():
            yield batch
        self.optimizer.step()  # nothing of it is kept; it makes the state whose size is asked for
        images = self._loader_arguments().batch_size // self.accelerator.num_processes
        memory = {
            "weights": tensor_bytes(list(self.model.parameters())),
            "gradients": tensor_bytes([p.grad for p in self.model.parameters() if p.grad is not None]),
            "optimiser": tensor_bytes(list(self.optimizer.state.values())),
            "averaged weights": tensor_bytes(list(self.ema.module.parameters())) if self.ema is not None else 0,
            "activations": round(meter.bytes / images * self.schedule.images_per_pass),
        }
        picture = self.output / "dry_run.png"
        names = getattr(getattr(self._unwrapped(), "config", None), "id2label", None) or {}
        image = draw_batch(batch, self.processor.image_mean, self.processor.image_std, names)
        schedule = self.schedule
        middle = schedule.warmup + (schedule.total - schedule.warmup) // 2
        points = sorted({0, schedule.warmup, middle, *schedule.milestones, schedule.total - 1})
        rates = {step: schedule.learning_rate_at(step) for step in points if step < schedule.total}
        self._report = {
            "parameters": sum(p.numel() for p in self._unwrapped().parameters()),
            "loss": self._losses["loss"].item(),
            "updates": self.schedule.total,
            "updates_per_epoch": self.schedule.steps_per_epoch,
            "learning_rates": rates,
            "memory": memory,
            "picture": str(picture),
        }
        if not self.accelerator.is_main_process:
            return
        write_complete(picture, image.save)
        console.print(model_table(self._unwrapped()))
        console.print(memory_table(memory))
        self.print(
            f"Schedule: {schedule.total:,} updates, {schedule.steps_per_epoch:,} an epoch, of "
            f"{self.arguments.batch_size:,} images: {self.accelerator.num_processes} processes x "
            f"{self.arguments.gradient_accumulation_steps} steps of {schedule.images_per_pass:,}."
        )
        self.print("Learning rate: " + ", ".join(f"{rate:.2e} at {step:,}" for step, rate in rates.items()))
        self.print(f"Loss of a fresh batch: {self._report['loss']:.4f}. The batch as the model sees it: {picture}")


class ShardedState:
    """The state of averaged weights that are sharded over the processes: whole in a checkpoint, sharded in memory."""

    def __init__(self, ema: ModelEmaV3):
        self.ema = ema

    def state_dict(self) -> dict:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.ema.module, options=options)

    def load_state_dict(self, state: dict) -> None:
        set_model_state_dict(self.ema.module, state, options=StateDictOptions(full_state_dict=True))


def _sharded_layers(model: nn.Module) -> list[str]:
    """Classes in a model whose modules are sharded one by one.

    Of those that it names, such as may not occur in it are left out, and what holds its first projection: accelerate
    shards that projection on its own, and a parameter can be sharded but once.
    """
    first = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    holders = {type(module).__name__ for module in found if any(part is first for part in module.modules())}
    return sorted({type(module).__name__ for module in found} - holders)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def stored_settings(arguments: RunArguments) -> str:
    """What makes a run what it is, as YAML: a run that differs in it is another run."""
    left_out = runtime_options(type(arguments)) | {"output_dir"}
    settings = {name: value for name, value in dataclasses.asdict(arguments).items() if name not in left_out}
    return yaml.safe_dump(settings, sort_keys=False)


def prepare_output(accelerator: Accelerator, arguments: RunArguments) -> Path:
    """The output folder, holding `arguments.yaml`; a folder of another run is refused unless `overwrite`.

    Raises ValueError where the folder cannot be written, or holds a run or a checkpoint with other settings.
    """
    if arguments.output_dir is None:
        raise ValueError("Name a folder for the results with --output_dir.")
    output, settings = Path(arguments.output_dir), stored_settings(arguments)
    stored = output / "arguments.yaml"
    try:
        if arguments.overwrite and not arguments.dry_run and accelerator.is_main_process:
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
            for name in ("all_results.json", "arguments.yaml"):
                (output / name).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        checkpoints = list_checkpoints(output / "checkpoints")
        earlier = [checkpoints[-1] / stored.name] if checkpoints else []
        earlier += [stored] if checkpoints or (output / "all_results.json").is_file() else []
        for file in earlier:
            changed = _changed_settings(settings, file) if file.is_file() and not arguments.dry_run else []
            if changed:
                raise ValueError(
                    f"{file.parent} holds a run with other settings ({', '.join(changed)}): choose another "
                    f"--output_dir, or --overwrite it."
                )
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            (output / "interrupted").unlink(missing_ok=True)
            if not arguments.dry_run:
                write_complete(stored, lambda path: path.write_text(settings, encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"Cannot write to the output folder {output}: {error.strerror}.") from None
    accelerator.wait_for_everyone()
    return output


def _changed_settings(settings: str, file: Path) -> list[str]:
    new, old = yaml.safe_load(settings), yaml.safe_load(file.read_text(encoding="utf-8"))
    return sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))
