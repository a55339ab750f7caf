"""Optimiser, learning rate and averaged weights."""

import math
import re

from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from training.arguments import OptimizationArguments


def parse_duration(text: str, updates_per_epoch: int, total: int | None = None) -> int:
    """Weight updates in `300 epochs`, `20000 steps` or, where `total` updates are given, `25 %`.

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(epochs?|steps?|%)\s*", text)
    if not match or (match[2] == "%" and total is None):
        raise ValueError(f"A duration reads '300 epochs', '20000 steps' or '25 %', not {text!r}.")
    unit = {"e": updates_per_epoch, "s": 1, "%": (total or 0) / 100}[match[2][0]]
    return round(float(match[1]) * unit)


def learning_rate_at(update: int, total: int, warmup: int, arguments: OptimizationArguments) -> float:
    """Learning rate of update number `update` (from 0): a linear rise, then the fall that `schedule` names.

    With the linear fall this is the one-cycle of the papers.
    """
    start, peak, final = arguments.start_learning_rate, arguments.learning_rate, arguments.final_learning_rate
    if update < warmup:
        return start + (peak - start) * update / warmup
    progress = (update - warmup) / max(total - warmup, 1)
    remaining = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}
    return final + (peak - final) * remaining[arguments.schedule]


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give every parameter group its share: with layer decay, groups carry a factor of their own."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def create_optimizer(model: nn.Module, arguments: OptimizationArguments) -> Optimizer:
    """A timm optimiser over the trainable parameters; vectors and `model.no_weight_decay()` are not decayed."""
    return create_optimizer_v2(
        model,
        opt=arguments.optimizer,
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        layer_decay=arguments.layer_decay,
    )


def create_ema(model: nn.Module, arguments: OptimizationArguments) -> ModelEmaV3 | None:
    """The running average of the weights, warmed up, where `ema_decay` asks for one."""
    return ModelEmaV3(model, decay=arguments.ema_decay, use_warmup=True) if arguments.ema_decay is not None else None
