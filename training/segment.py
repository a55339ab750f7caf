"""Semantic segmentation: the papers' probes and heads on a frozen model, or full fine-tuning.

accelerate launch -m training.segment --config training/recipes/segment/digits.yaml --pretrained runs/digits/model
"""

from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModel, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from locatvit_hf import LocAtViTImageProcessor
from locatvit_hf.configuration_utils_locat import FamilyConfigMixin
from locatvit_hf.inference import InferenceArguments, Segmenter
from locatvit_hf.layers_locat import ProbeHead
from locatvit_hf.modeling_utils_locat import FreezableBackboneMixin
from training.data import TrainingSamples, create_evaluation_loader, describe_data, load_splits
from training.data.label_counts import LabelCounts, count_pixels
from training.data.label_maps import IGNORE_INDEX, LabelReader
from training.engine.arguments import describe, option, run_program
from training.engine.distributed import create_accelerator
from training.engine.loop import TrainingLoop
from training.engine.optimization import create_optimizer
from training.engine.schedule import Schedule
from training.engine.settings import ProgramArguments
from training.tasks.checkpoint_loading import (
    change_config,
    label_fields,
    load_pretrained,
    read_config,
    without_num_labels,
)
from training.tasks.segmentation.augmentation import SegmentationAugmentation, SegmentationTransform
from training.tasks.segmentation.evaluation import SegmentationCollator, draw_examples, evaluate


@strict
@dataclass(kw_only=True)
class SegmentArguments(ProgramArguments, SegmentationAugmentation, InferenceArguments):
    """Settings of `segment`; the defaults are the paper's frozen probe.

    But for the model's own mean and std, and label maps that are resized by the nearest center.
    """

    pretrained: str | None = option(None, "Folder or Hub name of the model to start from.")
    head: Literal["probe", "paca", "upernet"] = option(
        "probe", "What reads the features; paca is the head of PaCa-ViT."
    )
    freeze: bool = option(True, "Train the head only.")
    model: dict[str, Any] = option({}, "Fields of the configuration to change: --model.drop_path_rate 0.1.")
    upernet: dict[str, Any] = option({}, "Fields of UPerNet's configuration: --upernet.hidden_size 256.")
    head_initialization: Literal["mmsegmentation", "default"] = option(
        "mmsegmentation",
        "Of a new probe or UPerNet: the classifier normal with deviation 0.01, other convolutions by "
        "Kaiming's rule, as in the papers; or that of the class of the model. The PaCa head keeps its own.",
    )
    test_interpolation: Literal["bilinear", "bicubic"] = option(
        "bilinear", "How images are resized in evaluation, and by the image processor that is exported."
    )
    loss_average: Literal["all", "labelled"] = option(
        "all",
        "Mean of the loss over all pixels, where those without a class cost nothing, or over the labeled "
        "ones in the batch of a process, which depends on how batches are split.",
    )
    length: str = "20000 steps"
    warmup: str = "25 %"
    final_learning_rate: float | int = 1e-11
    weight_decay: float | int = 0.01
    no_weight_decay: list[str] | None = option(
        [], "As everywhere, but by default all are decayed, biases and norms too, as in the paper."
    )
    max_gradient_norm: float | int | None = None
    batch_size: int = 32
    evaluate_every: str = "4000 steps"
    checkpoint_every: str = "1000 steps"
    eval_batch_size: int = option(8, "Images per step of evaluation, in every process.")


