"""What the families share: base classes of their configurations, models and attention, masks, losses and heads."""

import math
import os

import torch
import torch.nn.functional as F
from huggingface_hub import create_repo, file_exists
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput, SemanticSegmenterOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, is_tracing
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .image_processing_locatvit import LocAtViTImageProcessor, channel_values, pair
from .locat import LocAtGaussian


class FamilyConfigMixin(BackboneConfigMixin):
    """What the configurations of all families know about their images, patches, presets and code files."""

    presets: dict = {}
    class_prefix = ""
    _auto_class = "AutoConfig"

    @classmethod
    def from_preset(cls, name: str, **overrides):
        """A size of the paper by its name, a key of `presets`. Any field can be overridden."""
        if name not in cls.presets:
            raise ValueError(f"There is no preset {name!r}; choose one of {', '.join(cls.presets)}.")
        return cls(**{**cls.presets[name], **overrides})

    def __post_init__(self, **kwargs):
        """Names the code of every Auto class, unless a loaded config did.

        Complete from the start: saving a model merges only its own Auto class into the map.
        """
        num_labels = kwargs.get("num_labels")
        if num_labels is not None and num_labels < 0:
            raise ValueError(f"num_labels must not be negative, got {num_labels}.")
        super().__post_init__(**kwargs)
        if getattr(self, "auto_map", None) is not None:
            return
        self.auto_map = {"AutoConfig": f"configuration_{self.model_type}.{self.class_prefix}Config"}
        for auto_class, suffix in (
            ("AutoModel", "Model"),
            ("AutoModelForImageClassification", "ForImageClassification"),
            ("AutoModelForSemanticSegmentation", "ForSemanticSegmentation"),
            ("AutoBackbone", "Backbone"),
        ):
            self.auto_map[auto_class] = f"modeling_{self.model_type}.{self.class_prefix}{suffix}"

    def name_stages(self, kwargs: dict) -> None:
        """One backbone stage for each layer; takes `out_features` and `out_indices` out of `kwargs`.

        A feature pyramid reads the ends of the four quarters of the depth unless told otherwise.
        """
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        out_indices, out_features = kwargs.pop("out_indices", None), kwargs.pop("out_features", None)
        if getattr(self, "feature_pyramid", False) and out_indices is None and out_features is None:
            if self.num_hidden_layers < 3:
                raise ValueError(f"feature_pyramid=True needs at least 3 layers, got {self.num_hidden_layers}.")
            out_indices = [self.num_hidden_layers * quarter // 4 for quarter in (1, 2, 3, 4)]
        self.set_output_features_output_indices(out_indices=out_indices, out_features=out_features)

    def set_output_features_output_indices(self, out_features=None, out_indices=None) -> None:
        """As the library's. Raises ValueError for an empty list, which would make a backbone without feature maps."""
        for name, chosen in (("out_features", out_features), ("out_indices", out_indices)):
            if chosen in ([], ()):
                raise ValueError(f"{name} is empty: name at least one stage, from stem to {self.stage_names[-1]}.")
        super().set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return pair(self.patch_size)

    @property
    def native_grid(self) -> tuple[int, int]:
        """(height, width) in patches of an image of `image_size`."""
        (height, width), (patch_height, patch_width) = pair(self.image_size), self.patch_shape
        return height // patch_height, width // patch_width

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches."""
        return 0

    @property
    def output_stride(self) -> tuple[int, int]:
        """(height, width) in pixels of a cell of the map that the segmentation head reads."""
        return self.patch_shape

    @property
    def size_divisor(self) -> int:
        """Pixels: the image processor for segmentation resizes both sides to multiples of it."""
        return math.lcm(*self.output_stride)

    def check_positive(self, *names: str) -> None:
        """Raises ValueError for a field, or an entry of a list, below 1."""
        for name in names:
            value = getattr(self, name)
            if min([value] if isinstance(value, int) else value, default=0) <= 0:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    def check_heads(self) -> None:
        """Raises ValueError unless all layers have positive sizes, and heads that divide their channels."""
        self.check_positive("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by num_attention_heads={self.num_attention_heads}."
            )

    def check_rates(self, *names: str) -> None:
        """Raises ValueError for a probability outside [0, 1)."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")

    def check_pairs(self, *names: str, unit: str = "pixel") -> None:
        """Raises ValueError for a size that is neither a positive number nor two of them."""
        for name in names:
            size = getattr(self, name)
            if not isinstance(size, int) and len(size) != 2:
                raise ValueError(f"{name} must be one number or [height, width], got {size}.")
            if min(pair(size)) <= 0:
                raise ValueError(f"{name} must be at least 1 {unit} on each side, got {size}.")

    def validate_feature_pyramid(self):
        """A pyramid stands on four maps."""
        pyramid = getattr(self, "feature_pyramid", False)
        if pyramid and (len(self.out_features) != 4 or not self.reshape_hidden_states):
            raise ValueError(
                "feature_pyramid=True needs four out_features (or out_indices) and reshape_hidden_states=True."
            )

    def validate_functions(self):
        """The activation, the kind of loss and the numbers of norms and of initialisation exist."""
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is no activation of transformers, such as 'gelu'.")
        kinds = ("single_label_classification", "multi_label_classification", "regression")
        if self.problem_type not in (None, *kinds):
            raise ValueError(f"problem_type must be one of {', '.join(kinds)}, got {self.problem_type!r}.")
        if self.layer_norm_eps < 0 or self.initializer_range <= 0:
            got = f"got {self.layer_norm_eps} and {self.initializer_range}"
            raise ValueError(f"layer_norm_eps must not be negative and initializer_range must be above 0, {got}.")

    def validate_image(self):
        """Sizes are positive, and an image of `image_size` holds at least one patch of the last map."""
        self.check_positive("num_channels", "segmentation_hidden_size")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}.")
        for name in ("image_mean", "image_std"):
            values = channel_values(getattr(self, name), self.num_channels)
            if len(values) != self.num_channels or (name == "image_std" and min(values) <= 0):
                raise ValueError(
                    f"{name} must be one number, or one for each of the {self.num_channels} channels"
                    f"{', above 0' if name == 'image_std' else ''}; got {getattr(self, name)}."
                )
        self.check_pairs("image_size", "patch_size")
        self.check_rates("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob")
        if any(side < cell for side, cell in zip(pair(self.image_size), self.output_stride, strict=True)):
            raise ValueError(
                f"image_size={self.image_size} is smaller than one patch of the last map, "
                f"{self.output_stride[0]} x {self.output_stride[1]} pixels."
            )


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's residual branch is dropped with this probability, else scaled up."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.probability == 0.0 or not self.training:
            return hidden_states
        keep = 1.0 - self.probability
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * (hidden_states.new_empty(shape).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"probability={self.probability}"


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch."""

    def __init__(self, hidden_size: int, init_value: float):
        super().__init__()
        self.init_value = float(init_value)
        self.scale = nn.Parameter(torch.full((hidden_size,), float(init_value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.scale


def drop_path_rates(rate: float, num_layers: int) -> list[float]:
    """Stochastic depth grows linearly from zero at the first layer to `rate` at the last."""
    return [rate * index / max(num_layers - 1, 1) for index in range(num_layers)]


def check_pixel_values(pixel_values: torch.Tensor, num_channels: int) -> None:
    """Raises ValueError unless `pixel_values` is (batch, num_channels, height, width) with at least one pixel."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values must be (batch, {num_channels}, height, width), got {tuple(pixel_values.shape)}; "
            "prepare images with the image processor of the checkpoint."
        )
    if pixel_values.shape[2] == 0 or pixel_values.shape[3] == 0:
        raise ValueError(f"pixel_values holds no pixels: its shape is {tuple(pixel_values.shape)}.")


