"""`from_vit`: a LocAtViT that starts from a plain ViT of transformers or timm and computes what it computes.

The Gaussian starts switched down and the refinement off, so that training departs from the source.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration_locatvit import LocAtViTConfig
from ..layers_locat import resample_position_embeddings
from ..utils.io import one_line
from . import locatvit, timm_vit, transformers_vit
from .arguments import changed_rates
from .errors import ConversionError
from .key_mapping import rename, restrict
from .plain_vit import PlainViT
from .readers import find, read_checkpoint, read_state, unnamed

logger = logging.get_logger(__name__)

# Strength of the new Gaussians: small beside any attention logit that matters, and above where Adam's epsilon drowns
# its gradient.
INITIAL_AMPLITUDE = 5e-5

HEAD_NAMES = ("classifier.weight", "classifier.bias")
# Fields that the weights were trained with: another value loads, or lacks tensors, and computes something else.
IMMUTABLE_FIELDS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "num_register_tokens", "use_class_token")


def from_vit(cls, checkpoint: str | Path | nn.Module, **config_overrides) -> PreTrainedModel:
    """Make a model of this class that starts from a plain ViT.

    The new Gaussians start at an amplitude of 5e-5, and `last_hidden_state` is the source's to within 1e-3. The head is
    copied where it has our shape, otherwise it is new and a sentence says so.

    Args:
        checkpoint: A ViT, DeiT, DINOv2 or DINOv2 with registers of transformers, or a ViT of timm: a folder, a Hub id,
            or a model in memory. DeiT's distillation token becomes a register.
        config_overrides: Fields of `LocAtViTConfig`, and `attn_implementation`. `use_refinement=True` refines from the
            start. For another `image_size` the position embeddings are resampled as the source does. `pooling="mean"`
            in place of a class token takes the mean of the normed tokens, and a new head.

    Raises:
        ValueError: The checkpoint is not a plain ViT, or has fixed one of the fields.
    """
    attn_implementation = config_overrides.pop("attn_implementation", None)
    known = LocAtViTConfig()
    unknown = [name for name in config_overrides if not hasattr(known, name)]
    if unknown:
        raise ValueError(f"LocAtViTConfig has no field {unknown[0]!r}.")
    source = open_vit(checkpoint)
    labels = ("num_labels", "id2label", "label2id")
    fields = dict(source.fields)
    if any(name in config_overrides for name in labels):
        fields = {name: value for name, value in fields.items() if name not in labels}
    try:
        native = LocAtViTConfig(**fields)
        if native.pooling == "cls" and config_overrides.get("pooling") == "mean":
            config_overrides.setdefault("norm_before_pooling", True)
        config = LocAtViTConfig(**{**fields, **config_overrides})
    except StrictDataclassError as error:
        raise ConversionError(f"{one_line(error.__cause__ or error)}.") from error
    for name in IMMUTABLE_FIELDS:
        trained, asked = getattr(native, name), getattr(config, name)
        if asked != trained:
            raise ConversionError(
                f"{source.description} was trained with {name}={trained!r} and cannot start with {asked!r}."
            )

    state = dict(source.state)
    if config.native_grid != native.native_grid and source.position_name in state:
        state[source.position_name] = source.resample(native, config.native_grid)
    model = cls._from_config(config, attn_implementation=attn_implementation)
    _load(model, source, config, state)
    for module in model.modules():
        if hasattr(module, "gaussian") and module.gaussian is not None:
            nn.init.zeros_(module.gaussian.amplitude.weight)
            nn.init.constant_(module.gaussian.amplitude.bias, math.log(math.expm1(INITIAL_AMPLITUDE)))
    return model.eval()


@torch.no_grad()
def _load(model: PreTrainedModel, source: PlainViT, config: LocAtViTConfig, state: dict[str, torch.Tensor]) -> None:
    """Copies every tensor of the source, and its head where it fits."""
    parameters = dict(model.named_parameters())
    prefix = "" if model.base_model is not model else f"{model.base_model_prefix}."
    # New: the Gaussians, which the source cannot have, and the heads.
    table = restrict(source.key_table(_without_gaussian(config)), parameters, prefix)
    table = {name: ours for name, ours in table.items() if not ours[0].startswith("classifier.")}
    renamed = rename(state, table, {name: parameter.shape for name, parameter in parameters.items()})
    for name, tensor in renamed.items():
        parameters[name].copy_(tensor)
    if "classifier.weight" in parameters:
        shape = parameters["classifier.weight"].shape
        reads_the_same = config.pooling == source.fields.get("pooling", "cls")
        if reads_the_same and source.head is not None and source.head["classifier.weight"].shape == shape:
            for name in HEAD_NAMES:
                parameters[name].copy_(source.head[name])
            return
        reason = source.missing_head_reason
        if source.head is not None:
            classes = f"of {len(source.head['classifier.bias'])} classes"
            reason = f"has a classifier {classes if reads_the_same else 'of another pooling'}"
        logger.warning(
            f"{source.description} {reason}: the classifier of {shape[0]} classes is new and must be trained."
        )
    elif model.base_model is not model and hasattr(model, "segmentation_head"):
        logger.warning(f"The segmentation head of {config.num_labels} classes is new and must be trained.")


def _without_gaussian(config: LocAtViTConfig) -> LocAtViTConfig:
    """The configuration of the same model with plain attention."""
    plain = copy.deepcopy(config)
    plain.use_gaussian = False
    return plain


def open_vit(checkpoint: str | Path | nn.Module) -> PlainViT:
    """Read a plain ViT: a model of transformers or timm in memory, a folder of either, or a Hub id.

    Raises:
        ConversionError: It is anything else.
    """
    if isinstance(checkpoint, nn.Module):
        if hasattr(checkpoint, "pretrained_cfg"):
            return _of_timm_model(checkpoint)
        if getattr(getattr(checkpoint, "config", None), "model_type", None) in transformers_vit.TRANSFORMERS_TYPES:
            return transformers_vit.describe(checkpoint, {}, type(checkpoint).__name__)
        raise ConversionError(f"A {type(checkpoint).__name__} is not a plain ViT of transformers or timm.")
    folder = find(str(checkpoint))
    config = transformers_vit.read_config(folder)
    if config is None:
        return _of_checkpoint(folder, str(checkpoint))
    return transformers_vit.open_folder(folder, config, str(checkpoint))


def _of_checkpoint(path: Path, description: str) -> PlainViT:
    """A plain ViT of timm, or of a training run of the reference's program."""
    checkpoint = read_checkpoint(path, description)
    if not checkpoint.is_named:
        raise ConversionError(unnamed(checkpoint))
    if checkpoint.architecture is None:
        raise ConversionError(f"{description} holds the arguments of a LocAtViT; convert it with `locatvit convert`.")
    # The distilled DeiT has a second token and a second head; their mean is not a linear head on the class token.
    name = (checkpoint.architecture or "").replace("_distilled", "")
    if not locatvit.recognize(name, checkpoint.arguments) or name.startswith("locatvit"):
        advice = "; convert it with `locatvit convert`" if name.startswith("locatvit") else ""
        raise ConversionError(f"The architecture {checkpoint.architecture} is not a plain ViT of timm{advice}.")
    arguments = dict(checkpoint.arguments)
    if name != checkpoint.architecture:
        arguments["reg_tokens"] = 1
    fields = locatvit.config_fields(name, arguments)
    preprocessing = {**locatvit.default_preprocessing(name), **checkpoint.preprocessing}
    fields["image_mean"], fields["image_std"] = list(preprocessing["mean"]), list(preprocessing["std"])
    fields["crop_pct"] = preprocessing["crop_pct"]
    labels = checkpoint.label_names
    if labels and len(labels) == fields["num_labels"]:
        fields["id2label"] = dict(enumerate(map(str, labels)))
        fields["label2id"] = {label: index for index, label in fields["id2label"].items()}
    state, _ = read_state(checkpoint)
    for sentence in changed_rates(arguments):
        logger.warning(f"{description}: {sentence}")
    return _of_timm(fields, state, description)


