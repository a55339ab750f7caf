"""PaCa-ViT: names and shapes of a checkpoint -> `PaCaViTConfig`, and the table of tensor names.

Its releases carry no arguments, so everything is read from the tensors; a training run also says in args.yaml what
they cannot. A classifier holds the encoder and `head`; an
ADE20K checkpoint the encoder below `backbone.` and a `decode_head` (the PaCa head, or UPerNet's with an
`auxiliary_head`); a COCO checkpoint the encoder beside a Mask R-CNN, of which only the backbone is taken.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, UperNetConfig, UperNetForSemanticSegmentation

from ..configuration_pacavit import PaCaViTConfig
from ..modeling_pacavit import PaCaViTForImageClassification, PaCaViTForSemanticSegmentation, PaCaViTModel
from .arguments import dropout_fields
from .errors import ConversionError
from .key_mapping import KeyTable, load_renamed
from .validation import check_type

Shapes = Mapping[str, tuple[int, ...]]

# `pacavit_tiny_p2cconv_100_0`, `pacavit_convmixer_base_100`: what the reference's training program calls its models.
NAME = re.compile(r"pacavit_\w+")
# Every release has these; heads leave no trace in the shapes.
HEADS = [2, 4, 8, 16]
# What surrounds the backbone in a Mask R-CNN of mmdetection.
DETECTOR = ("neck.", "rpn_head.", "roi_head.")
ADE20K_IMAGE_SIZE = 512


def recognize(architecture: str | None, arguments: Mapping[str, Any]) -> bool:
    """Whether a training run is of this family. The releases name no architecture, see `recognize_shapes`."""
    return bool(NAME.fullmatch(architecture or ""))


def recognize_shapes(shapes: Shapes) -> bool:
    """Whether the tensors of a checkpoint, under any prefix, are of PaCa-ViT."""
    first = re.compile(r"(module\.)?(backbone\.)?stage1\.0\.mlp\.dwconv\.dwconv\.weight")
    return any(first.fullmatch(name) for name in shapes)


def default_preprocessing(architecture: str | None) -> dict[str, Any]:
    """Mean, std and crop of all releases: ImageNet's statistics."""
    return {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 0.9}


def prepare_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that our models have a place for, by the names of the classifier and of `decode_head`.

    Left out are the blur kernels of the teacher, which are constant, and a detector around the backbone. Counters of
    BatchNorm that a converted file may lack are zero.
    """
    prepared = {ours: state[name] for name, ours in _kept(state)}
    for name in [name for name in prepared if name.endswith(".running_var")]:
        prepared.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return prepared


def _kept(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of a checkpoint that are kept, and what they are without prefixes."""
    bare = [(name, name.removeprefix("module.")) for name in names]
    return [
        (name, stripped.removeprefix("backbone."))
        for name, stripped in bare
        if not stripped.startswith(DETECTOR) and not stripped.endswith(".blur_filter")
    ]


def task(names: Iterable[str]) -> str:
    """What a checkpoint is for: "classification", "paca_head", "upernet" or "encoder", by its names without prefix."""
    names = set(names)
    if "head.weight" in names:
        return "classification"
    if "decode_head.k.0.weight" in names:
        return "paca_head"
    return "upernet" if "decode_head.psp_modules.0.1.conv.weight" in names else "encoder"


