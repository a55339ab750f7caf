"""Image classification: augmentation and mixing, the objective, and the training of a classifier."""

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from huggingface_hub.dataclasses import strict
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF
from transformers import PreTrainedModel

from locatvit_hf import LocAtViTImageProcessor
from locatvit_hf.utils.images import to_rgb
from training.data import Splits, TrainingSamples, create_evaluation_loader, describe_data
from training.data.images import crop_and_resize
from training.engine.arguments import option
from training.engine.loop import TrainingLoop
from training.engine.optimization import create_optimizer
from training.engine.plotting import caption, restore_image
from training.engine.schedule import Schedule
from training.engine.settings import ProgramArguments
from training.metrics import compute_over_processes, load_metric
from training.tasks.distillation import Distillation, DistillationArguments

NUM_EXAMPLES = 16


def _posterize(image: Image.Image, bits: int, **options) -> Image.Image:
    """At its strongest, timm keeps zero bits, which means black; newer versions of Pillow refuse that number."""
    return ImageOps.posterize(image, bits) if 0 < bits < 8 else image if bits else Image.new(image.mode, image.size)


NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize))


@strict
@dataclass(kw_only=True)
class ClassificationAugmentation:
    """Augmentation and label mixing of image classification."""

    crop_scale: list[float | int] = option(
        [0.08, 1.0], "Fraction of the area that a random crop keeps.", least=0, interval=True
    )
    crop_ratio: list[float | int] = option(
        [3 / 4, 4 / 3], "Width of a random crop relative to its height, from and to.", least=0, interval=True
    )
    horizontal_flip: float | int = option(0.5, "Probability of mirroring an image.", least=0, most=1)
    auto_augment: str | None = option("rand-m9-mstd0.5-inc1", "timm's notation for RandAugment, AutoAugment, AugMix.")
    interpolation: Literal["random", "bilinear", "bicubic"] = option(
        "random", "Of the random crops; random draws one of the other two for each image."
    )
    random_erasing: float | int = option(
        0.25, "Probability that a rectangle of an image is replaced by noise.", least=0, most=1
    )
    mixup: float | int = option(
        0.8, "Strength of mixing images of a batch: the parameter of its beta distribution; 0 for none.", least=0
    )
    cutmix: float | int = option(
        1.0, "Strength of pasting images of a batch into each other, as `mixup`; 0 for none.", least=0
    )
    label_smoothing: float | int = option(0.1, "Fraction of a label that is spread over all classes.", least=0, most=1)
    loss: Literal["cross_entropy", "binary_cross_entropy"] = option(
        "cross_entropy", "The binary one asks for every class whether it is there."
    )
    repeated_augmentation: int = option(1, "Times that an image occurs in its batch, each augmented anew.", least=1)
    image_sizes: list[int] = option(
        [], "Progressive size: the run's equal parts train at these sizes in pixels, as [128, 176, 224].", least=1
    )


@strict
@dataclass(kw_only=True)
class ClassifierArguments(ProgramArguments, ClassificationAugmentation):
    """What every program that trains a classifier takes."""


class ClassificationTransform:
    """Maps (image, label) to (normalized pixels (3, height, width), label).

    Args:
        image_size: Pixels, one number or [height, width].
        mean: Of the three channels, in 0 to 1.
        std: Of the three channels, in 0 to 1.
        num_epochs: Of the run, over which progressive sizes are distributed.
    """

    def __init__(
        self,
        arguments: ClassificationAugmentation,
        image_size: int | list[int],
        mean: list[float],
        std: list[float],
        num_epochs: float = 1.0,
    ):
        try:
            crop, augment, _ = create_transform(
                image_size if isinstance(image_size, int) else tuple(image_size),
                is_training=True,
                scale=tuple(arguments.crop_scale),
                ratio=tuple(arguments.crop_ratio),
                hflip=arguments.horizontal_flip,
                color_jitter=None,
                auto_augment=arguments.auto_augment,
                interpolation=arguments.interpolation,
                mean=tuple(mean),
                separate=True,
            )
        except (AssertionError, KeyError, ValueError):
            if (given := arguments.auto_augment) is None:
                raise
            raise ValueError(f"auto_augment is in timm's notation, rand-m9-mstd0.5-inc1, not {given!r}.") from None
        self.crop, *flip = crop.transforms
        self.sizes, self.num_epochs = arguments.image_sizes, num_epochs
        kinds = self.crop.interpolation
        self.interpolations = kinds if isinstance(kinds, list | tuple) else [kinds]
        self.augment = v2.Compose([*flip, *augment.transforms, v2.Identity()])
        self.mean, self.std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        # Where images are mixed, a rectangle is erased afterwards, see `classification_objective`.
        self.erase = _random_erasing(0.0 if mixes(arguments) else arguments.random_erasing)

    def __call__(self, image: Image.Image, label: int) -> tuple[torch.Tensor, int]:
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        box = (left, top, left + width, top + height)
        image = crop_and_resize(to_rgb(image), box, self.crop.size, random.choice(self.interpolations))
        pixels = torch.from_numpy(np.array(self.augment(image))).permute(2, 0, 1)
        pixels = tvF.rgb_to_grayscale(pixels) if len(self.mean) == 1 else pixels
        pixels = pixels.contiguous().float().sub_(self.mean).div_(self.std)
        return self.erase(pixels), label

    def at_epoch(self, epoch: int) -> "ClassificationTransform":
        """The transform at the image size of an epoch."""
        if not self.sizes:
            return self
        part = min(int(epoch / self.num_epochs * len(self.sizes)), len(self.sizes) - 1)
        resized = copy.copy(self)
        resized.crop = copy.copy(self.crop)
        resized.crop.size = (self.sizes[part], self.sizes[part])
        return resized


