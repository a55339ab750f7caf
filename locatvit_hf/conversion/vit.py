"""`from_vit`: a LocAtViT that starts from a plain ViT of transformers or timm and computes what it computes.

The Gaussian starts switched down and the refinement off, so that training departs from the source.
"""

import contextlib
import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from ..configuration_locatvit import LocAtViTConfig
from ..layers_locat import resample_position_embeddings
from ..utils.io import one_line, read_json
from . import locatvit, timm_vit
from .arguments import changed_rates
from .errors import ConversionError
from .key_mapping import KeyTable, expand, rename, restrict
from .readers import TIMM_WRAPPER, find, read_checkpoint, read_state, unnamed

logger = logging.get_logger(__name__)

# Strength of the new Gaussians: small beside any attention logit that matters, and above where Adam's epsilon drowns
# its gradient.
INITIAL_AMPLITUDE = 5e-5

TRANSFORMERS_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers")
# Classes whose head is read; any other checkpoint of these types gives its encoder.
CLASSIFIERS = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
)
# Each version of transformers spells these models its own way: rewritten to one spelling, top to bottom.
KEY_RENAMES = (
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^encoder\.layers?\.", "layers."),
    (r"\.attention\.attention\.", ".attention."),
    (r"\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^embeddings\.distillation_token$", "embeddings.register_tokens"),
)
# Tensors that have no place in ours, and are left behind knowingly: masked pretraining and pooling layers.
IGNORED_KEYS = re.compile(r"embeddings\.mask_token|pooler\..*|decoder\..*")
HEAD_NAMES = ("classifier.weight", "classifier.bias")
# Fields that the weights were trained with: another value loads, or lacks tensors, and computes something else.
IMMUTABLE_FIELDS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "num_register_tokens", "use_class_token")


@dataclasses.dataclass
class PlainViT:
    """A plain ViT, whatever library it is of.

    description: for messages. fields: of `LocAtViTConfig` for the same function. state: its tensors, head left out.
    key_table: configuration -> its names -> ours. resample: (configuration, (height, width) of the new native grid) ->
    its position embeddings there, as the source itself would compute them.
    head: weight and bias of a linear head on what our classifier reads, or None. missing_head_reason: why
    there is none, for a sentence.
    """

    description: str
    fields: dict[str, Any]
    state: dict[str, torch.Tensor]
    key_table: Callable[[LocAtViTConfig], KeyTable]
    position_name: str
    resample: Callable[[LocAtViTConfig, tuple[int, int]], torch.Tensor]
    head: dict[str, torch.Tensor] | None = None
    missing_head_reason: str = "has no classifier"


def from_vit(cls, checkpoint: str | Path | nn.Module, **config_overrides) -> PreTrainedModel:
    """A model of this class that starts from a plain ViT.

    checkpoint: a ViT, DeiT, DINOv2 or DINOv2 with registers of transformers, or a ViT of timm: a folder, a Hub id, or a
        model in memory. DeiT's distillation token becomes a register.
    config_overrides: fields of `LocAtViTConfig`, and `attn_implementation`. `use_refinement=True` refines from the
        start. For another `image_size` the position embeddings are resampled as the source does. `pooling="mean"` in
        place of a class token takes the mean of the normed tokens, and a new head.

    The new Gaussians start at an amplitude of 5e-5, and `last_hidden_state` is the source's to within 1e-3. The head is
    copied where it has our shape, otherwise it is new and a sentence says so.
    Raises ValueError, in one sentence, for a checkpoint that is no plain ViT, and for a field that it has fixed.
    """
    attn_implementation = config_overrides.pop("attn_implementation", None)
    known = LocAtViTConfig()
    unknown = [name for name in config_overrides if not hasattr(known, name)]
    if unknown:
        raise ValueError(f"LocAtViTConfig has no field {unknown[0]!r}.")
    source = open_vit(checkpoint)
    labels = ("num_labels", "id2label", "label2id")
    fields = dict(source.fields)
    if any(name in config_overrides for name in labels):
        fields = {name: value for name, value in fields.items() if name not in labels}
    try:
        native = LocAtViTConfig(**fields)
        if native.pooling == "cls" and config_overrides.get("pooling") == "mean":
            config_overrides.setdefault("norm_before_pooling", True)
        config = LocAtViTConfig(**{**fields, **config_overrides})
    except StrictDataclassError as error:
        raise ConversionError(f"{one_line(error.__cause__ or error)}.") from error
    for name in IMMUTABLE_FIELDS:
        trained, asked = getattr(native, name), getattr(config, name)
        if asked != trained:
            raise ConversionError(f"{source.description} was trained with {name}={trained!r}; {asked!r} is no start.")

    state = dict(source.state)
    if config.native_grid != native.native_grid and source.position_name in state:
        state[source.position_name] = source.resample(native, config.native_grid)
    model = cls._from_config(config, attn_implementation=attn_implementation)
    _load(model, source, config, state)
    for module in model.modules():
        if hasattr(module, "gaussian") and module.gaussian is not None:
            nn.init.zeros_(module.gaussian.amplitude.weight)
            nn.init.constant_(module.gaussian.amplitude.bias, math.log(math.expm1(INITIAL_AMPLITUDE)))
    return model.eval()


