"""Image-label training of a LocAtViT, or of the plain ViT that it is compared with.

accelerate launch -m training.pretrain --config training/recipes/pretrain/digits.yaml --output_dir runs/digits
"""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoModelForImageClassification, PreTrainedModel

from training.data import load_splits
from training.engine.arguments import option, run_program
from training.engine.distributed import create_accelerator
from training.engine.schedule import Schedule
from training.tasks.checkpoint_loading import build_config, label_fields, without_num_labels
from training.tasks.classification import ClassifierArguments, train_classifier
from training.tasks.distillation import DistillationArguments


@strict
@dataclass(kw_only=True)
class PretrainArguments(ClassifierArguments, DistillationArguments):
    """Settings of `pretrain`; the defaults are the paper's ImageNet-1k recipe, in full precision.

    Stochastic depth (`model`) grows with the size of the model there: the recipes give it.
    """

    family: str = option("locatvit", "`model_type` of the configuration.")
    preset: str | None = option(None, "Sizes of the paper: tiny, small, base, large.")
    model: dict[str, Any] = option({}, "Fields of the configuration: --model.use_gaussian false.")


def main(arguments: PretrainArguments) -> dict[str, Any]:
    """Train, evaluate and export; returns the content of `all_results.json`."""
    accelerator = create_accelerator(arguments)
    splits = load_splits(arguments)
    schedule = Schedule.resolve(arguments, len(splits.train), accelerator.num_processes)
    torch.manual_seed(arguments.seed)
    return train_classifier(arguments, accelerator, schedule, splits, build_model(arguments, splits.label_names or []))


def build_model(arguments: PretrainArguments, label_names: list[str]) -> PreTrainedModel:
    """A fresh classifier with the names of the data's classes; unknown fields of `model` are errors."""
    values = without_num_labels(arguments.model, label_names) | label_fields(label_names)
    return AutoModelForImageClassification.from_config(build_config(arguments.family, arguments.preset, values))


if __name__ == "__main__":
    run_program(main, PretrainArguments)
