# SPDX-License-Identifier: MIT
"""What the models of all families share: loading and initialization, losses, and the forwards of their heads."""

import math
import os
from collections import OrderedDict

import torch
import torch.nn.functional as F
from huggingface_hub import file_exists
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, is_tracing
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .image_processing_locatvit import LocAtViTImageProcessor
from .layers_locat import LayerScale, ScaledInitLinear


class FamilyPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization, and the parts of timm's model contract that its optimizer tools read.

    A family adds its config class, its prefix, its layers, and the initialization of its own parameters.
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
    _no_weight_decay_suffixes: tuple = ()
    # Saving writes a folder that works elsewhere: one without an image processor gets that of the configuration.
    _saves_image_processor = True
    _image_processor_folder = None  # whose image processor it gets instead
    _segments_images = False

    def __init_subclass__(cls, **kwargs) -> None:
        """Pickles and copies of the modules whose outputs are recorded go without the hooks that record them."""
        super().__init_subclass__(**kwargs)
        for recorded in (cls.__dict__.get("_can_record_outputs") or {}).values():
            recorded.__getstate__ = _state_without_recorders

    def __setstate__(self, state: dict) -> None:
        """Installs these hooks again where they were: later they break compiled graphs."""
        super().__setstate__(state)
        if self.base_model is self:
            # A process learns what a class records when it first makes a model of it, which a pickle does not.
            PreTrainedModel.__init__(PreTrainedModel.__new__(type(self)), self.config)
            if self.__dict__.pop("_output_capturing_hooks_installed", False):
                maybe_install_capturing_hooks(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the reference: truncated normal weights, zero biases, PyTorch's own bounds for the patch convolution."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            scale = module.init_scale if isinstance(module, ScaledInitLinear) else 1.0
            init.trunc_normal_(module.weight, std=self.config.initializer_range * scale)
        elif isinstance(module, nn.Conv2d):
            bound = math.prod(module.weight.shape[1:]) ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, LayerScale):
            init.constant_(module.scale, module.init_value)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, **kwargs) -> None:
        """As in transformers, plus `preprocessor_config.json` and its code where the folder has none.

        Args:
            save_directory: the folder, made where it does not exist.
            push_to_hub: whether to upload the model and the image processor of the folder afterwards.
        """
        names = ("repo_id", "commit_message", "create_pr", "private")
        upload = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        has_processor = os.path.isfile(os.path.join(save_directory, "preprocessor_config.json"))
        if self._saves_image_processor and not has_processor:
            if self._image_processor_folder is not None:
                processor = LocAtViTImageProcessor.from_pretrained(self._image_processor_folder)
            else:
                processor = LocAtViTImageProcessor.from_model_config(self.config, segmentation=self._segments_images)
            processor.save_pretrained(save_directory)
        if push_to_hub:
            upload.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self._image_processor_folder = save_directory
            try:
                self.push_to_hub(token=kwargs.get("token"), **upload)
            finally:
                self._image_processor_folder = None

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As in transformers; an image processor that the repository already has is left as it is."""
        if self._image_processor_folder is None:
            location = {name: kwargs.get(name) for name in ("token", "revision")}
            self._saves_image_processor = not file_exists(repo_id, "preprocessor_config.json", **location)
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            self._saves_image_processor = True

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for timm's layer-wise learning-rate decay."""
        prefix = "" if self.base_model is self else rf"{self.base_model_prefix}\."
        return self._layer_groups(rf"^{prefix}", coarse)

    def _layer_groups(self, prefix: str, coarse: bool) -> dict:
        layers = [(rf"{prefix}layers\.(\d+)", None), (rf"{prefix}layernorm", (99999,))]
        return {"stem": rf"{prefix}(?:embeddings|rope)", "blocks": rf"{prefix}layers\.(\d+)" if coarse else layers}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed besides those of one dimension."""
        return {name for name, _ in self.named_parameters() if name.endswith(self._no_weight_decay_suffixes)}


def _state_without_recorders(module: nn.Module) -> dict:
    """The state of a module without the hooks of transformers, functions inside functions, which no pickle holds."""
    state = nn.Module.__getstate__(module)
    state["_forward_hooks"] = OrderedDict(
        (number, hook)
        for number, hook in state["_forward_hooks"].items()
        if getattr(hook, "__module__", None) != maybe_install_capturing_hooks.__module__
    )
    return state


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


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor, image_size: tuple[int, int], config) -> torch.Tensor:
    """Mean cross-entropy over the pixels that are not ignored, at the size of the labels.

    Logits are upsampled bilinearly in at least float32 to the padded image and the padding is cut off; the reference
    stretches the padded map over the image, which shifts every mask. A batch without a valid pixel costs zero.

    Args:
        logits: (batch, classes, grid height, grid width), each of `config.output_stride` pixels of the padded image.
        labels: (batch, height, width) class ids; `config.semantic_loss_ignore_index` is left out.
        image_size: (height, width) in pixels.

    Raises:
        ValueError: for labels of another size or outside the classes.
    """
    if tuple(labels.shape) != (logits.shape[0], *image_size):
        raise ValueError(
            f"labels must hold one map of its image's size for each image, {(logits.shape[0], *image_size)}; "
            f"got {tuple(labels.shape)}."
        )
    ignore_index = config.semantic_loss_ignore_index
    check_labels(labels, logits.shape[1], ignore_index)
    padded_size = [cells * pixels for cells, pixels in zip(logits.shape[-2:], config.output_stride, strict=True)]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = F.interpolate(logits, size=padded_size, mode="bilinear", align_corners=False)
    logits = logits[..., : labels.shape[-2], : labels.shape[-1]]
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def check_labels(labels: torch.Tensor, num_labels: int, ignore_index: int | None = None) -> None:
    """Raises ValueError for a class id outside [0, num_labels) that is not ignored.

    Only on CPU and outside tracing: elsewhere reading a value would stall the device, whose own assertion speaks up.
    Nor inside a transform of `torch.func`, where a tensor may stand for several and has no value to read.
    """
    if is_tracing() or torch._C._are_functorch_transforms_active():
        return
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    wrong = (labels < 0) | (labels >= num_labels)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        raise ValueError(
            f"labels hold the class id {int(labels[wrong][0])}, but the model has {num_labels} classes "
            f"(0 to {num_labels - 1}{'' if ignore_index is None else f', {ignore_index} is ignored'})."
        )


def optional_outputs(outputs: ModelOutput) -> dict[str, tuple]:
    """What an encoder recorded on request beside its last state: hidden states, attentions, cluster assignments."""
    return {name: value for name, value in outputs.items() if name not in ("last_hidden_state", "pooler_output")}


class FreezableBackboneMixin(nn.Module):
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


class BackboneForwardMixin(BackboneMixin):
    """How a backbone answers: with a map for each chosen stage of its encoder."""

    _auto_class = "AutoBackbone"

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """The maps of the chosen stages.

        Args:
            pixel_values, and anything else that the encoder takes: as in the family's `…Model`.

        Returns:
            `feature_maps`, what `feature_map` makes of the hidden state of each of `config.out_features`, and what the
            encoder was asked for.
        """
        outputs = self.base_model(pixel_values, return_dict=True, **{**kwargs, "output_hidden_states": True})
        states = zip(self.stage_names, outputs.hidden_states, strict=True)
        maps = [self.feature_map(state, stage, pixel_values) for stage, state in states if stage in self.out_features]
        if getattr(self, "pyramid", None) is not None:
            maps = self.pyramid(maps)
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def feature_map(self, hidden_states: torch.Tensor, stage: str, pixel_values: torch.Tensor) -> torch.Tensor:
        """A map (batch, channels, height, width) of the hidden states of a stage of these images."""
        return hidden_states