def infer_arguments(shapes: Shapes, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `PaCaViTConfig` for a checkpoint.

    Args:
        shapes: Name -> shape of its tensors, under any prefix.
        arguments: Those of a training run, or none. The reference takes the number of classes and the size of the
            images alone and ignores others; of these the dropout rates are kept.

    Returns:
        Field -> value.

    Raises:
        ConversionError: The tensors are not those of a whole PaCa-ViT, or the arguments contradict them.
    """
    shapes = {ours: tuple(shapes[name]) for name, ours in _kept(shapes)}
    try:
        fields = _infer(shapes)
    except KeyError as error:
        raise ConversionError(f"The checkpoint is not a whole PaCa-ViT: it lacks {error.args[0]}.") from error
    for argument, field, what in (("num_classes", "num_labels", "classes"), ("in_chans", "num_channels", "channels")):
        given, found = arguments.get(argument), fields[field]
        if given not in (None, found):
            raise ConversionError(f"The tensors of the checkpoint are for {found} {what}, but its run says {given}.")
    size = arguments.get("image_size") or arguments.get("img_size")
    if size is not None:
        check_type("The model was built with", "image_size", size, "a whole number or two of them")
        fields["image_size"] = size
    return {**fields, **dropout_fields(arguments)}


def _infer(shapes: Shapes) -> dict[str, Any]:
    stages = range(1, len(HEADS) + 1)
    clusterings = [_on_site_clustering(shapes, stage) for stage in stages]
    kinds = {kind for kind, _, _ in clusterings if kind is not None}
    if any(name.startswith("paca_teacher.") for name in shapes):
        kinds.add("teacher")
        weights = [shapes.get(f"paca_teacher.to_clusters{stage}.weight") for stage in stages]
        num_clusters = [shape[0] if shape is not None else 0 for shape in weights]
    else:
        num_clusters = [clusters for _, clusters, _ in clusterings]
    if len(kinds) > 1:
        raise ConversionError(f"The checkpoint clusters in several ways: {' and '.join(sorted(kinds))}.")
    inner, channels = shapes["stage1.0.mlp.fc1.weight"]
    fields: dict[str, Any] = {
        "hidden_sizes": [shapes[f"norm{stage}.weight"][0] for stage in stages],
        "depths": [_count(shapes, rf"stage{stage}\.\d+\.norm1_before\.weight") for stage in stages],
        "num_attention_heads": HEADS,
        "mlp_ratio": inner // channels,
        "num_channels": shapes["patch_embed.proj.0.weight"][1],
        "num_clusters": num_clusters,
        "clustering_type": "".join(kinds) or "conv",
        "blockwise_clustering": any(modules > 1 for _, _, modules in clusterings),
        # The value itself only matters to a model without weights.
        "layer_scale_init_value": 1.0 if "stage1.0.gamma1" in shapes else None,
    }
    if "teacher" in kinds:
        pattern = r"paca_teacher\.block{}\.\d+\.1\.weight"
        fields["teacher_depths"] = [_count(shapes, pattern.format(stage)) for stage in stages]
    segments = "decode_head.conv_seg.weight" in shapes
    head = shapes.get("decode_head.conv_seg.weight" if segments else "head.weight", (0,))
    fields["num_labels"] = head[0]
    if segments:
        fields["image_size"] = ADE20K_IMAGE_SIZE
    if task(shapes) == "paca_head":
        fields["segmentation_hidden_size"] = head[1]
    return fields


def _count(shapes: Shapes, pattern: str) -> int:
    return sum(1 for name in shapes if re.fullmatch(pattern, name))


def _on_site_clustering(shapes: Shapes, stage: int) -> tuple[str | None, int, int]:
    """Kind of a stage's clustering, its clusters, and how many layers cluster; (None, 0, 0) without."""
    modules = _count(shapes, rf"stage{stage}\.\d+\.attn\.clustering\.clustering\.2\.weight")
    if modules == 0:
        return None, 0, 0
    first = f"stage{stage}.0.attn.clustering.clustering"
    kind, last = ("conv", 4) if f"{first}.4.weight" in shapes else ("mlp", 2)
    return kind, shapes[f"{first}.{last}.weight"][0], modules


def build_config(architecture: str | None, arguments: Mapping[str, Any], **fields: Any) -> PaCaViTConfig:
    """The configuration of a checkpoint from `infer_arguments`. `fields` win."""
    return PaCaViTConfig(**{**arguments, **fields})


def build_model(config: PaCaViTConfig, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """The model of a prepared state dict: ours, or with UPerNet's head the UPerNet of transformers around our backbone.

    Raises:
        ConversionError: Tensors are missing, unknown or of another shape; the message names them.
    """
    kind = task(state)
    with torch.device("meta"):
        if kind == "upernet":
            config.out_indices = list(range(1, len(config.depths) + 1))
            model = UperNetForSemanticSegmentation(_upernet_config(config, state))
        elif kind == "paca_head":
            model = PaCaViTForSemanticSegmentation(config)
        else:
            model = PaCaViTForImageClassification(config) if kind == "classification" else PaCaViTModel(config)
    return load_renamed(model, state, key_table(config, model.state_dict()))


def _upernet_config(config: PaCaViTConfig, state: Mapping[str, torch.Tensor]) -> UperNetConfig:
    auxiliary = state.get("auxiliary_head.convs.0.conv.weight")
    fields: dict[str, Any] = {"use_auxiliary_head": auxiliary is not None}
    if auxiliary is not None:
        fields.update(auxiliary_channels=auxiliary.shape[0], auxiliary_in_channels=auxiliary.shape[1])
    channels = state["decode_head.conv_seg.weight"].shape[1]
    return UperNetConfig(backbone_config=config, hidden_size=channels, num_labels=config.num_labels, **fields)


# How our names become those of the reference, one rule after the other. {stage} counts stages from 0, {number} from 1.
NAMES = (
    (r"^(backbone\.)?pacavit\.", ""),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj.0."),
    (r"^embeddings\.downsampling\.projection\.", "patch_embed.proj.1."),
    (r"^embeddings\.downsampling\.norm\.", "patch_embed.norm."),
    (r"^stages\.(?P<stage>\d+)\.downsampling\.projection\.", "transition{stage}.proj."),
    (r"^stages\.(?P<stage>\d+)\.downsampling\.norm\.", "transition{stage}.norm."),
    (r"^stages\.(?P<stage>\d+)\.norm\.", "norm{number}."),
    (r"^stages\.(?P<stage>\d+)\.layers\.", "stage{number}."),
    (r"(?<=\d)\.norm([12])\.", r".norm\1_before."),
    (r"\.attention\.clustering\.(depthwise|up_proj)\.", ".attn.clustering.clustering.0."),
    (r"\.attention\.clustering\.pointwise\.", ".attn.clustering.clustering.2."),
    (r"\.attention\.clustering\.clusters\.", ".attn.clustering.clustering.{last}."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.depthwise\.", ".mlp.dwconv.dwconv."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.scale$", r".gamma\1"),
    (r"^teacher\.layers\.(?P<stage>\d+)\.", "paca_teacher.block{number}."),
    (r"^teacher\.downsamplings\.(?P<stage>\d+)\.projection\.", "paca_teacher.transition{number}.0.conv."),
    (r"^teacher\.downsamplings\.(?P<stage>\d+)\.norm\.", "paca_teacher.transition{number}.2."),
    (r"^teacher\.laterals\.(?P<stage>\d+)\.projection\.", "paca_teacher.lateral{number}.0."),
    (r"^teacher\.laterals\.(?P<stage>\d+)\.norm\.", "paca_teacher.lateral{number}.2."),
    (r"^teacher\.laterals\.(?P<stage>\d+)\.layer\.", "paca_teacher.fpn{number}."),
    (r"^teacher\.clusterings\.(?P<stage>\d+)\.clusters\.", "paca_teacher.to_clusters{number}."),
    (r"(^paca_teacher\.(?:block|fpn)[\d.]+\.)depthwise\.", r"\g<1>0.fn.0."),
    (r"(^paca_teacher\.(?:block|fpn)[\d.]+\.)norm1(?:_before)?\.", r"\g<1>0.fn.2."),
    (r"(^paca_teacher\.(?:block|fpn)[\d.]+\.)pointwise\.", r"\g<1>1."),
    (r"(^paca_teacher\.(?:block|fpn)[\d.]+\.)norm2(?:_before)?\.", r"\g<1>3."),
    (r"^classifier\.", "head."),
    (r"^segmentation_head\.projections\.", "decode_head.convs."),
    (r"^segmentation_head\.query\.", "decode_head.q.0."),
    (r"^segmentation_head\.cluster_projection\.", "decode_head.clustering.0."),
    (r"^segmentation_head\.clusters\.", "decode_head.clustering.1."),
    (r"^segmentation_head\.(k|v)(?:ey|alue)\.", r"decode_head.\1.0."),
    (r"^segmentation_head\.(k|v)(?:ey|alue)_norm\.", r"decode_head.\1.2."),
    (r"^segmentation_head\.output\.", "decode_head.proj."),
    (r"^(decode_head\..*)\.projection\.", r"\1.conv."),
    (r"^(decode_head\..*)\.norm\.", r"\1.bn."),
    # UPerNet of transformers, and of mmsegmentation.
    (r"\.batch_norm\.", ".bn."),
    (r"^(?:segmentation_head|decode_head)\.classifier\.", "decode_head.conv_seg."),
    (r"^auxiliary_head\.classifier\.", "auxiliary_head.conv_seg."),
)


def reference_name(name: str, clustering_type: str = "conv") -> str:
    """The reference's name of one of our tensors, as `prepare_state` leaves it."""
    for pattern, replacement in NAMES:
        match = re.search(pattern, name)
        if match is None:
            continue
        stage = int(match.groupdict().get("stage") or 0)
        replacement = match.expand(replacement)
        replacement = replacement.format(stage=stage, number=stage + 1, last=4 if clustering_type == "conv" else 2)
        name = name[: match.start()] + replacement + name[match.end() :]
    return name


def key_table(config: PaCaViTConfig, names: Iterable[str]) -> KeyTable:
    """Every name of the reference, as `prepare_state` leaves it -> ours, for the tensors of one of our models."""
    return {reference_name(name, config.clustering_type): (name,) for name in names}


__all__ = [
    "build_config",
    "build_model",
    "default_preprocessing",
    "infer_arguments",
    "key_table",
    "prepare_state",
    "recognize",
    "recognize_shapes",
    "reference_name",
    "task",
]
