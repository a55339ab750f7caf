# SPDX-License-Identifier: MIT
"""Configuration of the `locatvit` models: ViT, RegViT and RoPE-ViT, each plain or with LocAt."""

from transformers.utils.versions import require_version

require_version("transformers>=5.14", "Older versions cannot add the Gaussian to the attention logits.")

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig  # noqa: E402

from .configuration_utils_locat import FamilyConfigMixin  # noqa: E402


@strict
class LocAtViTConfig(FamilyConfigMixin, PreTrainedConfig):
    """Configuration of a LocAtViT. With `use_gaussian` and `use_refinement` both off it is the plain baseline.

    Args:
        image_size: pixels, one number or [height, width]: the size of pretraining, which fixes the native grid. Every
            model takes images of any other size too, without a flag.
        patch_size: pixels, one number or [height, width].
        num_channels: channels of an image.
        hidden_size: channels of a token, divisible by `num_attention_heads`.
        num_hidden_layers: transformer layers.
        num_attention_heads: heads of each layer, and of the refinement.
        intermediate_size: channels inside the MLP; 4 * hidden_size where None.
        hidden_act: activation of the MLP.
        layer_norm_eps: epsilon of every LayerNorm.
        qkv_bias: whether the query, key and value projections have a bias.
        use_class_token: whether a class token precedes the patches.
        num_register_tokens: learned tokens between the class token and the patches (RegViT).
        position_embedding_type: "learned" (added, resampled to other sizes), "rope_mixed" (learned two-dimensional
            rotary frequencies, RoPE-ViT) or "none".
        prefix_position_embeddings: whether class and register tokens own learned position embeddings.
        rope_temperature: initial temperature of the rotary frequencies.
        pooling: what the classifier reads, "cls" or "mean" (of the patches). With "mean" the final norm sits after
            the pooling, as in the reference, or
        norm_before_pooling: as for the class token, before it.
        use_gaussian: Gaussian-augmented attention in every layer.
        use_refinement: parameter-free self-attention between the final norm and the pooling.
        coarse_training: in training mode only, one Gaussian for each 2x2 block of patches. The reference does so where
            the native grid is at least 32 patches high.
        layer_scale_init_value: initial layer scale; None for no layer scale.
        drop_path_rate: stochastic depth of the last layer, growing linearly from zero.
        hidden_dropout_prob: dropout after the embeddings, the attention projection and inside the MLP.
        attention_probs_dropout_prob: dropout of the attention weights.
        initializer_range: standard deviation of fresh weights.
        image_mean, image_std, crop_pct: what the image processor of this checkpoint uses; mean and std are one number
            for all channels, or one each.
        semantic_loss_ignore_index: label of pixels without a class.
        segmentation_hidden_size: channels of the segmentation head.
        apply_layernorm: whether the backbone normalizes its feature maps with the final norm.
        reshape_hidden_states: whether backbone maps are (batch, channels, height, width), or (batch, tokens, channels)
            with the class token first.
        feature_pyramid: whether the backbone brings four maps to strides of a quarter, half, once and twice the patch.
        out_features, out_indices: stages that the backbone returns, among "stem", "stage1", ...
    """

    model_type = "locatvit"
    class_prefix = "LocAtViT"
    presets = {
        "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3},
        "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
        "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    }

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-6
    qkv_bias: bool = True
    use_class_token: bool = True
    num_register_tokens: int = 0
    position_embedding_type: str = "learned"
    prefix_position_embeddings: bool = True
    rope_temperature: float | int = 10.0
    pooling: str = "cls"
    norm_before_pooling: bool = False
    use_gaussian: bool = True
    use_refinement: bool = True
    coarse_training: bool = False
    layer_scale_init_value: float | int | None = None
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
        self.set_stage_names(kwargs)
        super().__post_init__(**kwargs)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return int(self.use_class_token) + self.num_register_tokens

    @property
    def normalizes_tokens(self) -> bool:
        """Whether the final norm is that of every token, or else of the pooled output alone."""
        return self.pooling == "cls" or self.norm_before_pooling

    def validate_sizes(self):
        """Every size is positive, and the heads divide the channels."""
        self.check_heads()
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens must not be negative, got {self.num_register_tokens}.")

    def validate_choices(self):
        """Names are known, and the fields agree with each other."""
        if self.position_embedding_type not in ("learned", "rope_mixed", "none"):
            raise ValueError(
                "position_embedding_type must be 'learned', 'rope_mixed' or 'none', "
                f"got {self.position_embedding_type!r}."
            )
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f"pooling must be 'cls' or 'mean', got {self.pooling!r}.")
        if self.pooling == "cls" and not self.use_class_token:
            raise ValueError("pooling='cls' needs use_class_token=True; use pooling='mean' without a class token.")
        if self.rope_temperature <= 0:
            raise ValueError(f"rope_temperature must be above 0, got {self.rope_temperature}.")
        if self.position_embedding_type == "rope_mixed" and self.hidden_size // self.num_attention_heads % 4:
            raise ValueError("position_embedding_type='rope_mixed' needs heads whose channels are a multiple of 4.")


__all__ = ["LocAtViTConfig"]
