"""The ViT family: names of architectures and their arguments -> `LocAtViTConfig`, and the table of tensor names.

Covers `locatvit_*` of the reference (with registers, without position embeddings, with mean pooling, with mixed rotary
embeddings) and the plain models of timm, which become baselines.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..configuration_locatvit import LocAtViTConfig
from . import timm_vit
from .arguments import IMAGENET_MEAN, IMAGENET_STD, preset_of, translate
from .errors import ConversionError
from .key_mapping import KeyTable, expand, without

# `locatvit_tiny`, `locatvit_base_rope_mixed`.
LOCAT_NAME = re.compile(r"locatvit_(?P<size>[a-z]+)(?P<rope>_rope_mixed)?")
# `vit_base_patch16_224`, `nopos_vit_tiny_patch16_224`, `vit_small_patch14_reg4_dinov2`, `deit3_small_patch16_384`,
# `vit_base_patch16_rope_mixed_224`. Sizes are those of our presets.
BASELINE_NAME = re.compile(
    r"(?P<nopos>nopos_)?(?P<kind>vit|deit|deit3)_(?P<size>[a-z]+)_patch(?P<patch>\d+)"
    r"(?P<rope>_rope_mixed)?(_reg(?P<registers>\d+))?(?P<gap>_gap)?(?P<dinov2>_dinov2)?(_(?P<image>\d+))?"
)
# Any other name of a ViT is looked up in timm, which is needed for it.
TIMM_NAME = re.compile(r"(vit|deit|deit3|flexivit)_\w+")

# Argument of the reference (and of timm) -> field of ours, where the value is the same; more stand in `arguments`.
RENAMED = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "init_values": "layer_scale_init_value",
    "class_token": "use_class_token",
    "reg_tokens": "num_register_tokens",
    "num_reg_tokens": "num_register_tokens",
    "rope_temperature": "rope_temperature",
    "layer_norm_eps": "layer_norm_eps",
}
# Arguments that change the function in ways that we do not have: only these values are taken.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "scale_norm": (False,),
    "proj_bias": (True,),
    "pre_norm": (False,),
    "final_norm": (True,),
    "pool_include_prefix": (False,),
    "embed_norm_layer": (None,),
    "norm_layer": (None, "layernorm"),
    "attn_type": ("rope",),
    "rope_type": ("mixed",),
    "rope_grid_indexing": ("xy",),
    "rope_mixed_mode": (True,),
    "use_rot_pos_emb": (True,),
    "use_abs_pos_emb": (False,),
    "qkv_fused": (True,),
    "swiglu_mlp": (False,),
    "use_post_norm": (False,),
}
# Arguments that several fields depend on, or that mean different things; see `config_fields`.
HANDLED = ("no_pos_emb", "pos_embed", "no_embed_class", "mlp_ratio", "global_pool", "fc_norm")


def recognize(architecture: str | None, arguments: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of this family. The reference's own `save_pretrained` stores no name, only arguments."""
    if architecture is None:
        return {"embed_dim", "depth", "num_heads"} <= arguments.keys() and not arguments.keys() & {"J", "depths"}
    return any(name.fullmatch(architecture) for name in (LOCAT_NAME, BASELINE_NAME, TIMM_NAME))


def _baseline(architecture: str) -> re.Match | None:
    """The parts of a name that stands for a baseline of one of our sizes."""
    match = BASELINE_NAME.fullmatch(architecture)
    return match if match and match["size"] in LocAtViTConfig.presets else None


def default_arguments(architecture: str | None) -> dict[str, Any]:
    """The arguments that the name of an architecture stands for.

    Raises:
        ConversionError: The name is unknown.
    """
    name = architecture or ""
    if match := LOCAT_NAME.fullmatch(name):
        return {**_size(match["size"], name), "gaug": True, "prr": True, "rope": bool(match["rope"])}
    if match := _baseline(name):
        arguments = dict[str, Any](_size(match["size"], name), gaug=False, prr=False, rope=bool(match["rope"]))
        arguments["patch_size"] = int(match["patch"])
        arguments["no_pos_emb"] = bool(match["nopos"])
        arguments["reg_tokens"] = int(match["registers"] or 0)
        arguments["no_embed_class"] = bool(match["registers"]) or match["kind"] == "deit3"
        if match["image"]:
            arguments["img_size"] = int(match["image"])
        if match["dinov2"]:
            arguments.update(img_size=518, init_values=1e-5, num_classes=0)  # released without a head
        elif match["kind"] == "deit3":
            arguments["init_values"] = 1e-6
        if match["gap"]:
            # Those of timm without registers pool what the final norm gives.
            arguments.update(class_token=False, global_pool="avg", fc_norm=bool(match["registers"]))
            if match["size"] == "base" and not match["registers"]:
                arguments["num_heads"] = 16  # timm's one exception
        return arguments
    if TIMM_NAME.fullmatch(name):
        return timm_vit.default_arguments(name)
    if match := BASELINE_NAME.fullmatch(name):
        return _size(match["size"], name)  # says that there is no such size
    return {"gaug": True, "prr": True}


def _size(size: str, architecture: str) -> dict[str, int]:
    preset = preset_of(LocAtViTConfig, size, architecture)
    return {
        "embed_dim": preset["hidden_size"],
        "depth": preset["num_hidden_layers"],
        "num_heads": preset["num_attention_heads"],
    }


def default_preprocessing(architecture: str | None) -> dict[str, Any]:
    """Mean, std and crop of models whose checkpoint does not say: those of timm and the reference for the name."""
    name = architecture or ""
    imagenet = "rope" in name or "dinov2" in name or name.startswith(("deit", "vit_small_patch8"))
    whole = name.startswith(("vit", "deit")) and name.endswith(("_384", "_dinov2"))
    found = {
        "mean": IMAGENET_MEAN if imagenet else [0.5, 0.5, 0.5],
        "std": IMAGENET_STD if imagenet else [0.5, 0.5, 0.5],
        "crop_pct": 1.0 if whole else 0.9,
    }
    looked_up = TIMM_NAME.fullmatch(name) and not _baseline(name)
    return {**found, **timm_vit.default_preprocessing(name)} if looked_up else found


