"""`locatvit convert`: a reference checkpoint becomes a folder that `AutoModel*.from_pretrained` loads."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_utils import PILImageResampling

from .. import __version__
from ..configuration_utils_locat import pair
from ..hub.card import UNKNOWN, Card, Conversion, public_name, write_card
from ..hub.repository import license_text
from ..image_processing_locatvit import LocAtViTImageProcessor
from ..utils.io import atomic_directory, one_line, sha256
from .arguments import changed_rates
from .converters import Converter, converter_of
from .errors import ConversionError
from .key_mapping import load_renamed
from .readers import SourceCheckpoint, find, read_checkpoint, read_state

# Of the largest logit. Rounding alone is below it: float32 sums in another order where weights lie in a mapped file.
LARGEST_LOGIT_DIFFERENCE = 1e-5
# What timm does with an image that is not of the crop's aspect ratio: cut it, or change it.
CROP_MODES = ("center", "squash")


@dataclass(frozen=True)
class Converted:
    """What `convert` did: the folder, the model's class and configuration, and how many tensors it mapped."""

    folder: Path
    model_class: str
    config: PreTrainedConfig
    num_tensors: int
    num_parameters: int


def convert(
    source: str,
    folder: Path,
    ema: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Converted:
    """Convert a checkpoint into a folder, which is complete or absent.

    Args:
        source: A local path or a Hub id.
        folder: The folder to write.
        ema: Take the moving average that a training run kept, instead of the weights.
        overwrite: Replace `folder` where it holds something.
        revision: A branch, tag or commit of the Hub repository.
        report: Called with one line for each choice that was made.

    Raises:
        ConversionError: The checkpoint cannot become ours.
        ValueError: The configuration refuses its fields.
    """
    check_destination(folder, overwrite)
    checkpoint = read_checkpoint(find(source, revision), source)
    converter = converter_of(checkpoint)
    report(f"Found {checkpoint.architecture or converter.family.config_class.model_type} ({checkpoint.layout}).")
    config = configure(converter, checkpoint)
    for sentence in losses(checkpoint, config):
        report(sentence)
    state, where = read_state(checkpoint, ema)
    report(f"Took {where} of {checkpoint.weights_file.name}: {len(state)} tensors.")
    stored, state = state, converter.prepare_state(state)
    check_class_count(state, config)
    model = (converter.build_model or partial(build_model, converter))(config, state)
    tensors = summarize_unused_tensors(stored, state)
    report(tensors)
    segments = type(model).__name__.endswith("ForSemanticSegmentation")
    with atomic_directory(folder) as unfinished:
        build_processor(checkpoint, config, segments).save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        (unfinished / "LICENSE").write_text(license_text(), encoding="utf-8")
        difference = verify(model, unfinished)
        write_card(unfinished, describe(checkpoint, folder.name, where, tensors, difference))
    report(f"Wrote {folder}; reloaded, it gives the same output.")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Converted(folder, type(model).__name__, config, len(state), num_parameters)


def check_destination(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that may not be replaced.

    Raises:
        ConversionError: `folder` is not a folder, or holds something and `overwrite` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise ConversionError(f"{folder} exists and is not a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConversionError(f"{folder} exists and is not empty; pass --overwrite to replace it.")


def describe(checkpoint: SourceCheckpoint, name: str, where: str, tensors: str, difference: float) -> Card:
    """The card of a converted checkpoint: what `checkpoint` says, and nothing that it does not.

    Args:
        checkpoint: The source.
        name: Of the folder.
        where: Which of its weights were taken.
        tensors: What became of them, a sentence.
        difference: The largest that `verify` found.
    """
    source = public_name(checkpoint.source.removeprefix("hf-hub:").removeprefix("hf_hub:"))
    local = Path(checkpoint.source).expanduser().exists()
    return Card(
        title=checkpoint.architecture or name,
        repository=name,
        datasets=[UNKNOWN],
        weights_license=UNKNOWN,
        base_model=None if local else source,
        conversion=Conversion(
            source=source,
            layout=checkpoint.layout,
            part=where,
            file=checkpoint.weights_file.name,
            sha256=sha256(checkpoint.weights_file),
            tensors=tensors,
            difference=difference,
            version=__version__,
        ),
    )


def configure(converter: Converter, checkpoint: SourceCheckpoint, **fields: Any) -> PreTrainedConfig:
    """The configuration of a checkpoint, with its own mean, std and crop. `fields` win over what it says."""
    arguments = checkpoint.arguments
    if converter.infer_arguments is not None:
        arguments = converter.infer_arguments(checkpoint.shapes, arguments)
    preprocessing = {**converter.default_preprocessing(checkpoint.architecture), **checkpoint.preprocessing}
    fields = {
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
        "crop_pct": preprocessing["crop_pct"],
        **fields,
    }
    try:
        config = converter.build_config(checkpoint.architecture, arguments, **fields)
    except StrictDataclassError as error:
        raise ConversionError(f"{one_line(error.__cause__ or error)}.") from error
    if checkpoint.label_names and len(checkpoint.label_names) == config.num_labels and "id2label" not in fields:
        config.id2label = dict(enumerate(map(str, checkpoint.label_names)))
        config.label2id = {label: index for index, label in config.id2label.items()}
    return config


def losses(checkpoint: SourceCheckpoint, config: PreTrainedConfig) -> list[str]:
    """Tell what a checkpoint says of itself that the converted one does not keep as it is.

    Args:
        checkpoint: The checkpoint.
        config: Of the converted one.

    Returns:
        A sentence for each kind.
    """
    found = [*checkpoint.remarks, *changed_rates(checkpoint.arguments)]
    names = checkpoint.label_names
    if names and len(names) != config.num_labels:
        found.append(f"Left out the names of {len(names)} classes: the model has {config.num_labels}.")
    if checkpoint.preprocessing.get("crop_mode") not in (None, *CROP_MODES):
        mode = checkpoint.preprocessing["crop_mode"]
        found.append(f"Left out crop_mode={mode!r}: the image processor crops the center.")
    return found


def summarize_unused_tensors(stored: dict[str, torch.Tensor], prepared: dict[str, torch.Tensor]) -> str:
    """What became of the tensors of a checkpoint whose prepared ones all have a place, as a sentence."""
    kept = {id(tensor) for tensor in prepared.values()}
    left_out = [name for name, tensor in stored.items() if id(tensor) not in kept]
    if not left_out:
        return "Every tensor has its place in the model."
    what = f"{len(left_out)} copies, constants or parts around the model, such as {left_out[0]}"
    return f"Every tensor has its place in the model but {what}."


def check_class_count(state: dict[str, torch.Tensor], config: PreTrainedConfig) -> None:
    """Refuse a head with another number of classes than the configuration.

    Raises:
        ConversionError: The numbers differ.
    """
    head = state.get("head.weight", state.get("head.fc.weight"))
    if head is not None and head.shape[0] != config.num_labels:
        raise ConversionError(
            f"The head of the checkpoint has {head.shape[0]} classes, but its configuration says {config.num_labels}."
        )


def build_model(converter: Converter, config: PreTrainedConfig, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Our model in float32 with the weights of the reference, in evaluation mode; the encoder if it has no head."""
    with torch.device("meta"):
        model = converter.classifier(config) if config.num_labels else converter.encoder(config)
    # The table is written for the classifier, whose encoder sits below the base model's name.
    prefix = "" if config.num_labels else f"{model.base_model_prefix}."
    table = {
        name: tuple(ours.removeprefix(prefix) for ours in row) for name, row in converter.key_table(config).items()
    }
    return load_renamed(model, state, table)


def build_processor(checkpoint: SourceCheckpoint, config: PreTrainedConfig, segmentation: bool = False):
    """The image processor of a checkpoint: of the configuration, and of what only the checkpoint's evaluation says."""
    arguments: dict[str, Any] = {"segmentation": segmentation}
    # mmsegmentation, which segmentation checkpoints come from, resizes bilinearly.
    interpolation = checkpoint.preprocessing.get("interpolation", "bilinear" if segmentation else "bicubic")
    if interpolation != "bicubic":
        arguments["resample"] = PILImageResampling[interpolation.upper()]
    size = checkpoint.preprocessing.get("size")
    if size is not None and list(size) != list(pair(config.image_size)):
        # Evaluated at another size than it was built for.
        config = copy.deepcopy(config)
        config.image_size = list(size)
    if checkpoint.preprocessing.get("crop_mode") == "squash" and not segmentation:
        height, width = (math.floor(side / config.crop_pct) for side in pair(config.image_size))
        arguments["size"] = {"height": height, "width": width}
    return LocAtViTImageProcessor.from_model_config(config, **arguments)


@torch.no_grad()
def verify(model: PreTrainedModel, folder: Path) -> float:
    """Load `folder` and compare its output with that of `model`, on a fixed random image.

    Returns:
        The largest difference.

    Raises:
        ConversionError: The outputs differ by more than rounding.
    """
    reloaded = type(model).from_pretrained(folder).eval()
    config = getattr(model.config, "backbone_config", None) or model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, config.num_channels, height, width, generator=generator)
    ours, theirs = (network(pixel_values)[0] for network in (model, reloaded))
    difference = (ours - theirs).abs().max().item()
    if not difference <= LARGEST_LOGIT_DIFFERENCE * max(1.0, ours.abs().max().item()):
        raise ConversionError(f"The written folder does not give the output of its source: it differs by {difference}.")
    return difference


__all__ = ["Converted", "build_model", "build_processor", "configure", "convert", "describe", "verify"]
