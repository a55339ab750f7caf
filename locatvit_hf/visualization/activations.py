"""What happens in each layer of a model for one image, laid out on the layer's own grid of patches."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..locat import Gaussian
from ..modeling_locatswin import partition_windows
from .attention import eager_evaluation


@dataclass
class Layer:
    """One layer on one image; tensors are on CPU in float32.

    Attributes:
        grid: The (height, width) in patches, row-major.
        features: The layer's output (patches, channels).
        class_features: The same of the class token (class tokens, channels); no rows for a model without one.
        attention: What each patch gives to each key (heads, patches, keys); None for attention without maps.
        class_attention: The same of the class token (heads, keys); None for a model without one.
        key_patches: The patch (patches, keys) that stands behind each key of each query, -1 for padding; None where the
            keys are all patches in their order, or clusters.
        assignment: Where the keys are clusters, of which patches each is made (clusters, patches); rows sum to 1.
        gaussian: The Gaussians of all patches; None for a layer without.
    """

    grid: tuple[int, int]
    features: torch.Tensor
    class_features: torch.Tensor
    attention: torch.Tensor | None = None
    class_attention: torch.Tensor | None = None
    key_patches: torch.Tensor | None = None
    assignment: torch.Tensor | None = None
    gaussian: Gaussian | None = None

    @property
    def num_heads(self) -> int:
        """Heads of the attention maps; 0 for attention without maps."""
        return 0 if self.attention is None else self.attention.shape[0]

    def attention_map(self, query: int | None = None, head: int | None = None) -> np.ndarray:
        """Attention of one query over the patches. Attention to clusters is handed on to the patches of each.

        Args:
            query: The index of a patch in the row-major grid, or None for the class token.
            head: One head, or None for the mean of all.

        Returns:
            The weights (height, width).

        Raises:
            ValueError: The layer has no such attention.
        """
        weights = self.class_attention if query is None else self.attention
        if weights is None:
            raise ValueError(
                "This layer has no attention map of " + ("a class token." if query is None else "patches.")
            )
        row = weights if query is None else weights[:, query]
        row = row.mean(dim=0) if head is None else row[head]
        if self.assignment is not None:
            row = row @ self.assignment
        elif self.key_patches is not None:
            keys = self.key_patches[query]
            row = torch.zeros(len(self.features)).index_add(0, keys.clamp(min=0), row * (keys >= 0))
        return row.reshape(self.grid).numpy()

    def similarity_map(self, query: int | None = None) -> np.ndarray:
        """Cosine similarity of the features of all patches to those of one query.

        Args:
            query: The index of a patch in the row-major grid, or None for the class token.

        Returns:
            The similarities (height, width), in -1 to 1.

        Raises:
            ValueError: The model has no class token.
        """
        patches = F.normalize(self.features, dim=-1)
        if query is not None:
            return (patches @ patches[query]).reshape(self.grid).numpy()
        if not len(self.class_features):
            raise ValueError("The model has no class token.")
        return (patches @ F.normalize(self.class_features, dim=-1).mean(dim=0)).reshape(self.grid).numpy()

    def principal_colors(self) -> np.ndarray:
        """(height, width, 3) uint8: the first three principal components of the features as red, green and blue.

        Each component spans its color from its 1st to its 99th percentile, its largest deviation on the bright side.
        """
        centered = self.features - self.features.mean(dim=0)
        _, _, directions = torch.linalg.svd(centered, full_matrices=False)
        components = centered @ directions[:3].T
        extremes = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
        components = components * extremes.sign()
        low, high = components.quantile(torch.tensor([0.01, 0.99]), dim=0)
        scaled = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        colors = F.pad(scaled, (0, 3 - scaled.shape[1]))  # fewer channels than colors
        return (255 * colors).round().to(torch.uint8).reshape(*self.grid, 3).numpy()


@torch.no_grad()
def read_layers(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[Layer]:
    """Read all layers of a model of this package for one image.

    Args:
        model: The model, which is left as it was.
        pixel_values: A prepared image (1, channels, height, width).

    Returns:
        The layers, first layer first.

    Raises:
        ValueError: There are several images, or the model is not one of this package.
    """
    if pixel_values.shape[0] != 1:
        raise ValueError(f"Layers are read for one image at a time, not for {pixel_values.shape[0]}.")
    modules = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    modules = [module for module in modules if hasattr(module, "attention")]
    if not modules or not hasattr(model.config, "num_prefix_tokens"):
        raise ValueError(f"{type(model).__name__} is not a model of this package, whose layers can be read.")
    found: dict[nn.Module, dict] = {module: {} for module in modules}
    hooks = []
    for module in modules:
        record = partial(_record, found[module])
        hooks.append(module.register_forward_hook(partial(record, "layer"), with_kwargs=True))
        hooks.append(module.attention.register_forward_hook(partial(record, "attention"), with_kwargs=True))
        if getattr(module.attention, "gaussian", None) is not None:
            hooks.append(module.attention.gaussian.register_forward_hook(partial(record, "gaussian"), with_kwargs=True))
    try:
        with eager_evaluation(model):
            model(pixel_values=pixel_values.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [_lay_out(module, calls, model.config) for module, calls in found.items()]


def _record(calls: dict, name: str, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
    calls[name] = (args, kwargs, output)


def _lay_out(module: nn.Module, calls: dict, config) -> Layer:
    args, kwargs, output = calls["layer"]
    grid = tuple(kwargs["grid"] if "grid" in kwargs else args[2])
    tokens = _on_cpu(output[0] if isinstance(output, tuple) else output)[0]
    prefix = config.num_prefix_tokens
    # A jumbo token is several tokens; registers stand after the class token and are none.
    num_class_tokens = getattr(config, "num_jumbo_tokens", int(getattr(config, "use_class_token", False)))
    layer = Layer(grid, tokens[prefix:], tokens[:num_class_tokens])
    _, weights, *assignment = calls["attention"][2]
    gaussian = calls["gaussian"][2] if "gaussian" in calls else None
    if gaussian is not None:
        gaussian = gaussian._replace(
            inverse_variance=_on_cpu(gaussian.inverse_variance), amplitude=_on_cpu(gaussian.amplitude)
        )
    if weights is None:
        return layer
    weights = _on_cpu(weights)
    if hasattr(module, "window"):
        _undo_windows(layer, weights, gaussian, module.window, module.shift)
        return layer
    layer.gaussian = gaussian
    layer.attention = weights[0, :, prefix:, prefix:]
    if num_class_tokens:
        layer.class_attention = weights[0, :, :num_class_tokens, prefix:].mean(dim=1)
    if assignment and assignment[0] is not None:
        layer.assignment = _on_cpu(assignment[0])[0]
    return layer


def _undo_windows(
    layer: Layer,
    weights: torch.Tensor,
    gaussian: Gaussian | None,
    window: tuple[int, int],
    shift: tuple[int, int],
) -> None:
    """Give each patch its row of (windows, heads, area, area), and its Gaussian."""
    patches = torch.arange(len(layer.features)).reshape(layer.grid).roll((-shift[0], -shift[1]), dims=(0, 1))
    bottom, right = (-side % length for side, length in zip(layer.grid, window, strict=True))
    patches = F.pad(patches, (0, right, 0, bottom), value=-1)
    members = partition_windows(patches[None, :, :, None], window)[..., 0]  # (windows, area)
    windows, places = (members >= 0).nonzero(as_tuple=True)
    order = members[windows, places].argsort()
    windows, places = windows[order], places[order]
    layer.key_patches = members[windows]
    layer.attention = weights[windows, :, places].transpose(0, 1)
    if gaussian is not None:
        layer.gaussian = gaussian._replace(
            inverse_variance=gaussian.inverse_variance[windows, :, places].transpose(0, 1)[None],
            amplitude=gaussian.amplitude[windows, :, places].T[None],
            grid=layer.grid,
        )


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu()
