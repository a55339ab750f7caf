# SPDX-License-Identifier: MIT
"""The `locatvit` models: ViT, RegViT and RoPE-ViT, each plain or with LocAt."""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput, SemanticSegmenterOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_locat import LocAtAttentionInterface, additive_attention_mask, eager_attention_forward
from .blockwise_locat import blockwise_attention_forward
from .configuration_locatvit import LocAtViTConfig
from .layers_locat import (
    MLP,
    DropPath,
    FeaturePyramid,
    LayerScale,
    MultiHeadProjections,
    ProbeHead,
    ScaledInitLinear,
    check_pixel_values,
    drop_path_rates,
    pad_to_multiple,
    patch_feature_map,
    patch_grid,
    resample_position_embeddings,
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
from .triton_locat import fused_attention_forward

# 'eager' and 'flex_attention' are those of every family; on CPU 'sdpa' works a block of logits at a time.
ALL_ATTENTION_FUNCTIONS = LocAtAttentionInterface(sdpa=blockwise_attention_forward, locat_fused=fused_attention_forward)


class LocAtViTEmbeddings(nn.Module):
    """Patches, the prefix tokens before them, and learned position embeddings where the model has them."""

    def __init__(self, config: LocAtViTConfig):
        super().__init__()
        self.config = config
        patch_shape = config.patch_shape
        self.patch_embeddings = nn.Conv2d(config.num_channels, config.hidden_size, patch_shape, stride=patch_shape)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.use_class_token else None
        self.register_tokens = None
        if config.num_register_tokens > 0:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.num_positioned_prefix_tokens = config.num_prefix_tokens if config.prefix_position_embeddings else 0
        self.position_embeddings = None
        if config.position_embedding_type == "learned":
            num_positions = self.num_positioned_prefix_tokens + math.prod(config.native_grid)
            self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, channels, height, width), both sides multiples of the patch, to (batch, tokens, hidden_size)."""
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)
        tokens = [token for token in (self.cls_token, self.register_tokens) if token is not None]
        prefix = torch.cat(tokens, dim=1).expand(patches.shape[0], -1, -1) if tokens else patches[:, :0]
        if self.position_embeddings is None:
            embedded = torch.cat([prefix, patches], dim=1)
            return embedded if self.config.position_embedding_type == "none" else self.dropout(embedded)
        num_prefix = self.num_positioned_prefix_tokens
        positions = resample_position_embeddings(self.position_embeddings, self.config.native_grid, grid, num_prefix)
        if num_prefix:
            return self.dropout(torch.cat([prefix, patches], dim=1) + positions)
        return self.dropout(torch.cat([prefix, patches + positions], dim=1))


class LocAtViTRotaryEmbedding(nn.Module):
    """Mixed rotary embedding of RoPE-ViT: every layer and head learns its own two-dimensional frequencies."""

    def __init__(self, config: LocAtViTConfig):
        super().__init__()
        head_dim = config.hidden_size // config.num_attention_heads
        self.temperature = config.rope_temperature
        sizes = config.num_hidden_layers, config.num_attention_heads, head_dim // 2
        self.frequencies = nn.Parameter(torch.zeros(2, *sizes))

    def forward(self, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (layers, heads, patches, head_dim / 2), in at least float32.

        The angle of patch n is x_n * frequencies[0] + y_n * frequencies[1], x its column and y its row, as integers.
        """
        height, width = grid
        dtype = torch.promote_types(self.frequencies.dtype, torch.float32)
        with maybe_autocast(self.frequencies.device.type, enabled=False):
            along_x, along_y = self.frequencies.to(dtype)[..., None, :].unbind(0)
            columns = torch.arange(width, dtype=dtype, device=self.frequencies.device).repeat(height)[:, None]
            rows = torch.arange(height, dtype=dtype, device=self.frequencies.device).repeat_interleave(width)[:, None]
            angles = columns * along_x + rows * along_y
            return angles.cos(), angles.sin()

    @torch.no_grad()
    def initial_frequencies(self) -> torch.Tensor:
        """Magnitudes fall geometrically with the channel, directions are random, the second half turned by 90°."""
        _, layers, heads, half = self.frequencies.shape
        magnitude = self.temperature ** -(torch.arange(0, 2 * half, 4).float() / (2 * half))
        direction = 2 * math.pi * torch.rand(layers, heads, 1)
        along_x = torch.cat([magnitude * direction.cos(), magnitude * (direction + math.pi / 2).cos()], dim=-1)
        along_y = torch.cat([magnitude * direction.sin(), magnitude * (direction + math.pi / 2).sin()], dim=-1)
        return torch.stack([along_x, along_y])


