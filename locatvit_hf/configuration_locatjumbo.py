# SPDX-License-Identifier: MIT
"""Configuration of the `locatjumbo` models: the Jumbo ViT, plain or with LocAt."""

from transformers.utils.versions import require_version

require_version("transformers>=5.14", "Older versions cannot add the Gaussian to the attention logits.")

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig  # noqa: E402

from .configuration_utils_locat import FamilyConfigMixin  # noqa: E402


@strict
class LocAtJumboConfig(FamilyConfigMixin, PreTrainedConfig):
    """Configuration of a LocAt-Jumbo. With `use_gaussian` and `use_refinement` both off it is the plain Jumbo.

    Args:
        image_size: pixels, one number or [height, width]: the size of pretraining, which fixes the native grid. Every
            model takes images of any other size too, without a flag.
        patch_size: pixels, one number or [height, width].
        num_channels: channels of an image.
        hidden_size: channels of a token, divisible by `num_attention_heads`.
        num_hidden_layers: transformer layers.
        num_attention_heads: heads of each layer, and of the refinement.
        num_jumbo_tokens: tokens before the patches. They attend like any token; between attentions they are one wide
            token of num_jumbo_tokens * hidden_size channels with an MLP of its own.
        intermediate_size: channels inside the MLP of the patches; 4 * hidden_size where None.
        jumbo_intermediate_size: channels inside the MLP of the jumbo token, which all layers share; 4 *
            num_jumbo_tokens * hidden_size where None.
        hidden_act: activation of both MLPs.
        layer_norm_eps: epsilon of the LayerNorms before attention and before the MLP of the patches.
        jumbo_layer_norm_eps: epsilon of the LayerNorms of the jumbo token, and of the final ones.
        qkv_bias: whether the query, key and value projections have a bias.
        use_gaussian: Gaussian-augmented attention in every layer.
        use_refinement: parameter-free self-attention between the final norm and the pooling.
        use_patch_layernorm: whether the patches have a final norm; where None, with `use_gaussian` or `use_refinement`.
        coarse_training: in training mode only, one Gaussian for each 2x2 block of patches. The reference does so where
            the native grid is at least 32 patches high.
        layer_scale_init_value: initial layer scale.
        drop_path_rate: stochastic depth of the last layer, growing linearly from zero.
        hidden_dropout_prob: dropout after the embeddings, the attention projection and inside the MLPs.
        attention_probs_dropout_prob: dropout of the attention weights.
        initializer_range: standard deviation of fresh weights.
        image_mean, image_std, crop_pct: what the image processor of this checkpoint uses; mean and std one number for
            all channels, or one each.
        semantic_loss_ignore_index: label of pixels without a class.
        segmentation_hidden_size: channels of the segmentation head.
        apply_layernorm: whether the backbone normalizes its feature maps with the final norm of the patches. The plain
            Jumbo has none.
        reshape_hidden_states: whether backbone maps are (batch, channels, height, width), or (batch, tokens, channels)
            with the jumbo tokens first.
        feature_pyramid: whether the backbone brings four maps to strides of a quarter, half, once and twice the patch.
        out_features, out_indices: stages that the backbone returns, among "stem", "stage1", ...
    """

    model_type = "locatjumbo"
    class_prefix = "LocAtJumbo"
    presets = {
        "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3},
        "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    }

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_jumbo_tokens: int = 6
    intermediate_size: int | None = None
    jumbo_intermediate_size: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-6
    jumbo_layer_norm_eps: float | int = 1e-5
    qkv_bias: bool = True
    use_gaussian: bool = True
    use_refinement: bool = True
    use_patch_layernorm: bool | None = None
    coarse_training: bool = False
    layer_scale_init_value: float | int = 1e-4
    drop_path_rate: float | int = 0.0
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float | int = 0.02
    image_mean: float | int | list[float | int] | tuple[float | int, ...] = (0.5, 0.5, 0.5)
    image_std: float | int | list[float | int] | tuple[float | int, ...] = (0.5, 0.5, 0.5)
    crop_pct: float | int = 0.9
    semantic_loss_ignore_index: int = 255
    segmentation_hidden_size: int = 512
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    feature_pyramid: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.jumbo_intermediate_size is None:
            self.jumbo_intermediate_size = 4 * self.jumbo_hidden_size
        self.set_stage_names(kwargs)
        super().__post_init__(**kwargs)

    @property
    def jumbo_hidden_size(self) -> int:
        """Channels of the jumbo token, which the classifier reads."""
        return self.num_jumbo_tokens * self.hidden_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the jumbo tokens."""
        return self.num_jumbo_tokens

    @property
    def normalizes_patches(self) -> bool:
        """Whether the patches have a final norm. Nothing reads them after the last layer of a plain Jumbo."""
        if self.use_patch_layernorm is not None:
            return self.use_patch_layernorm
        return self.use_gaussian or self.use_refinement

    def validate_sizes(self):
        """Every size is positive, and the heads divide the channels."""
        self.check_positive("num_jumbo_tokens", "jumbo_intermediate_size")
        self.check_heads()


__all__ = ["LocAtJumboConfig"]
