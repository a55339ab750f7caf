"""Checkpoints by folder or Hub id, loaded with the installed classes: none of their code runs."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel

from .. import LocAtViTImageProcessor
from .remote import sha256_of
from .repository import build_config, read_json, weight_files


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a checkpoint of this package, without what names code or kernels.

    Raises ValueError where it is none, OSError where none is.
    """
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} is no checkpoint: it is not a folder with a config.json.")
    content = _read_settings(name, revision)
    commit = content.pop("_commit_hash", None)
    config = build_config(content, name)
    config._commit_hash = commit
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise ValueError(f"The config.json of {name} does not name its classes by the ids 0, 1, 2, ….")
    return config


def _read_settings(name: str, revision: str | None) -> dict[str, Any]:
    if Path(name).exists():
        return read_json(Path(name) / "config.json")
    try:
        return PreTrainedConfig.get_config_dict(name, revision=revision)[0]
    except OSError as error:
        raise OSError(f"There is no checkpoint {name}, neither a folder nor a Hub repository in reach.") from error


def load_model(auto_class: Any, name: str, revision: str | None = None) -> PreTrainedModel:
    """The model of a checkpoint in evaluation mode, on the GPU where there is one.

    Raises ValueError for weights that are damaged, incomplete, of other sizes than the model's, or not finite.
    """
    config = load_config(name, revision)
    try:
        model, loading = auto_class.from_pretrained(
            name, revision=revision, config=config, trust_remote_code=False, output_loading_info=True
        )
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"The weights of {name} do not fit its config.json or are damaged: {reason}.") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(f"The weights of {name} lack {len(missing)} tensors of the model, such as {missing[0]}.")
    plain = [parameter for parameter in model.parameters() if type(parameter.data) is torch.Tensor]  # not quantised
    if not all(parameter.isfinite().all() for parameter in plain):
        raise ValueError(f"The weights of {name} hold numbers that are not finite.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_processor(name: str, revision: str | None = None) -> LocAtViTImageProcessor:
    return AutoImageProcessor.from_pretrained(
        name, revision=revision, config=load_config(name, revision), trust_remote_code=False
    )


def identify(name: str, revision: str | None = None) -> str:
    """What tells this state of a checkpoint from any other: its commit on the Hub, or a digest of its weights."""
    if not Path(name).exists():
        return load_config(name, revision)._commit_hash
    return " ".join(sha256_of(file) for file in weight_files(Path(name)))
