"""Image-label training of a LocAtViT, or of the plain ViT that it is compared with.

accelerate launch -m training.pretrain --config training/recipes/pretrain/digits.yaml --output_dir runs/digits
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from locatvit_hf import LocAtViTImageProcessor
from locatvit_hf.hub.families import FAMILIES
from training.augmentation import ClassificationAugmentation, ClassificationTransform, classification_objective
from training.data import Splits, TrainingSamples, create_evaluation_loader, describe_data, load_splits
from training.engine.arguments import describe, option, run_program
from training.engine.distributed import create_accelerator
from training.engine.loop import TrainingLoop
from training.engine.optimization import create_optimizer
from training.engine.plotting import caption, restore_image
from training.engine.schedule import Schedule
from training.engine.settings import DataArguments, OptimizationArguments, RunArguments
from training.metrics import compute_over_processes, load_metric
from training.tasks.distillation import Distillation, DistillationArguments

NUM_EXAMPLES = 16


@strict
@dataclass(kw_only=True)
class PretrainArguments(
    DataArguments, OptimizationArguments, ClassificationAugmentation, DistillationArguments, RunArguments
):
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
    return train_classifier(arguments, accelerator, schedule, splits, build_model(arguments, splits.label_names))


def train_classifier(
    arguments: OptimizationArguments | RunArguments,
    accelerator: Accelerator,
    schedule: Schedule,
    splits: Splits,
    model: PreTrainedModel,
    **loop_options: Any,
) -> dict[str, Any]:
    """Train, evaluate and export a classifier; returns the content of `all_results.json`.

    arguments: settings with those of data, augmentation, optimisation and run, and of distillation where there is a
        `teacher`. loop_options: of `TrainingLoop`.
    """
    columns = [arguments.image_column, arguments.label_column]
    images = schedule.images_per_pass
    if (arguments.mixup or arguments.cutmix) and images % 2:
        raise ValueError(f"mixup and cutmix pair images: the {images} that a process handles at once must be even.")
    processor = LocAtViTImageProcessor.from_model_config(model.config)
    optimizer = create_optimizer(model, arguments)
    mix, criterion = classification_objective(arguments, model.config.num_labels)
    transform = ClassificationTransform(
        arguments,
        model.config.image_size,
        processor.image_mean,
        processor.image_std,
        num_epochs=schedule.epochs(schedule.total),
    )
    distill = None
    if getattr(arguments, "teacher", None) is not None:
        statistics = processor.image_mean, processor.image_std
        distill = Distillation(arguments, model.config.num_labels, *statistics, accelerator)
    samples = TrainingSamples(splits.train, columns, transform, arguments.seed)
    validation = create_evaluation_loader(
        splits.validation, columns, partial(collate, processor), arguments, accelerator
    )

    def describe() -> dict[str, Any]:
        described = describe_data(columns, splits.label_names, training=splits.train, validation=splits.validation)
        return described | ({"teacher": distill.fingerprint()} if distill is not None else {})

    loop_options = {"mix": mix, "data": describe, **loop_options}
    run = accelerator, arguments, schedule, model, processor, optimizer, samples
    loop = TrainingLoop(*run, metric="accuracy", **loop_options)
    with loop:
        for images, targets in loop:
            logits = loop.model(pixel_values=images).logits.float()
            loss, terms = criterion(logits, targets), {}
            if distill is not None:
                terms = distill(loss, logits, images)
                loss = terms.pop("loss")
            loop.update(loss, terms)
            if loop.evaluation_due:
                metrics = evaluate(loop.evaluation_model, validation, accelerator)
                loop.record(metrics, partial(draw_predictions, loop.evaluation_model, validation, accelerator))
    return loop.finish(num_train_images=len(splits.train), num_validation_images=len(splits.validation))


def build_model(arguments: PretrainArguments, label_names: list[str]) -> PreTrainedModel:
    """A fresh classifier with the names of the data's classes; unknown fields of `model` are errors."""
    num_labels = arguments.model.get("num_labels", len(label_names))
    if num_labels != len(label_names):
        raise ValueError(f"model.num_labels is {num_labels}, but the data has {len(label_names)} classes.")
    names = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    values = {k: v for k, v in arguments.model.items() if k != "num_labels"} | names
    return AutoModelForImageClassification.from_config(build_config(arguments.family, arguments.preset, values))


def build_config(family: str, preset: str | None, values: dict[str, Any]) -> PreTrainedConfig:
    """A configuration by the name of its family, a size of the paper and its fields; unknown ones are errors."""
    try:
        config_class = type(AutoConfig.for_model(family))
    except ValueError:  # which names every model of transformers
        raise ValueError(f"There is no family {family!r}; choose one of {', '.join(FAMILIES)}.") from None
    unknown = sorted(set(values) - {f.name for f in fields(config_class)} - {"id2label", "label2id"})
    if unknown:
        raise ValueError(f"A {family} configuration has no field {unknown[0]!r}.")
    try:
        return config_class.from_preset(preset, **values) if preset is not None else config_class(**values)
    except StrictDataclassError as error:
        raise ValueError(describe(error)) from None


def collate(processor: LocAtViTImageProcessor, rows: list[tuple]) -> tuple[torch.Tensor, list[int]]:
    """Rows (image, label) as (pixel_values, labels), with the processor that goes with the exported model."""
    images, labels = zip(*rows, strict=True)
    return processor(list(images), return_tensors="pt")["pixel_values"], list(labels)


@torch.inference_mode()
def evaluate(model: PreTrainedModel, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Accuracy over all batches of all processes."""
    metric = load_metric("accuracy")
    model.eval()
    for pixel_values, labels in loader:
        with accelerator.autocast():
            logits = model(pixel_values=pixel_values.to(accelerator.device)).logits
        metric.add_batch(predictions=logits.argmax(dim=-1).cpu(), references=labels)
    return compute_over_processes(accelerator, metric)


@torch.inference_mode()
def draw_predictions(model: PreTrainedModel, loader: DataLoader, accelerator: Accelerator) -> list[Image.Image]:
    """The first images of the validation split over the class that each is taken for, red where that is wrong."""
    pixel_values, labels = next(iter(loader))
    pixel_values, labels = pixel_values[:NUM_EXAMPLES].to(accelerator.device), labels[:NUM_EXAMPLES]
    with accelerator.autocast():
        shares, classes = model.eval()(pixel_values=pixel_values).logits.float().softmax(dim=-1).max(dim=-1)
    config, names = model.config, model.config.id2label
    return [
        caption(
            restore_image(pixels, config.image_mean, config.image_std),
            f"{names[guess]} {share:.2f}",
            "green" if guess == label else "red",
        )
        for pixels, share, guess, label in zip(
            pixel_values.cpu(), shares.tolist(), classes.tolist(), labels, strict=True
        )
    ]


if __name__ == "__main__":
    run_program(main, PretrainArguments)