def _of_timm_model(model: nn.Module) -> PlainViT:
    """A `VisionTransformer` of timm in memory. What it has besides a plain ViT shows up as tensors without a place."""
    description = f"The timm model {type(model).__name__}"
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    arguments = timm_vit.describe(model, description)
    for sentence in changed_rates(arguments):
        logger.warning(f"{description}: {sentence}")
    fields = locatvit.config_fields(None, arguments)
    cfg = model.pretrained_cfg or {}
    fields["image_mean"], fields["image_std"] = list(cfg.get("mean", [0.5] * 3)), list(cfg.get("std", [0.5] * 3))
    fields["crop_pct"] = cfg.get("crop_pct") or 0.9
    return _of_timm(fields, state, description)


def _of_timm(fields: dict[str, Any], state: dict[str, torch.Tensor], description: str) -> PlainViT:
    # The Gaussian is what is new. The refinement stays only where the source has it (global_pool="prr").
    fields = {**fields, "use_gaussian": True}
    heads = {name: state[name] for name in state if name.startswith(("head.", "head_dist."))}
    state = {name.replace("dist_token", "reg_token"): tensor for name, tensor in state.items() if name not in heads}
    if not heads:
        fields.pop("num_labels")
    head = None
    if "head.weight" in heads and "head_dist.weight" not in heads:
        head = {f"classifier.{name.removeprefix('head.')}": tensor for name, tensor in heads.items()}

    def resample(native: LocAtViTConfig, grid: tuple[int, int]) -> torch.Tensor:
        prefix = native.num_prefix_tokens if native.prefix_position_embeddings else 0
        return resample_position_embeddings(state["pos_embed"], native.native_grid, grid, prefix)

    return PlainViT(
        description=description,
        fields=fields,
        state=state,
        key_table=locatvit.key_table,
        position_name="pos_embed",
        resample=resample,
        head=head,
        missing_head_reason="has a classifier of another form" if heads else "has no classifier",
    )


__all__ = ["PlainViT", "from_vit", "open_vit"]
