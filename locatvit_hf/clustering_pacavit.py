"""How patches are assigned to clusters (PaCa-ViT, CVPR 2023, section 3): inside the attention, or by a ConvMixer.

An assignment is (batch, clusters, patches). Its softmax runs over the patches: a cluster is a weighted mean of patches,
and the weights of each cluster sum to one.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_pacavit import PaCaViTConfig
from .layers_locat import feature_map_tokens

KERNEL_SIZE = 7


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
    """(batch, channels, height, width) to an assignment (batch, clusters, patches); subclasses define `logits`."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return assign_patches(self.logits(feature_map))


class PaCaViTConvClustering(PaCaViTClustering):
    """Depthwise 7x7 convolution, GELU, 1x1 convolution, GELU, 1x1 convolution to the clusters.

    The last has no bias: a constant for each cluster would not change a softmax over the patches.
    """

    def __init__(self, config: PaCaViTConfig, stage: int):
        super().__init__()
        channels = config.hidden_sizes[stage]
        self.depthwise = nn.Conv2d(channels, channels, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, kernel_size=1)
        self.clusters = nn.Conv2d(channels, config.num_clusters[stage], kernel_size=1, bias=False)
        self.activation = nn.GELU()

    def logits(self, feature_map: torch.Tensor) -> torch.Tensor:
        hidden_states = self.activation(self.depthwise(feature_map))
        return self.clusters(self.activation(self.pointwise(hidden_states)))


class PaCaViTMlpClustering(PaCaViTClustering):
    """Two linear layers on each patch alone. The bias of the second is dead, but stands in the released checkpoints."""

    def __init__(self, config: PaCaViTConfig, stage: int):
        super().__init__()
        channels = config.hidden_sizes[stage]
        self.up_proj = nn.Linear(channels, config.mlp_ratio * channels)
        self.clusters = nn.Linear(config.mlp_ratio * channels, config.num_clusters[stage])
        self.activation = nn.GELU()

    def logits(self, feature_map: torch.Tensor) -> torch.Tensor:
        hidden_states = self.activation(self.up_proj(feature_map.permute(0, 2, 3, 1)))
        return self.clusters(hidden_states).permute(0, 3, 1, 2)


class PaCaViTTeacherClustering(PaCaViTClustering):
    """1x1 convolution of a map of the teacher. Its bias is dead, but stands in the released checkpoints."""

    def __init__(self, config: PaCaViTConfig, stage: int):
        super().__init__()
        self.clusters = nn.Conv2d(config.hidden_sizes[stage], config.num_clusters[stage], kernel_size=1)

    def logits(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.clusters(feature_map)


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
        sizes = config.hidden_sizes
        finest = next(stage for stage, clusters in enumerate(config.num_clusters) if clusters > 0)
        self.layers = nn.ModuleList(
            [
                nn.Sequential(*[PaCaViTTeacherLayer(size) for _ in range(depth)])
                for size, depth in zip(sizes, config.teacher_depths, strict=True)
            ]
        )
        self.downsamplings = nn.ModuleList([PaCaViTTeacherDownsampling(*pair) for pair in pairwise(sizes)])
        self.laterals = nn.ModuleList(
            [PaCaViTTeacherLateral(*pair) if stage >= finest else None for stage, pair in enumerate(pairwise(sizes))]
        )
        self.clusterings = nn.ModuleList(
            [
                PaCaViTTeacherClustering(config, stage) if clusters > 0 else None
                for stage, clusters in enumerate(config.num_clusters)
            ]
        )

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


ON_SITE_CLUSTERINGS = {"conv": PaCaViTConvClustering, "mlp": PaCaViTMlpClustering}


__all__ = ["PaCaViTClustering", "PaCaViTTeacher", "assign_patches", "pool_clusters", "ON_SITE_CLUSTERINGS"]