@torch.no_grad()
def _load(model: PreTrainedModel, source: PlainViT, config: LocAtViTConfig, state: dict[str, torch.Tensor]) -> None:
    """Copies every tensor of the source, and its head where it fits."""
    parameters = dict(model.named_parameters())
    prefix = "" if model.base_model is not model else f"{model.base_model_prefix}."
    # New: the Gaussians, which the source cannot have, and the heads.
    table = restrict(source.key_table(_without_gaussian(config)), parameters, prefix)
    table = {name: ours for name, ours in table.items() if not ours[0].startswith("classifier.")}
    renamed = rename(state, table, {name: parameter.shape for name, parameter in parameters.items()})
    for name, tensor in renamed.items():
        parameters[name].copy_(tensor)
    if "classifier.weight" in parameters:
        shape = parameters["classifier.weight"].shape
        reads_the_same = config.pooling == source.fields.get("pooling", "cls")
        if reads_the_same and source.head is not None and source.head["classifier.weight"].shape == shape:
            for name in HEAD_NAMES:
                parameters[name].copy_(source.head[name])
            return
        reason = source.missing_head_reason
        if source.head is not None:
            classes = f"of {len(source.head['classifier.bias'])} classes"
            reason = f"has a classifier {classes if reads_the_same else 'of another pooling'}"
        logger.warning(
            f"{source.description} {reason}: the classifier of {shape[0]} classes is new and must be trained."
        )
    elif model.base_model is not model and hasattr(model, "segmentation_head"):
        logger.warning(f"The segmentation head of {config.num_labels} classes is new and must be trained.")


def _without_gaussian(config: LocAtViTConfig) -> LocAtViTConfig:
    """The configuration of the same model with plain attention."""
    plain = copy.deepcopy(config)
    plain.use_gaussian = False
    return plain


def open_vit(checkpoint: str | Path | nn.Module) -> PlainViT:
    """Reads a plain ViT: a model of transformers or timm in memory, a folder of either, or a Hub id.

    Raises ConversionError for anything else.
    """
    if isinstance(checkpoint, nn.Module):
        if hasattr(checkpoint, "pretrained_cfg"):
            return _of_timm_model(checkpoint)
        if getattr(getattr(checkpoint, "config", None), "model_type", None) in TRANSFORMERS_TYPES:
            return _of_transformers(checkpoint, {}, type(checkpoint).__name__)
        raise ConversionError(f"A {type(checkpoint).__name__} is no plain ViT of transformers or timm.")
    folder = find(str(checkpoint))
    config = _transformers_config(folder)
    if config is None:
        return _of_checkpoint(folder, str(checkpoint))
    if config.get("model_type") not in TRANSFORMERS_TYPES:
        kind = config["model_type"]
        raise ConversionError(
            f"{checkpoint} has the model_type {kind!r}; from_vit takes {', '.join(TRANSFORMERS_TYPES)}."
        )
    preprocessor = folder / "preprocessor_config.json"
    preprocessing = read_json(preprocessor) if preprocessor.is_file() else {}
    return _of_transformers(_load_transformers(folder, config, str(checkpoint)), preprocessing, str(checkpoint))


