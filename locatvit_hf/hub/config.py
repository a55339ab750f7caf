"""config.json of a checkpoint, read and built by the installed classes: none of the checkpoint's code runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

import locatvit_hf

from ..configuration_utils_locat import FamilyConfigMixin
from ..utils.io import one_line, read_json
from ..utils.registry import FAMILIES

# Settings that can name a kernel on the Hub, which building a model would then fetch and run.
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


class RepositoryError(ValueError):
    """A folder that cannot be published: one sentence that says what is wrong with it."""


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        RepositoryError: It holds something else, or is not JSON.
    """
    try:
        content = read_json(file)
    except ValueError as error:
        raise RepositoryError(str(error)) from error
    if not isinstance(content, dict):
        raise RepositoryError(f"{file} is not a JSON object.")
    return content


def build_config(content: Mapping[str, Any], name: str) -> PreTrainedConfig:
    """The configuration that a config.json describes, of the installed classes.

    Args:
        content: Of the file.
        name: Of the checkpoint, for the message.

    Raises:
        RepositoryError: It is not of this package, or not valid.
    """
    if _family_of(content) is None:
        raise RepositoryError(f"{name} is a {content.get('model_type')}, not one of {', '.join(FAMILIES)}.")
    try:
        return AutoConfig.for_model(**without_code(content))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = one_line(error.__cause__ or error)
        raise RepositoryError(f"The config.json of {name} is not valid: {reason}.") from error


def without_code(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what names code."""
    kept = {name: value for name, value in content.items() if name not in ("auto_map", *IMPLEMENTATIONS)}
    return {name: without_code(value) if name == "backbone_config" else value for name, value in kept.items()}


def family_config(config: PreTrainedConfig) -> FamilyConfigMixin:
    """The part of a configuration that is ours: of a whole model, or of the backbone inside one of transformers."""
    return config if isinstance(config, FamilyConfigMixin) else config.backbone_config


def model_class(config: PreTrainedConfig, name: str) -> type[transformers.PreTrainedModel]:
    """The installed class of a checkpoint.

    Args:
        config: See `build_config`.
        name: Of the checkpoint, for the message.

    Raises:
        RepositoryError: Its config.json does not name a class that exists and fits its settings.
    """
    architecture = (config.architectures or ["none"])[0]
    found: Any = getattr(locatvit_hf, architecture, None) or getattr(transformers, architecture, None)
    fits = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not fits or not isinstance(config, found.config_class or ()):
        raise RepositoryError(f"The config.json of {name} names no model class for its settings, but {architecture}.")
    return found


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint folder.

    Raises:
        RepositoryError: It is not a checkpoint of this package.
    """
    if not (folder / "config.json").is_file():
        raise RepositoryError(f"{folder} is not a checkpoint: it is not a folder with a config.json.")
    return build_config(read_object(folder / "config.json"), str(folder))


def family_of(folder: Path) -> str | None:
    """The model type of a checkpoint folder of one of our families, also below a UPerNet; None for other models.

    Raises:
        RepositoryError: Its config.json cannot be read.
    """
    if not (folder / "config.json").is_file():
        return None
    return _family_of(read_object(folder / "config.json"))


def _family_of(content: Mapping[str, Any]) -> str | None:
    parts = (content, content.get("backbone_config"))
    types = [part.get("model_type") for part in parts if isinstance(part, Mapping)]
    return next((kind for kind in types if isinstance(kind, str) and kind in FAMILIES), None)


def parameter_shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Name -> shape of each parameter of the model that `config.architectures` names."""
    with torch.device("meta"):
        model = model_class(config, "this checkpoint")(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def count_parameters(config: PreTrainedConfig) -> int:
    """Of the model that `config.architectures` names."""
    return sum(shape.numel() for shape in parameter_shapes(config).values())


__all__ = [
    "IMPLEMENTATIONS",
    "RepositoryError",
    "build_config",
    "count_parameters",
    "family_config",
    "family_of",
    "model_class",
    "parameter_shapes",
    "read_config",
    "read_object",
    "without_code",
]
