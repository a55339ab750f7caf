"""Checkpoints by folder or Hub id, loaded with the installed classes: none of their code runs."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig, PreTrainedModel

from .. import LocAtJumboConfig, LocAtSwinConfig, LocAtViTConfig, LocAtViTImageProcessor, PaCaViTConfig

CONFIGS = (LocAtViTConfig, LocAtSwinConfig, LocAtJumboConfig, PaCaViTConfig)


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a checkpoint of this package. Raises ValueError where it is none, OSError where none is."""
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} is no checkpoint: it is not a folder with a config.json.")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise OSError(f"There is no checkpoint {name}, neither a folder nor a Hub repository in reach.") from error
    known = [getattr(config, "backbone_config", None), config]
    if not any(isinstance(part, CONFIGS) for part in known):
        families = ", ".join(family.model_type for family in CONFIGS)
        raise ValueError(
            f"{name} is a {config.model_type}, not one of {families}; `locatvit convert` and "
            "`LocAtViTForImageClassification.from_vit` turn a plain ViT into one."
        )
    return config


def load_model(auto_class: Any, name: str, revision: str | None = None) -> PreTrainedModel:
    """The model of a checkpoint in evaluation mode, on the GPU where there is one."""
    model = auto_class.from_pretrained(name, revision=revision, trust_remote_code=False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_processor(name: str, revision: str | None = None) -> LocAtViTImageProcessor:
    return AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
