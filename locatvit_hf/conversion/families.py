"""The families that can be converted: one row each. A new family is a module like `locatvit` and a row here."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .. import modeling_locatjumbo, modeling_locatswin, modeling_locatvit, modeling_pacavit
from . import locatjumbo, locatswin, locatvit, pacavit
from .errors import ConversionError
from .keys import KeyTable
from .sources import Reference, Shapes, unnamed


class Family(NamedTuple):
    """How checkpoints of a family are recognised, configured and renamed.

    name: of our model type.
    recognise: (architecture or None, arguments) -> whether this family converts it.
    build_config: (architecture, arguments, **fields of the configuration) -> configuration.
    default_preprocessing: architecture -> mean, std and crop_pct where the checkpoint says nothing.
    key_table: configuration -> names of the reference -> our names in `classifier`.
    classifier, encoder: our model with and without a head.
    prepare_state: the tensors of a checkpoint -> those of the key table, where some are stored twice or not learned.
    recognise_shapes: (name -> shape) -> whether tensors that come without any arguments are of this family.
    infer_arguments: (name -> shape, arguments) -> the arguments of a checkpoint whose tensors say what it is, and of
        those that it names what the tensors leave open.
    build_model: (configuration, tensors) -> our model, where its class depends on the tensors.
    """

    name: str
    recognise: Callable[[str | None, Mapping[str, Any]], bool]
    build_config: Callable[..., PreTrainedConfig]
    default_preprocessing: Callable[[str | None], dict[str, Any]]
    key_table: Callable[[PreTrainedConfig], KeyTable]
    classifier: type[PreTrainedModel]
    encoder: type[PreTrainedModel]
    prepare_state: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] = dict
    recognise_shapes: Callable[[Shapes], bool] | None = None
    infer_arguments: Callable[[Shapes, Mapping[str, Any]], dict[str, Any]] | None = None
    build_model: Callable[[PreTrainedConfig, Mapping[str, torch.Tensor]], PreTrainedModel] | None = None


def _family(conversion: ModuleType, classifier: type[PreTrainedModel], encoder: type[PreTrainedModel]) -> Family:
    """A row: the models of a family, and what its module of this package offers under the names of the fields."""
    functions = {field: getattr(conversion, field) for field in Family._fields if field in conversion.__all__}
    return Family(name=encoder.config_class.model_type, classifier=classifier, encoder=encoder, **functions)


FAMILIES = (
    _family(locatvit, modeling_locatvit.LocAtViTForImageClassification, modeling_locatvit.LocAtViTModel),
    _family(locatswin, modeling_locatswin.LocAtSwinForImageClassification, modeling_locatswin.LocAtSwinModel),
    _family(locatjumbo, modeling_locatjumbo.LocAtJumboForImageClassification, modeling_locatjumbo.LocAtJumboModel),
    _family(pacavit, modeling_pacavit.PaCaViTForImageClassification, modeling_pacavit.PaCaViTModel),
)


def family_of(reference: Reference) -> Family:
    """The family of a checkpoint. Raises ConversionError for another architecture."""
    if reference.shapes is not None:
        for family in FAMILIES:
            if family.recognise_shapes is not None and family.recognise_shapes(reference.shapes):
                return family
        raise ConversionError(unnamed(reference))
    for family in FAMILIES:
        if family.recognise(reference.architecture, reference.arguments):
            return family
    if reference.architecture is None:
        raise ConversionError(
            f"config.json of {reference.source} names no architecture and holds no arguments of a ViT."
        )
    raise ConversionError(f"The architecture {reference.architecture} cannot be converted; it is none of ours.")


__all__ = ["FAMILIES", "Family", "family_of"]