def _transformers_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a folder of transformers; None for what `read_checkpoint` judges, timm's models among it."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    known = isinstance(config, dict) and config.get("model_type") not in (None, TIMM_WRAPPER)
    return config if known else None


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Silences what transformers reports about unused tensors: they are checked here, one by one."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _load_transformers(folder: Path, config: Mapping[str, Any], source: str) -> PreTrainedModel:
    if config.get("use_swiglu_ffn"):
        raise ConversionError(f"{source} has SwiGLU layers (the giant DINOv2), which LocAtViT does not have.")
    architecture = (config.get("architectures") or [""])[0]
    arguments: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    loader = getattr(transformers, architecture) if architecture in CLASSIFIERS else AutoModel
    if loader is AutoModel and config["model_type"] in ("vit", "deit"):
        arguments["add_pooling_layer"] = False
    try:
        with _only_errors():
            model, info = loader.from_pretrained(folder, **arguments)
    except Exception as error:  # whatever a damaged file led to
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConversionError(f"{source} cannot be loaded by transformers: {lines[0]}") from error
    missing = sorted(name for name in info["missing_keys"] if not IGNORED_KEYS.fullmatch(normalize_key(name)))
    if missing:
        raise ConversionError(f"The checkpoint lacks {missing[0]}.")
    return model


