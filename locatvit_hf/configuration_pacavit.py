# SPDX-License-Identifier: MIT
"""Configuration of the `pacavit` models: PaCa-ViT, whose patches attend to learned clusters of patches."""

from transformers.utils.versions import require_version

require_version("transformers>=5.14", "Older versions lack the attention interface that these models are written for.")

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig  # noqa: E402

from .configuration_utils_locat import FamilyConfigMixin  # noqa: E402

TINY = {"hidden_sizes": [96, 192, 320, 384], "depths": [2, 2, 4, 2]}
SMALL = {"hidden_sizes": [96, 192, 320, 384], "depths": [3, 3, 10, 3]}
BASE = {"hidden_sizes": [96, 192, 384, 512], "depths": [3, 3, 18, 3]}
TEACHER = {"clustering_type": "teacher", "num_clusters": [100, 100, 100, 100]}


@strict
class PaCaViTConfig(FamilyConfigMixin, PreTrainedConfig):
    """Configuration of a PaCa-ViT. Lists hold one entry for each stage; the default is PaCa-ViT tiny.

    Args:
        image_size: pixels, one number or [height, width]: the size that the image processor crops to. No model depends
            on it: every model takes images of any size, without a flag.
        num_channels: channels of an image.
        hidden_sizes: channels of each stage, divisible by its heads; those of the first stage are even.
        depths: layers of each stage.
        num_attention_heads: heads of each stage.
        mlp_ratio: channels inside an MLP, as a multiple of those of its stage.
        num_clusters: clusters that the patches of each stage attend to; 0 for full attention among the patches.
        clustering_type: what assigns patches to clusters: "conv" or "mlp" (in the attention itself), or "teacher" (a
            ConvMixer with a feature pyramid beside the stages, trained jointly, that also adds its features to theirs).
        blockwise_clustering: whether every layer clusters, instead of the first of each stage for the others too.
        teacher_depths: ConvMixer layers of the teacher in each stage.
        clusterless_attention: attention of the stages without clusters, "softmax" or, experimental and without
            pretrained weights, "castling" (linear-angular attention of Castling-ViT).
        hidden_act: activation of the MLPs.
        layer_norm_eps: epsilon of every LayerNorm.
        layer_scale_init_value: initial layer scale; None for no layer scale.
        drop_path_rate: stochastic depth of the last layer, growing linearly from zero.
        hidden_dropout_prob: dropout after the attention projection and inside the MLP.
        attention_probs_dropout_prob: dropout of the attention weights.
        initializer_range: standard deviation of fresh linear weights.
        image_mean, image_std, crop_pct: what the image processor of this checkpoint uses; mean and std one number for
            all channels, or one each.
        semantic_loss_ignore_index: label of pixels without a class.
        segmentation_head_type: "paca" (the paper's head, which clusters pixels by class) or "linear" (a linear probe).
        segmentation_hidden_size: channels of the PaCa head.
        segmentation_dropout_prob: dropout of whole channels before the classifier of the PaCa head.
        auxiliary_loss_weight: weight of the loss on the cluster logits of the PaCa head.
        out_features, out_indices: stages that the backbone returns, among "stem", "stage1", ...
    """

    model_type = "pacavit"
    class_prefix = "PaCaViT"
    # Every model that was released. Where a name says nothing, clustering is convolutional, once a stage, with 100
    # clusters in all stages but the last.
    presets = {
        "tiny": TINY,
        "small": SMALL,
        "base": BASE,
        "small_mlp": {**SMALL, "clustering_type": "mlp"},
        "small_clusters_2": {**SMALL, "num_clusters": [2, 2, 2, 0]},
        "small_clusters_49": {**SMALL, "num_clusters": [49, 49, 49, 0]},
        "small_clusters_49_to_100": {**SMALL, "num_clusters": [49, 64, 81, 100]},
        "small_clusters_100_to_49": {**SMALL, "num_clusters": [100, 81, 64, 49]},
        "small_clusters_100": {**SMALL, "num_clusters": [100, 100, 100, 100]},
        "small_blockwise": {**SMALL, "num_clusters": [100, 100, 100, 100], "blockwise_clustering": True},
        "tiny_teacher": {**TINY, **TEACHER, "depths": [2, 2, 2, 2]},
        "small_teacher": {**SMALL, **TEACHER, "depths": [3, 3, 7, 3]},
        "base_teacher": {**BASE, **TEACHER, "depths": [3, 3, 16, 3], "teacher_depths": [2, 2, 4, 2]},
    }

    image_size: int | list[int] | tuple[int, int] = 224
    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (96, 192, 320, 384)
    depths: list[int] | tuple[int, ...] = (2, 2, 4, 2)
    num_attention_heads: list[int] | tuple[int, ...] = (2, 4, 8, 16)
    mlp_ratio: int = 4
    num_clusters: list[int] | tuple[int, ...] = (100, 100, 100, 0)
    clustering_type: str = "conv"
    blockwise_clustering: bool = False
    teacher_depths: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    clusterless_attention: str = "softmax"
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-6
    layer_scale_init_value: float | int | None = None
    drop_path_rate: float | int = 0.0
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float | int = 0.02
    image_mean: float | int | list[float | int] | tuple[float | int, ...] = (0.485, 0.456, 0.406)
    image_std: float | int | list[float | int] | tuple[float | int, ...] = (0.229, 0.224, 0.225)
    crop_pct: float | int = 0.9
    semantic_loss_ignore_index: int = 255
    segmentation_head_type: str = "paca"
    segmentation_hidden_size: int = 256
    segmentation_dropout_prob: float | int = 0.1
    auxiliary_loss_weight: float | int = 0.4
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        for name in ("hidden_sizes", "depths", "num_attention_heads", "num_clusters", "teacher_depths"):
            setattr(self, name, list(getattr(self, name)))  # a tuple would come back from JSON as another value
        self.set_stage_names(kwargs)
        super().__post_init__(**kwargs)

    @property
    def patch_size(self) -> int:
        """Pixels between the patches of the first stage."""
        return 4

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage, which a classifier reads."""
        return self.hidden_sizes[-1]

    @property
    def num_hidden_layers(self) -> int:
        """Stages: there is one hidden state for each, after that of the stem."""
        return len(self.depths)

    @property
    def size_divisor(self) -> int:
        """Pixels between the patches of the last stage: sides that are multiples of it lose nothing at any stage."""
        return 2 ** (len(self.depths) + 1)

    def validate_sizes(self):
        """Every list has an entry for each stage, and the heads divide the channels."""
        self.check_positive("hidden_sizes", "depths", "num_attention_heads", "mlp_ratio", "teacher_depths")
        for name in ("hidden_sizes", "num_attention_heads", "num_clusters", "teacher_depths"):
            values = getattr(self, name)
            if len(values) != len(self.depths):
                raise ValueError(f"{name} must have {len(self.depths)} entries, as many as depths, got {values}.")
        if min(self.num_clusters) < 0:
            raise ValueError(f"num_clusters must hold numbers of at least 0, got {self.num_clusters}.")
        if self.hidden_sizes[0] % 2:
            raise ValueError(f"hidden_sizes must start with an even number, got {self.hidden_sizes}.")
        for hidden_size, heads in zip(self.hidden_sizes, self.num_attention_heads, strict=True):
            if hidden_size % heads:
                raise ValueError(
                    f"hidden_sizes={self.hidden_sizes} must be divisible by "
                    f"num_attention_heads={self.num_attention_heads}."
                )

    def validate_choices(self):
        """Names are known, and the fields agree with each other."""
        for name, choices in (
            ("clustering_type", ("conv", "mlp", "teacher")),
            ("clusterless_attention", ("softmax", "castling")),
            ("segmentation_head_type", ("paca", "linear")),
        ):
            if getattr(self, name) not in choices:
                known = ", ".join(repr(choice) for choice in choices)
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        if self.clustering_type == "teacher" and self.blockwise_clustering:
            raise ValueError(
                "clustering_type='teacher' clusters once for each stage; it needs blockwise_clustering=False."
            )
        if self.clustering_type == "teacher" and not any(self.num_clusters):
            raise ValueError("clustering_type='teacher' needs num_clusters above zero in at least one stage.")
        self.check_rates("segmentation_dropout_prob")


__all__ = ["PaCaViTConfig"]
