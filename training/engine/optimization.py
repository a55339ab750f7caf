"""Optimizer and averaged weights."""

import re
from typing import Any

from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from training.engine.settings import OptimizationArguments

VECTORS = "vectors"
"""Among the names in `no_weight_decay`: every parameter of one dimension, such as biases and norms."""


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give every parameter group its own: groups carry a factor of their own."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def set_weight_decay(optimizer: Optimizer, weight_decay: float) -> None:
    """Give it to every parameter group that is decayed."""
    for group in optimizer.param_groups:
        if group.get("decayed", True):
            group["weight_decay"] = weight_decay


def create_optimizer(model: nn.Module, arguments: OptimizationArguments) -> Optimizer:
    """A timm optimizer over the trainable parameters, in the groups of `group_trainable_parameters`.

    Raises:
        ValueError: For an optimizer or a setting that timm does not know, and where nothing is trainable.
    """
    groups = group_trainable_parameters(model, arguments)
    if not groups:
        raise ValueError("The model has no trainable parameters: everything is frozen.")
    options = {"opt": arguments.optimizer, "lr": arguments.learning_rate, "weight_decay": arguments.weight_decay}
    try:
        return create_optimizer_v2(groups, **options, **arguments.optimizer_options)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip("'\"").rstrip(".")
        raise ValueError(f"Cannot build the optimizer {arguments.optimizer!r}: {reason}.") from None


def group_trainable_parameters(model: nn.Module, arguments: OptimizationArguments) -> list[dict]:
    """Divide the trainable parameters by weight decay and learning rate.

    Args:
        model: The model; its `no_weight_decay()`, or that of its parts, lists names that are not decayed by default.
        arguments: Vectors and what the model lists are not decayed, or else what `no_weight_decay` names. The factor of
            the learning rate is that of the layer (`layer_decay`) times that of the name (`learning_rate_factors`, the
            longest that fits).

    Returns:
        Groups for an optimizer, each with `decayed` and a factor `lr_scale`.

    Raises:
        ValueError: Layers cannot be told apart, a name is not a regular expression, or it occurs in no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for option in ("learning_rate_factors", "no_weight_decay"):
        for part in getattr(arguments, option) or ():
            try:
                found = (option == "no_weight_decay" and part == VECTORS) or any(
                    re.search(part, name) for name in names
                )
            except re.error as error:
                raise ValueError(f"{option} names {part!r}, which is not a regular expression: {error}.") from None
            if not found:
                raise ValueError(f"{option} names {part!r}, but no parameter of the model is called so.")
    layer_scales = scale_layers(model, arguments.layer_decay) if arguments.layer_decay is not None else {}
    listed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    groups: dict[tuple[bool, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if arguments.no_weight_decay is None:
            decayed = parameter.ndim > 1 and name not in listed
        else:
            left_alone = arguments.no_weight_decay
            is_vector = VECTORS in left_alone and parameter.ndim <= 1
            decayed = not is_vector and not any(re.search(part, name) for part in left_alone if part != VECTORS)
        fitting = [part for part in arguments.learning_rate_factors if re.search(part, name)]
        factor = arguments.learning_rate_factors[max(fitting, key=len)] if fitting else 1.0
        scale = layer_scales.get(name, 1.0) * factor
        weight_decay = arguments.weight_decay if decayed else 0.0
        group: dict[str, Any] = {"params": [], "decayed": decayed, "weight_decay": weight_decay, "lr_scale": scale}
        groups.setdefault((decayed, scale), group)["params"].append(parameter)
    return list(groups.values())


def scale_layers(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Learning-rate factor of every parameter of a model: 1 after its last layer, `layer_decay` less for each before.

    The layers are those of the model, or of the module in it that has a `group_matcher`, such as the backbone of a
    detector; what stands outside of that module counts as after the last layer.

    Raises:
        ValueError: Where there is none.
    """
    found = next(((name, module) for name, module in model.named_modules() if hasattr(module, "group_matcher")), None)
    if found is None:
        raise ValueError(f"layer_decay needs a model that names its layers, which a {type(model).__name__} does not.")
    prefix, module = found
    layers = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
    last = max(layers.values()) + (1 if prefix else 0)
    prefix = f"{prefix}." if prefix else ""
    return {f"{prefix}{name}": layer_decay ** (last - layer) for name, layer in layers.items()}


def create_ema(model: nn.Module, arguments: OptimizationArguments) -> ModelEmaV3 | None:
    """The running average of the weights, warmed up, where `ema_decay` asks for one; on the model's device."""
    return ModelEmaV3(model, decay=arguments.ema_decay, use_warmup=True) if arguments.ema_decay is not None else None
