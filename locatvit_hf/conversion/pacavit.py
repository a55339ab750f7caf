"""PaCa-ViT: names and shapes of a checkpoint -> `PaCaViTConfig`, and the table of tensor names.

Its releases carry no arguments, so everything is read from the tensors. A classifier holds the encoder and `head`; an
ADE20K checkpoint the encoder below `backbone.` and a `decode_head` (the PaCa head, or UPerNet's with an
`auxiliary_head`); a COCO checkpoint the encoder beside a Mask R-CNN, of which only the backbone is taken.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..configuration_pacavit import PaCaViTConfig
from .errors import ConversionError
from .keys import KeyTable

# Every release has these; heads leave no trace in the shapes.
HEADS = [2, 4, 8, 16]
# What surrounds the backbone in a Mask R-CNN of mmdetection.
DETECTOR = ("neck.", "rpn_head.", "roi_head.")
# A cluster for each class, and more clusters than in pretraining.
ADE20K_IMAGE_SIZE = 512


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether the tensors of a checkpoint, under any prefix, are of PaCa-ViT."""
    return any(re.fullmatch(r"(module\.)?(backbone\.)?stage1\.0\.attn\.q\.weight", name) for name in state) and any(
        name.endswith("mlp.dwconv.dwconv.weight") for name in state
    )


def task(state: Mapping[str, torch.Tensor]) -> str:
    """What a prepared state dict is for: "classification", "paca_head", "upernet" or "backbone"."""
    if "head.weight" in state:
        return "classification"
    if "decode_head.k.0.weight" in state:
        return "paca_head"
    return "upernet" if "decode_head.psp_modules.0.1.conv.weight" in state else "backbone"


def prepare_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that our models have a place for, by the names of the classifier and of `decode_head`.

    Left out are the blur kernels of the teacher, which are constant, and a detector around the backbone. Counters of
    BatchNorm that a converted file may lack are zero.
    """
    prepared = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if name.startswith(DETECTOR) or name.endswith(".blur_filter"):
            continue
        prepared[name.removeprefix("backbone.")] = tensor
    for name in [name for name in prepared if name.endswith(".running_var")]:
        prepared.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return prepared


def build_config(state: Mapping[str, torch.Tensor], **fields: Any) -> PaCaViTConfig:
    """The configuration of a prepared state dict. `fields` win over what its names and shapes say.

    Raises ConversionError for tensors that are not those of a PaCa-ViT.
    """
    try:
        inferred = _infer(state)
    except (KeyError, IndexError) as error:
        raise ConversionError(f"The checkpoint is no whole PaCa-ViT: {error.args[0]} is missing.") from error
    return PaCaViTConfig(**{**inferred, **fields})


def _infer(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    stages = range(1, len(HEADS) + 1)
    teacher = any(name.startswith("paca_teacher.") for name in state)
    depths = [_count(state, rf"stage{stage}\.(\d+)\.norm1_before\.weight") for stage in stages]
    clusterings = [_clusterings(state, stage) for stage in stages]
    if teacher:
        clusters = [state[f"paca_teacher.to_clusters{stage}.weight"] for stage in stages if _clusters(state, stage)]
        counts = iter(tensor.shape[0] for tensor in clusters)
        num_clusters = [next(counts) if _clusters(state, stage) else 0 for stage in stages]
        clustering_type = "teacher"
    else:
        kinds = {kind for kind, _, _ in filter(None, clusterings)}
        if len(kinds) > 1:
            raise ConversionError("The checkpoint mixes convolutional and MLP clustering, which PaCaViT does not have.")
        clustering_type = kinds.pop() if kinds else "conv"
        num_clusters = [clustering[1] if clustering else 0 for clustering in clusterings]
    inner, channels = state["stage1.0.mlp.fc1.weight"].shape
    fields: dict[str, Any] = {
        "hidden_sizes": [state[f"norm{stage}.weight"].shape[0] for stage in stages],
        "depths": depths,
        "num_attention_heads": HEADS,
        "mlp_ratio": inner // channels,
        "num_channels": state["patch_embed.proj.0.weight"].shape[1],
        "num_clusters": num_clusters,
        "clustering_type": clustering_type,
        "blockwise_clustering": any(clustering[2] > 1 for clustering in filter(None, clusterings)),
        "layer_scale_init_value": 1.0 if "stage1.0.gamma1" in state else None,
    }
    if teacher:
        fields["teacher_depths"] = [_count(state, rf"paca_teacher\.block{stage}\.(\d+)\.1\.weight") for stage in stages]
    head = state.get("head.weight", state.get("decode_head.conv_seg.weight"))
    if head is not None:
        fields["num_labels"] = head.shape[0]
    if "decode_head.conv_seg.weight" in state:
        fields["image_size"] = ADE20K_IMAGE_SIZE
        if task(state) == "paca_head":
            fields["segmentation_hidden_size"] = head.shape[1]
    return fields


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    return sum(1 for name in state if re.fullmatch(pattern, name))


def _clusters(state: Mapping[str, torch.Tensor], stage: int) -> bool:
    """Whether the patches of a stage attend to clusters."""
    return f"stage{stage}.0.attn.cluster_norm.weight" in state


def _clusterings(state: Mapping[str, torch.Tensor], stage: int) -> tuple[str, int, int] | None:
    """Kind of the clustering, clusters, and how many layers of a stage cluster; None without clustering."""
    modules = _count(state, rf"stage{stage}\.(\d+)\.attn\.clustering\.clustering\.2\.weight")
    if modules == 0:
        return None
    first = f"stage{stage}.0.attn.clustering.clustering"
    kind, last = ("conv", 4) if f"{first}.4.weight" in state else ("mlp", 2)
    return kind, state[f"{first}.{last}.weight"].shape[0], modules


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


__all__ = ["build_config", "key_table", "prepare_state", "recognise", "reference_name", "task"]
