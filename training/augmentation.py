"""Augmentation and regularisation of the recipes, by timm and torchvision; image and label map move together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF

IGNORE_INDEX = 255


def _posterize(image: Image.Image, bits: int, **options) -> Image.Image:
    """At its strongest, timm keeps zero bits, which means black; newer versions of Pillow refuse that number."""
    return ImageOps.posterize(image, bits) if 0 < bits < 8 else image if bits else Image.new(image.mode, image.size)


NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize))


@strict
@dataclass(kw_only=True)
class ClassificationAugmentation:
    """Augmentation and label mixing of image classification."""

    crop_scale: list[float | int] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Share of the area that a random crop keeps."}
    )
    crop_ratio: list[float | int] = field(default_factory=lambda: [3 / 4, 4 / 3])
    horizontal_flip: float | int = 0.5
    auto_augment: str | None = field(
        default="rand-m9-mstd0.5-inc1", metadata={"help": "timm's notation for RandAugment, AutoAugment, AugMix."}
    )
    random_erasing: float | int = 0.25
    mixup: float | int = 0.8
    cutmix: float | int = 1.0
    label_smoothing: float | int = 0.1


@strict
@dataclass(kw_only=True)
class SegmentationAugmentation:
    """Joint augmentation of images and label maps."""

    resize: int = field(default=512, metadata={"help": "Short side in pixels that the random scale refers to."})
    max_resize: int = field(default=2048, metadata={"help": "Longest side in pixels, before the random scale."})
    scale: list[float | int] = field(default_factory=lambda: [0.5, 2.0])
    crop_size: int = field(default=512, metadata={"help": "Side in pixels of the training crops."})
    max_class_share: float | int = field(
        default=0.75, metadata={"help": "Try crops until no class fills more of them than this."}
    )
    horizontal_flip: float | int = 0.5
    photometric_distortion: float | int = 0.5
    reduce_labels: bool = field(
        default=False, metadata={"help": "Label 0 means no class: 0 becomes 255, every other goes down by one."}
    )


class ClassificationTransform:
    """Maps (image, label) to (normalised pixels (3, height, width), label).

    image_size: pixels, one number or [height, width].
    mean, std: of the three channels, in 0 to 1.
    """

    def __init__(
        self, arguments: ClassificationAugmentation, image_size: int | list[int], mean: list[float], std: list[float]
    ):
        self.transform = create_transform(
            image_size if isinstance(image_size, int) else tuple(image_size),
            is_training=True,
            scale=tuple(arguments.crop_scale),
            ratio=tuple(arguments.crop_ratio),
            hflip=arguments.horizontal_flip,
            color_jitter=None,
            auto_augment=arguments.auto_augment,
            interpolation="random",
            mean=tuple(mean),
            std=tuple(std),
            re_prob=arguments.random_erasing,
            re_mode="pixel",
        )

    def __call__(self, image: Image.Image, label: int) -> tuple[torch.Tensor, int]:
        return self.transform(image.convert("RGB")), label


def classification_objective(
    arguments: ClassificationAugmentation, num_labels: int
) -> tuple[Callable[[torch.Tensor, torch.Tensor], tuple], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """The mixing of a batch, (images, labels) to (images, targets), and the loss of (logits, targets) that fits it.

    Mixing acts inside the batch of one process, so its outcome depends on how a global batch is split.
    """
    smoothing = arguments.label_smoothing
    if arguments.mixup or arguments.cutmix:
        mix = Mixup(arguments.mixup, arguments.cutmix, label_smoothing=smoothing, num_classes=num_labels)
        return mix, SoftTargetCrossEntropy()
    return lambda images, labels: (images, labels), LabelSmoothingCrossEntropy(smoothing)


class SegmentationTransform:
    """Maps (image, map) to (normalised pixels (3, crop, crop), labels (crop, crop) int64, 255 for no class).

    mean, std: of the three channels, in 0 to 1.
    Raises ValueError where image and map differ in size or a label is outside the classes.
    """

    def __init__(self, arguments: SegmentationAugmentation, num_labels: int, mean: list[float], std: list[float]):
        self.num_labels, self.reduce_labels = num_labels, arguments.reduce_labels
        low, high = (round(factor * arguments.resize) for factor in arguments.scale)
        fill = {tv_tensors.Image: [255 * channel for channel in mean], tv_tensors.Mask: IGNORE_INDEX}
        self.transform = v2.Compose(
            [
                v2.RandomShortestSize(range(low, high + 1), max_size=round(arguments.scale[1] * arguments.max_resize)),
                RandomCropOfClasses(arguments.crop_size, arguments.max_class_share, fill),
                v2.RandomHorizontalFlip(arguments.horizontal_flip),
                v2.RandomPhotometricDistort(p=arguments.photometric_distortion),
                v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __call__(self, image: Image.Image, label_map: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        labels = tv_tensors.Mask(read_labels(image, label_map, self.num_labels, self.reduce_labels))
        pixels, labels = self.transform(tv_tensors.Image(tvF.pil_to_tensor(image.convert("RGB"))), labels)
        return pixels.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)


def read_labels(image: Image.Image, label_map: Image.Image, num_labels: int, reduce_labels: bool) -> torch.Tensor:
    """The label map of an image as (height, width) int64.

    Raises ValueError where the sizes differ or a label is neither a class nor 255.
    """
    if label_map.size != image.size:
        raise ValueError(f"the label map is {label_map.size} pixels, but its image {image.size}.")
    labels = tvF.pil_to_tensor(label_map).squeeze(0).to(torch.int64)
    if labels.ndim != 2:
        raise ValueError(f"a label map has one channel, not {len(labels)}.")
    if reduce_labels:
        labels = torch.where((labels == 0) | (labels == IGNORE_INDEX), IGNORE_INDEX, labels - 1)
    known = labels[labels != IGNORE_INDEX]
    if known.numel() and not 0 <= known.min() <= known.max() < num_labels:
        raise ValueError(f"labels run from {known.min()} to {known.max()}, outside the {num_labels} classes.")
    return labels


class RandomCropOfClasses(v2.RandomCrop):
    """A square crop, padded where the image is smaller; drawn up to ten times until no class fills too much of it.

    size: side in pixels.
    max_class_share: of the pixels with a class.
    fill: padding value for every kind of input.
    """

    def __init__(self, size: int, max_class_share: float, fill: dict[type, Any]):
        super().__init__(size, pad_if_needed=True, fill=fill)
        self.max_class_share = max_class_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        if self.max_class_share >= 1:
            return super().make_params(flat_inputs)
        labels = next(entry for entry in flat_inputs if isinstance(entry, tv_tensors.Mask))
        for _ in range(10):
            params = super().make_params(flat_inputs)
            crop = super().transform(labels, params)
            counts = torch.unique(crop[crop != IGNORE_INDEX], return_counts=True)[1]
            if len(counts) > 1 and counts.max() < self.max_class_share * counts.sum():
                break
        return params
