# SPDX-License-Identifier: MIT
"""The `pacavit` models: PaCa-ViT, whose patches attend to learned clusters of patches instead of to each other.

An assignment of patches to clusters is (batch, clusters, patches). Its softmax runs over the patches: a cluster is a
weighted mean of patches, and the weights of each cluster sum to one (PaCa-ViT, CVPR 2023, section 3).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput, SemanticSegmenterOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_pacavit import PaCaViTConfig
from .layers_locat import (
    MLP,
    DropPath,
    LayerScale,
    MultiHeadProjections,
    channels_last_map,
    check_pixel_values,
    drop_path_rates,
    feature_map_tokens,
    patch_feature_map,
)
from .modeling_utils_locat import (
    BackboneForwardMixin,
    FamilyPreTrainedModel,
    FreezableBackboneMixin,
    classification_loss,
    optional_outputs,
    segmentation_loss,
)


@dataclass
class PaCaViTModelOutput(BaseModelOutputWithPooling):
    """As its base class, with `cluster_assignments`: see `PaCaViTModel`."""

    cluster_assignments: tuple[torch.Tensor, ...] | None = None


@dataclass
class PaCaViTImageClassifierOutput(ImageClassifierOutput):
    """As its base class, with `cluster_assignments`: see `PaCaViTModel`."""

    cluster_assignments: tuple[torch.Tensor, ...] | None = None


@dataclass
class PaCaViTSemanticSegmenterOutput(SemanticSegmenterOutput):
    """As its base class, with `cluster_assignments` (see `PaCaViTModel`) and `auxiliary_logits` of the PaCa head."""

    auxiliary_logits: torch.Tensor | None = None
    cluster_assignments: tuple[torch.Tensor, ...] | None = None


class PaCaViTDownsampling(nn.Module):
    """A 3x3 convolution of stride 2, then a LayerNorm over the channels at each position."""

    def __init__(self, config: PaCaViTConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_channels, eps=config.layer_norm_eps)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.norm(self.projection(feature_map).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PaCaViTEmbeddings(nn.Module):
    """Patches of four pixels: a 3x3 convolution of stride 2 and, with nothing in between, a downsampling."""

    def __init__(self, config: PaCaViTConfig):
        super().__init__()
        channels = config.hidden_sizes[0]
        self.patch_embeddings = nn.Conv2d(config.num_channels, channels // 2, kernel_size=3, stride=2, padding=1)
        self.downsampling = PaCaViTDownsampling(config, channels // 2, channels)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to (batch, hidden_sizes[0], height / 4, width / 4), sides rounded up."""
        return self.downsampling(self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype)))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention step by step, softmax in at least float32; the only backend that returns the attention maps.

    query, key, value: (batch, heads, patches or clusters, head_dim). attention_mask: None, as PaCa-ViT has no mask.
    Returns (batch, patches, heads, head_dim) and (batch, heads, patches, clusters).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights = F.softmax(query @ key.transpose(-2, -1) * scaling, dim=-1, dtype=dtype).to(query.dtype)
    output = F.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


KERNEL_SIZE = 7  # of the depthwise convolutions that cluster
CASTLING_THRESHOLD = 0.02  # softmax weights up to it are left out of Castling-ViT's auxiliary branch


