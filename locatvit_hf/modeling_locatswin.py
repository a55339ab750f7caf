# SPDX-License-Identifier: MIT
"""The `locatswin` models: Swin, plain or with LocAt inside each window."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput, SemanticSegmenterOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_locat import LocAtAttentionInterface, eager_attention_forward
from .configuration_locatswin import LocAtSwinConfig
from .layers_locat import (
    MLP,
    DropPath,
    MultiHeadProjections,
    ProbeHead,
    check_pixel_values,
    drop_path_rates,
    pad_to_multiple,
    patch_feature_map,
    patch_grid,
)
from .locat import LocAtGaussian, refine
from .modeling_utils_locat import (
    BackboneForwardMixin,
    FamilyPreTrainedModel,
    FreezableBackboneMixin,
    classification_loss,
    optional_outputs,
    segmentation_loss,
)

# Every window has a position bias and many a shift mask, so no kernel without masks is of use.
ALL_ATTENTION_FUNCTIONS = LocAtAttentionInterface()
# What the reference adds to the logits of two patches that the shift brought together: finite, as everything there is.
SHIFT_MASK_VALUE = -100.0


def relative_position_index(window: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(area, area): which row of the relative position table belongs to a query and a key of a window.

    The table holds (2 * height - 1) * (2 * width - 1) offsets, query minus key, row-major from the most negative.
    """
    height, width = window
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    row_offsets = rows[:, None] - rows[None, :] + height - 1
    column_offsets = columns[:, None] - columns[None, :] + width - 1
    return row_offsets * (2 * width - 1) + column_offsets


def shift_mask(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    """(windows, 1, area, area), added to the logits of shifted windows: patches from opposite edges stay apart.

    grid: (height, width) of whole windows, padding included. The last `shift` rows and columns count as the wrapped
    ones also where padding follows them, as in the reference.
    like: a tensor of the device and type of the mask.
    """
    wrapped = [
        torch.arange(length, device=like.device) >= (length - offset if offset else length)
        for length, offset in zip(grid, shift, strict=True)
    ]
    regions = wrapped[0][:, None] * 2 + wrapped[1][None, :]
    regions = partition_windows(regions[None, :, :, None], window)[..., 0]
    apart = regions[:, None, :, None] != regions[:, None, None, :]
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, SHIFT_MASK_VALUE)


def partition_windows(feature_map: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """(batch, height, width, channels) to (batch * windows, area, channels), windows of a sample row by row."""
    batch, height, width, channels = feature_map.shape
    rows, columns = height // window[0], width // window[1]
    windows = feature_map.reshape(batch, rows, window[0], columns, window[1], channels)
    return windows.permute(0, 1, 3, 2, 4, 5).reshape(batch * rows * columns, window[0] * window[1], channels)


def merge_windows(windows: torch.Tensor, window: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """The inverse of `partition_windows`: to (batch, height, width, channels), grid = (height, width)."""
    rows, columns = grid[0] // window[0], grid[1] // window[1]
    feature_map = windows.reshape(-1, rows, columns, *window, windows.shape[-1])
    return feature_map.permute(0, 1, 3, 2, 4, 5).reshape(-1, *grid, windows.shape[-1])


def merged_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid after patch merging, (height, width) halved and rounded up."""
    return -(-grid[0] // 2), -(-grid[1] // 2)


class LocAtSwinEmbeddings(nn.Module):
    """Normalised patches; Swin has no position embeddings here."""

    def __init__(self, config: LocAtSwinConfig):
        super().__init__()
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.embed_dim, config.patch_shape, stride=config.patch_shape
        )
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width), both sides multiples of the patch, to (batch, patches, embed_dim)."""
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))
        return self.dropout(self.norm(patches.flatten(2).transpose(1, 2)))