def normalize_key(name: str) -> str:
    """A tensor's name in transformers, any version's, as `transformers_key_table` writes it."""
    for pattern, replacement in KEY_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _of_transformers(model: PreTrainedModel, preprocessing: Mapping[str, Any], description: str) -> PlainViT:
    theirs = model.config
    if getattr(theirs, "use_swiglu_ffn", False):
        raise ConversionError(f"{description} has SwiGLU layers (the giant DINOv2), which LocAtViT does not have.")
    dinov2 = theirs.model_type.startswith("dinov2")
    registers = 1 if theirs.model_type == "deit" else getattr(theirs, "num_register_tokens", 0)
    mlp_ratio = getattr(theirs, "mlp_ratio", 4)
    fields = {
        "image_size": _side(theirs.image_size),
        "patch_size": _side(theirs.patch_size),
        "intermediate_size": int(theirs.hidden_size * mlp_ratio) if dinov2 else theirs.intermediate_size,
        "num_register_tokens": registers,
        "layer_scale_init_value": theirs.layerscale_value if dinov2 else None,
        "drop_path_rate": getattr(theirs, "drop_path_rate", 0.0),
        "use_refinement": False,
        **_preprocessing_fields(preprocessing, imagenet=theirs.model_type != "vit"),
        "id2label": dict(theirs.id2label),
        "label2id": dict(theirs.label2id),
    }
    for name in ("num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "qkv_bias"):
        fields[name] = getattr(theirs, name)
    for name in ("layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"):
        fields[name] = getattr(theirs, name)

    state = {normalize_key(name): tensor.detach() for name, tensor in model.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if not IGNORED_KEYS.fullmatch(name)}
    heads = [name for name in state if re.fullmatch(r"\w*classifier\.(weight|bias)", name)]
    head = {name: state.pop(name) for name in heads}
    missing_head_reason = "has no classifier"
    if "classifier.weight" not in head or head["classifier.weight"].shape[1] != theirs.hidden_size:
        # DINOv2 also reads the mean of the patches, DeiT's teacher variant averages two heads.
        missing_head_reason = "has a classifier of another form" if head else missing_head_reason
        head = None
    base = getattr(model, model.base_model_prefix, model)
    own_prefix = 1 if dinov2 else 1 + registers

    def insert_register_positions(positions: torch.Tensor) -> torch.Tensor:
        """DINOv2 gives its registers no position; ours, added to the whole prefix, are zero there."""
        return torch.cat(
            [
                positions[:, :own_prefix],
                positions.new_zeros(1, 1 + registers - own_prefix, positions.shape[-1]),
                positions[:, own_prefix:],
            ],
            dim=1,
        )

    @torch.no_grad()
    def resample(native: LocAtViTConfig, grid: tuple[int, int]) -> torch.Tensor:
        rows, columns = native.native_grid
        if rows != columns:  # which the library itself cannot resample
            positions = base.embeddings.position_embeddings
            return insert_register_positions(resample_position_embeddings(positions, (rows, columns), grid, own_prefix))
        tokens = torch.zeros(1, own_prefix + math.prod(grid), native.hidden_size)
        height, width = (cells * pixels for cells, pixels in zip(grid, native.patch_shape, strict=True))
        return insert_register_positions(base.embeddings.interpolate_pos_encoding(tokens, height, width))

    state["embeddings.position_embeddings"] = insert_register_positions(state["embeddings.position_embeddings"])
    return PlainViT(
        description=description,
        fields=fields,
        state=state,
        key_table=transformers_key_table,
        position_name="embeddings.position_embeddings",
        resample=resample,
        head=head,
        missing_head_reason=missing_head_reason,
    )


def transformers_key_table(config: LocAtViTConfig) -> KeyTable:
    """Names of ViT, DeiT and DINOv2 in transformers, spelled as `KEY_RENAMES` leaves them -> ours."""
    ours = "locatvit.layers.{i}"
    modules: dict[str, str | tuple[str, ...]] = {
        "=embeddings.cls_token": "locatvit.embeddings.cls_token",
        "=embeddings.position_embeddings": "locatvit.embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection": "locatvit.embeddings.patch_embeddings",
        "layers.{i}.norm1": f"{ours}.norm1",
        **{f"layers.{{i}}.attention.{name}_proj": f"{ours}.attention.{name}_proj" for name in "qkvo"},
        "layers.{i}.norm2": f"{ours}.norm2",
        "layers.{i}.mlp.fc1": f"{ours}.mlp.up_proj",
        "layers.{i}.mlp.fc2": f"{ours}.mlp.down_proj",
        "layernorm": "locatvit.layernorm",
    }
    if config.num_register_tokens:
        modules["=embeddings.register_tokens"] = "locatvit.embeddings.register_tokens"
    if config.layer_scale_init_value is not None:
        for index in (1, 2):
            modules[f"=layers.{{i}}.layer_scale{index}.lambda1"] = f"{ours}.layer_scale{index}.scale"
    table = expand(modules, config.num_hidden_layers)
    return table if config.qkv_bias else {name: row for name, row in table.items() if not _is_qkv_bias(name)}


def _is_qkv_bias(name: str) -> bool:
    return name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))


def _preprocessing_fields(preprocessing: Mapping[str, Any], imagenet: bool) -> dict[str, Any]:
    """Mean, std and crop from a preprocessor_config.json. What is resized without a crop has a crop_pct of 1."""
    half = [0.5, 0.5, 0.5]
    size, crop = preprocessing.get("size"), preprocessing.get("crop_size")
    shortest = size.get("shortest_edge", size.get("height")) if isinstance(size, Mapping) else size
    cropped = crop.get("height") if isinstance(crop, Mapping) else crop
    crop_pct = 1.0 if preprocessing else 0.9
    if preprocessing.get("do_center_crop") and shortest and cropped:
        crop_pct = min(1.0, cropped / shortest)
    return {
        "image_mean": list(preprocessing.get("image_mean") or (locatvit.IMAGENET_MEAN if imagenet else half)),
        "image_std": list(preprocessing.get("image_std") or (locatvit.IMAGENET_STD if imagenet else half)),
        "crop_pct": crop_pct,
    }


