"""config.json of a checkpoint, read and built by the installed classes: none of the checkpoint's code runs."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

import locatvit_hf

from ..configuration_utils_locat import FamilyConfigMixin
from ..image_processing_locatvit import LocAtViTImageProcessor
from ..utils.io import is_out_of_memory, one_line, read_json
from ..utils.registry import FAMILIES

# Settings that can name a kernel on the Hub, which building a model would then fetch and run.
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


MAX_LAYERS, MAX_LABELS, MAX_ENTRIES = 1000, 1_000_000, 1000
"""Of a model that a config.json or a recipe describes, and of a list in it; the largest ViT has 48 layers."""
MAX_SIDE = 16_384
"""Pixels of a side to which an image processor resizes, crops or pads."""


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
    if family_in(content) is None:
        raise RepositoryError(f"{name} is a {content.get('model_type')}, not one of {', '.join(FAMILIES)}.")
    try:
        check_bounds(content)
        config = AutoConfig.for_model(**without_code(content))
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        reason = one_line(error.__cause__ or error)
        raise RepositoryError(f"The config.json of {name} is not valid: {reason}.") from error
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise RepositoryError(f"The config.json of {name} does not name its classes by the ids 0, 1, 2, ….")
    if not all(isinstance(label, str) for label in config.id2label.values()):
        raise RepositoryError(f"The config.json of {name} is not valid: id2label must map each id to a name.")
    for field, kind in (("architectures", list), ("dtype", str | torch.dtype), ("quantization_config", dict)):
        value = content.get(field)
        if value is not None and not isinstance(value, kind):
            raise RepositoryError(f"The config.json of {name} is not valid: {field} is {value!r}.")
    if not all(isinstance(architecture, str) for architecture in config.architectures or []):
        raise RepositoryError(f"The config.json of {name} is not valid: architectures must be names of classes.")
    return config


def check_bounds(fields: Mapping[str, Any]) -> None:
    """Raises ValueError for numbers that would fill the memory, or take minutes, before anything else is checked."""
    layers = {"num_hidden_layers", "depths", "teacher_depths"} & fields.keys()
    bounds = {"num_labels": ("MAX_LABELS", MAX_LABELS), **dict.fromkeys(layers, ("MAX_LAYERS", MAX_LAYERS))}
    for field, value in fields.items():
        if isinstance(value, list | tuple) and len(value) > MAX_ENTRIES:
            raise ValueError(f"{field} has {len(value):,} entries, and MAX_ENTRIES allows {MAX_ENTRIES:,}")
    for field, (limit, most) in bounds.items():
        value = fields.get(field)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and number > most:
                raise ValueError(f"{field} is {number:,}, and {limit} allows {most:,}")
    if isinstance(inner := fields.get("backbone_config"), Mapping):
        check_bounds(inner)


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


@contextlib.contextmanager
def weights_of(name: str | Path) -> Iterator[None]:
    """Turn what damaged weights lead to while they are loaded into one sentence.

    Args:
        name: Of the checkpoint.

    Raises:
        RepositoryError: The weights are damaged, of other shapes, or a pickle that asks for more than tensors.
    """
    try:
        yield
    except UnpicklingError:
        reason = "they are a pickle that is damaged or asks for more than tensors, and are not loaded"
        raise RepositoryError(f"The weights of {name} cannot be used: {reason}.") from None
    except ImportError as error:
        raise RepositoryError(f"The weights of {name} need a package that is missing: {one_line(error)}.") from None
    except (SafetensorError, RuntimeError, TypeError, LookupError, AttributeError, EOFError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise RepositoryError(f"The weights of {name} do not fit its config.json or are damaged: {reason}.") from error


def build_processor(content: Mapping[str, Any], name: str | Path) -> LocAtViTImageProcessor:
    """The image processor that a preprocessor_config.json describes, tried on a small image.

    Args:
        content: Of the file.
        name: Of the checkpoint, for the message.

    Raises:
        RepositoryError: A size is not between 1 and `MAX_SIDE` pixels, or no image can be prepared with it.
    """
    file = f"The preprocessor_config.json of {name}"
    sizes = [content.get(key) for key in ("size", "crop_size", "pad_size", "size_divisor")]
    for size in sizes:
        for side in size.values() if isinstance(size, dict) else [size]:
            if isinstance(side, int | float) and not 1 <= side <= MAX_SIDE:
                raise RepositoryError(f"{file} names a side of {side} pixels: MAX_SIDE allows 1 to {MAX_SIDE:,}.")
    try:
        processor = LocAtViTImageProcessor.from_dict(dict(content))
        channels = 3 if processor.do_convert_rgb or processor.do_grayscale else len(processor.image_mean)
        processor(torch.zeros(channels, 8, 8, dtype=torch.uint8), input_data_format="channels_first")
        processor.output_stride = check_output_stride(processor.output_stride)
    except Exception as error:  # whatever a value of another kind leads to in the library
        raise RepositoryError(f"{file} is not valid: {one_line(error)}.") from error
    return processor


def check_output_stride(stride: Any) -> Any:
    """The stride of a processor. Raises ValueError unless it is None or two positive whole numbers."""
    whole = isinstance(stride, list | tuple) and len(stride) == 2
    if stride is not None and not (whole and all(type(side) is int and 1 <= side <= MAX_SIDE for side in stride)):
        raise ValueError(f"output_stride must be [height, width] in pixels, got {stride!r}")
    return stride


def family_of(folder: Path) -> str | None:
    """The model type of a checkpoint folder of one of our families, also below a UPerNet; None for other models.

    Raises:
        RepositoryError: Its config.json cannot be read.
    """
    if not (folder / "config.json").is_file():
        return None
    return family_in(read_object(folder / "config.json"))


def family_in(content: Mapping[str, Any]) -> str | None:
    """The model type of one of our families in the content of a config.json, also below a UPerNet; else None."""
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
    "build_processor",
    "check_bounds",
    "count_parameters",
    "family_config",
    "family_in",
    "family_of",
    "model_class",
    "parameter_shapes",
    "read_config",
    "read_object",
    "weights_of",
    "without_code",
]
