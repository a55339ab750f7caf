# SPDX-License-Identifier: MIT
"""The `locatjumbo` models: the Jumbo ViT, plain or with LocAt."""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput, SemanticSegmenterOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_locat import LocAtAttentionInterface, additive_attention_mask, eager_attention_forward
from .blockwise_locat import blockwise_attention_forward
from .configuration_locatjumbo import LocAtJumboConfig
from .layers_locat import (
    MLP,
    DropPath,
    FeaturePyramid,
    LayerScale,
    MultiHeadProjections,
    ProbeHead,
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


class LocAtJumboEmbeddings(nn.Module):
    """The jumbo tokens, then the patches with their learned position embeddings."""

    def __init__(self, config: LocAtJumboConfig):
        super().__init__()
        self.config = config
        patch_shape = config.patch_shape
        self.patch_embeddings = nn.Conv2d(config.num_channels, config.hidden_size, patch_shape, stride=patch_shape)
        self.jumbo_tokens = nn.Parameter(torch.zeros(1, config.num_jumbo_tokens, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, math.prod(config.native_grid), config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, channels, height, width), both sides multiples of the patch, to (batch, tokens, hidden_size)."""
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)
        patches = patches + resample_position_embeddings(self.position_embeddings, self.config.native_grid, grid, 0)
        return self.dropout(torch.cat([self.jumbo_tokens.expand(patches.shape[0], -1, -1), patches], dim=1))


class LocAtJumboAttention(MultiHeadProjections):
    """Multi-head self-attention; with `use_gaussian` the logits get a bias around each query patch."""

    def __init__(self, config: LocAtJumboConfig):
        super().__init__(
            config.hidden_size, config.num_attention_heads, config.qkv_bias, config.attention_probs_dropout_prob
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.project(hidden_states)
        gaussian = self.gaussian(query, grid, self.config.num_jumbo_tokens) if self.gaussian is not None else None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, gaussian=gaussian, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights


class LocAtJumboLayer(GradientCheckpointingLayer):
    """Attention among all tokens, then one MLP for each patch and another for the jumbo token as a whole."""

    def __init__(self, config: LocAtJumboConfig, index: int):
        super().__init__()
        self.num_jumbo_tokens = config.num_jumbo_tokens
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = LocAtJumboAttention(config)
        self.layer_scale1 = LayerScale(config.hidden_size, config.layer_scale_init_value)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        sizes: tuple[int, int] = config.hidden_size, config.intermediate_size  # type: ignore[assignment] # None is resolved
        self.mlp = MLP(*sizes, config.hidden_act, config.hidden_dropout_prob)
        self.layer_scale2 = LayerScale(config.hidden_size, config.layer_scale_init_value)
        self.norm3 = nn.LayerNorm(config.jumbo_hidden_size, eps=config.jumbo_layer_norm_eps)
        self.layer_scale3 = LayerScale(config.jumbo_hidden_size, config.layer_scale_init_value)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rates(config.drop_path_rate, config.num_hidden_layers)[index])

    def forward(
        self, hidden_states: torch.Tensor, jumbo_mlp: nn.Module, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """jumbo_mlp: the MLP of the jumbo token, one for all layers and owned by the model."""
        attended, _ = self.attention(self.norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(self.dropout(attended)))
        jumbo, patches = hidden_states[:, : self.num_jumbo_tokens], hidden_states[:, self.num_jumbo_tokens :]
        jumbo = jumbo.flatten(1)
        jumbo = jumbo + self.drop_path(self.layer_scale3(jumbo_mlp(self.norm3(jumbo))))
        patches = patches + self.drop_path(self.layer_scale2(self.mlp(self.norm2(patches))))
        return torch.cat([jumbo.unflatten(1, (self.num_jumbo_tokens, -1)), patches], dim=1)


class LocAtJumboClassifier(nn.Linear):
    """Starts from zero weights and a bias that gives every class the prior of one among all (for sigmoid losses)."""


class LocAtJumboPreTrainedModel(FamilyPreTrainedModel):
    """What every `locatjumbo` model shares."""

    config: LocAtJumboConfig
    config_class = LocAtJumboConfig
    base_model_prefix = "locatjumbo"
    _no_split_modules = ["LocAtJumboEmbeddings", "LocAtJumboLayer"]
    _can_record_outputs = {"hidden_states": LocAtJumboLayer, "attentions": LocAtJumboAttention}
    _no_weight_decay_suffixes = ("embeddings.jumbo_tokens", "embeddings.position_embeddings")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LocAtJumboEmbeddings):
            init.normal_(module.jumbo_tokens, std=1e-6)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
        elif isinstance(module, LocAtJumboClassifier):
            init.zeros_(module.weight)
            # A sigmoid of this is 1 / classes: -4.6 for 100 classes, -6.9 for 1000, -9.25 for 10450.
            init.constant_(module.bias, -math.log(max(module.out_features - 1, 1)))

    def _layer_groups(self, prefix: str, coarse: bool) -> dict:
        groups = super()._layer_groups(prefix, coarse)
        if not coarse:
            # Every layer uses the shared MLP, so it learns at the rate of the last.
            groups["blocks"].append((rf"{prefix}(?:jumbo_mlp|patch_layernorm)", (99999,)))
        return groups


class LocAtJumboModel(LocAtJumboPreTrainedModel):
    """The encoder.

    add_pooling_layer: whether to compute `pooler_output`; heads that read patches do without.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: LocAtJumboConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = LocAtJumboEmbeddings(config)
        sizes: tuple[int, int] = config.jumbo_hidden_size, config.jumbo_intermediate_size  # type: ignore[assignment] # as above
        self.jumbo_mlp = MLP(*sizes, config.hidden_act, config.hidden_dropout_prob)
        self.layers = nn.ModuleList([LocAtJumboLayer(config, index) for index in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.jumbo_hidden_size, eps=config.jumbo_layer_norm_eps)
        self.patch_layernorm = nn.Identity()
        if config.normalizes_patches:
            self.patch_layernorm = nn.LayerNorm(config.hidden_size, eps=config.jumbo_layer_norm_eps)
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
            tokens), bool (true attends) or additive float. Tokens are the jumbo tokens, then the patches row by row.

        Returns `last_hidden_state` (batch, tokens, hidden_size) after the final norms and before the refinement, and
        `pooler_output` (batch, num_jumbo_tokens * hidden_size), what a classifier reads; on request `hidden_states`,
        the last of which is the last layer's output before the norms, and `attentions`, Gaussians included
        (attn_implementation="eager").
        Raises ValueError for images without pixels, other channel counts and masks of another shape.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        grid = patch_grid(pixel_values, self.config.patch_shape)
        hidden_states = self.embeddings(pad_to_multiple(pixel_values, self.config.patch_shape), grid)
        num_heads = self.config.num_attention_heads
        mask = additive_attention_mask(attention_mask, num_heads, hidden_states.dtype, *hidden_states.shape[:2])
        for layer in self.layers:
            hidden_states = layer(hidden_states, self.jumbo_mlp, grid=grid, attention_mask=mask, **kwargs)
        num_jumbo = self.config.num_jumbo_tokens
        jumbo = self.layernorm(hidden_states[:, :num_jumbo].flatten(1)).unflatten(1, (num_jumbo, -1))
        hidden_states = torch.cat([jumbo, self.patch_layernorm(hidden_states[:, num_jumbo:])], dim=1)
        pooled = self.pool(hidden_states, mask) if self.add_pooling_layer else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def pool(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, tokens, hidden_size) refined and reduced to the jumbo token, (batch, jumbo_hidden_size)."""
        num_jumbo = self.config.num_jumbo_tokens
        if self.config.use_refinement:
            tokens = refine(tokens, self.config.num_attention_heads, mask, num_queries=num_jumbo)
        return tokens[:, :num_jumbo].flatten(1)

    def feature_map(self, hidden_states: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """A layer's (batch, tokens, channels) of these images, as (batch, channels, grid height, grid width)."""
        grid = patch_grid(pixel_values, self.config.patch_shape)
        return patch_feature_map(hidden_states, grid, self.config.num_jumbo_tokens)

    def freeze_unread(self, *, patches: bool = False, jumbo_token: bool = False) -> None:
        """Freezes what only changes the patches, or the jumbo token, after the last attention.

        A head that does not read them leaves these parameters without gradients, for which distributed training waits.
        """
        last = self.layers[-1]
        unread = [last.norm2, last.mlp, last.layer_scale2, self.patch_layernorm] if patches else []
        if jumbo_token:
            unread += [last.norm3, last.layer_scale3, self.layernorm]
            unread += [self.jumbo_mlp] if len(self.layers) == 1 else []
        for module in unread:
            module.requires_grad_(False)


class LocAtJumboForImageClassification(LocAtJumboPreTrainedModel):
    """The encoder and a linear classifier on its pooled output."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: LocAtJumboConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.locatjumbo = LocAtJumboModel(config)
        self.locatjumbo.freeze_unread(patches=not config.use_refinement)
        self.classifier = nn.Identity()
        if config.num_labels > 0:
            self.classifier = LocAtJumboClassifier(config.jumbo_hidden_size, config.num_labels)
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
            pixel_values, attention_mask: as in `LocAtJumboModel`.
            labels: (batch,) class ids, or (batch, classes) soft labels; `config.problem_type` may say otherwise.

        Returns:
            `loss` where there are labels, `logits` (batch, classes), and what else the encoder was asked for.
        """
        outputs = self.locatjumbo(pixel_values, attention_mask=attention_mask, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = classification_loss(logits, labels, self.config) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits, **optional_outputs(outputs))


class LocAtJumboForSemanticSegmentation(FreezableBackboneMixin, LocAtJumboPreTrainedModel):
    """The encoder and the paper's probe on the last layer's patches, before the final norm and without refinement."""

    _auto_class = "AutoModelForSemanticSegmentation"
    _segments_images = True

    def __init__(self, config: LocAtJumboConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.locatjumbo = LocAtJumboModel(config, add_pooling_layer=False)
        self.locatjumbo.freeze_unread(jumbo_token=True)
        self.locatjumbo.patch_layernorm.requires_grad_(False)
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
            pixel_values, attention_mask: as in `LocAtJumboModel`.
            labels: (batch, height, width) class ids of the images' size, `config.semantic_loss_ignore_index` left out.

        Returns:
            `loss` where there are labels, and `logits` (batch, classes, grid height, grid width), whose cells are
            `config.output_stride` pixels of the padded image; the processor's `post_process_semantic_segmentation`
            cuts the padding off.
        """
        kwargs["output_hidden_states"] = True
        outputs = self.locatjumbo(pixel_values, attention_mask=attention_mask, return_dict=True, **kwargs)
        logits = self.segmentation_head(self.locatjumbo.feature_map(outputs.hidden_states[-1], pixel_values))
        loss = segmentation_loss(logits, labels, pixel_values.shape[-2:], self.config) if labels is not None else None
        return SemanticSegmenterOutput(loss=loss, logits=logits, **optional_outputs(outputs))


class LocAtJumboBackbone(BackboneForwardMixin, LocAtJumboPreTrainedModel):
    """Feature maps of chosen layers for the dense-prediction frameworks of transformers."""

    def __init__(self, config: LocAtJumboConfig):
        super().__init__(config)
        self.locatjumbo = LocAtJumboModel(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.pyramid = FeaturePyramid(config.hidden_size) if config.feature_pyramid else None
        self.locatjumbo.freeze_unread(jumbo_token=config.reshape_hidden_states)
        self.locatjumbo.layernorm.requires_grad_(False)  # it belongs to the classifier's token
        if not config.apply_layernorm:
            self.locatjumbo.patch_layernorm.requires_grad_(False)
        self.post_init()

    def feature_map(self, hidden_states: torch.Tensor, stage: str, pixel_values: torch.Tensor) -> torch.Tensor:
        """A layer's tokens as (batch, hidden_size, grid height, grid width).

        With `reshape_hidden_states=False` they are (batch, jumbo tokens + patches, hidden_size), the former without
        norm.
        """
        num_jumbo = self.config.num_jumbo_tokens
        jumbo, patches = hidden_states[:, :num_jumbo], hidden_states[:, num_jumbo:]
        if self.config.apply_layernorm:
            patches = self.locatjumbo.patch_layernorm(patches)
        hidden_states = torch.cat([jumbo, patches], dim=1)
        if self.config.reshape_hidden_states:
            return self.locatjumbo.feature_map(hidden_states, pixel_values)
        return hidden_states


__all__ = [
    "LocAtJumboBackbone",
    "LocAtJumboForImageClassification",
    "LocAtJumboForSemanticSegmentation",
    "LocAtJumboModel",
    "LocAtJumboPreTrainedModel",
]
