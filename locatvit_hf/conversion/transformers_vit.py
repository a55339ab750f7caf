"""A plain ViT of transformers: ViT, DeiT, DINOv2, and DINOv2 with registers."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from ..configuration_locatvit import LocAtViTConfig
from ..layers_locat import resample_position_embeddings
from ..utils.io import read_json
from .arguments import IMAGENET_MEAN, IMAGENET_STD
from .errors import ConversionError
from .key_mapping import KeyTable, expand
from .plain_vit import PlainViT
from .readers import TIMM_WRAPPER

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


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a folder of transformers; None for what `read_checkpoint` judges, timm's models among it."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    known = isinstance(config, dict) and config.get("model_type") not in (None, TIMM_WRAPPER)
    return config if known else None


def open_folder(folder: Path, config: Mapping[str, Any], source: str) -> PlainViT:
    """The ViT in a folder of transformers.

    Args:
        folder: The folder.
        config: Its config.json.
        source: The subject of messages.

    Raises:
        ConversionError: It holds any other model.
    """
    if config["model_type"] not in TRANSFORMERS_TYPES:
        raise ConversionError(
            f"{source} has the model_type {config['model_type']!r}; from_vit takes {', '.join(TRANSFORMERS_TYPES)}."
        )
    preprocessor = folder / "preprocessor_config.json"
    preprocessing = read_json(preprocessor) if preprocessor.is_file() else {}
    return describe(_load(folder, config, source), preprocessing, source)


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Silences what transformers reports about unused tensors: they are checked here, one by one."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _load(folder: Path, config: Mapping[str, Any], source: str) -> PreTrainedModel:
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
    """A tensor's name in transformers, any version's, as `key_table` writes it."""
    for pattern, replacement in KEY_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def describe(model: PreTrainedModel, preprocessing: Mapping[str, Any], description: str) -> PlainViT:
    """What a model of transformers is as a plain ViT.

    Args:
        model: The model, with or without a head.
        preprocessing: Its preprocessor_config.json.
        description: The subject of messages.

    Raises:
        ConversionError: It has layers that ours do not have.
    """
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
        head = {}
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
        key_table=key_table,
        position_name="embeddings.position_embeddings",
        resample=resample,
        head=head or None,
        missing_head_reason=missing_head_reason,
    )


def key_table(config: LocAtViTConfig) -> KeyTable:
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
        "image_mean": list(preprocessing.get("image_mean") or (IMAGENET_MEAN if imagenet else half)),
        "image_std": list(preprocessing.get("image_std") or (IMAGENET_STD if imagenet else half)),
        "crop_pct": crop_pct,
    }


def _side(size: Any) -> int | list[int]:
    return size if isinstance(size, int) else list(size)


__all__ = ["TRANSFORMERS_TYPES", "describe", "key_table", "normalize_key", "open_folder", "read_config"]
