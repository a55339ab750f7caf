"""Accuracy of a linear classifier that is trained on the frozen encoder.

accelerate launch -m training.evaluation.linear_probe --pretrained FOLDER --dataset FOLDER --output_dir runs/probe
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoModelForImageClassification

from training import finetune
from training.engine.arguments import option, run_program
from training.engine.distributed import create_accelerator
from training.evaluation.results import Meter, write_result
from training.finetune import FinetuneArguments


@strict
@dataclass(kw_only=True)
class LinearProbeArguments(FinetuneArguments):
    """Settings of `evaluation.linear_probe`; the defaults are the protocol of DINO."""

    freeze: Literal[True] = option(True, "Always: only the classifier is trained.")
    length: str = "100 epochs"
    warmup: str = "0 steps"
    schedule: Literal["linear", "cosine", "constant", "step"] = "cosine"
    optimizer: str = option("momentum", "Any optimizer name that timm knows.")
    learning_rate: float | int = option(1e-3, "Peak learning rate, of 256 images per step.")
    learning_rate_batch_size: int | None = 256
    final_learning_rate: float | int = 0.0
    weight_decay: float | int = 0.0
    layer_decay: float | int | None = None
    max_gradient_norm: float | int | None = None
    batch_size: int = 1024
    interpolation: Literal["random", "bilinear", "bicubic"] = "bilinear"
    auto_augment: str | None = None
    random_erasing: float | int = 0.0
    label_smoothing: float | int = 0.0


def main(arguments: LinearProbeArguments) -> dict[str, Any]:
    """Train and evaluate the classifier; returns the content of `linear_probe.json`.

    Images a second are those of the training; its metrics are those of the exported classifier.
    """
    results = finetune.main(arguments)
    if arguments.dry_run:
        return results
    model = AutoModelForImageClassification.from_pretrained(Path(str(arguments.output_dir)) / "model")
    names = "images_per_second", "updates", "num_train_images", "num_validation_images"
    meter, metrics = Meter(create_accelerator(arguments)), results["exported"]["metrics"]
    return write_result(meter, arguments, metrics, model, **{name: results[name] for name in names})


if __name__ == "__main__":
    run_program(main, LinearProbeArguments)
