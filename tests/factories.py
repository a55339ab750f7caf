"""Every tiny model that the tests build.

A new family is a row of `FAMILIES`. A test names the family and the fields that it is about; what a tiny model is
otherwise stands here alone.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import locatvit_hf

VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
# Prefix of the class names, and fields of a tiny configuration.
FAMILIES = {
    "locatvit": ("LocAtViT", VIT),
    "locatjumbo": (
        "LocAtJumbo",
        {**VIT, "num_hidden_layers": 3, "num_jumbo_tokens": 3, "layer_scale_init_value": 0.1},
    ),
    "locatswin": (
        "LocAtSwin",
        {"image_size": 64, "embed_dim": 16, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 3},
    ),
    "pacavit": (
        "PaCaViT",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 40, 48],
            "depths": [2, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 3],
            "num_clusters": [5, 7, 6, 0],
            "teacher_depths": [1, 1, 1, 1],
            "segmentation_hidden_size": 16,
            "segmentation_dropout_prob": 0.0,
        },
    ),
}
# Fields of models that learn within seconds, from images of 16 pixels (pyramids: 32).
SMALLEST = {
    "locatvit": {**VIT, "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2},
    "locatjumbo": {**VIT, "image_size": 16, "patch_size": 4, "hidden_size": 12, "num_hidden_layers": 2},
    "locatswin": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1] * 4,
        "num_heads": [1, 2, 2, 2],
        "window_size": 4,
    },
    "pacavit": {
        "image_size": 32,
        "hidden_sizes": [8] * 4,
        "depths": [1] * 4,
        "num_attention_heads": [2] * 4,
        "num_clusters": [4, 4, 4, 0],
    },
}
# The same model with both ideas off.
PLAIN = {"use_gaussian": False, "use_refinement": False}


def model_class(family: str, task: str = "ForImageClassification") -> type[PreTrainedModel]:
    """The class of a family for a task: `Model`, `Backbone`, `ForImageClassification` or `ForSemanticSegmentation`."""
    return getattr(locatvit_hf, FAMILIES[family][0] + task)


def tiny_config(family: str, **fields: object) -> PreTrainedConfig:
    """A tiny configuration with five classes. `fields` win."""
    return model_class(family, "Config")(**{"num_labels": 5, "drop_path_rate": 0.0, **FAMILIES[family][1], **fields})


def tiny_model(
    family: str, task: str = "ForImageClassification", implementation: str | None = None, **fields: object
) -> PreTrainedModel:
    """A tiny model in evaluation mode with weights as if trained: nothing is zero, no Gaussian is at its start."""
    torch.manual_seed(0)
    model = model_class(family, task)._from_config(tiny_config(family, **fields), attn_implementation=implementation)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.5 if "gaussian" in name else 0.1)
    return model.eval()
