"""The `pacavit` models: PaCa-ViT, whose patches attend to learned clusters of patches instead of to each other."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_locat import ALL_ATTENTION_FUNCTIONS, eager_attention_forward
from .clustering_pacavit import (
    ON_SITE_CLUSTERINGS,
    PaCaViTClustering,
    PaCaViTTeacher,
    assign_patches,
    pool_clusters,
)
from .configuration_pacavit import PaCaViTConfig
from .layers_locat import (
    DropPath,
    FamilyPreTrainedModel,
    FreezableBackboneMixin,
    LayerScale,
    MultiHeadProjections,
    check_pixel_values,
    classification_loss,
    drop_path_rates,
    feature_map_tokens,
    patch_feature_map,
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


@dataclass
class PaCaViTBackboneOutput(BackboneOutput):
    """As its base class, with `cluster_assignments`: see `PaCaViTModel`."""

    cluster_assignments: tuple[torch.Tensor, ...] | None = None


class PaCaViTEmbeddings(nn.Module):
    """Patches of four pixels: two 3x3 convolutions of stride 2 with nothing in between, then a norm of the channels."""

    def __init__(self, config: PaCaViTConfig):
        super().__init__()
        channels = config.hidden_sizes[0]
        self.patch_embeddings = nn.Conv2d(config.num_channels, channels // 2, kernel_size=3, stride=2, padding=1)
        self.projection = nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to (batch, hidden_sizes[0], height / 4, width / 4), sides rounded up."""
        feature_map = self.projection(self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype)))
        return normalize_channels(feature_map, self.norm)


class PaCaViTDownsampling(nn.Module):
    """From one stage to the next: a 3x3 convolution of stride 2, then a norm of the channels."""

    def __init__(self, config: PaCaViTConfig, stage: int):
        super().__init__()
        in_channels, out_channels = config.hidden_sizes[stage - 1 : stage + 1]
        self.projection = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_channels, eps=config.layer_norm_eps)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return normalize_channels(self.projection(feature_map), self.norm)


