"""LocAtViT for Hugging Face Transformers: vision transformers that see where things are.

Importing the package registers its models with the Auto classes; this file is not remote code.
"""

from pathlib import Path

import transformers
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel

from .configuration_locatjumbo import LocAtJumboConfig
from .configuration_locatswin import LocAtSwinConfig
from .configuration_locatvit import LocAtViTConfig
from .configuration_pacavit import PaCaViTConfig
from .image_processing_locatvit import LocAtViTImageProcessor
from .modeling_locatjumbo import (
    LocAtJumboBackbone,
    LocAtJumboForImageClassification,
    LocAtJumboForSemanticSegmentation,
    LocAtJumboModel,
    LocAtJumboPreTrainedModel,
)
from .modeling_locatswin import (
    LocAtSwinBackbone,
    LocAtSwinForImageClassification,
    LocAtSwinForSemanticSegmentation,
    LocAtSwinModel,
    LocAtSwinPreTrainedModel,
)
from .modeling_locatvit import (
    LocAtViTBackbone,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
    LocAtViTModel,
    LocAtViTPreTrainedModel,
)
from .modeling_pacavit import (
    PaCaViTBackbone,
    PaCaViTForImageClassification,
    PaCaViTForSemanticSegmentation,
    PaCaViTModel,
    PaCaViTPreTrainedModel,
)
from .utils.registry import FAMILIES

__version__ = "0.1.0"

for model_type, family in FAMILIES.items():
    models = family.models
    AutoConfig.register(model_type, family.config_class, exist_ok=True)
    AutoImageProcessor.register(
        family.config_class, image_processor_classes={"torchvision": LocAtViTImageProcessor}, exist_ok=True
    )
    for auto_class, model_class in models.items():
        getattr(transformers, auto_class).register(family.config_class, model_class, exist_ok=True)
    # Classes of a family that no line above imports.
    globals().update({found.__name__: found for found in (family.config_class, *models.values())})


def _from_vit(cls: type[PreTrainedModel], checkpoint: str | Path | nn.Module, **config_overrides) -> PreTrainedModel:
    """Make a model of this class that starts from a plain ViT, see `locatvit_hf.conversion.vit.from_vit`."""
    from .conversion.vit import from_vit

    return from_vit(cls, checkpoint, **config_overrides)


# A tool that remote code must not import is attached here, and loaded when it is called.
LocAtViTPreTrainedModel.from_vit = classmethod(_from_vit)

__all__ = [
    "LocAtJumboBackbone",
    "LocAtJumboConfig",
    "LocAtJumboForImageClassification",
    "LocAtJumboForSemanticSegmentation",
    "LocAtJumboModel",
    "LocAtJumboPreTrainedModel",
    "LocAtSwinBackbone",
    "LocAtSwinConfig",
    "LocAtSwinForImageClassification",
    "LocAtSwinForSemanticSegmentation",
    "LocAtSwinModel",
    "LocAtSwinPreTrainedModel",
    "LocAtViTBackbone",
    "LocAtViTConfig",
    "LocAtViTForImageClassification",
    "LocAtViTForSemanticSegmentation",
    "LocAtViTImageProcessor",
    "LocAtViTModel",
    "LocAtViTPreTrainedModel",
    "PaCaViTBackbone",
    "PaCaViTConfig",
    "PaCaViTForImageClassification",
    "PaCaViTForSemanticSegmentation",
    "PaCaViTModel",
    "PaCaViTPreTrainedModel",
]