def main(arguments: SegmentArguments) -> dict[str, Any]:
    """Train, evaluate and export; returns the content of `all_results.json`."""
    accelerator = create_accelerator(arguments)
    splits = load_splits(arguments, segmentation=True)
    columns = [arguments.image_column, arguments.label_column]
    schedule = Schedule.resolve(arguments, len(splits.train), accelerator.num_processes)

    torch.manual_seed(arguments.seed)
    model = build_model(arguments, splits.label_names)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # The few large crops of one process are too few for the means of a head's batch norms. Those of a teacher in
        # the encoder stay as they are, as in the reference.
        for name, head in heads_of(model).items():
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(head))
    processor = build_processor(arguments, model.config)
    optimizer = create_optimizer(model, arguments)
    num_labels = model.config.num_labels
    transform = SegmentationTransform(arguments, num_labels, processor.image_mean, processor.image_std, count_pixels)
    samples = TrainingSamples(splits.train, columns, transform, arguments.seed)
    collator = SegmentationCollator(processor, LabelReader(arguments, num_labels), arguments)
    validation = create_evaluation_loader(splits.validation, columns, collator, arguments, accelerator)

    counts = LabelCounts("training", splits.label_names or [], arguments)
    data = partial(describe_data, columns, splits.label_names, training=splits.train, validation=splits.validation)
    run = accelerator, arguments, schedule, model, processor, optimizer, samples
    loop = TrainingLoop(*run, metric="mean_iou", data=data)
    tell_once = cache(loop.print)
    with loop:
        one_pass = schedule.steps_per_epoch * arguments.batch_size // accelerator.num_processes
        for images, labels, counted in loop:
            loss = loop.model(pixel_values=images, labels=labels).loss
            if arguments.loss_average == "all":
                loss = loss * (labels != IGNORE_INDEX).float().mean()
            loop.update(loss)
            if counts.num_maps < one_pass:
                counts.add(counted)
                if counts.num_maps >= one_pass:
                    counts.check(accelerator, tell_once, least=2)
            if loop.evaluation_due:
                segmenter = Segmenter(loop.evaluation_model, processor, arguments)
                metrics = evaluate(segmenter, validation, accelerator, tell_once)
                loop.record(metrics, examples=partial(draw_examples, segmenter, validation))
                loop.print(
                    "IoU: " + ", ".join(f"{name} {iou:.3f}" for name, iou in metrics["per_category_iou"].items())
                )
        if counts.num_maps < one_pass:
            counts.check(accelerator, tell_once, least=0 if arguments.dry_run else 2)
    return loop.finish(num_train_images=len(splits.train), num_validation_images=len(splits.validation))


def build_model(arguments: SegmentArguments, label_names: list[str] | None) -> PreTrainedModel:
    """The pretrained model with a head that knows the names of the classes, frozen below it where asked.

    The head is fresh, unless the checkpoint is of the same kind and of the same classes: then it goes on.

    Raises:
        ValueError: Where the classes have no names or the model has another number of them, as `build_config` does, and
            as `load_pretrained` does.
    """
    if label_names is None:
        raise ValueError("The data does not name its classes: give --label_names, a list or a JSON file {id: name}.")
    changes = without_num_labels(arguments.model, label_names)
    source = read_config(arguments.pretrained) if arguments.pretrained is not None else None
    backbone = getattr(source, "backbone_config", None)
    if isinstance(backbone, FamilyConfigMixin):
        config = build_config(arguments, change_config(backbone, changes), label_names)
    else:
        encoder, _ = load_pretrained(AutoModel, arguments.pretrained, changes)
        config = build_config(arguments, encoder.config, label_names)
    if arguments.head == "upernet":
        model = UperNetForSemanticSegmentation(config)
    else:
        model = AutoModelForSemanticSegmentation.from_config(config)
    if arguments.head_initialization == "mmsegmentation":
        initialize_heads(model)
    try:
        if source is not None and source.architectures == [type(model).__name__] and source.id2label == config.id2label:
            model = type(model).from_pretrained(arguments.pretrained, config=config, dtype=torch.float32)
        elif isinstance(backbone, FamilyConfigMixin):
            earlier = transformers.UperNetForSemanticSegmentation.from_pretrained(arguments.pretrained)
            model.base_model.load_state_dict(earlier.backbone.base_model.state_dict())
        else:
            model.base_model.load_state_dict(encoder.state_dict())
    except RuntimeError:
        raise ValueError(
            f"The fields of `model` give other shapes than the tensors of {arguments.pretrained} have."
        ) from None
    if arguments.freeze:
        model.freeze_backbone()
    elif arguments.head != "upernet":
        # The heads read before the final norm. Processes wait for the gradient of whatever may have one.
        for name, module in model.base_model.named_children():
            if name.endswith("layernorm"):
                module.requires_grad_(False)
    return model


HEADS = ("segmentation_head", "decode_head", "auxiliary_head")