def normalize_channels(feature_map: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """A LayerNorm over the channels at each position of (batch, channels, height, width)."""
    return norm(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PaCaViTAttention(MultiHeadProjections):
    """Patch-to-cluster attention: queries are the patches, keys and values the clusters.

    The assignment of patches to clusters is computed here where `clusters` says so, else it is handed down from an
    earlier layer of the stage or from the teacher. Without clusters it is full attention among the patches.
    """

    def __init__(self, config: PaCaViTConfig, stage: int, clusters: bool):
        hidden_size, num_heads = config.hidden_sizes[stage], config.num_attention_heads[stage]
        super().__init__(hidden_size, num_heads, True, config.attention_probs_dropout_prob, gaussian_grid=None)
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

        Returns the attended patches, the attention maps (batch, heads, patches, clusters) if the back-end has them, and
        the assignment that was used.
        """
        if self.clustering is not None:
            assignment = self.clustering(patch_feature_map(hidden_states, grid))
        sources = hidden_states
        if self.cluster_norm is not None:
            # These patches are pooled, even where the assignment comes from an earlier layer.
            sources = self.cluster_norm(pool_clusters(assignment, hidden_states))
        query, key, value = self.project(hidden_states, sources)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights, assignment


# Softmax weights below it are left out of Castling-ViT's auxiliary branch.
CASTLING_THRESHOLD = 0.02


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
        self,
        hidden_states: torch.Tensor,
        assignment: torch.Tensor | None,
        grid: tuple[int, int],
        **kwargs: Unpack[TransformersKwargs],
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


class PaCaViTMLP(nn.Module):
    """Two linear layers with a depthwise 3x3 convolution and an identity beside it before the activation."""

    def __init__(self, config: PaCaViTConfig, stage: int):
        super().__init__()
        channels = config.hidden_sizes[stage]
        self.up_proj = nn.Linear(channels, config.mlp_ratio * channels)
        self.depthwise = nn.Conv2d(
            config.mlp_ratio * channels,
            config.mlp_ratio * channels,
            kernel_size=3,
            padding=1,
            groups=config.mlp_ratio * channels,
        )
        self.down_proj = nn.Linear(config.mlp_ratio * channels, channels)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        hidden_states = self.up_proj(hidden_states)
        mixed = self.depthwise(patch_feature_map(hidden_states, grid))
        hidden_states = self.activation(hidden_states + feature_map_tokens(mixed))
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
        if config.layer_scale_init_value is None:
            self.layer_scale1, self.layer_scale2 = nn.Identity(), nn.Identity()
        else:
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
        self.downsampling = PaCaViTDownsampling(config, stage) if stage > 0 else nn.Identity()
        self.layers = nn.ModuleList([PaCaViTLayer(config, stage, index) for index in range(config.depths[stage])])
        self.norm = nn.LayerNorm(config.hidden_sizes[stage], eps=config.layer_norm_eps)

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
        grid = feature_map.shape[-2:]
        hidden_states = feature_map_tokens(feature_map)
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
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PaCaViTSegmentationHead):
            init.normal_(module.classifier.weight, std=0.01)
            for layer in (module.key, module.value, module.clusters):
                bound = math.prod(layer.weight.shape[1:]) ** -0.5
                init.uniform_(layer.weight, -bound, bound)
                init.uniform_(layer.bias, -bound, bound)

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
        map. Sizes of all maps are rounded up. Raises ValueError for images without pixels and other channel counts.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
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
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PaCaViTImageClassifierOutput:
        """
        pixel_values: as in `PaCaViTModel`.
        labels: (batch,) class ids, or (batch, classes) soft labels; `config.problem_type` may say otherwise.

        Returns `loss` where there are labels and `logits` (batch, classes).
        """
        outputs = self.pacavit(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        return PaCaViTImageClassifierOutput(
            loss=classification_loss(logits, labels, self.config) if labels is not None else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cluster_assignments=outputs.cluster_assignments,
        )


class PaCaViTConvLayer(nn.Sequential):
    """1x1 convolution without bias, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU()


class PaCaViTSegmentationHead(nn.Module):
    """The PaCa head: pixels attend to one cluster for each class.

    Its cluster logits are class scores themselves, and get the auxiliary loss. The attention has one head and, as in
    the reference, no scaling.
    """

    def __init__(self, config: PaCaViTConfig):
        super().__init__()
        self.config = config
        channels, num_labels = config.segmentation_hidden_size, config.num_labels
        merged = channels * len(config.hidden_sizes)
        self.projections = nn.ModuleList([PaCaViTConvLayer(size, channels) for size in config.hidden_sizes])
        self.query = PaCaViTConvLayer(merged, channels)
        self.cluster_projection = PaCaViTConvLayer(merged, channels)
        self.clusters = nn.Conv2d(channels, num_labels, kernel_size=1)
        self.key = nn.Linear(merged, channels)
        self.key_norm = nn.BatchNorm1d(channels)
        self.value = nn.Linear(merged, channels)
        self.value_norm = nn.BatchNorm1d(channels)
        self.output = PaCaViTConvLayer(channels, channels)
        self.dropout = nn.Dropout2d(config.segmentation_dropout_prob)
        self.classifier = nn.Conv2d(channels, num_labels, kernel_size=1)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The stages' maps to logits and auxiliary logits, both (batch, classes, height, width) of the first map."""
        grid = feature_maps[0].shape[-2:]
        merged = torch.cat(
            [
                resize(projection(feature_map), grid)
                for projection, feature_map in zip(self.projections, feature_maps, strict=True)
            ],
            dim=1,
        )
        auxiliary_logits = self.clusters(self.cluster_projection(merged))
        clusters = pool_clusters(assign_patches(auxiliary_logits), feature_map_tokens(merged))
        query = feature_map_tokens(self.query(merged))
        key = F.relu(self.key_norm(self.key(clusters).transpose(1, 2)).transpose(1, 2))
        value = F.relu(self.value_norm(self.value(clusters).transpose(1, 2)).transpose(1, 2))
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
        self.classifiers = nn.ModuleList(
            [
                nn.Conv2d(size, config.num_labels, kernel_size=1, bias=stage == 0)
                for stage, size in enumerate(config.hidden_sizes)
            ]
        )

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, None]:
        """As `PaCaViTSegmentationHead.forward`; there are no auxiliary logits."""
        grid = feature_maps[0].shape[-2:]
        scores = [
            resize(classifier(feature_map), grid)
            for classifier, feature_map in zip(self.classifiers, feature_maps, strict=True)
        ]
        return sum(scores), None


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
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PaCaViTSemanticSegmenterOutput:
        """
        pixel_values: as in `PaCaViTModel`.
        labels: (batch, height, width) class ids of the images' size; `config.semantic_loss_ignore_index` is left out.

        Returns `loss` where there are labels, `logits` (batch, classes, height / 4, width / 4), rounded up, and with
        the PaCa head `auxiliary_logits` of the same shape, whose loss is part of `loss`.
        """
        kwargs["output_hidden_states"] = True
        outputs = self.pacavit(pixel_values, return_dict=True, **kwargs)
        logits, auxiliary_logits = self.segmentation_head(outputs.hidden_states[1:])
        loss = None
        if labels is not None:
            cell, ignore_index = self.config.output_stride, self.config.semantic_loss_ignore_index
            loss = segmentation_loss(logits, labels, cell, ignore_index)
            if auxiliary_logits is not None:
                auxiliary_loss = segmentation_loss(auxiliary_logits, labels, cell, ignore_index)
                loss = loss + self.config.auxiliary_loss_weight * auxiliary_loss
        return PaCaViTSemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary_logits=auxiliary_logits,
            cluster_assignments=outputs.cluster_assignments,
        )


class PaCaViTBackbone(BackboneMixin, PaCaViTPreTrainedModel):
    """The normed maps of chosen stages, at strides 4, 8, 16 and 32, for dense-prediction frameworks."""

    _auto_class = "AutoBackbone"

    def __init__(self, config: PaCaViTConfig):
        super().__init__(config)
        self.pacavit = PaCaViTModel(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> PaCaViTBackboneOutput:
        """
        pixel_values: as in `PaCaViTModel`.

        Returns `feature_maps`, one (batch, channels, height, width) for each of `config.out_features`.
        """
        kwargs["output_hidden_states"] = True
        outputs = self.pacavit(pixel_values, return_dict=True, **kwargs)
        return PaCaViTBackboneOutput(
            feature_maps=tuple(
                feature_map
                for name, feature_map in zip(self.stage_names, outputs.hidden_states, strict=True)
                if name in self.out_features
            ),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cluster_assignments=outputs.cluster_assignments,
        )


__all__ = [
    "PaCaViTBackbone",
    "PaCaViTForImageClassification",
    "PaCaViTForSemanticSegmentation",
    "PaCaViTModel",
    "PaCaViTPreTrainedModel",
]
