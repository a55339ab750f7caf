"""LocAtViT for Hugging Face Transformers: vision transformers that see where things are.

Importing the package registers its models with the Auto classes; this file never travels to the Hub.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

from .configuration_locatvit import LocAtViTConfig
from .conversion.vit import from_vit
from .image_processing_locatvit import LocAtViTImageProcessor
from .modeling_locatvit import (
    LocAtViTBackbone,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
    LocAtViTModel,
    LocAtViTPreTrainedModel,
)

__version__ = "0.1.0"

for config_class, model_classes in (
    (
        LocAtViTConfig,
        (LocAtViTModel, LocAtViTForImageClassification, LocAtViTForSemanticSegmentation, LocAtViTBackbone),
    ),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoImageProcessor.register(
        config_class, image_processor_classes={"torchvision": LocAtViTImageProcessor}, exist_ok=True
    )
    auto_classes = (AutoModel, AutoModelForImageClassification, AutoModelForSemanticSegmentation, AutoBackbone)
    for auto_class, model_class in zip(auto_classes, model_classes, strict=True):
        auto_class.register(config_class, model_class, exist_ok=True)

# A tool that the travelling files must not import, attached here.
LocAtViTPreTrainedModel.from_vit = classmethod(from_vit)

__all__ = [
    "LocAtViTBackbone",
    "LocAtViTConfig",
    "LocAtViTForImageClassification",
    "LocAtViTForSemanticSegmentation",
    "LocAtViTImageProcessor",
    "LocAtViTModel",
    "LocAtViTPreTrainedModel",
]
