"""Augmentation and regularization of the recipes, by timm and torchvision; image and label map move together."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvF

from locatvit_hf.image_processing_locatvit import pil_to_rgb
from locatvit_hf.utils.images import TURNS, orientation_of
from locatvit_hf.utils.io import read_json
from training.engine.arguments import option

IGNORE_INDEX = 255


@strict
@dataclass(kw_only=True)
class LabelArguments:
    """How the pixels of a label map name their classes: as ids from 0, unless one of these says otherwise."""

    reduce_labels: bool = option(False, "Label 0 means no class: 0 becomes 255, every other goes down by one.")
    label_mapping: dict | str | None = option(
        None,
        "Class id of every id or, quoted as '#804080', of every color in the masks, or a JSON file with "
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
        pixels = tvF.rgb_to_grayscale(pixels) if self.is_gray else pixels
        pixels, labels = self.transform(tv_tensors.Image(pixels), tv_tensors.Mask(read))
        pixels, labels = pixels.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)
        bottom, right = (self.crop_size - side for side in labels.shape)  # where the scaled image is smaller
        pixels, labels = (
            F.pad(entry, (0, right, 0, bottom), value=value) for entry, value in ((pixels, 0), (labels, IGNORE_INDEX))
        )
        return (pixels, labels) if self.count is None else (pixels, labels, self.count(read, self.num_labels))


class LabelReader:
    """Reads the label map of an image as (height, width) int64: class ids, and 255 for pixels without a class.

    Maps hold one number a pixel, in 1, 8, 16 or 32 bits; those of a palette image are its indices. Maps in colors need
    `label_mapping`.
    Calling it raises ValueError where the sizes differ, or a label is neither a class nor 255.

    Args:
        num_labels: Number of classes; None where any id is taken.
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
                "each color with --label_mapping '{\"#804080\": 0}'."
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
