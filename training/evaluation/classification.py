"""Top-1 and top-5 accuracy of a classifier.

accelerate launch -m training.evaluation.classification --pretrained FOLDER --dataset FOLDER --output_dir runs/results
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from training.data import create_evaluation_loader
from training.engine.arguments import run_program
from training.evaluation.results import EvaluationArguments, Meter, load_validation, start_evaluation, write_result
from training.tasks.checkpoint_loading import load_pretrained, load_processor
from training.tasks.classification import collate, evaluate


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
        metrics = evaluate(model, meter.counted(loader), accelerator, min(5, model.config.num_labels), classes)
    return write_result(meter, arguments, metrics, model, num_images=len(validation))


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


if __name__ == "__main__":
    run_program(main, ClassificationArguments)
