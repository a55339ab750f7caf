"""Top-1 and top-5 accuracy of a classifier.

accelerate launch -m training.evaluation.classification --pretrained FOLDER --dataset FOLDER --output_dir runs/results
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.dataclasses import strict
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from training.data import create_evaluation_loader
from training.engine.arguments import run_program
from training.evaluation.results import EvaluationArguments, Meter, load_validation, start_evaluation, write_result
from training.metrics import compute_over_processes, load_metric
from training.tasks.checkpoint_loading import load_pretrained, load_processor
from training.tasks.classification import collate


@strict
@dataclass(kw_only=True)
class ClassificationArguments(EvaluationArguments):
    """Settings of `evaluation.classification`."""


def main(arguments: ClassificationArguments) -> dict[str, Any]:
    """Evaluate on the validation split; returns the content of `classification.json`."""
    accelerator, name = start_evaluation(arguments), str(arguments.pretrained)
    model = load_classifier(name).to(accelerator.device).eval()
    validation, label_names = load_validation(arguments)
    classes = match_labels(label_names or [], model.config, name)
    columns = [arguments.image_column, arguments.label_column]
    processor = load_processor(name, model.config)
    loader = create_evaluation_loader(validation, columns, partial(collate, processor), arguments, accelerator)
    meter = Meter(accelerator)
    with meter.measure():
        metrics = evaluate(model, loader, accelerator, meter, classes)
    measured = meter.report()
    details = {"num_images": len(validation)}
    return write_result(
        accelerator, arguments, "classification", arguments.validation_split, metrics, model, measured, **details
    )


def load_classifier(pretrained: str) -> PreTrainedModel:
    """A classifier of ours, or a plain ViT as it is. Raises ValueError for a checkpoint without a classifier."""
    model, fresh = load_pretrained(AutoModelForImageClassification, pretrained, keep_plain=True)
    if any(name.startswith("classifier.") for name in fresh):
        raise ValueError(f"{pretrained} has no classifier: train one with `python -m training.finetune` first.")
    return model


def match_labels(label_names: list[str], config: PreTrainedConfig, pretrained: str) -> torch.Tensor:
    """The model's class id of every class of the data: by name, or by number where one side has no names.

    Raises:
        ValueError: Where neither fits.
    """
    ids = {name: label for label, name in config.id2label.items()}
    if all(name in ids for name in label_names):
        return torch.tensor([ids[name] for name in label_names])
    unnamed = all(name == str(label) for label, name in enumerate(label_names))
    generic = all(name == f"LABEL_{label}" for name, label in ids.items())
    if (generic and len(label_names) == len(ids)) or (unnamed and len(label_names) <= len(ids)):
        return torch.arange(len(label_names))
    odd = next(name for name in label_names if name not in ids)
    raise ValueError(
        f"The data has {len(label_names)} classes, of which {odd!r} is none of the {len(ids)} of {pretrained}."
    )


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, loader: DataLoader, accelerator: Accelerator, meter: Meter, classes: torch.Tensor
) -> dict[str, float]:
    """Accuracy over all batches of all processes. classes: the model's class id of every label."""
    metric = load_metric("accuracy", top_k=min(5, model.config.num_labels))
    for pixel_values, labels in loader:
        with accelerator.autocast():
            logits = model(pixel_values=pixel_values.to(accelerator.device)).logits
        ranked = logits.topk(metric.top_k).indices.cpu()
        metric.add_batch(predictions=ranked if metric.top_k > 1 else ranked[:, 0], references=classes[labels])
        meter.images += len(labels)
    return compute_over_processes(accelerator, metric)


if __name__ == "__main__":
    run_program(main, ClassificationArguments)
