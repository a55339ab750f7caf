"""The Jumbo family: names of architectures and their arguments -> `LocAtJumboConfig`, and the table of tensor names.

Covers `locatjumbo_*` and `jumbo_*` of the reference; the latter become baselines.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..configuration_locatjumbo import LocAtJumboConfig
from .arguments import preset_of, translate
from .errors import ConversionError
from .key_mapping import KeyTable, expand, without

NAME = re.compile(r"(?P<locat>locat)?jumbo_(?P<size>[a-z]+)")
ALIAS = re.compile(r"blocks\.\d+\.(jumbo_mlp\..+)")

RENAMED = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "J": "num_jumbo_tokens",
    "init_values": "layer_scale_init_value",
}
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "global_pool": (None, "", "token"),
    "mlp_ratio": (4, 4.0),
    "class_token": (True,),
    "qk_norm": (False,),
    "norm_layer": (None, "layernorm"),
}


def recognize(architecture: str | None, arguments: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of this family."""
    return bool(NAME.fullmatch(architecture or ""))


def default_preprocessing(architecture: str | None) -> dict[str, Any]:
    """Mean, std and crop of models whose checkpoint does not say."""
    return {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9}


def build_config(architecture: str, arguments: Mapping[str, Any], **fields: Any) -> LocAtJumboConfig:
    """The configuration of a checkpoint.

    Args:
        architecture: The name of the reference or of timm.
        arguments: Those given on top of what the name stands for.
        fields: Further fields of `LocAtJumboConfig`; they win.

    Raises:
        ConversionError: An argument is unknown or asks for what our models do not have.
    """
    if (match := NAME.fullmatch(architecture)) is None:
        raise ConversionError(f"{architecture} is not an architecture of LocAt-Jumbo.")
    found: dict[str, Any] = {"num_labels": 1000, **preset_of(LocAtJumboConfig, match["size"], architecture)}
    if match["locat"]:
        found["use_patch_layernorm"] = True  # also with gaug=False and prr=False
    else:
        found.update(use_gaussian=False, use_refinement=False)
    found.update(translate(arguments, RENAMED, SUPPORTED_VALUES, (), "LocAt-Jumbo"))
    config = LocAtJumboConfig(**{**found, **fields})
    # The reference decides this by the height of the native grid alone.
    config.coarse_training = config.use_gaussian and config.native_grid[0] >= 32
    return config


def prepare_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with the MLP of the jumbo token once, which the reference stores again in every block.

    Raises:
        ConversionError: Two of these copies differ: then it is not one MLP.
    """
    prepared = {name: tensor for name, tensor in state.items() if not ALIAS.fullmatch(name)}
    for name, tensor in state.items():
        if match := ALIAS.fullmatch(name):
            shared = prepared.setdefault(match[1], tensor)
            if not torch.equal(shared, tensor):
                raise ConversionError(f"The tensors {match[1]} and {name} differ, but all blocks share one jumbo_mlp.")
    return prepared


def key_table(config: LocAtJumboConfig) -> KeyTable:
    """Every name of the reference -> our names in `LocAtJumboForImageClassification`; see `expand` for "="."""
    ours = "locatjumbo.layers.{i}"
    table = expand(
        {
            "=cls_token": "locatjumbo.embeddings.jumbo_tokens",
            "=pos_embed": "locatjumbo.embeddings.position_embeddings",
            "patch_embed.proj": "locatjumbo.embeddings.patch_embeddings",
            "jumbo_mlp.fc1": "locatjumbo.jumbo_mlp.up_proj",
            "jumbo_mlp.fc2": "locatjumbo.jumbo_mlp.down_proj",
            "blocks.{i}.norm1": f"{ours}.norm1",
            "blocks.{i}.attn.qkv": tuple(f"{ours}.attention.{name}_proj" for name in "qkv"),
            "blocks.{i}.attn.proj": f"{ours}.attention.o_proj",
            # Neither name of the reference is what it says: no exponential is taken of either.
            "blocks.{i}.attn.gaug.log_var": f"{ours}.attention.gaussian.variance",
            "blocks.{i}.attn.gaug.log_alpha": f"{ours}.attention.gaussian.amplitude",
            "=blocks.{i}.ls1.gamma": f"{ours}.layer_scale1.scale",
            "blocks.{i}.norm2": f"{ours}.norm2",
            "blocks.{i}.mlp.fc1": f"{ours}.mlp.up_proj",
            "blocks.{i}.mlp.fc2": f"{ours}.mlp.down_proj",
            "=blocks.{i}.ls2.gamma": f"{ours}.layer_scale2.scale",
            "blocks.{i}.norm3": f"{ours}.norm3",
            "=blocks.{i}.ls3.gamma": f"{ours}.layer_scale3.scale",
            "norm": "locatjumbo.layernorm",
            "norm_patches": "locatjumbo.patch_layernorm",
            "head": "classifier",
        },
        config.num_hidden_layers,
    )
    return without(
        table,
        {
            "norm_patches.": not config.normalizes_patches,
            ".gaug.": not config.use_gaussian,
            ".qkv.bias": not config.qkv_bias,
            "head.": not config.num_labels,
        },
    )


__all__ = ["build_config", "default_preprocessing", "key_table", "prepare_state", "recognize"]