def mixes(arguments: ClassificationAugmentation) -> bool:
    """Tell whether mixup or cutmix mixes the images of a batch."""
    return bool(arguments.mixup or arguments.cutmix)


def _random_erasing(probability: float, device: torch.device | str = "cpu") -> RandomErasing:
    return RandomErasing(probability, mode="pixel", max_count=1, device=device)


def classification_objective(
    arguments: ClassificationAugmentation, num_labels: int
) -> tuple[Callable[[torch.Tensor, torch.Tensor], tuple], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """The mixing of a batch, (images, labels) to (images, targets), and the loss of (logits, targets) that fits it.

    Images are normalized (batch, channels, height, width). Where they are mixed, a rectangle of some is erased
    afterwards, as the loader of timm does: in the other order noise would be mixed into other images, and cut with
    them. What is erased is drawn from Python's stream of the process, and the noise from that of the device. Mixing,
    and with it erasing, acts inside the batch of one process, so its outcome depends on how a global batch is split.
    """
    smoothing = arguments.label_smoothing
    binary = BinaryCrossEntropy(smoothing) if arguments.loss == "binary_cross_entropy" else None
    if not mixes(arguments):
        return lambda images, labels: (images, labels), binary or LabelSmoothingCrossEntropy(smoothing)
    mixup = Mixup(arguments.mixup, arguments.cutmix, label_smoothing=smoothing, num_classes=num_labels)

    def mix_then_erase(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = mixup(images, labels)
        return _random_erasing(arguments.random_erasing, images.device)(images), targets

    return mix_then_erase, binary or SoftTargetCrossEntropy()


def train_classifier(
    arguments: ClassifierArguments,
    accelerator: Accelerator,
    schedule: Schedule,
    splits: Splits,
    model: PreTrainedModel,
    **loop_options: Any,
) -> dict[str, Any]:
    """Train, evaluate and export a classifier; returns the content of `all_results.json`.

    Args:
        arguments: Settings of the program, with those of distillation where there may be a teacher.
        loop_options: Of `TrainingLoop`.
    """
    columns = [arguments.image_column, arguments.label_column]
    images = schedule.images_per_pass
    if mixes(arguments) and images % 2:
        raise ValueError(f"mixup and cutmix pair images: the {images} that a process handles at once must be even.")
    processor = LocAtViTImageProcessor.from_model_config(model.config)
    optimizer = create_optimizer(model, arguments)
    mix, criterion = classification_objective(arguments, model.config.num_labels)
    statistics, num_epochs = (processor.image_mean, processor.image_std), schedule.epochs(schedule.total)
    transform = ClassificationTransform(arguments, model.config.image_size, *statistics, num_epochs)
    distill = None
    if isinstance(arguments, DistillationArguments) and arguments.teacher is not None:
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


def collate(processor: LocAtViTImageProcessor, rows: list[tuple]) -> tuple[torch.Tensor, list[int]]:
    """Rows (image, label) as (pixel_values, labels), with the processor that goes with the exported model."""
    images, labels = zip(*rows, strict=True)
    return processor(list(images), return_tensors="pt")["pixel_values"], list(labels)


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    loader: Iterable,
    accelerator: Accelerator,
    top_k: int = 1,
    classes: torch.Tensor | None = None,
) -> dict[str, float]:
    """Accuracy over all batches of all processes, and that of the `top_k` best classes where this is above 1.

    Args:
        loader: Batches of `collate`.
        classes: The model's class id of every label; None where they are the same.
    """
    metric = load_metric("accuracy", top_k=top_k)
    model.eval()
    for pixel_values, labels in loader:
        with accelerator.autocast():
            logits = model(pixel_values=pixel_values.to(accelerator.device)).logits
        predictions = logits.argmax(dim=-1) if top_k == 1 else logits.topk(top_k).indices
        metric.add_batch(predictions=predictions.cpu(), references=labels if classes is None else classes[labels])
    return compute_over_processes(accelerator, metric)


@torch.inference_mode()
def draw_predictions(model: PreTrainedModel, loader: DataLoader, accelerator: Accelerator) -> list[Image.Image]:
    """The first images of the validation split over the class that each is taken for, red where that is wrong."""
    pixel_values, labels = next(iter(loader))
    pixel_values, labels = pixel_values[:NUM_EXAMPLES].to(accelerator.device), labels[:NUM_EXAMPLES]
    with accelerator.autocast():
        confidences, classes = model.eval()(pixel_values=pixel_values).logits.float().softmax(dim=-1).max(dim=-1)
    config, names = model.config, model.config.id2label
    return [
        caption(
            restore_image(pixels, config.image_mean, config.image_std),
            f"{names[guess]} {confidence:.2f}",
            "green" if guess == label else "red",
        )
        for pixels, confidence, guess, label in zip(
            pixel_values.cpu(), confidences.tolist(), classes.tolist(), labels, strict=True
        )
    ]
