"""Augmentation of images and their label maps, which move together, by torchvision."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF

from locatvit_hf.image_processing_locatvit import pil_to_rgb
from training.data.label_maps import IGNORE_INDEX, LabelReader, ResizedLabelArguments, resize_labels
from training.engine.arguments import option


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


class SegmentationTransform:
    """Maps (image, map) to (normalized pixels (3, crop, crop), labels (crop, crop) int64, 255 for no class).

    Args:
        mean: Of the channels, in 0 to 1.
        std: Of the channels, in 0 to 1.
        count: A function of (labels, num_labels) whose value, a tensor, is added to each sample; it gets the labels of
            the whole image.

    Raises:
        ValueError: Where image and map differ in size or a label is outside the classes.
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
        self.is_gray, self.crop_size = len(mean) == 1, arguments.crop_size
        crop: Callable[..., v2.Transform] = RandomCropOfClasses
        distortion: type[v2.Transform] = PhotometricDistortion
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
        pixels = tvF.rgb_to_grayscale(pixels) if self.is_gray else pixels
        pixels, labels = self.transform(tv_tensors.Image(pixels), tv_tensors.Mask(read))
        pixels, labels = pixels.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)
        bottom, right = (self.crop_size - side for side in labels.shape)  # where the scaled image is smaller
        pixels, labels = (
            F.pad(entry, (0, right, 0, bottom), value=value) for entry, value in ((pixels, 0), (labels, IGNORE_INDEX))
        )
        return (pixels, labels) if self.count is None else (pixels, labels, self.count(read, self.num_labels))


class RandomScale(v2.Transform):
    """Resizes by a random factor, the aspect ratio kept, what first fits into `resize` and `max_resize`.

    Args:
        scale: Range of the factor.
        resize: Pixels that the short and the long side have at factor 1, whichever is reached first.
        max_resize: Pixels that the short and the long side have at factor 1, whichever is reached first.
        label_interpolation: Of label maps, see `resize_labels`; images are resized bilinearly, with antialiasing.
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

    Args:
        size: Side in pixels.
        max_class_share: Of the pixels with a class.
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

    Args:
        fill: Padding value for every kind of input.
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
