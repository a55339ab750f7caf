"""Semantic segmentation: the papers' probes and heads on a frozen model, or full fine-tuning.

accelerate launch training/segment.py --config training/recipes/segment/digits.yaml --pretrained runs/digits/model
"""

import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

if not __package__:  # started as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import transformers
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from locatvit_hf import LocAtViTImageProcessor
from locatvit_hf.layers_locat import FamilyConfigMixin, FreezableBackboneMixin
from training.arguments import DataArguments, OptimizationArguments, RunArguments, console, describe, run_program
from training.augmentation import IGNORE_INDEX, LabelReader, SegmentationAugmentation, SegmentationTransform
from training.data import TrainingSamples, create_evaluation_loader, load_splits
from training.inference import InferenceArguments, SegmentationCollator, draw_examples, evaluate
from training.loop import TrainingLoop, create_accelerator
from training.optimization import create_optimizer


@strict
@dataclass(kw_only=True)
class SegmentArguments(
    DataArguments, OptimizationArguments, SegmentationAugmentation, InferenceArguments, RunArguments
):
    """Settings of `segment`; the defaults are the paper's frozen probe, with the model's own mean and std."""

    pretrained: str | None = field(default=None, metadata={"help": "Folder or Hub name of the model to start from."})
    head: Literal["probe", "paca", "upernet"] = field(
        default="probe", metadata={"help": "What reads the features; paca is the head of PaCa-ViT."}
    )
    freeze: bool = field(default=True, metadata={"help": "Train the head only."})
    model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of the configuration to change: --model.drop_path_rate 0.1."}
    )
    upernet: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of UPerNet's configuration: --upernet.hidden_size 256."}
    )
    loss_average: Literal["all", "labelled"] = field(
        default="all",
        metadata={
            "help": "Mean of the loss over all pixels, where those without a class cost nothing, or over the labelled "
            "ones in the batch of a process, which depends on how batches are split."
        },
    )
    length: str = "20000 steps"
    warmup: str = "25 %"
    final_learning_rate: float | int = 1e-11
    weight_decay: float | int = 0.01
    max_gradient_norm: float | int | None = None
    batch_size: int = 32
    evaluate_every: str = "4000 steps"
    checkpoint_every: str = "1000 steps"
    eval_batch_size: int = field(default=8, metadata={"help": "Images a step of evaluation, in every process."})


def main(arguments: SegmentArguments) -> dict[str, Any]:
    """Train, evaluate and export; returns the content of `all_results.json`."""
    accelerator = create_accelerator(arguments)
    splits = load_splits(arguments, segmentation=True)
    columns = [arguments.image_column, arguments.label_column]

    torch.manual_seed(arguments.seed)
    model = build_model(arguments, splits.label_names)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # The few large crops of one process are too few for the means of a head's batch norms.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    processor = build_processor(arguments, model.config)
    optimizer = create_optimizer(model, arguments)
    num_labels = model.config.num_labels
    transform = SegmentationTransform(arguments, num_labels, processor.image_mean, processor.image_std)
    samples = TrainingSamples(splits.train, columns, transform, arguments.seed)
    collator = SegmentationCollator(processor, LabelReader(arguments, num_labels), arguments)
    validation = create_evaluation_loader(splits.validation, columns, collator, arguments, accelerator)

    with TrainingLoop(accelerator, arguments, model, processor, optimizer, samples, metric="mean_iou") as loop:
        for images, labels in loop:
            loss = loop.model(pixel_values=images, labels=labels).loss
            if arguments.loss_average == "all":
                loss = loss * (labels != IGNORE_INDEX).float().mean()
            loop.update(loss)
            if loop.evaluation_due:
                test = (loop.evaluation_model, processor, validation)
                metrics = evaluate(*test, accelerator, arguments)
                loop.record(metrics, examples=partial(draw_examples, *test, arguments))
                loop.print(
                    "IoU: " + ", ".join(f"{name} {iou:.3f}" for name, iou in metrics["per_category_iou"].items())
                )
    return loop.finish(num_train_images=len(splits.train), num_validation_images=len(splits.validation))


