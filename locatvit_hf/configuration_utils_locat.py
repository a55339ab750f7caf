# SPDX-License-Identifier: MIT
"""What the configurations of all families share: sizes, grids, stages, presets, checks, and the map of their code."""

import math

from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin


def channel_values(values: float | list[float] | tuple[float, ...], num_channels: int) -> list[float]:
    """A mean or std for every channel, from one number, from equal ones, or for grey images from those of a color."""
    values = [values] if isinstance(values, float | int) else list(values)
    if len(set(values)) == 1:
        return values[:1] * num_channels
    return [sum(values) / len(values)] if num_channels == 1 and values else values


def pair(size) -> tuple[int, int]:
    """(height, width) of a size given as one number or as two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


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
        """Names the code of every Auto class, whatever a loaded config named: other code never goes on from there.

        Complete from the start: saving a model merges only its own Auto class into the map.
        """
        num_labels = kwargs.get("num_labels")
        if num_labels is not None and num_labels < 0:
            raise ValueError(f"num_labels must not be negative, got {num_labels}.")
        super().__post_init__(**kwargs)
        self.auto_map = {"AutoConfig": f"configuration_{self.model_type}.{self.class_prefix}Config"}
        for auto_class, suffix in (
            ("AutoModel", "Model"),
            ("AutoModelForImageClassification", "ForImageClassification"),
            ("AutoModelForSemanticSegmentation", "ForSemanticSegmentation"),
            ("AutoBackbone", "Backbone"),
        ):
            self.auto_map[auto_class] = f"modeling_{self.model_type}.{self.class_prefix}{suffix}"

    def set_stage_names(self, kwargs: dict) -> None:
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
        """The activation, the kind of loss and the numbers of norms and of initialization exist."""
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not an activation of transformers, such as 'gelu'.")
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
            usable = all(math.isfinite(value) and (value > 0 or name == "image_mean") for value in values)
            if len(values) != self.num_channels or not usable:
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
