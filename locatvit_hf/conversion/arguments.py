"""Init arguments of the reference and of timm -> fields of our configurations, as far as all families agree."""

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig

from .errors import ConversionError
from .validation import check_type

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# Argument -> field, where the value is the same.
RENAMED = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "num_classes": "num_labels",
    "qkv_bias": "qkv_bias",
    "gaug": "use_gaussian",
    "prr": "use_refinement",
}
# Dropout rate -> field. It acts in training alone, so a rate changes no output, but it does change fine-tuning.
RATES = {
    "drop_path_rate": "drop_path_rate",
    "attn_drop_rate": "attention_probs_dropout_prob",
    # timm's name of the dropout after the embeddings, the projections and in the MLPs, and what it was called before.
    "proj_drop_rate": "hidden_dropout_prob",
    "drop_rate": "hidden_dropout_prob",
}
# Dropout of parts that our models do not drop on their own.
OTHER_RATES = ("pos_drop_rate", "patch_drop_rate", "drop_block_rate")
# Arguments that do not change what a trained model computes: ours takes every image size.
IGNORED_ARGS = {
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "store_metrics", "pretrained", "weight_init"),
    *("fix_init", "init_std", "head_init_scale", "device", "dtype"),
    *RATES,
    *OTHER_RATES,
}
# Kind of the value, where it has one in all families.
ARGUMENT_TYPES = {
    **dict.fromkeys(("img_size", "patch_size"), "a whole number or two of them"),
    **dict.fromkeys(("in_chans", "num_classes", "embed_dim", "depth", "J", "window_size"), "a whole number"),
    **dict.fromkeys(("reg_tokens", "num_reg_tokens"), "a whole number"),
    "num_heads": "a whole number or a list of them",
    "depths": "a list of whole numbers",
    **dict.fromkeys(("qkv_bias", "gaug", "prr", "class_token", "no_embed_class", "no_pos_emb"), "true or false"),
    **dict.fromkeys(("mlp_ratio", "rope_temperature", "layer_norm_eps"), "a number"),
    "init_values": "a number or null",
    **dict.fromkeys((*RATES, *OTHER_RATES), "a number or null"),
}
ACTIVATIONS = {None: "gelu", "gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
ACTIVATIONS |= {"relu": "relu", "silu": "silu", "swish": "silu"}


def translate(
    arguments: Mapping[str, Any],
    renamed: Mapping[str, str],
    supported_values: Mapping[str, tuple[Any, ...]],
    handled: Collection[str],
    model: str,
) -> dict[str, Any]:
    """Fields whose value is that of an argument.

    Args:
        arguments: Init arguments of the reference or of timm.
        renamed: Argument -> field of this family, besides those of all families.
        supported_values: Argument that changes the function in ways that we do not have -> the values that are taken.
        handled: Arguments that the family reads itself.
        model: Our model in words.

    Returns:
        Field -> value.

    Raises:
        ConversionError: An argument is unknown or asks for what our models do not have.
    """
    renamed = {**RENAMED, **renamed}
    fields = {}
    for name, value in arguments.items():
        if name in ARGUMENT_TYPES:
            check_type("The model was built with", name, value, ARGUMENT_TYPES[name])
        if name in renamed:
            fields[renamed[name]] = list(value) if isinstance(value, tuple) else value
        elif name in supported_values:
            value = tuple(value) if isinstance(value, list) else value
            if not any(value == allowed for allowed in supported_values[name]):
                raise ConversionError(f"The model was built with {name}={value!r}, which {model} does not have.")
        elif name == "act_layer":
            if not isinstance(value, str | None) or value not in ACTIVATIONS:
                raise ConversionError(f"The model was built with the unknown activation act_layer={value!r}.")
            fields["hidden_act"] = ACTIVATIONS[value]
        elif name not in IGNORED_ARGS and name not in handled:
            raise ConversionError(f"The model was built with the unknown argument {name}={value!r}.")
    return {**fields, **dropout_fields(arguments)}


def dropout_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration for the dropout rates that a source names.

    Args:
        arguments: Init arguments of timm or the reference; a rate that is None stands for the default of the model.

    Returns:
        Field -> rate, from 0 to 1, for the named rates alone.

    Raises:
        ConversionError: A rate is not a number.
    """
    fields: dict[str, Any] = {}
    for name, field in RATES.items():
        check_type("The model was built with", name, arguments.get(name), ARGUMENT_TYPES[name])
        if arguments.get(name) is not None:
            fields.setdefault(field, arguments[name])  # proj_drop_rate stands before drop_rate
    return fields


def changed_rates(arguments: Mapping[str, Any]) -> list[str]:
    """Tell what becomes of dropout rates that our models do not have as such.

    Args:
        arguments: Init arguments of timm or the reference.

    Returns:
        One sentence for the rates that are left out, and one for a rate that is taken for another.
    """
    hidden = dropout_fields(arguments).get("hidden_dropout_prob", 0.0)
    # Ours drops after the embeddings at the rate of the projections.
    held = {"drop_rate": hidden, "pos_drop_rate": hidden}
    left_out = [
        f"{name}={arguments[name]}"
        for name in ("drop_rate", *OTHER_RATES)
        if arguments.get(name) and arguments[name] != held.get(name)
    ]
    sentences = []
    if left_out:
        sentences.append(f"Left out {', '.join(left_out)}: our models have no such dropout; it acts in training alone.")
    if arguments.get("drop_rate") and arguments.get("proj_drop_rate") is None:
        sentences.append(
            f"Took drop_rate={arguments['drop_rate']} for hidden_dropout_prob, which acts after the embeddings, the "
            "projections and in the MLPs; newer versions of timm mean a dropout before the classifier."
        )
    return sentences


def preset_of(config_class: type[PreTrainedConfig], size: str, architecture: str) -> dict[str, Any]:
    """The fields of a size in the name of an architecture.

    Raises:
        ConversionError: There is no such size.
    """
    presets = config_class.presets
    if size not in presets:
        raise ConversionError(f"{architecture} has the unknown size {size!r}; the sizes are {', '.join(presets)}.")
    return dict(presets[size])


__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "changed_rates", "dropout_fields", "preset_of", "translate"]
