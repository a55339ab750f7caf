"""The Swin family: names of architectures and their arguments -> `LocAtSwinConfig`, and the table of tensor names.

Covers `locatswin_*` of the reference and the plain Swin models of timm, which become baselines.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..configuration_locatswin import LocAtSwinConfig
from .arguments import IMAGENET_MEAN, IMAGENET_STD, preset_of, translate
from .errors import ConversionError
from .key_mapping import KeyTable, expand, without

# `locatswin_tiny`; `swin_base_patch4_window7_224`.
LOCAT_NAME = re.compile(r"locatswin_(?P<size>[a-z]+)")
BASELINE_NAME = re.compile(r"swin_(?P<size>[a-z]+)_patch(?P<patch>\d+)_window(?P<window>\d+)_(?P<image>\d+)")

RENAMED = {
    name: name for name in ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio")
}  # the reference's names are ours
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "global_pool": (None, "", "avg"),
    "head_dim": (None,),
    "always_partition": (False,),
    "norm_layer": (None, "layernorm"),
}
# Neither is learned: older versions of timm stored what newer ones compute.
BUFFERS = (".relative_position_index", ".attn_mask")


def recognize(architecture: str | None, arguments: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of this family."""
    return bool(LOCAT_NAME.fullmatch(architecture or "") or BASELINE_NAME.fullmatch(architecture or ""))


def default_preprocessing(architecture: str | None) -> dict[str, Any]:
    """Mean, std and crop of models whose checkpoint does not say."""
    return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "crop_pct": 0.9}


def build_config(architecture: str, arguments: Mapping[str, Any], **fields: Any) -> LocAtSwinConfig:
    """The configuration of a checkpoint.

    Args:
        architecture: The name of the reference or of timm.
        arguments: Those given on top of what the name stands for.
        fields: Further fields of `LocAtSwinConfig`; they win.

    Raises:
        ConversionError: An argument is unknown or asks for what our models do not have.
    """
    baseline = BASELINE_NAME.fullmatch(architecture)
    match = baseline or LOCAT_NAME.fullmatch(architecture)
    if match is None:
        raise ConversionError(f"{architecture} is not an architecture of LocAt-Swin.")
    found: dict[str, Any] = {"num_labels": 1000, **preset_of(LocAtSwinConfig, match["size"], architecture)}
    if baseline:
        found.update(use_gaussian=False, use_refinement=False)
        for field, part in (("patch_size", "patch"), ("window_size", "window"), ("image_size", "image")):
            found[field] = int(baseline[part])
    found.update(translate(arguments, RENAMED, SUPPORTED_VALUES, (), "LocAt-Swin"))
    return LocAtSwinConfig(**{**found, **fields})


def prepare_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The learned tensors of a checkpoint."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(BUFFERS)}


def key_table(config: LocAtSwinConfig) -> KeyTable:
    """Every name of the reference -> our names in `LocAtSwinForImageClassification`; see `expand` for "="."""
    table = expand(
        {
            "patch_embed.proj": "locatswin.embeddings.patch_embeddings",
            "patch_embed.norm": "locatswin.embeddings.norm",
            "norm": "locatswin.layernorm",
            "head.fc": "classifier",
        },
        1,
    )
    for stage, depth in enumerate(config.depths):
        theirs, ours = f"layers.{stage}", f"locatswin.stages.{stage}"
        block, layer = f"{theirs}.blocks.{{i}}", f"{ours}.layers.{{i}}"
        if stage > 0:
            table |= expand(
                {
                    f"{theirs}.downsample.norm": f"{ours}.downsample.norm",
                    f"={theirs}.downsample.reduction.weight": f"{ours}.downsample.reduction.weight",
                },
                1,
            )
        table |= expand(
            {
                f"{block}.norm1": f"{layer}.norm1",
                f"{block}.attn.qkv": tuple(f"{layer}.attention.{name}_proj" for name in "qkv"),
                f"{block}.attn.proj": f"{layer}.attention.o_proj",
                f"={block}.attn.relative_position_bias_table": f"{layer}.attention.relative_position_bias_table",
                # Neither name of the reference is what it says: no exponential is taken of either.
                f"{block}.attn.gaug.log_var": f"{layer}.attention.gaussian.variance",
                f"{block}.attn.gaug.log_alpha": f"{layer}.attention.gaussian.amplitude",
                f"{block}.norm2": f"{layer}.norm2",
                f"{block}.mlp.fc1": f"{layer}.mlp.up_proj",
                f"{block}.mlp.fc2": f"{layer}.mlp.down_proj",
            },
            depth,
        )
    return without(
        table,
        {
            ".gaug.": not config.use_gaussian,
            ".qkv.bias": not config.qkv_bias,
            "head.": not config.num_labels,
        },
    )


__all__ = ["build_config", "default_preprocessing", "key_table", "prepare_state", "recognize"]
