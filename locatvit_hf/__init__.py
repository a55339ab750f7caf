"""LocAtViT for Hugging Face Transformers: vision transformers that see where things are.

Importing the package registers its models with the Auto classes; this file never travels to the Hub.
"""

from pathlib import Path

from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
)

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

__version__ = "0.1.0"

for config_class, model_classes in (
    (
        LocAtViTConfig,
        (LocAtViTModel, LocAtViTForImageClassification, LocAtViTForSemanticSegmentation, LocAtViTBackbone),
    ),
    (
        LocAtSwinConfig,
        (LocAtSwinModel, LocAtSwinForImageClassification, LocAtSwinForSemanticSegmentation, LocAtSwinBackbone),
    ),
    (
        LocAtJumboConfig,
        (LocAtJumboModel, LocAtJumboForImageClassification, LocAtJumboForSemanticSegmentation, LocAtJumboBackbone),
    ),
    (PaCaViTConfig, (PaCaViTModel, PaCaViTForImageClassification, PaCaViTForSemanticSegmentation, PaCaViTBackbone)),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoImageProcessor.register(
        config_class, image_processor_classes={"torchvision": LocAtViTImageProcessor}, exist_ok=True
    )
    auto_classes = (AutoModel, AutoModelForImageClassification, AutoModelForSemanticSegmentation, AutoBackbone)
    for auto_class, model_class in zip(auto_classes, model_classes, strict=True):
        auto_class.register(config_class, model_class, exist_ok=True)


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
