"""Where the weights of a run live: placed, averaged and sharded as the settings and the launcher ask."""

import copy
import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, recursively_apply, send_to_device
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import PreTrainedModel

from training.engine.finite import gradient_norm, scale_gradients
from training.engine.optimization import create_ema
from training.engine.schedule import Schedule
from training.engine.settings import OptimizationArguments

WHOLE = StateDictOptions(full_state_dict=True)


class Placement:
    """The model of a run with its optimizer, its average and the weights that are evaluated.

    Args:
        accelerator: From `create_accelerator`.
        arguments: How the weights move.
        schedule: Of the run.
        model: Not yet prepared by the accelerator; it is changed.
        optimizer: Of the model.
        evaluated: What is evaluated and exported instead of `model` or its average, such as a teacher.

    Raises:
        ValueError: The model cannot be trained with these settings.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: OptimizationArguments,
        schedule: Schedule,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        evaluated: PreTrainedModel | None = None,
    ):
        self.accelerator, self.arguments, self._evaluated = accelerator, arguments, evaluated
        accelerator.gradient_accumulation_steps = arguments.gradient_accumulation_steps
        if arguments.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if arguments.dtype != "float32" and arguments.ema_decay is not None:
            raise ValueError(f"ema_decay needs --dtype float32: in {arguments.dtype} the average would hardly move.")
        model.to(accelerator.device, getattr(torch, arguments.dtype))
        if arguments.channels_last:
            model.to(memory_format=torch.channels_last)
        self.ema = create_ema(model, arguments)
        self._whole: PreTrainedModel | None = None
        self._gathered_step: int | None = None
        if accelerator.is_fsdp2 and evaluated is None:
            # A sharded model runs in all processes at once or not at all, but these evaluate parts of their own.
            self._whole = copy.deepcopy(model).eval()
        if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sharded_layers(model)
        if self.is_deepspeed:
            settings = accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = schedule.images_per_pass
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if accelerator.is_fsdp2 and self.ema is not None:
            self.ema.module, self.ema.foreach = fsdp2_prepare_model(accelerator, self.ema.module), False

    @property
    def is_deepspeed(self) -> bool:
        """Whether the engine of DeepSpeed clips, and moves the weights, in its backward pass."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def unwrapped(self) -> nn.Module:
        """The model without what the accelerator and the compiler put around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated and exported; a gathered model has the weights that it was last given."""
        if self._evaluated is not None:
            return self._evaluated
        if self._whole is not None:
            return self._whole
        return self.ema.module if self.ema is not None else self.unwrapped

    def gather_evaluated(self, step: int) -> PreTrainedModel:
        """What is evaluated and exported after a step: the averaged weights if there are such, not sharded."""
        if self._whole is not None and self._gathered_step != step:
            sharded = self.ema.module if self.ema is not None else self.model
            self._whole.load_state_dict(get_model_state_dict(sharded, options=WHOLE))
            self._gathered_step = step
        return self.evaluated

    def states(self) -> dict[str, Any]:
        """What checkpoints keep beside what the accelerator prepared, by name: the average."""
        if self.ema is None:
            return {}
        return {"average": ShardedState(self.ema) if self.accelerator.is_fsdp2 else self.ema}

    def to_device(self, batch: Any) -> Any:
        """A batch where the model is, in its layout of memory."""
        batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
        return recursively_apply(_channels_last, batch) if self.arguments.channels_last else batch

    def gradient_norm(self) -> torch.Tensor:
        """Norm of the gradients of all parameters, before they are clipped; a scalar on the device."""
        device = self.accelerator.device
        if self.is_deepspeed:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_gradient_norm or 0.0)
            return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=device)
        self.accelerator.unscale_gradients()
        return gradient_norm(self.model.parameters(), device)

    def clip_gradients(self, norm: float) -> None:
        """Scale gradients of this norm to `max_gradient_norm` at most; leave those alone that are not finite."""
        most = self.arguments.max_gradient_norm
        if most is None or not math.isfinite(norm) or self.is_deepspeed:
            return
        factor = most / (norm + 1e-6)
        if factor < 1:
            scale_gradients(self.model.parameters(), factor)

    def step(self, step: int) -> None:
        """Move the weights, and their average, by the gradients; step: number of the step, from 1."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.unwrapped, step=step)


class ShardedState:
    """The state of averaged weights that are sharded over the processes: whole in a checkpoint, sharded in memory."""

    def __init__(self, ema: ModelEmaV3):
        self.ema = ema

    def state_dict(self) -> dict:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.ema.module, options=options)

    def load_state_dict(self, state: dict) -> None:
        set_model_state_dict(self.ema.module, state, options=WHOLE)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass. Raises ValueError for a model that cannot."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"A {type(model).__name__} does not support gradient_checkpointing.")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def sharded_layers(model: nn.Module) -> list[str]:
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