def for_one_image_size() -> bool:
    """Whether a graph is made for the size of its example alone.

    So does `torch.onnx.export(dynamo=False)`, which knows no antialiased resampling. Other graphs serve every size.
    """
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def image_sides(pixel_values: torch.Tensor) -> tuple[int, int]:
    """(height, width) of (batch, channels, height, width); in a graph for any size, what stands for these there."""
    height, width = pixel_values.shape[-2:]
    return (int(height), int(width)) if for_one_image_size() else (height, width)


def patch_grid(pixel_values: torch.Tensor, patch_shape: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in patches of (batch, channels, height, width), patches at the edge counted whole."""
    height, width = image_sides(pixel_values)
    return -(-height // patch_shape[0]), -(-width // patch_shape[1])


def pad_to_multiple(pixel_values: torch.Tensor, multiple: tuple[int, int]) -> torch.Tensor:
    """Zeros on the right and at the bottom of (batch, channels, height, width) until both sides are multiples."""
    height, width = image_sides(pixel_values)
    bottom, right = -height % multiple[0], -width % multiple[1]
    if (not is_tracing() or for_one_image_size()) and bottom == 0 and right == 0:
        return pixel_values
    return F.pad(pixel_values, (0, right, 0, bottom))


def resample_position_embeddings(
    position_embeddings: torch.Tensor, native_grid: tuple[int, int], grid: tuple[int, int], num_prefix_tokens: int
) -> torch.Tensor:
    """Position embeddings of `grid` from those of `native_grid`: antialiased bicubic, in at least float32.

    position_embeddings: (1, prefix + patches, channels); the first `num_prefix_tokens` rows are kept as they are.
    """
    # Resampling to the same grid is the identity; while tracing it stays, so that a graph serves every size.
    if (not is_tracing() or for_one_image_size()) and tuple(grid) == tuple(native_grid):
        return position_embeddings
    dtype = torch.promote_types(position_embeddings.dtype, torch.float32)
    prefix, patches = position_embeddings.split(
        [num_prefix_tokens, position_embeddings.shape[1] - num_prefix_tokens], dim=1
    )
    patches = patches.to(dtype).unflatten(1, native_grid).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config) -> torch.Tensor:
    """Mean loss of (batch, classes) logits. The config is read, never changed.

    Without `config.problem_type`: class ids give cross-entropy, soft labels (batch, classes) soft cross-entropy, and a
    single output regression. Raises ValueError for ids outside the classes.
    """
    problem_type = config.problem_type
    num_labels = logits.shape[-1]
    if problem_type == "regression" or (problem_type is None and num_labels == 1):
        return F.mse_loss(logits, labels.to(logits.dtype).view_as(logits))
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(f"Soft labels must be {tuple(logits.shape)} like the logits, got {tuple(labels.shape)}.")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(dtype), labels.to(dtype))
    check_labels(labels, num_labels)
    return F.cross_entropy(logits, labels.view(-1).long())


def segmentation_loss(
    logits: torch.Tensor, labels: torch.Tensor, image_size: tuple[int, int], cell: tuple[int, int], ignore_index: int
) -> torch.Tensor:
    """Mean cross-entropy over the pixels that are not ignored, at the size of the labels.

    logits: (batch, classes, grid height, grid width), each covering `cell` (height, width) pixels of the padded image.
    labels: (batch, height, width) of `image_size`. Logits are upsampled bilinearly in at least float32 to the padded
    image and the padding is cut off; the reference stretches the padded map over the image, which shifts every mask.
    A batch without a valid pixel costs zero. Raises ValueError for labels of another size or outside the classes.
    """
    if tuple(labels.shape) != (logits.shape[0], *image_size):
        raise ValueError(
            f"labels must hold one map of its image's size for each image, {(logits.shape[0], *image_size)}; "
            f"got {tuple(labels.shape)}."
        )
    check_labels(labels, logits.shape[1], ignore_index)
    padded_size = [cells * pixels for cells, pixels in zip(logits.shape[-2:], cell, strict=True)]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = F.interpolate(logits, size=padded_size, mode="bilinear", align_corners=False)
    logits = logits[..., : labels.shape[-2], : labels.shape[-1]]
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def check_labels(labels: torch.Tensor, num_labels: int, ignore_index: int | None = None) -> None:
    """Raises ValueError for a class id outside [0, num_labels) that is not ignored.

    Only on CPU and outside tracing: elsewhere reading a value would stall the device, whose own assertion speaks up.
    """
    if is_tracing() or labels.device.type != "cpu" or labels.numel() == 0:
        return
    wrong = (labels < 0) | (labels >= num_labels)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        raise ValueError(
            f"labels hold the class id {int(labels[wrong][0])}, but the model has {num_labels} classes "
            f"(0 to {num_labels - 1}{'' if ignore_index is None else f', {ignore_index} is ignored'})."
        )


class MLP(nn.Module):
    """Two linear maps around an activation, on the last dimension."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, dropout: float = 0.0):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down_proj(self.dropout(self.activation(self.up_proj(hidden_states)))))


class MultiHeadProjections(nn.Module):
    """The parameters of multi-head self-attention. A family's attention adds how tokens meet.

    gaussian_grid: native grid of the Gaussian that is read from each query; None for plain attention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        qkv_bias: bool,
        dropout: float,
        gaussian_grid: tuple[int, int] | None,
        coarse_training: bool = False,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.gaussian = None
        if gaussian_grid is not None:
            self.gaussian = LocAtGaussian(self.head_dim, gaussian_grid, coarse_training)
        self.scaling = self.head_dim**-0.5
        self.dropout = dropout

    def project(
        self, hidden_states: torch.Tensor, sources: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, tokens, hidden_size) to query, key and value, each (batch, heads, tokens, head_dim).

        sources: what keys and values are read from, (batch, sources, hidden_size); the tokens themselves where None.
        """
        sources = hidden_states if sources is None else sources
        projected = (self.q_proj(hidden_states), self.k_proj(sources), self.v_proj(sources))
        return tuple(states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for states in projected)


def patch_feature_map(tokens: torch.Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0) -> torch.Tensor:
    """(batch, tokens, channels) without its prefix tokens as (batch, channels, grid height, grid width)."""
    return channels_last_map(tokens[:, num_prefix_tokens:], grid).contiguous()


def channels_last_map(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(batch, patches, channels) seen as (batch, channels, grid height, grid width): nothing is copied.

    Channels stay last in memory, where convolutions take and leave them.
    """
    return patches.unflatten(1, grid).permute(0, 3, 1, 2)


def feature_map_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    """(batch, channels, height, width) as (batch, patches, channels), row by row: `patch_feature_map` undone."""
    return feature_map.flatten(2).transpose(1, 2)


class ResidualDepthwise(nn.Conv2d):
    """x + depthwise 3x3 convolution of x, in one pass: the identity is one more weight in the middle of the kernel."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        identity = F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        return self._conv_forward(feature_map, self.weight + identity, self.bias)


class ProbeHead(nn.Module):
    """The paper's segmentation probe: 1x1 convolution, GroupNorm(1), GELU, 1x1 convolution.

    GroupNorm(1) takes its mean and variance over all channels and positions of a sample.
    """

    def __init__(self, in_channels: int, hidden_channels: int, num_labels: int):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, hidden_channels, kernel_size=1, bias=False)
        self.norm = nn.GroupNorm(1, hidden_channels)
        self.activation = nn.GELU()
        self.classifier = nn.Conv2d(hidden_channels, num_labels, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, in_channels, height, width) to (batch, num_labels, height, width)."""
        return self.classifier(self.activation(self.norm(self.projection(features))))


class FeaturePyramid(nn.Module):
    """Brings four maps of one stride to 1/4, 1/2, 1 and 2 times that stride (4, 8, 16, 32 for patches of 16)."""

    def __init__(self, channels: int):
        super().__init__()
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2),
                    nn.GroupNorm(1, channels),
                    nn.GELU(),
                    nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2),
                ),
                nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True),
            ]
        )

    def forward(self, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [level(feature_map) for level, feature_map in zip(self.levels, feature_maps, strict=True)]


class FamilyPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, and the parts of timm's model contract that its optimiser tools read.

    A family adds its config class, its prefix, its layers, and the initialisation of its own parameters.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means: the Trainer must not rescale them for accumulated steps
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # flash kernels have no additive bias
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _input_embed_layer = "patch_embeddings"
    # Parameters without weight decay besides those of one dimension: how their names end.
    _undecayed: tuple = ()
    # Saving writes a folder that works elsewhere: one without an image processor gets the one of the config.
    _segments_images = False
    _repository_has_processor = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the reference: truncated normal weights, zero biases, PyTorch's own bounds for the patch convolution."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            std = self.config.initializer_range * getattr(module, "init_scale", 1.0)
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            bound = math.prod(module.weight.shape[1:]) ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, LayerScale):
            init.constant_(module.scale, module.init_value)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, **kwargs):
        """As in transformers, plus `preprocessor_config.json` and its code where the folder has none."""
        upload = {name: kwargs.pop(name, None) for name in ("repo_id", "commit_message", "create_pr", "private")}
        os.makedirs(save_directory, exist_ok=True)
        before = self._get_files_timestamps(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        has_processor = os.path.isfile(os.path.join(save_directory, "preprocessor_config.json"))
        if not has_processor and not self._repository_has_processor:
            processor = LocAtViTImageProcessor.from_model_config(self.config, segmentation=self._segments_images)
            processor.save_pretrained(save_directory)
        if push_to_hub:
            token = kwargs.get("token")
            repo_id = upload["repo_id"] or os.path.basename(os.path.abspath(save_directory))
            repo_id = create_repo(repo_id, private=upload["private"], token=token, exist_ok=True).repo_id
            before.pop("preprocessor_config.json", None)  # also one that was in the folder before belongs to the model
            self._upload_modified_files(
                save_directory,
                repo_id,
                before,
                commit_message=upload["commit_message"],
                token=token,
                create_pr=bool(upload["create_pr"]),
            )

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As in transformers; an image processor that the repository already has is left as it is."""
        location = {name: kwargs.get(name) for name in ("token", "revision")}
        self._repository_has_processor = file_exists(repo_id, "preprocessor_config.json", **location)
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            self._repository_has_processor = False

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embeddings.patch_embeddings

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for timm's layer-wise learning-rate decay."""
        prefix = "" if self.base_model is self else rf"{self.base_model_prefix}\."
        return self._layer_groups(rf"^{prefix}", coarse)

    def _layer_groups(self, prefix: str, coarse: bool) -> dict:
        layers = [(rf"{prefix}layers\.(\d+)", None), (rf"{prefix}layernorm", (99999,))]
        return {"stem": rf"{prefix}(?:embeddings|rope)", "blocks": rf"{prefix}layers\.(\d+)" if coarse else layers}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed besides those of one dimension."""
        return {name for name, _ in self.named_parameters() if name.endswith(self._undecayed)}


class FreezableBackboneMixin:
    """For a head that reads hidden states of its encoder, which can be frozen while the head trains."""

    backbone_is_frozen = False

    def post_init(self) -> None:
        """Also installs the hooks that record hidden states, as backbones do: later they break compiled graphs."""
        super().post_init()
        maybe_install_capturing_hooks(self)

    def freeze_backbone(self) -> None:
        """Trains only the head: the encoder gets no gradients and stays in evaluation mode whatever `train` is told."""
        self.base_model.requires_grad_(False)
        self.backbone_is_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.backbone_is_frozen:
            self.base_model.eval()
        return self


class ImageClassificationMixin:
    """How a linear `classifier` of what the encoder pools answers."""

    _auto_class = "AutoModelForImageClassification"
    _output_class = ImageClassifierOutput

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        pixel_values, and anything else that the encoder takes: as in the family's `…Model`.
        labels: (batch,) class ids, or (batch, classes) soft labels; `config.problem_type` may say otherwise.

        Returns `loss` where there are labels, `logits` (batch, classes), and what else the encoder was asked for.
        """
        outputs = self.base_model(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = classification_loss(logits, labels, self.config) if labels is not None else None
        return self._output_class(loss=loss, logits=logits, **records(outputs))


class ProbeSegmentationMixin(FreezableBackboneMixin):
    """How a `ProbeHead` on the last layer's patches answers, read before the final norm and without refinement."""

    _auto_class = "AutoModelForSemanticSegmentation"
    _segments_images = True

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SemanticSegmenterOutput:
        """
        pixel_values, and anything else that the encoder takes: as in the family's `…Model`.
        labels: (batch, height, width) class ids of the images' size; `config.semantic_loss_ignore_index` is left out.

        Returns `loss` where there are labels and `logits` (batch, classes, grid height, grid width) on the last layer's
        grid, whose cells are `config.output_stride` pixels of the padded image; the processor's
        `post_process_semantic_segmentation` cuts the padding off.
        """
        outputs = self.base_model(pixel_values, return_dict=True, **{**kwargs, "output_hidden_states": True})
        grid = patch_grid(pixel_values, self.config.output_stride)
        features = patch_feature_map(outputs.hidden_states[-1], grid, self.config.num_prefix_tokens)
        logits = self.segmentation_head(features)
        loss = None
        if labels is not None:
            ignore_index = self.config.semantic_loss_ignore_index
            loss = segmentation_loss(logits, labels, pixel_values.shape[-2:], self.config.output_stride, ignore_index)
        return SemanticSegmenterOutput(loss=loss, logits=logits, **records(outputs))


class TokenMaskMixin:
    """Names the mask in the `forward` of a head whose encoder takes one: trainers pass on what they find there."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        """As the head without a mask. attention_mask: as in the family's `…Model`."""
        return super().forward(pixel_values, labels, attention_mask=attention_mask, **kwargs)


class FeatureMapsMixin(BackboneMixin):
    """How a backbone answers: with a map for each chosen stage of its encoder."""

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """
        pixel_values, and anything else that the encoder takes: as in the family's `…Model`.

        Returns `feature_maps`, what `feature_map` makes of the hidden state of each of `config.out_features`, and
        what the encoder was asked for.
        """
        kwargs["output_hidden_states"] = True
        outputs = self.base_model(pixel_values, return_dict=True, **kwargs)
        grid = patch_grid(pixel_values, self.config.patch_shape)
        states = zip(self.stage_names, outputs.hidden_states, strict=True)
        maps = [self.feature_map(state, stage, grid) for stage, state in states if stage in self.out_features]
        if getattr(self, "pyramid", None) is not None:
            maps = self.pyramid(maps)
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def feature_map(self, hidden_states: torch.Tensor, stage: str, grid: tuple[int, int]) -> torch.Tensor:
        """A map (batch, channels, height, width) of the hidden states of a stage. grid: in patches, of the stem."""
        return hidden_states


def records(outputs: ModelOutput) -> dict[str, tuple]:
    """What an encoder recorded on request beside its last state: hidden states, attentions, cluster assignments."""
    return {name: value for name, value in outputs.items() if name not in ("last_hidden_state", "pooler_output")}


__all__ = [
    "DropPath",
    "FamilyConfigMixin",
    "FamilyPreTrainedModel",
    "FeatureMapsMixin",
    "FeaturePyramid",
    "FreezableBackboneMixin",
    "ImageClassificationMixin",
    "LayerScale",
    "MLP",
    "MultiHeadProjections",
    "ProbeHead",
    "ProbeSegmentationMixin",
    "ResidualDepthwise",
    "TokenMaskMixin",
    "channels_last_map",
    "check_labels",
    "check_pixel_values",
    "classification_loss",
    "drop_path_rates",
    "feature_map_tokens",
    "pad_to_multiple",
    "pair",
    "patch_feature_map",
    "patch_grid",
    "records",
    "resample_position_embeddings",
    "segmentation_loss",
]
