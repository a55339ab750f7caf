"""Augmentation and regularisation of the recipes, by timm and torchvision; image and label map move together."""

import copy
import functools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvF

from locatvit_hf.image_processing_locatvit import pil_to_rgb
from locatvit_hf.utils.images import TURNS, orientation_of
from locatvit_hf.utils.io import read_json
from training.data.images import crop_and_resize, to_rgb
from training.engine.arguments import option

IGNORE_INDEX = 255


def _posterize(image: Image.Image, bits: int, **options) -> Image.Image:
    """At its strongest, timm keeps zero bits, which means black; newer versions of Pillow refuse that number."""
    return ImageOps.posterize(image, bits) if 0 < bits < 8 else image if bits else Image.new(image.mode, image.size)


NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize))


@strict
@dataclass(kw_only=True)
class ClassificationAugmentation:
    """Augmentation and label mixing of image classification."""

    crop_scale: list[float | int] = option(
        [0.08, 1.0], "Share of the area that a random crop keeps.", least=0, interval=True
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
class LabelArguments:
    """How the pixels of a label map name their classes: as ids from 0, unless one of these says otherwise."""

    reduce_labels: bool = option(False, "Label 0 means no class: 0 becomes 255, every other goes down by one.")
    label_mapping: dict | str | None = option(
        None,
        "Class id of every id or, quoted as '#804080', of every colour in the masks, or a JSON file with "
        "that; what it leaves out becomes 255, no class.",
    )
    label_orientation: Literal["turned", "stored"] | None = option(
        None,
        "Whether masks belong to images turned as their EXIF orientation says, or to their pixels as they "
        "are stored and are to be turned too; by default the first, with a warning where it cannot be seen.",
    )


@strict
@dataclass(kw_only=True)
class ResizedLabelArguments(LabelArguments):
    """Label maps that are resized with their images."""

    label_interpolation: Literal["nearest-exact", "nearest"] = option(
        "nearest-exact",
        "How label maps are resized: nearest-exact takes the pixel around the same center as the image "
        "does; nearest is that of OpenCV and mmsegmentation, which lies up to half a pixel beside it.",
    )


@strict
@dataclass(kw_only=True)
class SegmentationAugmentation(ResizedLabelArguments):
    """Joint augmentation of images and label maps."""

    resize: int = option(512, "Short side in pixels, before the random scale and in evaluation.", least=1)
    max_resize: int = option(2048, "Longest side in pixels: larger images are made smaller.", least=1)
    scale: list[float | int] = option([0.5, 2.0], "Range of the random scale; [1, 1] for none.", least=0, interval=True)
    crop_size: int = option(512, "Side in pixels of the training crops.", least=1)
    max_class_share: float | int = option(
        0.75, "Try ten crops until no class fills more of one than this.", least=0, most=1
    )
    horizontal_flip: float | int = option(0.5, "Probability of mirroring an image.", least=0, most=1)
    photometric_distortion: float | int = option(
        0.5, "Probability of each change of brightness, contrast, saturation and hue.", least=0, most=1
    )
    augmentation_style: Literal["mmsegmentation", "torchvision"] = option(
        "mmsegmentation",
        "Whose changes of color and padding of small crops. mmsegmentation, as in the papers: brightness "
        "up to 32 of 255 levels more or less, hue up to a tenth of the circle, and zeros after normalization on "
        "the right and at the bottom. torchvision, as in the stored runs of docs/evidence.md: brightness times "
        "0.875 to 1.125, hue up to a twentieth, and the mean color on all sides.",
    )


class ClassificationTransform:
    """Maps (image, label) to (normalised pixels (3, height, width), label).

    image_size: pixels, one number or [height, width].
    mean, std: of the three channels, in 0 to 1.
    num_epochs: of the run, which progressive sizes are spread over.
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
        # Where images are mixed, `MixThenErase` erases afterwards.
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


class MixThenErase:
    """Mixes the images of a batch, then erases a rectangle of some, as the loader of timm does.

    In the other order noise would be mixed into other images, and cut with them. What is erased is drawn from Python's
    stream of the process, and the noise from that of the device.

    Args:
        mix: (images, labels) to (images, targets), of normalized images (batch, channels, height, width).
        random_erasing: Probability that a rectangle of an image is erased.
    """

    def __init__(self, mix: Callable[[torch.Tensor, torch.Tensor], tuple], random_erasing: float):
        self.mix, self.random_erasing = mix, random_erasing

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = self.mix(images, labels)
        return _random_erasing(self.random_erasing, images.device)(images), targets


def classification_objective(
    arguments: ClassificationAugmentation, num_labels: int
) -> tuple[Callable[[torch.Tensor, torch.Tensor], tuple], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """The mixing of a batch, (images, labels) to (images, targets), and the loss of (logits, targets) that fits it.

    Mixing, and with it erasing, acts inside the batch of one process, so its outcome depends on how a global batch is
    split.
    """
    smoothing = arguments.label_smoothing
    binary = BinaryCrossEntropy(smoothing) if arguments.loss == "binary_cross_entropy" else None
    if mixes(arguments):
        mix = Mixup(arguments.mixup, arguments.cutmix, label_smoothing=smoothing, num_classes=num_labels)
        return MixThenErase(mix, arguments.random_erasing), binary or SoftTargetCrossEntropy()
    return lambda images, labels: (images, labels), binary or LabelSmoothingCrossEntropy(smoothing)


class SegmentationTransform:
    """Maps (image, map) to (normalized pixels (3, crop, crop), labels (crop, crop) int64, 255 for no class).

    mean, std: of the channels, in 0 to 1.
    count: a function of (labels, num_labels) whose value, a tensor, is added to each sample; it gets the labels of the
        whole image.
    Raises ValueError where image and map differ in size or a label is outside the classes.
    """

    def __init__(
        self,
        arguments: SegmentationAugmentation,
        num_labels: int,
        mean: list[float],
        std: list[float],
        count: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ):
        self.num_labels, self.count = num_labels, count
        if not 0 < arguments.scale[0] <= arguments.scale[-1] or len(arguments.scale) != 2:
            raise ValueError(f"scale must be [smallest, largest], both above 0, got {arguments.scale}.")
        self.read_labels = LabelReader(arguments, num_labels)
        self.is_grey, self.crop_size = len(mean) == 1, arguments.crop_size
        crop, distortion = RandomCropOfClasses, PhotometricDistortion
        if arguments.augmentation_style == "torchvision":
            fill = {tv_tensors.Image: [255 * channel for channel in mean], tv_tensors.Mask: IGNORE_INDEX}
            crop, distortion = functools.partial(PaddedCropOfClasses, fill=fill), TorchvisionDistortion
        self.transform = v2.Compose(
            [
                RandomScale(arguments.scale, arguments.resize, arguments.max_resize, arguments.label_interpolation),
                crop(arguments.crop_size, arguments.max_class_share),
                v2.RandomHorizontalFlip(arguments.horizontal_flip),
                distortion(p=arguments.photometric_distortion),
                v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __call__(self, image: Image.Image, label_map: Image.Image) -> tuple[torch.Tensor, ...]:
        read = self.read_labels(image, label_map)
        pixels = pil_to_rgb(image)
        pixels = tvF.rgb_to_grayscale(pixels) if self.is_grey else pixels
        pixels, labels = self.transform(tv_tensors.Image(pixels), tv_tensors.Mask(read))
        pixels, labels = pixels.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)
        bottom, right = (self.crop_size - side for side in labels.shape)  # where the scaled image is smaller
        pixels, labels = (
            F.pad(entry, (0, right, 0, bottom), value=value) for entry, value in ((pixels, 0), (labels, IGNORE_INDEX))
        )
        return (pixels, labels) if self.count is None else (pixels, labels, self.count(read, self.num_labels))


class LabelReader:
    """Reads the label map of an image as (height, width) int64: class ids, and 255 for pixels without a class.

    Maps hold one number a pixel, in 1, 8, 16 or 32 bits; those of a palette image are its indices. Maps in colours need
    `label_mapping`.
    num_labels: number of classes; None where any id is taken.
    Calling it raises ValueError where the sizes differ, or a label is neither a class nor 255.
    """

    def __init__(self, arguments: LabelArguments, num_labels: int | None):
        self.reduce_labels, self.num_labels = arguments.reduce_labels, num_labels
        self.of_stored_pixels = arguments.label_orientation == "stored"
        self.mapping = _parse_label_mapping(arguments.label_mapping)
        if self.mapping is not None and self.reduce_labels:
            raise ValueError("Give reduce_labels or label_mapping, not both: the mapping can leave label 0 out.")
        if num_labels is not None and num_labels < 2:
            raise ValueError("A segmentation tells at least two classes apart, such as a background and an object.")
        highest = None if self.mapping is None else self.mapping.highest_class
        if num_labels is not None and highest is not None and highest >= num_labels:
            raise ValueError(f"label_mapping names class {highest}, outside the {num_labels} classes of --label_names.")
        if num_labels is not None and num_labels > IGNORE_INDEX:
            raise ValueError(
                f"Label {IGNORE_INDEX} marks pixels without a class, so there are at most {IGNORE_INDEX} classes, not "
                f"{num_labels}."
            )

    def __call__(self, image: Image.Image, label_map: Image.Image) -> torch.Tensor:
        orientation = orientation_of(image)
        if self.of_stored_pixels and orientation in TURNS and orientation_of(label_map) == 1:
            label_map = label_map.transpose(TURNS[orientation])
        if label_map.size != image.size:
            reason = ""
            if orientation >= 5 and label_map.size == image.size[::-1]:
                stored = "turned" if self.of_stored_pixels else "stored"
                reason = f" after the turn that its EXIF orientation asks for: give --label_orientation {stored}"
            raise ValueError(
                f"the label map is {label_map.width} x {label_map.height} pixels, but its image {image.width} x "
                f"{image.height}{reason}."
            )
        if self.mapping is not None and self.mapping.of_colors:
            red, green, blue = tvF.pil_to_tensor(label_map.convert("RGB")).to(torch.int64)
            labels = (red << 16) + (green << 8) + blue
        elif label_map.mode in ("1", "L", "P", "I", "F") or label_map.mode.startswith("I;"):
            labels = tvF.pil_to_tensor(label_map).squeeze(0)
            if label_map.mode == "F" and not (labels == labels.round()).all():
                raise ValueError("a label map holds one class id a pixel, but this one holds fractions or no numbers.")
            labels = labels.to(torch.int64)
            if label_map.mode.startswith("I;"):
                labels &= 0xFFFF  # torchvision may read unsigned values as signed
        else:
            raise ValueError(
                f"a label map holds one class id a pixel, but this one is an {label_map.mode} image: name the class of "
                "each colour with --label_mapping '{\"#804080\": 0}'."
            )
        if self.mapping is not None:
            position = torch.searchsorted(self.mapping.keys, labels).clamp(max=len(self.mapping.keys) - 1)
            known = self.mapping.keys[position] == labels
            labels = torch.where(known, self.mapping.classes[position], IGNORE_INDEX)
        elif self.reduce_labels:
            labels = torch.where((labels == 0) | (labels == IGNORE_INDEX), IGNORE_INDEX, labels - 1)
        known = labels[labels != IGNORE_INDEX]
        if self.num_labels is not None and known.numel() and not 0 <= known.min() <= known.max() < self.num_labels:
            raise ValueError(
                f"labels run from {known.min()} to {known.max()}, outside the {self.num_labels} classes; see "
                "--label_names, --reduce_labels and --label_mapping."
            )
        return labels


def read_labels(
    image: Image.Image, label_map: Image.Image, num_labels: int | None, reduce_labels: bool = False
) -> torch.Tensor:
    """The label map of an image as (height, width) int64, see `LabelReader`."""
    return LabelReader(LabelArguments(reduce_labels=reduce_labels), num_labels)(image, label_map)


class LabelMapping(NamedTuple):
    """keys: ids, or colors as 0xRRGGBB, in ascending order. classes: the class of each. of_colors: which they are."""

    keys: torch.Tensor
    classes: torch.Tensor
    of_colors: bool

    @property
    def highest_class(self) -> int | None:
        """The highest id of a class; None where all keys are left without one."""
        return max((label for label in self.classes.tolist() if label != IGNORE_INDEX), default=None)


def _parse_label_mapping(mapping: dict | str | None) -> LabelMapping | None:
    if isinstance(mapping, str):
        path = mapping
        try:
            mapping = read_json(path)
        except OSError as error:
            raise ValueError(f"{path} is not a JSON file: {error.strerror}.") from None
    if not mapping:
        return None
    if not isinstance(mapping, dict) or len({str(key).startswith("#") for key in mapping}) > 1:
        raise ValueError("label_mapping must map ids, or colors like '#804080', to class ids.")
    pairs: dict[int, int] = {}
    for key, value in mapping.items():
        number, label = _parse_key(str(key)), _parse_class(key, value)
        if pairs.setdefault(number, label) != label:
            raise ValueError(f"label_mapping maps {key} to {pairs[number]} and to {label}.")
    keys, classes = torch.tensor(sorted(pairs.items())).unbind(dim=1)
    return LabelMapping(keys.contiguous(), classes.contiguous(), str(key).startswith("#"))


def _parse_key(key: str) -> int:
    """An id, or a color of three or six hexadecimal digits as 0xRRGGBB."""
    if re.fullmatch("#[0-9a-fA-F]{3}", key):
        key = "#" + "".join(2 * digit for digit in key[1:])
    if re.fullmatch("#[0-9a-fA-F]{6}", key):
        return int(key[1:], 16)
    if not re.fullmatch("[0-9]+", key):
        reason = "colors have three or six hexadecimal digits" if key.startswith("#") else "ids are whole numbers"
        raise ValueError(f"label_mapping must map ids, or colors like '#804080', to class ids, not {key!r}: {reason}.")
    return int(key)


def _parse_class(key: Any, value: Any) -> int:
    if value is None:
        return IGNORE_INDEX
    if isinstance(value, bool) or not re.fullmatch("[0-9]+", str(value)) or int(value) > IGNORE_INDEX:
        raise ValueError(
            f"label_mapping maps {key} to {value!r}, but a class is a whole number of at most {IGNORE_INDEX - 1}, or "
            "null where there is none."
        )
    return int(value)


class RandomScale(v2.Transform):
    """Resizes by a random factor, the aspect ratio kept, what first fits into `resize` and `max_resize`.

    scale: range of the factor.
    resize, max_resize: pixels that the short and the long side have at factor 1, whichever is reached first.
    label_interpolation: of label maps, see `resize_labels`; images are resized bilinearly, with antialiasing.
    """

    def __init__(self, scale: list[float], resize: int, max_resize: int, label_interpolation: str = "nearest-exact"):
        super().__init__()
        self.scale, self.resize, self.max_resize = scale, resize, max_resize
        self.label_interpolation = label_interpolation

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = tvF.get_size(flat_inputs[0])
        factor = torch.empty(()).uniform_(*self.scale).item()
        factor *= min(self.resize / min(sides), self.max_resize / max(sides))
        return {"size": [max(round(side * factor), 1) for side in sides]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.Mask(resize_labels(inpt, params["size"], self.label_interpolation))
        return tvF.resize(inpt, params["size"], antialias=True)


def resize_labels(labels: torch.Tensor, size: Sequence[int], interpolation: str = "nearest-exact") -> torch.Tensor:
    """Resize a label map without mixing its ids.

    Args:
        labels: Class ids (height, width).
        size: Height and width in pixels.
        interpolation: "nearest-exact" or "nearest", see `ResizedLabelArguments`.

    Returns:
        Class ids of that size.
    """
    mode = InterpolationMode(interpolation)
    return tvF.resize_image(labels.as_subclass(torch.Tensor)[None], list(size), interpolation=mode)[0]


class PhotometricDistortion(v2.Transform):
    """Random brightness, contrast, saturation and hue, each with probability `p`, as in mmsegmentation.

    Brightness adds up to 32 of 255 levels. Contrast multiplies all values by 0.5 to 1.5, first or last of the other
    three by chance. Saturation multiplies that of the HSV color model by 0.5 to 1.5. Hue turns by up to a tenth of the
    circle, where mmsegmentation counts it in steps of two degrees. Inputs are images of 8 bits; label maps stay.
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = p

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        ranges = {"brightness": (-32.0, 32.0), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.1, 0.1)}
        params: dict[str, Any] = {
            name: torch.empty(()).uniform_(*interval).item() if torch.rand(()) < self.p else None
            for name, interval in ranges.items()
        }
        return {**params, "contrast_last": bool(torch.rand(()) < 0.5)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        pixels, contrast = inpt.as_subclass(torch.Tensor), params["contrast"]
        if params["brightness"] is not None:
            pixels = _to_levels(pixels + params["brightness"])
        if contrast is not None and not params["contrast_last"]:
            pixels = _to_levels(pixels * contrast)
        if params["saturation"] is not None:
            # With the largest channel v, HSV has the saturation (v - smallest) / v; hue and value stay.
            value = pixels.amax(dim=0, keepdim=True).float()
            full = value / (value - pixels.amin(dim=0, keepdim=True)).clamp(min=1)  # the factor that saturates
            pixels = _to_levels(value - (value - pixels) * full.clamp(max=params["saturation"]) + 0.5)
        if params["hue"] is not None:
            pixels = tvF.adjust_hue(pixels, params["hue"])
        if contrast is not None and params["contrast_last"]:
            pixels = _to_levels(pixels * contrast)
        return tv_tensors.Image(pixels)


def _to_levels(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(0, 255).to(torch.uint8)


class TorchvisionDistortion(v2.RandomPhotometricDistort):
    """Random brightness, contrast, saturation and hue, each with probability `p`; channels keep their places."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


def _is_varied(labels: torch.Tensor, max_class_share: float) -> bool:
    """Whether a crop has several classes, none of which fills more of it than `max_class_share`."""
    counts = torch.unique(labels[labels != IGNORE_INDEX], return_counts=True)[1]
    return len(counts) > 1 and bool(counts.max() < max_class_share * counts.sum())


class RandomCropOfClasses(v2.Transform):
    """A square crop, drawn up to ten times more until no class fills too much of it, as in mmsegmentation.

    Where a side of the image is smaller, the crop has the whole side.

    size: side in pixels.
    max_class_share: of the pixels with a class.
    """

    def __init__(self, size: int, max_class_share: float):
        super().__init__()
        self.size, self.max_class_share = size, max_class_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        labels = next(entry for entry in flat_inputs if isinstance(entry, tv_tensors.Mask))
        params = self._draw(*labels.shape[-2:])
        for _ in range(10 if self.max_class_share < 1 else 0):
            if _is_varied(tvF.crop_mask(labels.as_subclass(torch.Tensor), **params), self.max_class_share):
                break
            params = self._draw(*labels.shape[-2:])
        return params

    def _draw(self, height: int, width: int) -> dict[str, int]:
        params = {"height": min(height, self.size), "width": min(width, self.size)}
        params["top"] = int(torch.randint(0, height - params["height"] + 1, ()))
        params["left"] = int(torch.randint(0, width - params["width"] + 1, ()))
        return params

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return self._call_kernel(tvF.crop, inpt, **params)


class PaddedCropOfClasses(v2.RandomCrop):
    """As `RandomCropOfClasses`, of ten draws and from an image that is padded on all sides where it is smaller.

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
            if _is_varied(super().transform(labels, params), self.max_class_share):
                break
        return params