def heads_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return what reads the features in a segmentation model, by the names of its attributes."""
    return {name: head for name in HEADS if (head := getattr(model, name, None)) is not None}


def initialize_heads(model: PreTrainedModel) -> None:
    """Initialize a probe, or the heads of a UPerNet, as mmsegmentation does; other heads stay as they are.

    Classifiers are normal with a standard deviation of 0.01 and biases of 0, other convolutions normal with that of
    Kaiming's rule for their outputs.
    """
    for head in heads_of(model).values():
        if not isinstance(head, ProbeHead | UperNetHead | UperNetFCNHead):
            continue
        for name, layer in head.named_modules():
            if not isinstance(layer, nn.Conv2d):
                continue
            if name == "classifier":
                nn.init.normal_(layer.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def build_config(arguments: SegmentArguments, encoder: PreTrainedConfig, label_names: list[str]) -> PreTrainedConfig:
    """The configuration of an encoder with the names of the classes and the head of `arguments`.

    Raises:
        ValueError: For a head that its family does not have, for an unknown field of UPerNet, and for another label of
            pixels without a class than this program gives them.
    """
    for name, given in (("semantic_loss_ignore_index", arguments.model), ("loss_ignore_index", arguments.upernet)):
        if given.get(name, IGNORE_INDEX) != IGNORE_INDEX:
            raise ValueError(f"Pixels without a class have the label {IGNORE_INDEX} here: leave out {name}.")
    names = label_fields(label_names)
    is_paca = encoder.model_type == "pacavit"
    if arguments.head == "paca" and not is_paca:
        raise ValueError(
            f"The PaCa head reads four stages of a pacavit; for a {encoder.model_type} choose probe or upernet."
        )
    if arguments.head != "upernet":
        kind = {"segmentation_head_type": "paca" if arguments.head == "paca" else "linear"} if is_paca else {}
        return change_config(encoder, {**names, **kind, "semantic_loss_ignore_index": IGNORE_INDEX})
    if unknown := sorted(set(arguments.upernet) - {f.name for f in fields(transformers.UperNetConfig)}):
        raise ValueError(f"A UPerNet configuration has no field {unknown[0]!r}.")
    stages = {"feature_pyramid": True} if hasattr(encoder, "feature_pyramid") else {"out_indices": [1, 2, 3, 4]}
    try:
        return transformers.UperNetConfig(
            backbone_config=change_config(encoder, {**names, **stages, "semantic_loss_ignore_index": IGNORE_INDEX}),
            **names,
            **arguments.upernet,
        )
    except StrictDataclassError as error:
        raise ValueError(describe(error)) from None


def build_processor(arguments: SegmentArguments, config: PreTrainedConfig) -> LocAtViTImageProcessor:
    """Resizes to the test size of the recipe, whole images; UPerNet's logits have the size of the image."""
    settings = {
        "resample": PILImageResampling[arguments.test_interpolation.upper()],
        "size": {"shortest_edge": arguments.resize, "longest_edge": arguments.max_resize},
        "do_reduce_labels": arguments.reduce_labels,
    }
    if config.model_type == "upernet":
        config, settings["output_stride"] = config.backbone_config, [1, 1]
    return LocAtViTImageProcessor.from_model_config(config, segmentation=True, **settings)


class UperNetForSemanticSegmentation(FreezableBackboneMixin, transformers.UperNetForSemanticSegmentation):
    """The UPerNet of transformers, saved as such, whose encoder can be frozen."""

    supports_gradient_checkpointing = True  # of the layers of the backbone

    def post_init(self) -> None:
        """The backbone already records its hidden states; a second recorder would list each twice."""
        super(FreezableBackboneMixin, self).post_init()

    @property
    def base_model(self) -> PreTrainedModel:
        """The encoder in the backbone. A pyramid between it and the head belongs to the head."""
        return self.backbone.base_model

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> SemanticSegmenterOutput:
        """As in transformers; a batch without a valid pixel costs zero, not nan."""
        outputs = super().forward(pixel_values, labels=labels, **kwargs)
        if labels is not None:
            outputs.loss = torch.where((labels != IGNORE_INDEX).any(), outputs.loss, 0.0)
        return outputs


if __name__ == "__main__":
    run_program(main, SegmentArguments)
