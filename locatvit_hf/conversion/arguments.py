"""Init arguments of the reference and of timm -> fields of our configurations, as far as all families agree."""

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig

from .errors import ConversionError
from .kinds import check_kind

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# Argument -> field, where the value is the same.
SAME_VALUE = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "num_classes": "num_labels",
    "qkv_bias": "qkv_bias",
    "gaug": "use_gaussian",
    "prr": "use_refinement",
}
# Arguments that do not change what a trained model computes: ours takes every image size, and dropout is chosen anew.
WITHOUT_EFFECT = {
    *(
        "dynamic_img_size",
        "dynamic_img_pad",
        "strict_img_size",
        "store_metrics",
        "pretrained",
        "weight_init",
        "fix_init",
    ),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("drop_block_rate", "init_std", "head_init_scale", "device", "dtype"),
}
# Kind of the value, where it has one in all families.
KINDS = {
    **dict.fromkeys(("img_size", "patch_size"), "a whole number or two of them"),
    **dict.fromkeys(("in_chans", "num_classes", "embed_dim", "depth", "J", "window_size"), "a whole number"),
    **dict.fromkeys(("reg_tokens", "num_reg_tokens"), "a whole number"),
    "num_heads": "a whole number or a list of them",
    "depths": "a list of whole numbers",
    **dict.fromkeys(("qkv_bias", "gaug", "prr", "class_token", "no_embed_class", "no_pos_emb"), "true or false"),
    **dict.fromkeys(("mlp_ratio", "rope_temperature", "layer_norm_eps"), "a number"),
    "init_values": "a number or null",
}
ACTIVATIONS = {None: "gelu", "gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
ACTIVATIONS |= {"relu": "relu", "silu": "silu", "swish": "silu"}


def translate(
    arguments: Mapping[str, Any],
    same_value: Mapping[str, str],
    only_values: Mapping[str, tuple[Any, ...]],
    elsewhere: Collection[str],
    model: str,
) -> dict[str, Any]:
    """The fields whose value is that of an argument.

    same_value: argument -> field of this family, besides those of all families.
    only_values: arguments that change the function in ways that we do not have, and the values that are taken.
    elsewhere: arguments that the family reads itself. model: our model in words.
    Raises ConversionError for an argument that is unknown or asks for what our models do not have.
    """
    same_value = {**SAME_VALUE, **same_value}
    fields = {}
    for name, value in arguments.items():
        if name in KINDS:
            check_kind("The model was built with", name, value, KINDS[name])
        if name in same_value:
            fields[same_value[name]] = list(value) if isinstance(value, tuple) else value
        elif name in only_values:
            value = tuple(value) if isinstance(value, list) else value
            if not any(value == allowed for allowed in only_values[name]):
                raise ConversionError(f"The model was built with {name}={value!r}, which {model} does not have.")
        elif name == "act_layer":
            if not isinstance(value, str | None) or value not in ACTIVATIONS:
                raise ConversionError(f"The model was built with the unknown activation act_layer={value!r}.")
            fields["hidden_act"] = ACTIVATIONS[value]
        elif name not in WITHOUT_EFFECT and name not in elsewhere:
            raise ConversionError(f"The model was built with the unknown argument {name}={value!r}.")
    return fields


def preset_of(config_class: type[PreTrainedConfig], size: str, architecture: str) -> dict[str, Any]:
    """The fields of a size in the name of an architecture. Raises ConversionError for an unknown size."""
    presets = config_class.presets
    if size not in presets:
        raise ConversionError(f"{architecture} has the unknown size {size!r}; the sizes are {', '.join(presets)}.")
    return dict(presets[size])


__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "preset_of", "translate"]
