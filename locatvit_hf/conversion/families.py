"""The families that can be converted: one row each. A new family is a module like `locatvit` and a row here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .. import modeling_locatjumbo, modeling_locatswin, modeling_locatvit, modeling_pacavit
from ..image_processing_locatvit import LocAtViTImageProcessor
from . import locatjumbo, locatswin, locatvit, pacavit
from .errors import ConversionError
from .keys import KeyTable
from .sources import Reference, Shapes


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
    infer_arguments: (name -> shape) -> the arguments of such a checkpoint.
    build_model: (configuration, tensors) -> our model, where its class depends on the tensors.
    processor: our image processor.
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
    infer_arguments: Callable[[Shapes], dict[str, Any]] | None = None
    build_model: Callable[[PreTrainedConfig, Mapping[str, torch.Tensor]], PreTrainedModel] | None = None
    processor: type = LocAtViTImageProcessor


FAMILIES = (
    Family(
        name="locatvit",
        recognise=locatvit.recognise,
        build_config=locatvit.build_config,
        default_preprocessing=locatvit.default_preprocessing,
        key_table=locatvit.key_table,
        classifier=modeling_locatvit.LocAtViTForImageClassification,
        encoder=modeling_locatvit.LocAtViTModel,
    ),
    Family(
        name="locatswin",
        recognise=locatswin.recognise,
        build_config=locatswin.build_config,
        default_preprocessing=locatswin.default_preprocessing,
        key_table=locatswin.key_table,
        classifier=modeling_locatswin.LocAtSwinForImageClassification,
        encoder=modeling_locatswin.LocAtSwinModel,
        prepare_state=locatswin.prepare_state,
    ),
    Family(
        name="locatjumbo",
        recognise=locatjumbo.recognise,
        build_config=locatjumbo.build_config,
        default_preprocessing=locatjumbo.default_preprocessing,
        key_table=locatjumbo.key_table,
        classifier=modeling_locatjumbo.LocAtJumboForImageClassification,
        encoder=modeling_locatjumbo.LocAtJumboModel,
        prepare_state=locatjumbo.prepare_state,
    ),
    Family(
        name="pacavit",
        recognise=pacavit.recognise,
        build_config=pacavit.build_config,
        default_preprocessing=pacavit.default_preprocessing,
        key_table=pacavit.key_table,
        classifier=modeling_pacavit.PaCaViTForImageClassification,
        encoder=modeling_pacavit.PaCaViTModel,
        prepare_state=pacavit.prepare_state,
        recognise_shapes=pacavit.recognise_shapes,
        infer_arguments=pacavit.infer_arguments,
        build_model=pacavit.build_model,
    ),
)


def family_of(reference: Reference) -> Family:
    """The family of a checkpoint. Raises ConversionError for another architecture."""
    if reference.shapes is not None:
        for family in FAMILIES:
            if family.recognise_shapes is not None and family.recognise_shapes(reference.shapes):
                return family
        file = reference.weights_file
        raise ConversionError(
            f"There is no args.yaml beside {file.name} in {file.parent}; without it the model is unknown."
        )
    for family in FAMILIES:
        if family.recognise(reference.architecture, reference.arguments):
            return family
    if reference.architecture is None:
        raise ConversionError(
            f"config.json of {reference.source} names no architecture and holds no arguments of a ViT."
        )
    raise ConversionError(f"The architecture {reference.architecture} cannot be converted; it is none of ours.")


__all__ = ["FAMILIES", "Family", "family_of"]
