# SPDX-License-Identifier: MIT
"""Configuration of the `locatswin` models: Swin, plain or with LocAt."""

from transformers.utils.versions import require_version

require_version("transformers>=5.14", "Older versions cannot add the Gaussian to the attention logits.")

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig  # noqa: E402

from .configuration_utils_locat import FamilyConfigMixin, pair  # noqa: E402


@strict
class LocAtSwinConfig(FamilyConfigMixin, PreTrainedConfig):
    """Configuration of a LocAt-Swin. With `use_gaussian` and `use_refinement` both off it is the plain Swin.

    Args:
        image_size: pixels, one number or [height, width]: the size of pretraining. It decides once, for every size the
            model is used at, the window of each stage and whether that stage shifts it (see `windows`).
        patch_size: pixels, one number or [height, width].
        num_channels: channels of an image.
        embed_dim: channels of the first stage; every further stage has twice as many.
        depths: layers of each stage.
        num_heads: heads of each stage, which divide its channels. The refinement has those of the last stage.
        window_size: patches, one number or [height, width], inside which a layer attends.
        mlp_ratio: channels inside the MLP, as a multiple of the stage's.
        hidden_act: activation of the MLP.
        layer_norm_eps: epsilon of every LayerNorm.
        qkv_bias: whether the query, key and value projections have a bias.
        use_gaussian: Gaussian-augmented attention inside every window.
        use_refinement: parameter-free self-attention among all patches, between the final norm and the pooling.
        drop_path_rate: stochastic depth of the last layer, growing linearly from zero.
        hidden_dropout_prob: dropout after the embeddings, the attention projection and inside the MLP.
        attention_probs_dropout_prob: dropout of the attention weights.
        initializer_range: standard deviation of fresh weights.
        image_mean, image_std, crop_pct: what the image processor of this checkpoint uses; mean and std one number for
            all channels, or one each.
        semantic_loss_ignore_index: label of pixels without a class.
        segmentation_hidden_size: channels of the segmentation head.
        apply_layernorm: whether the backbone normalizes each feature map with a LayerNorm of its own, as Swin does for
            dense prediction. Those are new parameters; without them maps are as the stages leave them.
        reshape_hidden_states: whether backbone maps are (batch, channels, height, width), or (batch, patches,
            channels).
        out_features, out_indices: stages that the backbone returns, among "stem", "stage1", ...
    """

    model_type = "locatswin"
    class_prefix = "LocAtSwin"
    presets = {
        "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
        "small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
        "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    }
    attribute_map = {"num_hidden_layers": "num_stages", "num_attention_heads": "num_heads"}

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_heads: list[int] | tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | list[int] | tuple[int, int] = 7
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-5
    qkv_bias: bool = True
    use_gaussian: bool = True
    use_refinement: bool = True
    drop_path_rate: float | int = 0.1
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float | int = 0.02
    image_mean: float | int | list[float | int] | tuple[float | int, ...] = (0.485, 0.456, 0.406)
    image_std: float | int | list[float | int] | tuple[float | int, ...] = (0.229, 0.224, 0.225)
    crop_pct: float | int = 0.9
    semantic_loss_ignore_index: int = 255
    segmentation_hidden_size: int = 512
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.set_stage_names(kwargs)
        super().__post_init__(**kwargs)

    @property
    def num_stages(self) -> int:
        """Each after the first halves the grid and doubles the channels."""
        return len(self.depths)

    @property
    def stage_channels(self) -> list[int]:
        """Channels of each stage."""
        return [self.embed_dim * 2**stage for stage in range(self.num_stages)]

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.stage_channels[-1]

    @property
    def output_stride(self) -> tuple[int, int]:
        """(height, width) in pixels of a cell of the last stage's map."""
        height, width = self.patch_shape
        merged = 2 ** (self.num_stages - 1)
        return height * merged, width * merged

    @property
    def windows(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Window and shift of each stage, (height, width) in patches of that stage.

        Along each axis a window is no longer than the stage is at `image_size`, and where it covers the stage there,
        it is not shifted, whatever the image is.
        """
        window = pair(self.window_size)
        windows = []
        for stage in range(self.num_stages):
            grid = [side // 2**stage for side in self.native_grid]
            height, width = (min(sides) for sides in zip(window, grid, strict=True))
            shift = height // 2 if grid[0] > height else 0, width // 2 if grid[1] > width else 0
            windows.append(((height, width), shift))
        return windows

    def validate_sizes(self):
        """Every size is positive, and the heads of each stage divide its channels."""
        self.check_positive("embed_dim", "depths", "num_heads")
        self.check_pairs("window_size", unit="patch")
        if len(self.num_heads) != self.num_stages:
            raise ValueError(
                f"num_heads={list(self.num_heads)} must hold one entry for each stage of depths={list(self.depths)}."
            )
        for channels, heads in zip(self.stage_channels, self.num_heads, strict=True):
            if channels % heads:
                raise ValueError(f"A stage of {channels} channels cannot be divided among num_heads={heads}.")
        if int(self.embed_dim * self.mlp_ratio) <= 0:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves the MLP without channels.")


__all__ = ["LocAtSwinConfig"]
