"""Mean IoU of a segmentation model, at the size of the labels.

accelerate launch -m training.evaluation.segmentation --pretrained FOLDER --dataset FOLDER --output_dir runs/results
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict

from locatvit_hf.inference import Checkpoint, InferenceArguments
from training.data import create_evaluation_loader
from training.data.label_maps import LabelArguments, LabelReader
from training.engine.arguments import run_program
from training.evaluation.results import (
    EvaluationArguments,
    Meter,
    load_validation,
    start_evaluation,
    tell,
    write_result,
)
from training.tasks.segmentation.evaluation import SegmentationCollator, evaluate


@strict
@dataclass(kw_only=True)
class SegmentationArguments(EvaluationArguments, LabelArguments, InferenceArguments):
    """Settings of `evaluation.segmentation`."""

    eval_batch_size: int = 8


def main(arguments: SegmentationArguments) -> dict[str, Any]:
    """Evaluate on the validation split; returns the content of `segmentation.json`."""
    accelerator = start_evaluation(arguments)
    # The precision is that of the settings (mixed_precision), not the one in which the weights are stored.
    segmenter = Checkpoint(str(arguments.pretrained)).load_segmenter(
        arguments, dtype=torch.float32, device=accelerator.device
    )
    validation, label_names = load_validation(arguments, segmentation=True)
    own = list(segmenter.id2label.values())
    num_labels = len(own)
    if label_names is not None and len(label_names) != num_labels:
        raise ValueError(f"{arguments.pretrained} has {num_labels} classes, but the data has {len(label_names)}.")
    differing = [pair for pair in zip(label_names or [], own, strict=False) if pair[0] != pair[1]]
    if differing:
        tell(accelerator)(
            f"The data and {arguments.pretrained} name {len(differing)} of {num_labels} classes differently, the first "
            f"{differing[0][0]!r} and {differing[0][1]!r}: label maps are read by the model's names and their order."
        )
    collator = SegmentationCollator(segmenter.processor, LabelReader(arguments, num_labels), arguments)
    columns = [arguments.image_column, arguments.label_column]
    loader = create_evaluation_loader(validation, columns, collator, arguments, accelerator)
    meter = Meter(accelerator)
    with meter.measure():
        metrics = evaluate(segmenter, counted(loader, meter), accelerator, tell(accelerator))
    return write_result(
        accelerator,
        arguments,
        "segmentation",
        arguments.validation_split,
        metrics,
        segmenter.model,
        meter.report(),
        num_images=len(validation),
    )


def counted(loader: Iterable, meter: Meter) -> Iterator[Any]:
    """The batches of a loader; their images are counted."""
    for images, labels in loader:
        meter.images += len(labels)
        yield images, labels


if __name__ == "__main__":
    run_program(main, SegmentationArguments)