def assign_patches(logits: torch.Tensor) -> torch.Tensor:
    """Logits (batch, clusters, height, width) as an assignment (batch, clusters, patches), in at least float32.

    Weights of a cluster over many thousand patches would be subnormal numbers in half precision.
    """
    return F.softmax(logits.flatten(2), dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def pool_clusters(assignment: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The clusters (batch, clusters, channels) of tokens (batch, patches, channels), in the type of the tokens."""
    with maybe_autocast(tokens.device.type, enabled=False):
        return (assignment @ tokens.to(assignment.dtype)).to(tokens.dtype)


class PaCaViTClustering(nn.Module):
    """(batch, channels, height, width) to an assignment (batch, clusters, patches).

    This one is the teacher's: a 1x1 convolution of its map. Its bias is redundant, for a constant does not change a
    softmax, but stands in the released checkpoints.
    """

    def __init__(self, config: PaCaViTConfig, stage: int):
        super().__init__()
        self.clusters = nn.Conv2d(config.hidden_sizes[stage], config.num_clusters[stage], kernel_size=1)

    def logits(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.clusters(feature_map)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return assign_patches(self.logits(feature_map))


class PaCaViTConvClustering(PaCaViTClustering):
    """Depthwise 7x7 convolution, GELU, 1x1 convolution, GELU, 1x1 convolution without bias to the clusters."""

    def __init__(self, config: PaCaViTConfig, stage: int):
        super().__init__(config, stage)
        channels = config.hidden_sizes[stage]
        self.depthwise = nn.Conv2d(channels, channels, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, kernel_size=1)
        self.clusters = nn.Conv2d(channels, config.num_clusters[stage], kernel_size=1, bias=False)
        self.activation = nn.GELU()

    def logits(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.clusters(self.activation(self.pointwise(self.activation(self.depthwise(feature_map)))))


class PaCaViTMlpClustering(PaCaViTClustering):
    """Two linear layers on each patch alone. The bias of the second is as redundant as the teacher's."""

    def __init__(self, config: PaCaViTConfig, stage: int):
        super().__init__(config, stage)
        channels = config.hidden_sizes[stage]
        self.up_proj = nn.Linear(channels, config.mlp_ratio * channels)
        self.clusters = nn.Linear(config.mlp_ratio * channels, config.num_clusters[stage])
        self.activation = nn.GELU()

    def logits(self, feature_map: torch.Tensor) -> torch.Tensor:
        hidden_states = self.activation(self.up_proj(feature_map.permute(0, 2, 3, 1)))
        return self.clusters(hidden_states).permute(0, 3, 1, 2)


ON_SITE_CLUSTERINGS = {"conv": PaCaViTConvClustering, "mlp": PaCaViTMlpClustering}


class PaCaViTTeacherLayer(nn.Module):
    """A ConvMixer layer: depthwise 7x7 convolution beside an identity, then 1x1 convolution; GELU before each norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=channels)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, kernel_size=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.activation = nn.GELU()

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        feature_map = self.norm1(self.activation(self.depthwise(feature_map))) + feature_map
        return self.norm2(self.activation(self.pointwise(feature_map)))


class PaCaViTTeacherDownsampling(nn.Module):
    """A fixed 3x3 binomial blur against aliasing, then a convolution of stride 2, GELU and a norm."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.GELU()

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        channels = feature_map.shape[1]
        binomial = torch.tensor([1.0, 2.0, 1.0], dtype=feature_map.dtype, device=feature_map.device) / 4
        kernel = torch.outer(binomial, binomial).expand(channels, 1, 3, 3)
        feature_map = F.conv2d(feature_map, kernel, padding=1, groups=channels)
        return self.norm(self.activation(self.projection(feature_map)))


class PaCaViTTeacherLateral(nn.Module):
    """Brings the coarser level to a finer level's grid and channels, and merges the two."""

    def __init__(self, channels: int, coarser_channels: int):
        super().__init__()
        self.projection = nn.Conv2d(coarser_channels, channels, kernel_size=1)
        self.norm = nn.BatchNorm2d(channels)
        self.layer = PaCaViTTeacherLayer(channels)
        self.activation = nn.GELU()

    def forward(self, feature_map: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        coarser = F.interpolate(coarser, size=feature_map.shape[-2:], mode="bilinear", align_corners=False)
        return self.layer(feature_map + self.norm(self.activation(self.projection(coarser))))


class PaCaViTTeacher(nn.Module):
    """A ConvMixer with a feature pyramid on the patch embeddings, as wide as the stages that it clusters.

    It is no frozen teacher: it is trained with the model and runs at inference too. Levels that no clustering reads are
    not built.
    """

    def __init__(self, config: PaCaViTConfig):
        super().__init__()
        sizes, clusters = config.hidden_sizes, config.num_clusters
        finest = next(stage for stage, count in enumerate(clusters) if count > 0)
        stages = [
            nn.Sequential(*[PaCaViTTeacherLayer(size) for _ in range(depth)])
            for size, depth in zip(sizes, config.teacher_depths, strict=True)
        ]
        laterals = [PaCaViTTeacherLateral(*pair) if i >= finest else None for i, pair in enumerate(pairwise(sizes))]
        clusterings = [PaCaViTClustering(config, i) if count > 0 else None for i, count in enumerate(clusters)]
        self.layers = nn.ModuleList(stages)
        self.downsamplings = nn.ModuleList([PaCaViTTeacherDownsampling(*pair) for pair in pairwise(sizes)])
        self.laterals = nn.ModuleList(laterals)
        self.clusterings = nn.ModuleList(clusterings)

    def forward(self, feature_map: torch.Tensor) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
        """The patch embeddings (batch, channels, height, width) to what each stage needs.

        Returns the assignments (batch, clusters, patches), None for a stage without clusters, and the features
        (batch, patches, channels) of the way up, which are added to the tokens at the end of each stage.
        """
        features = []
        for stage, layers in enumerate(self.layers):
            feature_map = layers(self.downsamplings[stage - 1](feature_map) if stage > 0 else feature_map)
            features.append(feature_map)
        merged = list(features)
        for stage, lateral in reversed(list(enumerate(self.laterals))):
            if lateral is not None:
                merged[stage] = lateral(features[stage], merged[stage + 1])
        assignments = [
            clustering(feature_map) if clustering is not None else None
            for clustering, feature_map in zip(self.clusterings, merged, strict=True)
        ]
        return assignments, [feature_map_tokens(feature_map) for feature_map in features]


class PaCaViTAttention(MultiHeadProjections):
    """Patch-to-cluster attention: queries are the patches, keys and values the clusters.

    The assignment of patches to clusters is computed here where `clusters` says so, else it is handed down from an
    earlier layer of the stage or from the teacher. Without clusters it is full attention among the patches.
    """

    is_causal = False  # which the attention functions of transformers read

    def __init__(self, config: PaCaViTConfig, stage: int, clusters: bool):
        hidden_size, num_heads = config.hidden_sizes[stage], config.num_attention_heads[stage]
        super().__init__(hidden_size, num_heads, True, config.attention_probs_dropout_prob)
        self.config = config
        self.clustering = ON_SITE_CLUSTERINGS[config.clustering_type](config, stage) if clusters else None
        self.cluster_norm = None
        if config.num_clusters[stage] > 0:
            self.cluster_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        assignment: torch.Tensor | None,
        grid: tuple[int, int],
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        hidden_states: (batch, patches, hidden_size). assignment: (batch, clusters, patches); None if there is none yet.

        Returns the attended patches, the attention maps (batch, heads, patches, clusters) if the backend has them, and
        the assignment that was used.
        """
        if self.clustering is not None:
            assignment = self.clustering(channels_last_map(hidden_states, grid))
        sources = hidden_states
        if self.cluster_norm is not None:
            # These patches are pooled, even where the assignment comes from an earlier layer.
            sources = self.cluster_norm(pool_clusters(assignment, hidden_states))
        query, key, value = self.project(hidden_states, sources)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(output.flatten(2)), weights, assignment


class PaCaViTCastlingAttention(PaCaViTAttention):
    """Experimental: linear-angular attention (Castling-ViT, CVPR 2023) among the patches of a stage without clusters.

    With unit queries and keys, `V / 2 + Q (K^T V) / pi` are the first terms of the series of an angular attention,
    linear in the patches. In training, and only there, softmax attention without its small weights is added: an
    auxiliary branch. Each head's output is then scaled to unit length, and a depthwise convolution of the values, which
    stands for the rest of the series, is added. The paper's kernel has nine taps along the patches; here they are 3x3
    on the grid. No pretrained weights exist.
    """

    def __init__(self, config: PaCaViTConfig, stage: int):
        super().__init__(config, stage, clusters=False)
        self.local_mixing = nn.Conv2d(
            self.num_heads, self.num_heads, kernel_size=3, padding=1, groups=self.num_heads, bias=False
        )

    def forward(
        self, hidden_states: torch.Tensor, assignment: torch.Tensor | None, grid: tuple[int, int], **kwargs
    ) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        """As `PaCaViTAttention.forward`. There are no attention maps to return."""
        query, key, value = self.project(hidden_states)
        dtype = torch.promote_types(query.dtype, torch.float32)
        with maybe_autocast(query.device.type, enabled=False):
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            unit_query, unit_key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
            output = 0.5 * value + unit_query @ (unit_key.transpose(-2, -1) @ value) / math.pi
            if self.training:
                weights = F.softmax(query @ key.transpose(-2, -1) * self.scaling, dim=-1)
                output = output + weights.masked_fill(weights <= CASTLING_THRESHOLD, 0.0) @ value
            output = F.normalize(output, dim=-1)
        # Channels join the batch: one kernel for each head.
        maps = value.permute(0, 3, 1, 2).unflatten(-1, grid).flatten(0, 1).to(self.local_mixing.weight.dtype)
        local = self.local_mixing(maps).flatten(2).unflatten(0, (-1, self.head_dim))
        output = output.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return self.o_proj(output + local.permute(0, 3, 2, 1).flatten(2)), None, assignment


class ResidualDepthwise(nn.Conv2d):
    """x + depthwise 3x3 convolution of x, in one pass: the identity is one more weight in the middle of the kernel."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        identity = F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        return self._conv_forward(feature_map, self.weight + identity, self.bias)


class PaCaViTMLP(MLP):
    """Two linear layers with a depthwise 3x3 convolution and an identity beside it before the activation."""

    def __init__(self, config: PaCaViTConfig, stage: int):
        channels = config.hidden_sizes[stage]
        inner = config.mlp_ratio * channels
        super().__init__(channels, inner, config.hidden_act, config.hidden_dropout_prob)
        self.depthwise = ResidualDepthwise(inner, inner, kernel_size=3, padding=1, groups=inner)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:  # type: ignore[override] # it mixes patches
        mixed = self.depthwise(channels_last_map(self.up_proj(hidden_states), grid))
        hidden_states = self.activation(feature_map_tokens(mixed))
        return self.dropout(self.down_proj(self.dropout(hidden_states)))


class PaCaViTLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer, number `index` of its stage."""

    def __init__(self, config: PaCaViTConfig, stage: int, index: int):
        super().__init__()
        channels = config.hidden_sizes[stage]
        self.norm1 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        if config.num_clusters[stage] == 0 and config.clusterless_attention == "castling":
            self.attention = PaCaViTCastlingAttention(config, stage)
        else:
            on_site = config.num_clusters[stage] > 0 and config.clustering_type != "teacher"
            clusters = on_site and (index == 0 or config.blockwise_clustering)
            self.attention = PaCaViTAttention(config, stage, clusters)
        self.norm2 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = PaCaViTMLP(config, stage)
        self.layer_scale1, self.layer_scale2 = nn.Identity(), nn.Identity()
        if config.layer_scale_init_value is not None:
            self.layer_scale1 = LayerScale(channels, config.layer_scale_init_value)
            self.layer_scale2 = LayerScale(channels, config.layer_scale_init_value)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        rates = drop_path_rates(config.drop_path_rate, sum(config.depths))
        self.drop_path = DropPath(rates[sum(config.depths[:stage]) + index])

    def forward(
        self,
        hidden_states: torch.Tensor,
        assignment: torch.Tensor | None,
        grid: tuple[int, int],
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, _, assignment = self.attention(self.norm1(hidden_states), assignment, grid, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(self.dropout(attended)))
        hidden_states = hidden_states + self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states), grid)))
        return hidden_states, assignment


class PaCaViTStage(nn.Module):
    """Downsampling (but for the first stage), layers that may share one assignment, and a norm.

    The norm stands in the trunk: the next stage reads the normed map too.
    """

    def __init__(self, config: PaCaViTConfig, stage: int):
        super().__init__()
        sizes = config.hidden_sizes
        self.downsampling = PaCaViTDownsampling(config, *sizes[stage - 1 : stage + 1]) if stage > 0 else nn.Identity()
        self.layers = nn.ModuleList([PaCaViTLayer(config, stage, index) for index in range(config.depths[stage])])
        self.norm = nn.LayerNorm(sizes[stage], eps=config.layer_norm_eps)

    def forward(
        self,
        feature_map: torch.Tensor,
        assignment: torch.Tensor | None = None,
        teacher_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        feature_map: (batch, channels, height, width) of the stage before.
        assignment, teacher_features: of the teacher, (batch, clusters, patches) and (batch, patches, channels).
        """
        feature_map = self.downsampling(feature_map)
        grid, hidden_states = feature_map.shape[-2:], feature_map_tokens(feature_map)
        for layer in self.layers:
            # Positional: reentrant checkpointing finds the tensors that need a gradient among these only.
            hidden_states, assignment = layer(hidden_states, assignment, grid, **kwargs)
        if teacher_features is not None:
            hidden_states = hidden_states + teacher_features
        return patch_feature_map(self.norm(hidden_states), grid)


class PaCaViTPreTrainedModel(FamilyPreTrainedModel):
    """See `FamilyPreTrainedModel`."""

    config: PaCaViTConfig
    config_class = PaCaViTConfig
    base_model_prefix = "pacavit"
    _supports_flash_attn = True  # there is no bias: every attention function of transformers serves
    _no_split_modules = ["PaCaViTEmbeddings", "PaCaViTLayer", "PaCaViTTeacher"]
    _can_record_outputs = {
        "hidden_states": PaCaViTStage,
        "attentions": PaCaViTAttention,
        "cluster_assignments": PaCaViTClustering,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the reference: truncated normal linear weights, convolutions by fan-out, PyTorch's bounds in the head."""
        super()._init_weights(module)
        if isinstance(module, PaCaViTHeadConv2d | PaCaViTHeadLinear):
            bound = math.prod(module.weight.shape[1:]) ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            std = 0.01 if isinstance(module, PaCaViTPixelClassifier) else math.sqrt(2 / fan_out)
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)

    def _layer_groups(self, prefix: str, coarse: bool) -> dict:
        # What leads into a stage, and the teacher's part for it, count as its first layer; its norm as the last.
        layers = [
            (rf"{prefix}stages\.(\d+)\.downsampling", (0,)),
            (rf"{prefix}teacher\.\w+\.(\d+)", (0,)),
            (rf"{prefix}stages\.(\d+)\.layers\.(\d+)", None),
            (rf"{prefix}stages\.(\d+)\.norm", (99999,)),
        ]
        blocks = rf"{prefix}(?:stages|teacher\.\w+)\.(\d+)"
        return {"stem": rf"{prefix}embeddings", "blocks": blocks if coarse else layers}


class PaCaViTModel(PaCaViTPreTrainedModel):
    """The encoder."""

    _auto_class = "AutoModel"

    def __init__(self, config: PaCaViTConfig):
        super().__init__(config)
        self.embeddings = PaCaViTEmbeddings(config)
        self.teacher = PaCaViTTeacher(config) if config.clustering_type == "teacher" else None
        self.stages = nn.ModuleList([PaCaViTStage(config, stage) for stage in range(len(config.depths))])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> PaCaViTModelOutput:
        """
        pixel_values: (batch, channels, height, width) of any size.

        Returns `last_hidden_state` (batch, channels, height / 32, width / 32), the normed map of the last stage, and
        `pooler_output` (batch, channels), its mean, what a classifier reads. On request: `hidden_states`, the normed
        maps of the stem and of each stage; `attentions`, (batch, heads, patches, clusters or patches) for each layer
        (attn_implementation="eager"); with output_cluster_assignments=True `cluster_assignments`, one (batch, clusters,
        patches) for each clustering, in the order of the stages: a row, laid out on the grid of its stage, is a heat
        map. Sizes of all maps are rounded up. Raises ValueError for images without pixels, other channel counts, and an
        `attention_mask`.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        if kwargs.pop("attention_mask", None) is not None:
            raise ValueError("pacavit attends to clusters and takes no attention_mask.")
        feature_map = self.embeddings(pixel_values)
        assignments, features = [None] * len(self.stages), [None] * len(self.stages)
        if self.teacher is not None:
            assignments, features = self.teacher(feature_map)
        for stage, assignment, teacher_features in zip(self.stages, assignments, features, strict=True):
            feature_map = stage(feature_map, assignment, teacher_features, **kwargs)
        return PaCaViTModelOutput(last_hidden_state=feature_map, pooler_output=feature_map.mean(dim=(2, 3)))


class PaCaViTForImageClassification(PaCaViTPreTrainedModel):
    """The encoder and a linear classifier on the mean of the last map."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: PaCaViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.pacavit = PaCaViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> PaCaViTImageClassifierOutput:
        """Class scores of images.

        Args:
            pixel_values: as in `PaCaViTModel`.
            labels: (batch,) class ids, or (batch, classes) soft labels; `config.problem_type` may say otherwise.

        Returns:
            `loss` where there are labels, `logits` (batch, classes), and what else the encoder was asked for.
        """
        outputs = self.pacavit(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = classification_loss(logits, labels, self.config) if labels is not None else None
        return PaCaViTImageClassifierOutput(loss=loss, logits=logits, **optional_outputs(outputs))


class PaCaViTConvLayer(nn.Sequential):
    """1x1 convolution without bias, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU()


class PaCaViTHeadConv2d(nn.Conv2d):
    """A convolution of the head, initialized within PyTorch's own bounds."""


class PaCaViTHeadLinear(nn.Linear):
    """A linear map of the head, initialized within PyTorch's own bounds."""


class PaCaViTPixelClassifier(nn.Conv2d):
    """The last convolution of the head, whose fresh weights have a standard deviation of 0.01."""


class PaCaViTSegmentationHead(nn.Module):
    """The PaCa head: pixels attend to one cluster for each class.

    Its cluster logits are class scores themselves, and get the auxiliary loss. The attention has one head and, as in
    the reference, no scaling.
    """

    is_causal = False  # which the attention functions of transformers read

    def __init__(self, config: PaCaViTConfig):
        super().__init__()
        self.config = config
        channels, num_labels = config.segmentation_hidden_size, config.num_labels
        merged = channels * len(config.hidden_sizes)
        self.projections = nn.ModuleList([PaCaViTConvLayer(size, channels) for size in config.hidden_sizes])
        self.query = PaCaViTConvLayer(merged, channels)
        self.cluster_projection = PaCaViTConvLayer(merged, channels)
        self.clusters = PaCaViTHeadConv2d(channels, num_labels, kernel_size=1)
        self.key = PaCaViTHeadLinear(merged, channels)
        self.key_norm = nn.BatchNorm1d(channels)
        self.value = PaCaViTHeadLinear(merged, channels)
        self.value_norm = nn.BatchNorm1d(channels)
        self.output = PaCaViTConvLayer(channels, channels)
        self.dropout = nn.Dropout2d(config.segmentation_dropout_prob)
        self.classifier = PaCaViTPixelClassifier(channels, num_labels, kernel_size=1)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The stages' maps to logits and auxiliary logits, both (batch, classes, height, width) of the first map."""
        grid = feature_maps[0].shape[-2:]
        pairs = zip(self.projections, feature_maps, strict=True)
        merged = torch.cat([resize(projection(feature_map), grid) for projection, feature_map in pairs], dim=1)
        auxiliary_logits = self.clusters(self.cluster_projection(merged))
        clusters = pool_clusters(assign_patches(auxiliary_logits), feature_map_tokens(merged))
        query = feature_map_tokens(self.query(merged))
        key, value = self.key(clusters), self.value(clusters)
        key = F.relu(self.key_norm(key.flatten(0, 1))).view_as(key)
        value = F.relu(self.value_norm(value.flatten(0, 1))).view_as(value)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, query[:, None], key[:, None], value[:, None], None, scaling=1.0)
        output = self.output(patch_feature_map(output.flatten(2), grid))
        return self.classifier(self.dropout(output)), auxiliary_logits


class PaCaViTLinearProbe(nn.Module):
    """A linear classifier of each position of the stages' maps, resized to the first and concatenated.

    Written as one classifier a stage: a linear map and a resize commute.
    """

    def __init__(self, config: PaCaViTConfig):
        super().__init__()
        sizes, num_labels = config.hidden_sizes, config.num_labels
        classifiers = [nn.Conv2d(size, num_labels, 1, bias=stage == 0) for stage, size in enumerate(sizes)]
        self.classifiers = nn.ModuleList(classifiers)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, None]:
        """As `PaCaViTSegmentationHead.forward`; there are no auxiliary logits."""
        grid = feature_maps[0].shape[-2:]
        pairs = zip(self.classifiers, feature_maps, strict=True)
        return sum(resize(classifier(feature_map), grid) for classifier, feature_map in pairs), None


def resize(feature_map: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of (batch, channels, height, width) to `grid`."""
    return F.interpolate(feature_map, size=grid, mode="bilinear", align_corners=False)


class PaCaViTForSemanticSegmentation(FreezableBackboneMixin, PaCaViTPreTrainedModel):
    """The encoder and a head on the maps of all stages: the PaCa head or a linear probe."""

    _auto_class = "AutoModelForSemanticSegmentation"
    _segments_images = True

    def __init__(self, config: PaCaViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.pacavit = PaCaViTModel(config)
        head_class = PaCaViTSegmentationHead if config.segmentation_head_type == "paca" else PaCaViTLinearProbe
        self.segmentation_head = head_class(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> PaCaViTSemanticSegmenterOutput:
        """Class scores of each cell of the first map.

        Args:
            pixel_values: as in `PaCaViTModel`.
            labels: (batch, height, width) class ids of the images' size, `config.semantic_loss_ignore_index` left out.

        Returns:
            `loss` where there are labels, `logits` (batch, classes, height / 4, width / 4), rounded up, and with the
            PaCa head `auxiliary_logits` of the same shape, whose loss is part of `loss`.
        """
        kwargs["output_hidden_states"] = True
        outputs = self.pacavit(pixel_values, return_dict=True, **kwargs)
        logits, auxiliary_logits = self.segmentation_head(outputs.hidden_states[1:])
        loss = None
        if labels is not None:
            image_size = pixel_values.shape[-2:]
            loss = segmentation_loss(logits, labels, image_size, self.config)
            if auxiliary_logits is not None:
                auxiliary_loss = segmentation_loss(auxiliary_logits, labels, image_size, self.config)
                loss = loss + self.config.auxiliary_loss_weight * auxiliary_loss
        return PaCaViTSemanticSegmenterOutput(
            loss=loss, logits=logits, auxiliary_logits=auxiliary_logits, **optional_outputs(outputs)
        )


class PaCaViTBackbone(BackboneForwardMixin, PaCaViTPreTrainedModel):
    """The normed maps of chosen stages, at strides 4, 8, 16 and 32, for dense-prediction frameworks."""

    def __init__(self, config: PaCaViTConfig):
        super().__init__(config)
        self.pacavit = PaCaViTModel(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.post_init()


__all__ = [
    "PaCaViTBackbone",
    "PaCaViTForImageClassification",
    "PaCaViTForSemanticSegmentation",
    "PaCaViTModel",
    "PaCaViTPreTrainedModel",
]
