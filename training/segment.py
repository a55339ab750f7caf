"""Semantic segmentation: the paper's probe on a frozen model, or full fine-tuning.

accelerate launch training/segment.py --config training/recipes/segment/digits.yaml --pretrained runs/digits/model
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator
from huggingface_hub.dataclasses import strict
from torch.utils.data import DataLoader
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from locatvit_hf import LocAtViTImageProcessor
from training.arguments import DataArguments, OptimizationArguments, RunArguments, run_program
from training.augmentation import SegmentationAugmentation, SegmentationTransform, read_labels
from training.data import TrainingSamples, create_evaluation_loader, load_splits
from training.loop import TrainingLoop, create_accelerator
from training.metrics import compute_over_processes, load_metric
from training.optimization import create_optimizer


@strict
@dataclass(kw_only=True)
class SegmentArguments(DataArguments, OptimizationArguments, SegmentationAugmentation, RunArguments):
    """Settings of `segment`; the defaults are the paper's frozen probe, with the model's own mean and std."""

    pretrained: str | None = field(default=None, metadata={"help": "Folder or Hub name of the model to start from."})
    freeze: bool = field(default=True, metadata={"help": "Train the head only."})
    length: str = "20000 steps"
    warmup: str = "25 %"
    final_learning_rate: float | int = 1e-11
    weight_decay: float | int = 0.01
    max_gradient_norm: float | int | None = None
    batch_size: int = 32
    evaluate_every: str = "4000 steps"
    checkpoint_every: str = "1000 steps"


def main(arguments: SegmentArguments) -> dict[str, Any]:
    """Train, evaluate and export; returns the content of `all_results.json`."""
    accelerator = create_accelerator(arguments)
    splits = load_splits(arguments, segmentation=True)
    columns = [arguments.image_column, arguments.label_column]

    torch.manual_seed(arguments.seed)
    model = build_model(arguments, splits.label_names)
    processor = LocAtViTImageProcessor.from_model_config(
        model.config, segmentation=True, do_reduce_labels=arguments.reduce_labels
    )
    optimizer = create_optimizer(model, arguments)
    num_labels = model.config.num_labels
    transform = SegmentationTransform(arguments, num_labels, processor.image_mean, processor.image_std)
    samples = TrainingSamples(splits.train, columns, transform, arguments.seed)
    validation = create_evaluation_loader(
        splits.validation, columns, partial(collate, processor, num_labels), arguments, accelerator
    )

    with TrainingLoop(accelerator, arguments, model, processor, optimizer, samples, metric="mean_iou") as loop:
        for images, labels in loop:
            loop.update(loop.model(pixel_values=images, labels=labels).loss)
            if loop.evaluation_due:
                loop.record(evaluate(loop.evaluation_model, processor, validation, accelerator))
    return loop.finish(num_train_images=len(splits.train), num_validation_images=len(splits.validation))


def build_model(arguments: SegmentArguments, label_names: list[str] | None) -> PreTrainedModel:
    """The pretrained model with a fresh head that knows the names of the classes, frozen below it where asked."""
    if arguments.pretrained is None:
        raise ValueError("Name the model to start from with --pretrained: a folder or a Hub name.")
    if label_names is None:
        raise ValueError("The data does not name its classes: give --label_names, a list or a JSON file {id: name}.")
    model = AutoModelForSemanticSegmentation.from_pretrained(
        arguments.pretrained,
        id2label=dict(enumerate(label_names)),
        label2id={name: i for i, name in enumerate(label_names)},
        ignore_mismatched_sizes=True,
    )
    if arguments.freeze:
        model.freeze_backbone()
    return model


def collate(
    processor: LocAtViTImageProcessor, num_labels: int, rows: list[tuple]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rows (image, map) as pixel_values and a list of label maps at their own sizes."""
    images = [image for image, _ in rows]
    labels = [read_labels(image, label_map, num_labels, processor.do_reduce_labels) for image, label_map in rows]
    return processor(images, return_tensors="pt")["pixel_values"], labels


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, processor: LocAtViTImageProcessor, loader: DataLoader, accelerator: Accelerator
) -> dict[str, Any]:
    """Mean IoU at the size of the labels, over all batches of all processes."""
    metric = load_metric("mean_iou", num_labels=model.config.num_labels)
    model.eval()
    for pixel_values, labels in loader:
        with accelerator.autocast():
            outputs = model(pixel_values=pixel_values.to(accelerator.device))
        sizes = [tuple(label_map.shape) for label_map in labels]
        predictions = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        metric.add_batch(predictions=[prediction.cpu() for prediction in predictions], references=labels)
    return compute_over_processes(accelerator, metric)


if __name__ == "__main__":
    run_program(main, SegmentArguments)
