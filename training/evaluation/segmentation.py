"""Mean IoU of a segmentation model, at the size of the labels.

accelerate launch -m training.evaluation.segmentation --pretrained FOLDER --dataset FOLDER --output_dir runs/results
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from locatvit_hf import LocAtViTImageProcessor
from locatvit_hf.segmentation import InferenceArguments
from training.augmentation import LabelArguments, LabelReader
from training.data import create_evaluation_loader
from training.engine.arguments import run_program
from training.evaluation.results import (
    EvaluationArguments,
    Meter,
    load_validation,
    start_evaluation,
    tell,
    write_result,
)
from training.inference import SegmentationCollator, evaluate


@strict
@dataclass(kw_only=True)
class SegmentationArguments(EvaluationArguments, LabelArguments, InferenceArguments):
    """Settings of `evaluation.segmentation`."""

    eval_batch_size: int = 8


def main(arguments: SegmentationArguments) -> dict[str, Any]:
    """Evaluate on the validation split; returns the content of `segmentation.json`."""
    accelerator = start_evaluation(arguments)
    model, processor = load_segmenter(arguments.pretrained)
    model.to(accelerator.device)
    validation, label_names = load_validation(arguments, segmentation=True)
    num_labels = model.config.num_labels
    if label_names is not None and len(label_names) != num_labels:
        raise ValueError(f"{arguments.pretrained} has {num_labels} classes, but the data has {len(label_names)}.")
    collator = SegmentationCollator(processor, LabelReader(arguments, num_labels), arguments)
    columns = [arguments.image_column, arguments.label_column]
    loader = create_evaluation_loader(validation, columns, collator, arguments, accelerator)
    meter = Meter(accelerator)
    with meter.measure():
        metrics = evaluate(model, processor, counted(loader, meter), accelerator, arguments, tell(accelerator))
    return write_result(
        accelerator,
        arguments,
        "segmentation",
        arguments.validation_split,
        metrics,
        model,
        meter.report(),
        num_images=len(validation),
    )


def load_segmenter(pretrained: str) -> tuple[PreTrainedModel, LocAtViTImageProcessor]:
    """A segmentation model and its processor.

    Raises ValueError where there is none, or a checkpoint without a segmentation head.
    """
    try:
        # The precision is that of the settings (mixed_precision), not the one in which the weights are stored.
        model, info = AutoModelForSemanticSegmentation.from_pretrained(
            pretrained, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no segmentation model at {pretrained}: {str(error).splitlines()[0]}") from None
    if info["missing_keys"]:
        raise ValueError(
            f"{pretrained} is no segmentation model: it lacks {sorted(info['missing_keys'])[0]}; train a head with "
            "`python -m training.segment` first."
        )
    try:
        processor = LocAtViTImageProcessor.from_pretrained(pretrained)
    except OSError:
        config = getattr(model.config, "backbone_config", None) or model.config
        stride = {"output_stride": [1, 1]} if config is not model.config else {}
        processor = LocAtViTImageProcessor.from_model_config(config, segmentation=True, **stride)
    return model.eval(), processor


def counted(loader: Iterable, meter: Meter) -> Iterator[Any]:
    """The batches of a loader; their images are counted."""
    for images, labels in loader:
        meter.images += len(labels)
        yield images, labels


if __name__ == "__main__":
    run_program(main, SegmentationArguments)