def build_config(arguments: SegmentArguments, label_names: list[str] | None) -> PreTrainedConfig:
    """The configuration of the pretrained model, with the names of the classes, the head and the fields to change.

    Raises ValueError where there is no such model, field, or head for its family, or where the number of classes is
    given twice and differs.
    """
    if arguments.pretrained is None:
        raise ValueError("Name the model to start from with --pretrained: a folder or a Hub name.")
    if label_names is None:
        raise ValueError("The data does not name its classes: give --label_names, a list or a JSON file {id: name}.")
    try:
        source = AutoConfig.from_pretrained(arguments.pretrained)
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no model at {arguments.pretrained}: {str(error).splitlines()[0]}") from None
    source = getattr(source, "backbone_config", None) or source
    if not isinstance(source, FamilyConfigMixin):
        raise ValueError(
            f"{arguments.pretrained} is a {source.model_type}, which is none of the families of this package."
        )
    for name, given, known in (
        (f"A {source.model_type}", arguments.model, {f.name for f in fields(source)} | {"num_labels"}),
        ("A UPerNet", arguments.upernet, {f.name for f in fields(transformers.UperNetConfig)}),
    ):
        if unknown := sorted(set(given) - known):
            raise ValueError(f"{name} configuration has no field {unknown[0]!r}.")
    num_labels = arguments.model.get("num_labels", len(label_names))
    if num_labels != len(label_names):
        raise ValueError(f"model.num_labels is {num_labels}, but the data has {len(label_names)} classes.")
    names = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    # Which stages a backbone returns belongs to its head.
    values = {k: v for k, v in source.to_dict().items() if k not in ("out_features", "out_indices", "stage_names")}
    values.update({k: v for k, v in arguments.model.items() if k != "num_labels"})
    is_paca = source.model_type == "pacavit"
    if arguments.head == "paca" and not is_paca:
        raise ValueError(
            f"The PaCa head reads four stages of a pacavit; for a {source.model_type} choose probe or upernet."
        )
    if arguments.head != "upernet":
        head = {"segmentation_head_type": "paca" if arguments.head == "paca" else "linear"} if is_paca else {}
    elif any(f.name == "feature_pyramid" for f in fields(source)):
        head = {"feature_pyramid": True}
    else:
        head = {"out_indices": [1, 2, 3, 4]}
    try:
        config = type(source)(**{**values, **names, **head})
        if arguments.head != "upernet":
            return config
        return transformers.UperNetConfig(backbone_config=config, **names, **arguments.upernet)
    except StrictDataclassError as error:
        raise ValueError(describe(error)) from None


def build_model(arguments: SegmentArguments, label_names: list[str] | None) -> PreTrainedModel:
    """The pretrained model with a fresh head that knows the names of the classes, frozen below it where asked.

    Tensors of another shape than the configuration asks for start anew, which is printed.
    Raises ValueError where the checkpoint holds nothing of the encoder, or as `build_config` does.
    """
    config = build_config(arguments, label_names)
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    is_upernet = AutoConfig.from_pretrained(arguments.pretrained).model_type == "upernet"
    if arguments.head == "upernet" and is_upernet:
        model, info = UperNetForSemanticSegmentation.from_pretrained(arguments.pretrained, config=config, **options)
        encoder = f"backbone.{model.backbone.base_model_prefix}"
    elif arguments.head == "upernet":
        with torch.device("meta"):
            backbone_class = type(AutoBackbone.from_config(config.backbone_config))
        backbone, info = backbone_class.from_pretrained(arguments.pretrained, config=config.backbone_config, **options)
        model = UperNetForSemanticSegmentation(config)
        model.backbone.load_state_dict(backbone.state_dict())
        encoder = backbone.base_model_prefix
    else:
        # The encoder of a UPerNet stands in its backbone.
        options["key_mapping"] = {r"^backbone\.": ""} if is_upernet else None
        model, info = AutoModelForSemanticSegmentation.from_pretrained(arguments.pretrained, config=config, **options)
        encoder = model.base_model_prefix
    fresh = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    fresh = sorted(name for name in fresh if name.startswith(f"{encoder}."))
    if len(fresh) >= len(model.base_model.state_dict()):
        raise ValueError(f"{arguments.pretrained} holds no weights of its {model.base_model.config.model_type}.")
    if fresh:
        console.print(f"Starts anew, because the checkpoint has no such tensor: {', '.join(fresh)}.", markup=False)
    if arguments.freeze:
        model.freeze_backbone()
    elif arguments.head != "upernet":
        # The heads read before the final norm. Processes wait for the gradient of whatever may have one.
        for name, module in model.base_model.named_children():
            if name.endswith("layernorm"):
                module.requires_grad_(False)
    return model


def build_processor(arguments: SegmentArguments, config: PreTrainedConfig) -> LocAtViTImageProcessor:
    """Resizes to the test size of the recipe, whole images; UPerNet's logits have the size of the image."""
    settings = {
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
