"""The model that a run starts from: a checkpoint of one of our families, or a plain ViT of another library."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from locatvit_hf import LocAtViTForImageClassification, LocAtViTImageProcessor, LocAtViTModel
from locatvit_hf.configuration_utils_locat import FamilyConfigMixin
from locatvit_hf.conversion.vit import open_vit
from locatvit_hf.hub.config import build_config as build_repository_config
from locatvit_hf.hub.config import check_bounds, family_in, weights_of
from locatvit_hf.layers_locat import resample_position_embeddings
from locatvit_hf.utils.registry import FAMILIES
from training.engine.arguments import console, describe

# What `from_vit` makes of a plain ViT.
VIT_CLASSES = {AutoModel: LocAtViTModel, AutoModelForImageClassification: LocAtViTForImageClassification}
POSITIONS = "embeddings.position_embeddings"


def build_config(family: str, preset: str | None, values: dict[str, Any]) -> PreTrainedConfig:
    """A configuration by the name of its family, a size of the paper and its fields; unknown ones are errors."""
    try:
        config_class = type(AutoConfig.for_model(family))
    except ValueError:  # which names every model of transformers
        raise ValueError(f"There is no family {family!r}; choose one of {', '.join(FAMILIES)}.") from None
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(config_class)} - {"id2label", "label2id"})
    if unknown:
        raise ValueError(f"A {family} configuration has no field {unknown[0]!r}.")
    try:
        check_bounds(values)
        return config_class.from_preset(preset, **values) if preset is not None else config_class(**values)
    except StrictDataclassError as error:
        raise ValueError(describe(error)) from None


def without_num_labels(fields: dict[str, Any], label_names: list[str]) -> dict[str, Any]:
    """Fields of a configuration but for the number of classes. Raises ValueError where it is not that of the names."""
    num_labels = fields.get("num_labels", len(label_names))
    if num_labels != len(label_names):
        raise ValueError(f"model.num_labels is {num_labels}, but the data has {len(label_names)} classes.")
    return {name: value for name, value in fields.items() if name != "num_labels"}


def label_fields(label_names: list[str]) -> dict[str, Any]:
    """The fields of a configuration that name the classes, in the order of their ids."""
    return {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}


def read_config(pretrained: str | Path) -> PreTrainedConfig | None:
    """The configuration of a checkpoint of transformers; None where there is none, as in a folder of timm.

    Raises:
        ValueError: It is of one of our families and not valid.
    """
    try:
        content, _ = PreTrainedConfig.get_config_dict(pretrained)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None
    if not isinstance(content, dict):
        raise ValueError(f"The config.json of {pretrained} is not a JSON object.")
    if family_in(content) is not None:
        return build_repository_config(content, str(pretrained))
    try:
        return AutoConfig.from_pretrained(pretrained)
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        return None


def load_pretrained(
    auto_class: Any, pretrained: str | Path | None, fields: dict[str, Any] | None = None, keep_plain: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """The model of a checkpoint, and the names of its parameters that the checkpoint does not have.

    Any checkpoint of our families will do, whatever its head; anything else goes through `from_vit`. The weights are
    float32, in whatever precision they are stored: steps of half-precision weights are rounded away.

    Args:
        auto_class: `AutoModel` or `AutoModelForImageClassification`.
        pretrained: Folder or Hub name.
        fields: Of the configuration, to change. Position embeddings follow another `image_size`; other tensors whose
            shape changes start anew, which is printed.
        keep_plain: Give a plain ViT no Gaussians, which is the model itself.

    Raises:
        ValueError: Where there is no such model or field, or the checkpoint holds nothing of the encoder.
    """
    if pretrained is None:
        raise ValueError("Name the model to start from with --pretrained: a folder or a Hub name.")
    fields = dict(fields or {})
    source = read_config(pretrained)
    if source is not None and isinstance(getattr(source, "backbone_config", None), FamilyConfigMixin):
        raise ValueError(
            f"{pretrained} is a {source.model_type} around a {source.backbone_config.model_type}: start from the "
            "checkpoint that it was made of."
        )
    if not isinstance(source, FamilyConfigMixin):
        fields = {"use_gaussian": False, **fields} if keep_plain else fields
        model = VIT_CLASSES[auto_class].from_vit(pretrained, **fields)
        without_head = auto_class is AutoModelForImageClassification and open_vit(pretrained).head is None
        new = (".gaussian.", *(("classifier.",) if without_head else ()))
        return model, [name for name, _ in model.named_parameters() if any(part in name for part in new)]
    if unknown := sorted(set(fields) - {f.name for f in dataclasses.fields(source)}):
        raise ValueError(f"A {source.model_type} configuration has no field {unknown[0]!r}.")
    image_size = fields.pop("image_size", source.image_size)
    config = change_config(source, fields)
    with weights_of(pretrained):
        model, info = auto_class.from_pretrained(
            pretrained, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    fresh = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    in_encoder = [name for name in fresh if name.startswith(prefix)]
    if len(in_encoder) >= len(model.base_model.state_dict()):
        raise ValueError(f"{pretrained} holds no weights of a {source.model_type}.")
    if in_encoder:
        console.print(f"Starts anew, because the checkpoint has no such tensor: {', '.join(in_encoder)}.", markup=False)
    if image_size != source.image_size:
        model = rebuild(model, image_size=image_size)
    return model, fresh


def rebuild(model: PreTrainedModel, **fields: Any) -> PreTrainedModel:
    """The same weights under a configuration with other labels or another image size.

    Other labels give a new classifier; position embeddings are resampled to another native grid.
    """
    config = change_config(model.config, fields)
    rebuilt, state = type(model)(config), model.state_dict()
    if "id2label" in fields:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    for name, tensor in rebuilt.state_dict().items():
        if name.endswith(POSITIONS) and tensor.shape != state[name].shape:
            grid = model.config.native_grid
            num_prefix = state[name].shape[1] - math.prod(grid)
            state[name] = resample_position_embeddings(state[name], grid, config.native_grid, num_prefix)
    rebuilt.load_state_dict(state, strict=False)
    return rebuilt


def load_processor(pretrained: str | Path, config: PreTrainedConfig) -> BaseImageProcessor:
    """The processor of a checkpoint where it has one that crops, as classification does; else that of its model."""
    if isinstance(read_config(pretrained), FamilyConfigMixin):
        try:
            processor = LocAtViTImageProcessor.from_pretrained(pretrained)
        except OSError:
            processor = None
        if processor is not None and processor.size_divisor is None:
            return processor
    return LocAtViTImageProcessor.from_model_config(config)


def change_config(config: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedConfig:
    """A configuration with other values in some of its fields.

    Left out are which stages a backbone returns, and the precision in which its weights were stored: a model that is
    built of a configuration takes it over, and trains in it.
    """
    left_out = {"out_features", "out_indices", "stage_names", "dtype"}
    if {"id2label", "num_labels"} & fields.keys():
        left_out |= {"id2label", "label2id", "num_labels"}
    values = {name: value for name, value in copy.deepcopy(config.to_dict()).items() if name not in left_out}
    try:
        return type(config)(**{**values, **fields})
    except StrictDataclassError as error:
        raise ValueError(describe(error)) from None