class LocAtSwinPatchMerging(nn.Module):
    """Halves the grid and doubles the channels: each 2x2 block of patches becomes one."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels, eps=eps)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, patches of `grid`, channels) to (batch, patches of `merged_grid(grid)`, 2 * channels).

        Odd grids get a row or a column of zeros.
        """
        height, width = merged_grid(grid)
        feature_map = hidden_states.unflatten(1, grid)
        feature_map = F.pad(feature_map, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        batch, _, channels = hidden_states.shape
        blocks = feature_map.reshape(batch, height, 2, width, 2, channels)
        # The column inside a block varies slowest: (even row, even column), (odd, even), (even, odd), (odd, odd).
        merged = blocks.permute(0, 1, 3, 4, 2, 5).reshape(batch, height * width, 4 * channels)
        return self.reduction(self.norm(merged))


class LocAtSwinAttention(MultiHeadProjections):
    """Self-attention inside windows; with `use_gaussian` the logits get a bias around each query patch."""

    def __init__(self, config: LocAtSwinConfig, stage: int):
        window, _ = config.windows[stage]
        super().__init__(
            config.stage_channels[stage], config.num_heads[stage], config.qkv_bias, config.attention_probs_dropout_prob
        )
        self.config = config
        self.window = window
        self.gaussian = LocAtGaussian(self.head_dim, window) if config.use_gaussian else None
        num_offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets, config.num_heads[stage]))

    def relative_position_bias(self) -> torch.Tensor:
        """(heads, area, area), a learned value for each offset between two patches."""
        table = self.relative_position_bias_table
        return table[relative_position_index(self.window, table.device)].permute(2, 0, 1).contiguous()

    def forward(
        self, windows: torch.Tensor, shift_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """windows: (batch * windows, area, channels). shift_mask: (windows, 1, area, area), for shifted windows."""
        query, key, value = self.project(windows)
        # Distances are taken inside a window, which is its own native grid: nothing is rescaled.
        gaussian = self.gaussian(query, self.window) if self.gaussian is not None else None
        bias = self.relative_position_bias().to(query.dtype)[None]
        if shift_mask is not None:
            bias = bias + shift_mask.to(query.dtype)
            bias = bias.expand(query.shape[0] // shift_mask.shape[0], -1, -1, -1, -1).flatten(0, 1)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, bias, scaling=self.scaling, dropout=dropout, gaussian=gaussian, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights


class LocAtSwinLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer that attends inside windows; every second one shifts them first."""

    def __init__(self, config: LocAtSwinConfig, stage: int, index: int):
        super().__init__()
        channels = config.stage_channels[stage]
        self.window, shift = config.windows[stage]
        self.shift = shift if index % 2 else (0, 0)
        self.norm1 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.attention = LocAtSwinAttention(config, stage)
        self.norm2 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = MLP(channels, int(channels * config.mlp_ratio), config.hidden_act, config.hidden_dropout_prob)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        rates = drop_path_rates(config.drop_path_rate, sum(config.depths))
        self.drop_path = DropPath(rates[sum(config.depths[:stage]) + index])

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        attended = self.attend_in_windows(self.norm1(hidden_states), grid, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attended))
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))

    def attend_in_windows(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """Shift, pad to whole windows, attend, and undo both. The padding takes part as patches of zeros.

        hidden_states: (batch, patches of `grid`, channels), and so is the result.
        """
        feature_map = hidden_states.unflatten(1, grid)
        if any(self.shift):
            feature_map = feature_map.roll((-self.shift[0], -self.shift[1]), dims=(1, 2))
        height, width = [-(-side // length) * length for side, length in zip(grid, self.window, strict=True)]
        if is_tracing() or (height, width) != tuple(grid):
            feature_map = F.pad(feature_map, (0, 0, 0, width - grid[1], 0, height - grid[0]))
        mask = shift_mask((height, width), self.window, self.shift, like=hidden_states) if any(self.shift) else None
        windows, _ = self.attention(partition_windows(feature_map, self.window), shift_mask=mask, **kwargs)
        feature_map = merge_windows(windows, self.window, (height, width))[:, : grid[0], : grid[1]]
        if any(self.shift):
            feature_map = feature_map.roll(self.shift, dims=(1, 2))
        return feature_map.flatten(1, 2)


class LocAtSwinStage(nn.Module):
    """Layers of one grid. Every stage but the first merges patches before them."""

    def __init__(self, config: LocAtSwinConfig, stage: int):
        super().__init__()
        self.downsample = None
        if stage > 0:
            self.downsample = LocAtSwinPatchMerging(config.stage_channels[stage - 1], config.layer_norm_eps)
        self.layers = nn.ModuleList([LocAtSwinLayer(config, stage, index) for index in range(config.depths[stage])])

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """(batch, patches, channels) of the stage before, whose grid is `grid`, to those of this stage."""
        if self.downsample is not None:
            hidden_states = self.downsample(hidden_states, grid)
            grid = merged_grid(grid)
        for layer in self.layers:
            hidden_states = layer(hidden_states, grid=grid, **kwargs)
        return hidden_states


class LocAtSwinPreTrainedModel(FamilyPreTrainedModel):
    """What every `locatswin` model shares."""

    config: LocAtSwinConfig
    config_class = LocAtSwinConfig
    base_model_prefix = "locatswin"
    _no_split_modules = ["LocAtSwinEmbeddings", "LocAtSwinLayer"]
    _can_record_outputs = {"hidden_states": LocAtSwinStage, "attentions": LocAtSwinAttention}
    _no_weight_decay_suffixes = ("relative_position_bias_table",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LocAtSwinAttention):
            init.trunc_normal_(module.relative_position_bias_table, std=self.config.initializer_range)

    def _layer_groups(self, prefix: str, coarse: bool) -> dict:
        layers = [
            (rf"{prefix}stages\.(\d+)\.downsample", (0,)),
            (rf"{prefix}stages\.(\d+)\.layers\.(\d+)", None),
            (rf"{prefix}layernorm", (99999,)),
        ]
        return {"stem": rf"{prefix}embeddings", "blocks": rf"{prefix}stages\.(\d+)" if coarse else layers}


class LocAtSwinModel(LocAtSwinPreTrainedModel):
    """The encoder.

    add_pooling_layer: whether to compute `pooler_output`; heads that read patches do without.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: LocAtSwinConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = LocAtSwinEmbeddings(config)
        self.stages = nn.ModuleList([LocAtSwinStage(config, stage) for stage in range(config.num_stages)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.add_pooling_layer = add_pooling_layer
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        """
        pixel_values: (batch, channels, height, width) of any size; padded right and bottom to whole patches, and every
            stage to whole windows.

        Returns `last_hidden_state` (batch, patches of the last stage, hidden_size) after the final norm and before the
        refinement, and `pooler_output` (batch, hidden_size), what a classifier reads; on request `hidden_states`, the
        embeddings and the output of each stage (the last before the norm), and `attentions`, one (batch * windows,
        heads, area, area) for each layer, Gaussians included (attn_implementation="eager").
        Raises ValueError for images without pixels, other channel counts, and an `attention_mask`.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        if kwargs.pop("attention_mask", None) is not None:
            raise ValueError("locatswin attends inside windows and takes no attention_mask.")
        grid = patch_grid(pixel_values, self.config.patch_shape)
        hidden_states = self.embeddings(pad_to_multiple(pixel_values, self.config.patch_shape))
        for index, stage in enumerate(self.stages):
            hidden_states = stage(hidden_states, grid=grid, **kwargs)
            grid = merged_grid(grid) if index > 0 else grid
        hidden_states = self.layernorm(hidden_states)
        pooled = self.pool(hidden_states) if self.add_pooling_layer else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, patches, hidden_size) refined and averaged to (batch, hidden_size)."""
        if self.config.use_refinement:
            tokens = refine(tokens, self.config.num_heads[-1])
        return tokens.mean(dim=1)

    def feature_map(self, hidden_states: torch.Tensor, pixel_values: torch.Tensor, stage: int = -1) -> torch.Tensor:
        """The (batch, patches, channels) of a stage of these images, as (batch, channels, height, width)."""
        grid = patch_grid(pixel_values, self.config.patch_shape)
        for _ in range(stage % self.config.num_stages):
            grid = merged_grid(grid)
        return patch_feature_map(hidden_states, grid)


class LocAtSwinForImageClassification(LocAtSwinPreTrainedModel):
    """The encoder and a linear classifier on its pooled output."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: LocAtSwinConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.locatswin = LocAtSwinModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutput:
        """Class scores of images.

        Args:
            pixel_values: as in `LocAtSwinModel`.
            labels: (batch,) class ids, or (batch, classes) soft labels; `config.problem_type` may say otherwise.

        Returns:
            `loss` where there are labels, `logits` (batch, classes), and what else the encoder was asked for.
        """
        outputs = self.locatswin(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = classification_loss(logits, labels, self.config) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits, **optional_outputs(outputs))


class LocAtSwinForSemanticSegmentation(FreezableBackboneMixin, LocAtSwinPreTrainedModel):
    """The encoder and the paper's probe on the last stage's map, before the final norm and without refinement."""

    _auto_class = "AutoModelForSemanticSegmentation"
    _segments_images = True

    def __init__(self, config: LocAtSwinConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.locatswin = LocAtSwinModel(config, add_pooling_layer=False)
        self.locatswin.layernorm.requires_grad_(False)  # never read: distributed training would wait for its gradient
        self.segmentation_head = ProbeHead(config.hidden_size, config.segmentation_hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> SemanticSegmenterOutput:
        """Class scores of each cell of the last map.

        Args:
            pixel_values: as in `LocAtSwinModel`.
            labels: (batch, height, width) class ids of the images' size, `config.semantic_loss_ignore_index` left out.

        Returns:
            `loss` where there are labels, and `logits` (batch, classes, grid height, grid width), whose cells are
            `config.output_stride` pixels of the padded image; the processor's `post_process_semantic_segmentation`
            cuts the padding off.
        """
        kwargs["output_hidden_states"] = True
        outputs = self.locatswin(pixel_values, return_dict=True, **kwargs)
        logits = self.segmentation_head(self.locatswin.feature_map(outputs.hidden_states[-1], pixel_values))
        loss = segmentation_loss(logits, labels, pixel_values.shape[-2:], self.config) if labels is not None else None
        return SemanticSegmenterOutput(loss=loss, logits=logits, **optional_outputs(outputs))


class LocAtSwinBackbone(BackboneForwardMixin, LocAtSwinPreTrainedModel):
    """Feature maps of chosen stages for the dense-prediction frameworks of transformers, each with its own norm."""

    def __init__(self, config: LocAtSwinConfig):
        super().__init__(config)
        self.locatswin = LocAtSwinModel(config, add_pooling_layer=False)
        self.locatswin.layernorm.requires_grad_(False)  # never read, see LocAtSwinForSemanticSegmentation
        self.num_features = [config.embed_dim, *config.stage_channels]
        self.norms = nn.ModuleDict()
        if config.apply_layernorm:
            for stage, channels in zip(self.out_features, self.channels, strict=True):
                self.norms[stage] = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.post_init()

    def feature_map(self, hidden_states: torch.Tensor, stage: str, pixel_values: torch.Tensor) -> torch.Tensor:
        """A stage's patches as (batch, channels, height, width) of its own grid.

        With `reshape_hidden_states=False` they are (batch, patches, channels).
        """
        if stage in self.norms:
            hidden_states = self.norms[stage](hidden_states)
        if not self.config.reshape_hidden_states:
            return hidden_states
        return self.locatswin.feature_map(hidden_states, pixel_values, max(self.stage_names.index(stage) - 1, 0))


__all__ = [
    "LocAtSwinBackbone",
    "LocAtSwinForImageClassification",
    "LocAtSwinForSemanticSegmentation",
    "LocAtSwinModel",
    "LocAtSwinPreTrainedModel",
]
