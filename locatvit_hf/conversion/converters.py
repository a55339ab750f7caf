"""The families that can be converted: those of the registry that name a module of this sub-package."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.registry import FAMILIES, Family
from .errors import ConversionError
from .key_mapping import KeyTable
from .readers import Shapes, SourceCheckpoint, unnamed


class Converter(NamedTuple):
    """How checkpoints of a family are recognized, configured and renamed.

    Attributes:
        family: Our models.
        recognize: (architecture or None, arguments) -> whether this family converts it.
        build_config: (architecture, arguments, **fields of the configuration) -> configuration.
        default_preprocessing: architecture -> mean, std and crop_pct where the checkpoint says nothing.
        key_table: configuration -> names of the reference -> our names in the classifier.
        prepare_state: The tensors of a checkpoint -> those of the key table, where some are stored twice or not
            learned.
        recognize_shapes: (name -> shape) -> whether tensors that come without any arguments are of this family.
        infer_arguments: (name -> shape, arguments) -> the arguments of a checkpoint whose tensors say what it is, and
            of those that it names what the tensors leave open.
        build_model: (configuration, tensors) -> our model, where its class depends on the tensors.
    """

    family: Family
    recognize: Callable[[str | None, Mapping[str, Any]], bool]
    build_config: Callable[..., PreTrainedConfig]
    default_preprocessing: Callable[[str | None], dict[str, Any]]
    key_table: Callable[[PreTrainedConfig], KeyTable]
    prepare_state: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] = dict
    recognize_shapes: Callable[[Shapes], bool] | None = None
    infer_arguments: Callable[[Shapes, Mapping[str, Any]], dict[str, Any]] | None = None
    build_model: Callable[[PreTrainedConfig, Mapping[str, torch.Tensor]], PreTrainedModel] | None = None

    @property
    def classifier(self) -> type[PreTrainedModel]:
        """Our model with a head."""
        return self.family.models["AutoModelForImageClassification"]

    @property
    def encoder(self) -> type[PreTrainedModel]:
        """Our model without a head."""
        return self.family.models["AutoModel"]


def _converter(family: Family) -> Converter:
    """What the module of a family offers under the names of the fields."""
    module = importlib.import_module(f".{family.converter}", __package__)
    functions = {field: getattr(module, field) for field in Converter._fields if field in module.__all__}
    return Converter(family, **functions)


CONVERTERS = tuple(_converter(family) for family in FAMILIES.values() if family.converter is not None)


def converter_of(checkpoint: SourceCheckpoint) -> Converter:
    """The converter of a checkpoint.

    Raises:
        ConversionError: No family converts this architecture.
    """
    if not checkpoint.is_named:
        for converter in CONVERTERS:
            if converter.recognize_shapes is not None and converter.recognize_shapes(checkpoint.shapes):
                return converter
        raise ConversionError(unnamed(checkpoint))
    for converter in CONVERTERS:
        if converter.recognize(checkpoint.architecture, checkpoint.arguments):
            return converter
    if checkpoint.architecture is None:
        raise ConversionError(
            f"config.json of {checkpoint.source} names no architecture and holds no arguments of a ViT."
        )
    raise ConversionError(f"The architecture {checkpoint.architecture} cannot be converted; it is not one of ours.")


__all__ = ["CONVERTERS", "Converter", "converter_of"]
