"""What a ViT of timm is: its arguments, read from the model itself, as the reference would name them."""

import functools
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from .errors import ConversionError

# Classes of timm whose blocks are those of a plain ViT, or of a RoPE-ViT.
BLOCKS = {"Block", "EvaBlock"}
ACTIVATIONS = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu", "SiLU": "silu"}


def describe(model: nn.Module, description: str) -> dict[str, Any]:
    """Arguments of `locatvit.config_fields` for the function of a model of timm.

    Layers that a plain ViT lacks and that own tensors show up there later, as tensors without a place.

    Args:
        model: A model of timm.
        description: The subject of messages.

    Raises:
        ConversionError: It computes something that leaves no trace in the tensors and that our models do not have.
    """
    if _kind(model, "patch_embed") != "PatchEmbed" or not hasattr(model, "global_pool"):
        raise ConversionError(f"{description} is not a plain ViT.")
    block, names = model.blocks[0], model.state_dict().keys()
    norm, rope = getattr(block, "norm1", None), "rope.freqs" in names
    ordinary = (
        _kind(block, "mlp") == "Mlp"
        and _kind(getattr(block, "attn", None), "qkv") == "Linear"
        and isinstance(norm, nn.LayerNorm)
    )
    if not ordinary or {type(block).__name__ for block in model.blocks} - BLOCKS:
        raise ConversionError(f"{description} is not a plain ViT: its blocks hold other layers.")
    if getattr(model, "rope", None) is not None and not rope:
        raise ConversionError(
            f"{description} has rotary embeddings that are not learned, which LocAtViT does not have."
        )
    if getattr(model, "pool_include_prefix", False) and model.global_pool != "prr":
        raise ConversionError(f"{description} pools the prefix tokens too, which LocAtViT does not.")
    arguments = {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": Fraction(block.mlp.fc1.out_features, model.embed_dim),
        "act_layer": _activation(block.mlp.act, description),
        "layer_norm_eps": block.norm1.eps,
        "qkv_bias": block.attn.qkv.bias is not None,
        "class_token": "cls_token" in names,
        "reg_tokens": model.num_prefix_tokens - ("cls_token" in names),
        "no_embed_class": bool(getattr(model, "no_embed_class", False)),
        "no_pos_emb": "pos_embed" not in names,
        "global_pool": model.global_pool,
        "num_classes": model.num_classes,
        "rope": rope,
        "gaug": False,
        "prr": False,
    }
    arguments |= _rates(model)
    if "blocks.0.ls1.gamma" in names or "blocks.0.gamma_1" in names:
        arguments["init_values"] = 1e-5  # only whether there is layer scale matters: its values are copied
    if model.global_pool == "avg" and "fc_norm.weight" not in names:
        arguments["fc_norm"] = False
    return arguments


def _rates(model: nn.Module) -> dict[str, float]:
    """The dropout rates of a model, under the names of timm's arguments."""
    block = model.blocks[-1]  # where stochastic depth is strongest
    modules = {
        "drop_rate": getattr(model, "head_drop", None),
        "pos_drop_rate": getattr(model, "pos_drop", None),
        "patch_drop_rate": getattr(model, "patch_drop", None),
        "proj_drop_rate": getattr(block.attn, "proj_drop", None),
        "attn_drop_rate": getattr(block.attn, "attn_drop", None),
        "drop_path_rate": getattr(block, "drop_path1", None),
    }
    found = {}
    for name, module in modules.items():
        # nn.Dropout, DropPath and PatchDropout call their rate otherwise; an identity has none.
        rates = (getattr(module, rate, None) for rate in ("p", "drop_prob", "prob"))
        found[name] = float(next((rate for rate in rates if rate is not None), 0.0))
    return found


def _kind(parent: nn.Module | None, name: str) -> str:
    """The name of the class of a child; "NoneType" without such a child."""
    return type(getattr(parent, name, None)).__name__


def _activation(activation: nn.Module, description: str) -> str:
    kind = type(activation).__name__
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if kind not in ACTIVATIONS:
        raise ConversionError(f"{description} has the activation {kind}, which LocAtViT does not have.")
    return ACTIVATIONS[kind]


@functools.cache
def _default_arguments(architecture: str) -> dict[str, Any]:
    try:
        import timm
    except ImportError as error:
        raise ConversionError(
            f"What {architecture} is only timm knows, and it is not installed; `pip install timm` and try again."
        ) from error
    if not timm.is_model(architecture):
        raise ConversionError(f"The architecture {architecture} is unknown, to timm {timm.__version__} too.")
    with torch.device("meta"):
        model = timm.create_model(architecture, pretrained=False)
    arguments = describe(model, f"The architecture {architecture}")
    # No rate is no argument: one of the arguments that come on top may stand for several.
    return {name: value for name, value in arguments.items() if name not in _rates(model) or value}


def default_arguments(architecture: str) -> dict[str, Any]:
    """The arguments that a name of timm stands for, from a model without weights.

    Raises:
        ConversionError: timm is not installed or does not know the name, or the name does not mean a plain ViT.
    """
    return dict(_default_arguments(architecture))


def default_preprocessing(architecture: str) -> dict[str, Any]:
    """Mean, std and crop_pct that timm has for an architecture; nothing where it is not installed."""
    try:
        from timm.models import get_pretrained_cfg
    except ImportError:
        return {}
    cfg = get_pretrained_cfg(architecture, allow_unregistered=True)
    return {} if cfg is None else {"mean": list(cfg.mean), "std": list(cfg.std), "crop_pct": cfg.crop_pct}


__all__ = ["default_arguments", "default_preprocessing", "describe"]
