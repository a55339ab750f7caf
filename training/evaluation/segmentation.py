"""Mean IoU of a segmentation model, at the size of the labels.

accelerate launch -m training.evaluation.segmentation --pretrained FOLDER --dataset FOLDER --output_dir runs/results
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.dataclasses import strict

from locatvit_hf.inference import Checkpoint, InferenceArguments
from training.data import create_evaluation_loader
from training.data.label_maps import LabelArguments, LabelReader
from training.engine.arguments import run_program
from training.evaluation import results
from training.tasks.segmentation.evaluation import SegmentationCollator, evaluate


@strict
@dataclass(kw_only=True)
class SegmentationArguments(results.EvaluationArguments, LabelArguments, InferenceArguments):
    """Settings of `evaluation.segmentation`."""

    eval_batch_size: int = 8


def main(arguments: SegmentationArguments) -> dict[str, Any]:
    """Evaluate on the validation split; returns the content of `segmentation.json`."""
    accelerator = results.start_evaluation(arguments)
    # The precision is that of the settings (mixed_precision), not the one in which the weights are stored.
    segmenter = Checkpoint(str(arguments.pretrained)).load_segmenter(
        arguments, dtype=torch.float32, device=accelerator.device
    )
    validation, label_names = results.load_validation(arguments, segmentation=True)
    own, num_labels = list(segmenter.id2label.values()), len(segmenter.id2label)
    if label_names is not None and len(label_names) != num_labels:
        raise ValueError(f"{arguments.pretrained} has {num_labels} classes, but the data has {len(label_names)}.")
    differing = [pair for pair in zip(label_names or [], own, strict=False) if pair[0] != pair[1]]
    if differing:
        results.tell(
            accelerator,
            f"The data and {arguments.pretrained} name {len(differing)} of {num_labels} classes differently, the first "
            f"{differing[0][0]!r} and {differing[0][1]!r}: label maps are read by the model's names and their order.",
        )
    collator = SegmentationCollator(segmenter.processor, LabelReader(arguments, num_labels), arguments)
    columns = [arguments.image_column, arguments.label_column]
    loader = create_evaluation_loader(validation, columns, collator, arguments, accelerator)
    meter = results.Meter(accelerator)
    with meter.measure():
        metrics = evaluate(segmenter, meter.counted(loader), accelerator, partial(results.tell, accelerator))
    return results.write_result(meter, arguments, metrics, segmenter.model, num_images=len(validation))


if __name__ == "__main__":
    run_program(main, SegmentationArguments)