def config_fields(architecture: str | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LocAtViTConfig` from a name and the arguments given on top of it.

    Raises:
        ConversionError: An argument is unknown or asks for what our models do not have.
    """
    arguments = {**default_arguments(architecture), **arguments}
    rope = arguments.pop("rope", False)
    fields: dict[str, Any] = {"layer_norm_eps": 1e-6, "num_labels": 1000}
    if rope:
        arguments.setdefault("init_values", 1e-5)
        fields["position_embedding_type"] = "rope_mixed"
    fields.update(translate(arguments, RENAMED, SUPPORTED_VALUES, HANDLED, "LocAtViT"))
    if not rope and any(arguments.get(name) in (True, "", "none") for name in ("no_pos_emb", "pos_embed")):
        fields["position_embedding_type"] = "none"
    if "no_embed_class" in arguments:
        fields["prefix_position_embeddings"] = not arguments["no_embed_class"]
    if "mlp_ratio" in arguments:
        fields["intermediate_size"] = int(fields.get("hidden_size", 768) * arguments["mlp_ratio"])
    return {**fields, **_pooling(arguments)}


def _pooling(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The pooling, the place of the final norm, and timm's refinement. `global_pool` is None where it was not given."""
    pool, class_token = arguments.get("global_pool") or "token", arguments.get("class_token", True)
    if pool not in ("token", "avg", "prr"):
        raise ConversionError(f"The model pools with global_pool={pool!r}; LocAtViT has 'token', 'avg' and 'prr'.")
    mean = pool == "avg" or (pool == "prr" and not class_token)
    if pool == "prr" and mean and (arguments.get("reg_tokens") or arguments.get("num_reg_tokens")):
        raise ConversionError(
            "global_pool='prr' without a class token takes the mean of the registers too, which LocAtViT does not."
        )
    fc_norm = arguments.get("fc_norm")
    if fc_norm not in (None, False, pool == "avg"):
        raise ConversionError(
            f"The model was built with fc_norm={fc_norm!r} and global_pool={pool!r}, "
            "a place of the final norm that LocAtViT does not have."
        )
    fields: dict[str, Any] = {"pooling": "mean" if mean else "cls"}
    if mean and (pool == "prr" or fc_norm is False):
        fields["norm_before_pooling"] = True
    if pool == "prr":
        fields["use_refinement"] = True
    return fields


def build_config(architecture: str | None, arguments: Mapping[str, Any], **fields: Any) -> LocAtViTConfig:
    """The configuration of a checkpoint.

    Args:
        architecture: The name of the reference or of timm; None where only arguments are stored.
        arguments: Those given on top of what the name stands for.
        fields: Further fields of `LocAtViTConfig`; they win.
    """
    config = LocAtViTConfig(**{**config_fields(architecture, arguments), **fields})
    # The reference decides this by the height of the native grid alone.
    config.coarse_training = config.use_gaussian and config.native_grid[0] >= 32
    return config


def key_table(config: LocAtViTConfig) -> KeyTable:
    """Every name of the reference -> our names in `LocAtViTForImageClassification`; see `expand` for "="."""
    rope = config.position_embedding_type == "rope_mixed"
    final_norm = "norm" if config.normalizes_tokens else "fc_norm"
    scale1, scale2 = ("gamma_1", "gamma_2") if rope else ("ls1.gamma", "ls2.gamma")
    ours = "locatvit.layers.{i}"
    table = expand(
        {
            "=cls_token": "locatvit.embeddings.cls_token",
            "=reg_token": "locatvit.embeddings.register_tokens",
            "=pos_embed": "locatvit.embeddings.position_embeddings",
            "=rope.freqs": "locatvit.rope.frequencies",
            "patch_embed.proj": "locatvit.embeddings.patch_embeddings",
            "blocks.{i}.norm1": f"{ours}.norm1",
            "blocks.{i}.attn.qkv": tuple(f"{ours}.attention.{name}_proj" for name in "qkv"),
            "blocks.{i}.attn.proj": f"{ours}.attention.o_proj",
            # Neither name of the reference is what it says: no exponential is taken of either.
            "blocks.{i}.attn.gaug.log_var": f"{ours}.attention.gaussian.variance",
            "blocks.{i}.attn.gaug.log_alpha": f"{ours}.attention.gaussian.amplitude",
            f"=blocks.{{i}}.{scale1}": f"{ours}.layer_scale1.scale",
            "blocks.{i}.norm2": f"{ours}.norm2",
            "blocks.{i}.mlp.fc1": f"{ours}.mlp.up_proj",
            "blocks.{i}.mlp.fc2": f"{ours}.mlp.down_proj",
            f"=blocks.{{i}}.{scale2}": f"{ours}.layer_scale2.scale",
            final_norm: "locatvit.layernorm",
            "head": "classifier",
        },
        config.num_hidden_layers,
    )
    return without(
        table,
        {
            "cls_token": not config.use_class_token,
            "reg_token": not config.num_register_tokens,
            "pos_embed": config.position_embedding_type != "learned",
            "rope.freqs": not rope,
            ".gaug.": not config.use_gaussian,
            ".gamma": config.layer_scale_init_value is None,
            ".qkv.bias": not config.qkv_bias,
            "head.": not config.num_labels,
        },
    )


__all__ = ["build_config", "config_fields", "default_arguments", "default_preprocessing", "key_table", "recognize"]