def _side(size: Any) -> int | list[int]:
    return size if isinstance(size, int) else list(size)


def _of_checkpoint(path: Path, description: str) -> PlainViT:
    """A plain ViT of timm, or of a training run of the reference's program."""
    checkpoint = read_checkpoint(path, description)
    if not checkpoint.is_named:
        raise ConversionError(unnamed(checkpoint))
    if checkpoint.architecture is None:
        raise ConversionError(f"{description} holds the arguments of a LocAtViT; convert it with `locatvit convert`.")
    # The distilled DeiT has a second token and a second head; their mean is no linear head on the class token.
    name = (checkpoint.architecture or "").replace("_distilled", "")
    if not locatvit.recognize(name, checkpoint.arguments) or name.startswith("locatvit"):
        advice = "; convert it with `locatvit convert`" if name.startswith("locatvit") else ""
        raise ConversionError(f"The architecture {checkpoint.architecture} is no plain ViT of timm{advice}.")
    arguments = dict(checkpoint.arguments)
    if name != checkpoint.architecture:
        arguments["reg_tokens"] = 1
    fields = locatvit.config_fields(name, arguments)
    preprocessing = {**locatvit.default_preprocessing(name), **checkpoint.preprocessing}
    fields["image_mean"], fields["image_std"] = list(preprocessing["mean"]), list(preprocessing["std"])
    fields["crop_pct"] = preprocessing["crop_pct"]
    labels = checkpoint.label_names
    if labels and len(labels) == fields["num_labels"]:
        fields["id2label"] = dict(enumerate(map(str, labels)))
        fields["label2id"] = {label: index for index, label in fields["id2label"].items()}
    state, _ = read_state(checkpoint)
    for sentence in changed_rates(arguments):
        logger.warning(f"{description}: {sentence}")
    return _of_timm(fields, state, description)


def _of_timm_model(model: nn.Module) -> PlainViT:
    """A `VisionTransformer` of timm in memory. What it has besides a plain ViT shows up as tensors without a place."""
    description = f"The timm model {type(model).__name__}"
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    arguments = timm_vit.describe(model, description)
    for sentence in changed_rates(arguments):
        logger.warning(f"{description}: {sentence}")
    fields = locatvit.config_fields(None, arguments)
    cfg = model.pretrained_cfg or {}
    fields["image_mean"], fields["image_std"] = list(cfg.get("mean", [0.5] * 3)), list(cfg.get("std", [0.5] * 3))
    fields["crop_pct"] = cfg.get("crop_pct") or 0.9
    return _of_timm(fields, state, description)


def _of_timm(fields: dict[str, Any], state: dict[str, torch.Tensor], description: str) -> PlainViT:
    # The Gaussian is what is new. The refinement stays only where the source has it (global_pool="prr").
    fields = {**fields, "use_gaussian": True}
    heads = {name: state[name] for name in state if name.startswith(("head.", "head_dist."))}
    state = {name.replace("dist_token", "reg_token"): tensor for name, tensor in state.items() if name not in heads}
    if not heads:
        fields.pop("num_labels")
    head = None
    if "head.weight" in heads and "head_dist.weight" not in heads:
        head = {f"classifier.{name.removeprefix('head.')}": tensor for name, tensor in heads.items()}

    def resample(native: LocAtViTConfig, grid: tuple[int, int]) -> torch.Tensor:
        prefix = native.num_prefix_tokens if native.prefix_position_embeddings else 0
        return resample_position_embeddings(state["pos_embed"], native.native_grid, grid, prefix)

    return PlainViT(
        description=description,
        fields=fields,
        state=state,
        key_table=locatvit.key_table,
        position_name="pos_embed",
        resample=resample,
        head=head,
        missing_head_reason="has a classifier of another form" if heads else "has no classifier",
    )


__all__ = ["PlainViT", "from_vit", "open_vit", "normalize_key", "transformers_key_table"]