def rotate_patches(
    states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], num_prefix_tokens: int
) -> torch.Tensor:
    """Rotates the channel pairs (2j, 2j + 1) of the patches of (batch, heads, tokens, head_dim); prefix tokens stay."""
    cosines, sines = rotary
    prefix, patches = states[:, :, :num_prefix_tokens], states[:, :, num_prefix_tokens:]
    even, odd = patches[..., 0::2], patches[..., 1::2]
    rotated = torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], dim=-1).flatten(-2)
    return torch.cat([prefix, rotated.to(states.dtype)], dim=2)


class LocAtViTAttention(MultiHeadProjections):
    """Multi-head self-attention; with `use_gaussian` the logits get a bias around each query patch."""

    def __init__(self, config: LocAtViTConfig, init_scale: float = 1.0):
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            config.qkv_bias,
            config.attention_probs_dropout_prob,
            init_scale,
        )
        self.config = config
        self.gaussian = None
        if config.use_gaussian:
            self.gaussian = LocAtGaussian(self.head_dim, config.native_grid, config.coarse_training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid: tuple[int, int],
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.project(hidden_states)
        num_prefix = self.config.num_prefix_tokens
        # The Gaussian is read from the query before it is rotated or scaled.
        gaussian = self.gaussian(query, grid, num_prefix) if self.gaussian is not None else None
        if rotary is not None:
            query, key = rotate_patches(query, rotary, num_prefix), rotate_patches(key, rotary, num_prefix)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, gaussian=gaussian, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights


class LocAtViTLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer."""

    def __init__(self, config: LocAtViTConfig, index: int):
        super().__init__()
        # RoPE-ViT shrinks what each layer first writes to the residual stream, more so in deeper layers.
        init_scale = 1 / math.sqrt(2 * (index + 1)) if config.position_embedding_type == "rope_mixed" else 1.0
        sizes: tuple[int, int] = config.hidden_size, config.intermediate_size  # type: ignore[assignment] # None is resolved
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = LocAtViTAttention(config, init_scale)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(*sizes, config.hidden_act, config.hidden_dropout_prob, init_scale)
        self.layer_scale1, self.layer_scale2 = nn.Identity(), nn.Identity()
        if config.layer_scale_init_value is not None:
            self.layer_scale1 = LayerScale(config.hidden_size, config.layer_scale_init_value)
            self.layer_scale2 = LayerScale(config.hidden_size, config.layer_scale_init_value)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rates(config.drop_path_rate, config.num_hidden_layers)[index])

    def forward(
        self,
        hidden_states: torch.Tensor,
        cosines: torch.Tensor | None = None,
        sines: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        rotary = (cosines, sines) if cosines is not None else None
        attended, _ = self.attention(self.norm1(hidden_states), rotary=rotary, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(self.dropout(attended)))
        return hidden_states + self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states))))


class LocAtViTPreTrainedModel(FamilyPreTrainedModel):
    """What every `locatvit` model shares."""

    config: LocAtViTConfig
    config_class = LocAtViTConfig
    base_model_prefix = "locatvit"
    _no_split_modules = ["LocAtViTEmbeddings", "LocAtViTLayer"]
    _can_record_outputs = {"hidden_states": LocAtViTLayer, "attentions": LocAtViTAttention}
    _no_weight_decay_suffixes = ("embeddings.cls_token", "embeddings.position_embeddings", "rope.frequencies")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LocAtViTEmbeddings):
            if module.cls_token is not None:
                rotary = self.config.position_embedding_type == "rope_mixed"
                init.trunc_normal_(module.cls_token, std=std if rotary else 1e-6)
            if module.register_tokens is not None:
                init.normal_(module.register_tokens, std=1e-6)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, LocAtViTRotaryEmbedding):
            init.copy_(module.frequencies, module.initial_frequencies())


class LocAtViTModel(LocAtViTPreTrainedModel):
    """The encoder.

    add_pooling_layer: whether to compute `pooler_output`; heads that read patches do without.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: LocAtViTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = LocAtViTEmbeddings(config)
        self.rope = LocAtViTRotaryEmbedding(config) if config.position_embedding_type == "rope_mixed" else None
        self.layers = nn.ModuleList([LocAtViTLayer(config, index) for index in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.add_pooling_layer = add_pooling_layer
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        pixel_values: (batch, channels, height, width) of any size; padded right and bottom to whole patches.
        attention_mask: (batch, tokens) of bool or 0/1 over the keys, or broadcastable to (batch, heads, tokens,
            tokens), bool (true attends) or additive float. Tokens are the prefix tokens, then the patches row by row.

        Returns `last_hidden_state` (batch, tokens, hidden_size) after the final norm and before the refinement, and
        `pooler_output` (batch, hidden_size), what a classifier reads; on request `hidden_states`, the last of which is
        the last layer's output before the norm, and `attentions`, Gaussians included (attn_implementation="eager").
        Raises ValueError for images without pixels, other channel counts and masks of another shape.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        grid = patch_grid(pixel_values, self.config.patch_shape)
        hidden_states = self.embeddings(pad_to_multiple(pixel_values, self.config.patch_shape), grid)
        num_heads = self.config.num_attention_heads
        mask = additive_attention_mask(attention_mask, num_heads, hidden_states.dtype, *hidden_states.shape[:2])
        cosines, sines = self.rope(grid) if self.rope is not None else ([None] * len(self.layers),) * 2
        for layer, layer_cosines, layer_sines in zip(self.layers, cosines, sines, strict=True):
            # Positional: reentrant checkpointing finds the tensors that need a gradient among these only.
            hidden_states = layer(hidden_states, layer_cosines, layer_sines, grid=grid, attention_mask=mask, **kwargs)
        if self.config.normalizes_tokens:
            hidden_states = self.layernorm(hidden_states)
        pooled = self.pool(hidden_states, mask) if self.add_pooling_layer else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def pool(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, tokens, hidden_size) refined and reduced to (batch, hidden_size): class token or mean of the patches.

        mask: additive, broadcastable to (batch, heads, tokens, tokens). Where it depends on the keys alone, the patches
            that it blocks are also left out of the mean.
        """
        pools_mean = self.config.pooling == "mean"
        if self.config.use_refinement:
            tokens = refine(tokens, self.config.num_attention_heads, mask, num_queries=None if pools_mean else 1)
        if not pools_mean:
            return tokens[:, 0]
        patches = tokens[:, self.config.num_prefix_tokens :]
        if mask is not None and mask.shape[1] == mask.shape[2] == 1:
            blocked = mask[:, 0, 0, self.config.num_prefix_tokens :, None] <= torch.finfo(mask.dtype).min / 2
            weights = (~blocked).to(patches.dtype).expand(patches.shape[0], -1, -1)
            dtype = torch.promote_types(patches.dtype, torch.float32)  # half precision ends at 65504
            number = weights.sum(dim=1, dtype=dtype).clamp(min=1)
            pooled = ((patches * weights).sum(dim=1, dtype=dtype) / number).to(patches.dtype)
        else:
            pooled = patches.mean(dim=1)
        return pooled if self.config.normalizes_tokens else self.layernorm(pooled)

    def feature_map(self, hidden_states: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """A layer's (batch, tokens, channels) of these images, as (batch, channels, grid height, grid width)."""
        grid = patch_grid(pixel_values, self.config.patch_shape)
        return patch_feature_map(hidden_states, grid, self.config.num_prefix_tokens)


class LocAtViTForImageClassification(LocAtViTPreTrainedModel):
    """The encoder and a linear classifier on its pooled output."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: LocAtViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.locatvit = LocAtViTModel(config)
        self.classifier = nn.Identity()
        if config.num_labels > 0:
            init_scale = 0.001 if config.position_embedding_type == "rope_mixed" else 1.0
            self.classifier = ScaledInitLinear(config.hidden_size, config.num_labels, init_scale=init_scale)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Class scores of images.

        Args:
            pixel_values, attention_mask: as in `LocAtViTModel`.
            labels: (batch,) class ids, or (batch, classes) soft labels; `config.problem_type` may say otherwise.

        Returns:
            `loss` where there are labels, `logits` (batch, classes), and what else the encoder was asked for.
        """
        outputs = self.locatvit(pixel_values, attention_mask=attention_mask, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = classification_loss(logits, labels, self.config) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits, **optional_outputs(outputs))


class LocAtViTForSemanticSegmentation(FreezableBackboneMixin, LocAtViTPreTrainedModel):
    """The encoder and the paper's probe on the last layer's patches, before the final norm and without refinement."""

    _auto_class = "AutoModelForSemanticSegmentation"
    _segments_images = True

    def __init__(self, config: LocAtViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.locatvit = LocAtViTModel(config, add_pooling_layer=False)
        self.locatvit.layernorm.requires_grad_(False)  # never read: distributed training would wait for its gradient
        self.segmentation_head = ProbeHead(config.hidden_size, config.segmentation_hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SemanticSegmenterOutput:
        """Class scores of each cell of the last map.

        Args:
            pixel_values, attention_mask: as in `LocAtViTModel`.
            labels: (batch, height, width) class ids of the images' size, `config.semantic_loss_ignore_index` left out.

        Returns:
            `loss` where there are labels, and `logits` (batch, classes, grid height, grid width), whose cells are
            `config.output_stride` pixels of the padded image; the processor's `post_process_semantic_segmentation`
            cuts the padding off.
        """
        kwargs["output_hidden_states"] = True
        outputs = self.locatvit(pixel_values, attention_mask=attention_mask, return_dict=True, **kwargs)
        logits = self.segmentation_head(self.locatvit.feature_map(outputs.hidden_states[-1], pixel_values))
        loss = segmentation_loss(logits, labels, pixel_values.shape[-2:], self.config) if labels is not None else None
        return SemanticSegmenterOutput(loss=loss, logits=logits, **optional_outputs(outputs))


class LocAtViTBackbone(BackboneForwardMixin, LocAtViTPreTrainedModel):
    """Feature maps of chosen layers for the dense-prediction frameworks of transformers."""

    def __init__(self, config: LocAtViTConfig):
        super().__init__(config)
        self.locatvit = LocAtViTModel(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.pyramid = FeaturePyramid(config.hidden_size) if config.feature_pyramid else None
        if not (config.apply_layernorm and config.normalizes_tokens):
            self.locatvit.layernorm.requires_grad_(False)  # never read, see LocAtViTForSemanticSegmentation
        self.post_init()

    def feature_map(self, hidden_states: torch.Tensor, stage: str, pixel_values: torch.Tensor) -> torch.Tensor:
        """A layer's tokens as (batch, hidden_size, grid height, grid width).

        With `reshape_hidden_states=False` they are (batch, class token + patches, hidden_size).
        """
        if self.config.apply_layernorm and self.config.normalizes_tokens:
            hidden_states = self.locatvit.layernorm(hidden_states)
        if self.config.reshape_hidden_states:
            return self.locatvit.feature_map(hidden_states, pixel_values)
        class_token = hidden_states[:, : int(self.config.use_class_token)]
        return torch.cat([class_token, hidden_states[:, self.config.num_prefix_tokens :]], dim=1)


__all__ = [
    "LocAtViTBackbone",
    "LocAtViTForImageClassification",
    "LocAtViTForSemanticSegmentation",
    "LocAtViTModel",
    "LocAtViTPreTrainedModel",
]
