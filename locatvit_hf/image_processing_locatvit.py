# SPDX-License-Identifier: MIT
"""One image processor for all families: classification crops the center, segmentation keeps every pixel in place."""

import base64
import io
import math
import os
import warnings

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    PIL,  # transformers opens images with it, and torchvision needs it
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    get_max_height_width,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .configuration_utils_locat import channel_values, pair

IGNORE_INDEX = 255
# In widths of the crop: of longer sides only the middle is resized, so many widths of it.
LONGEST_SIDE = 16
MIDDLE = 8


class LocAtViTImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg] # mypy skips this TypedDict
    """
    do_reduce_labels: whether label 0 means "no class": 0 and 255 become `ignore_index`, others go down by one.
    ignore_index: label of pixels without a class and of padding, as `semantic_loss_ignore_index` of the model.
    do_grayscale: whether images become one grey channel instead of RGB.
    size_divisor: pixels; both sides are resized to multiples of it. Set for segmentation, None for classification.
    output_stride: [height, width] in pixels of a cell of the model's segmentation logits.
    """

    do_reduce_labels: bool
    ignore_index: int
    do_grayscale: bool
    size_divisor: int | None
    output_stride: list[int] | tuple[int, int] | None


class LocAtViTImageProcessor(TorchvisionBackend):
    """Prepares images (and label maps) for the models of this package and turns their logits into masks.

    PIL images of any mode are taken, and the names of their files: transparency is composited on white, palettes are
    resolved, and 16-bit, 32-bit and floating-point images are scaled to 8 bits, see `pil_to_rgb`. Pipelines, however,
    open files and addresses by themselves and convert them to 8-bit RGB before this class sees them: 16-bit images turn
    white, floating-point ones black, and a transparent pixel gets its hidden color. For such files call this class and
    the model yourself. Label maps keep their ids: they are resized with nearest neighbors.

    With `size_divisor` both sides are resized to multiples of it and nothing is cropped, so that a mask can be laid
    back on its image; images of different sizes are padded to one batch on the right and at the bottom.
    """

    valid_kwargs = LocAtViTImageProcessorKwargs
    model_input_names = ["pixel_values"]

    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size: SizeDict = {"shortest_edge": 248}  # of an instance; here dicts, which the library turns into it
    crop_size: SizeDict = {"height": 224, "width": 224}
    default_to_square = False
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_grayscale = False
    do_reduce_labels = False
    ignore_index = IGNORE_INDEX
    size_divisor: int | None = None
    output_stride: list[int] | None = None

    _auto_class = "AutoImageProcessor"

    def __init__(self, **kwargs):
        if "auto_map" in kwargs:  # code of another repository, which a loaded file may name, does not go on from there
            kwargs["auto_map"] = {self._auto_class: "image_processing_locatvit.LocAtViTImageProcessor"}
        super().__init__(**kwargs)

    @classmethod
    def from_model_config(cls, config, segmentation: bool = False, **kwargs) -> "LocAtViTImageProcessor":
        """The processor of a model's configuration: its mean, std, crop and patch size.

        segmentation: keep every pixel and resize to multiples of the patch, instead of cropping the center.
        """
        height, width = pair(config.image_size)
        arguments = {
            "image_mean": channel_values(config.image_mean, config.num_channels),
            "image_std": channel_values(config.image_std, config.num_channels),
            "do_convert_rgb": config.num_channels in (1, 3),
            "do_grayscale": config.num_channels == 1,
            "output_stride": list(config.output_stride),
            "ignore_index": config.semantic_loss_ignore_index,
        }
        if segmentation:
            short = min(height, width)
            arguments["size"] = {"shortest_edge": short, "longest_edge": 4 * short}
            arguments.update(do_center_crop=False, size_divisor=config.size_divisor)
        else:
            # As timm does: the short side is resized to the crop over `crop_pct`, rounded down.
            resized = [math.floor(side / config.crop_pct) for side in (height, width)]
            square = height == width
            arguments["size"] = {"shortest_edge": resized[0]} if square else {"height": resized[0], "width": resized[1]}
            arguments["crop_size"] = {"height": height, "width": width}
        return cls(**{**arguments, **kwargs})

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[LocAtViTImageProcessorKwargs],
    ) -> BatchFeature:
        """`pixel_values` (batch, channels, height, width), and `labels` (batch, height, width) int64 with maps.

        Args:
            images: one image or a list, as PIL images, arrays or tensors, or as addresses, names of files or base64.
                Floating-point arrays hold what 8 bits hold, 0 to 255; for 0 to 1 give `do_rescale=False`.
            segmentation_maps: one label map of the size of each image, class ids, `ignore_index` for pixels without a
                class.

        Raises:
            ValueError: for an image without pixels, with two channels, of int8 or with values that are not finite, and
                for a map whose size differs from its image's.
        """
        if isinstance(images, list | tuple):
            if not images:
                raise ValueError("There are no images to process: the list is empty.")
            images = [_with_channel_axis(image) for image in images]
        return super().preprocess(_with_channel_axis(images), segmentation_maps, **kwargs)

    def process_image(self, image: ImageInput, do_convert_rgb: bool | None = None, **kwargs) -> torch.Tensor:
        """One image as a tensor (channels, height, width); label maps come with `do_convert_rgb=False`."""
        if isinstance(image, PIL.Image.Image):
            if min(image.size) == 0:
                raise ValueError(f"An image of {image.width} x {image.height} pixels cannot be processed.")
            if do_convert_rgb:
                image, kwargs["input_data_format"] = pil_to_rgb(image), ChannelDimension.FIRST
            elif image.mode.startswith("I;"):
                image = image.convert("I")  # torchvision reads 16 bits as signed, or not at all
        else:
            if not isinstance(image, torch.Tensor):  # torch reads neither reversed views nor other orders of bytes
                image = image.astype(image.dtype.newbyteorder("="), order="C", copy=False)
            _check_channels(image.shape, kwargs.get("input_data_format"), do_convert_rgb)
            image = _array_to_8_bits(image) if do_convert_rgb else image
        processed = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)
        if processed.numel() == 0:
            raise ValueError(f"An image of shape {tuple(processed.shape)} holds no pixels.")
        if do_convert_rgb and processed.shape[0] == 1:  # before 5.23, transformers leaves grey arrays grey
            processed = processed.expand(3, -1, -1)
        return processed

    def _preprocess_image_like_inputs(
        self, images: ImageInput, segmentation_maps: ImageInput | None = None, **kwargs
    ) -> BatchFeature:
        images = self._prepare_image_like_inputs(images, **kwargs)
        _check_floats(images, kwargs["do_rescale"])
        if kwargs["do_grayscale"]:
            images = [tvF.rgb_to_grayscale(image) for image in images]
        pads = kwargs["do_pad"] or kwargs["size_divisor"] is not None
        data = dict(self._preprocess(images, **{**kwargs, "do_pad": pads, "return_tensors": None}))
        if segmentation_maps is not None:
            options = {**kwargs, "do_convert_rgb": False, "input_data_format": ChannelDimension.FIRST}
            options.update(do_rescale=False, do_normalize=False, resample=tvF.InterpolationMode.NEAREST_EXACT)
            options.update(do_pad=False, return_tensors=None)
            maps = self._prepare_image_like_inputs(segmentation_maps, expected_ndims=2, **options)
            self._check_maps(images, maps)
            labels = self._preprocess([label_map.long() for label_map in maps], **options)["pixel_values"]
            ignore_index = kwargs["ignore_index"]
            if kwargs["do_reduce_labels"]:
                without = [(m == 0) | (m == IGNORE_INDEX) | (m == ignore_index) for m in labels]
                labels = [torch.where(none, ignore_index, m - 1) for none, m in zip(without, labels, strict=True)]
            labels = self.pad(labels, kwargs["pad_size"], fill_value=ignore_index) if pads else labels
            data["labels"] = [label_map.squeeze(0) for label_map in labels]
        return BatchFeature(data=data, tensor_type=kwargs["return_tensors"])

    @staticmethod
    def _check_maps(images: list[torch.Tensor], maps: list[torch.Tensor]) -> None:
        if len(images) != len(maps):
            raise ValueError(f"There are {len(images)} images but {len(maps)} segmentation maps.")
        for index, (image, label_map) in enumerate(zip(images, maps, strict=True)):
            if label_map.shape[0] != 1 or label_map.shape[-2:] != image.shape[-2:]:
                raise ValueError(
                    f"Segmentation map {index} has shape {tuple(label_map.shape)}, but its image is "
                    f"{image.shape[-2]} x {image.shape[-1]} pixels; a map holds one class id for each pixel."
                )
            if label_map.is_floating_point() and not (label_map == label_map.round()).all():
                raise ValueError(f"Segmentation map {index} holds fractions, where class ids are whole numbers.")

    def _preprocess(
        self, images: list[torch.Tensor], do_resize: bool, size: SizeDict, resample, **kwargs
    ) -> BatchFeature:
        if do_resize:
            images = [self._resize_for_crop(image, size, resample, **kwargs) for image in images]
        return super()._preprocess(images, do_resize=False, size=size, resample=resample, **kwargs)

    def _resize_for_crop(
        self, image: torch.Tensor, size: SizeDict, resample, do_center_crop, crop_size, size_divisor, **kwargs
    ) -> torch.Tensor:
        """Resizes an image; of one that becomes many times as long as its crop, the middle alone.

        A line of 1 x 6000 pixels would be resized to 248 x 1,488,000 before all but 224 of these are cut off. Middle
        and image have one center, so that the crop holds the same pixels but for rounding of the scale.
        """
        sides = list(self._resized_size(size, size_divisor, *image.shape[-2:]))
        crops = (crop_size.height, crop_size.width) if do_center_crop else ()
        for axis, crop in enumerate(crops):
            side, target = image.shape[axis - 2], sides[axis]
            count = math.ceil(MIDDLE * crop * side / target) + 8  # more than an enlarging filter reads at the edge
            count += (side - count) % 2
            if target > max(LONGEST_SIDE * crop, side) and count < side:
                image = image.narrow(axis - 2, (side - count) // 2, count)
                sides[axis] = round(count * target / side)
                sides[axis] += (target - sides[axis]) % 2
        return self.resize(image, SizeDict(height=sides[0], width=sides[1]), resample)

    @staticmethod
    def _resized_size(size: SizeDict, divisor: int | None, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that an image of that height and width is resized to."""
        if size.shortest_edge:
            height, width = get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge or None)
        elif size.height and size.width:
            height, width = size.height, size.width
        else:
            raise ValueError(f"size must hold 'shortest_edge', or 'height' and 'width'; got {dict(size)}.")
        if divisor is not None:
            height, width = (max(divisor, int(side / divisor + 0.5) * divisor) for side in (height, width))
        return max(height, 1), max(width, 1)

    def pad(self, images: list[torch.Tensor], pad_size: SizeDict | None = None, **kwargs) -> list[torch.Tensor]:
        """As the library's: all to the largest size (or `pad_size`), on the right and at the bottom."""
        height, width = get_max_height_width(images)
        if pad_size is not None and (pad_size.height < height or pad_size.width < width):
            raise ValueError(f"pad_size={dict(pad_size)} is smaller than an image of {height} x {width} pixels.")
        return super().pad(images, pad_size, **kwargs)

    def fetch_images(self, image_url_or_urls):
        """As the library's, but images in files and in base64 keep their mode, for `pil_to_rgb` to convert.

        Raises:
            ValueError: text is neither an address, nor the name of a file, nor an image in base64.
        """
        text = image_url_or_urls
        if not isinstance(text, str) or text.startswith(("http://", "https://")):
            return super().fetch_images(text)
        if os.path.isfile(text):
            return PIL.ImageOps.exif_transpose(PIL.Image.open(text))
        try:
            content = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text)
            return PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(content)))
        except (ValueError, OSError):
            if len(text) > 200 or text.startswith("data:"):
                text = f"{text[:30]}… ({len(text):,} characters), nor is that an image in base64"
            raise ValueError(f"There is no image file {text}.") from None

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: list[tuple[int, int]] | None = None,
        return_segmentation_scores: bool = False,
        do_resize: bool | None = None,
        size: dict | None = None,
    ) -> list:
        """Class maps from the logits of a segmentation model.

        outputs: with `logits` (batch, classes, grid height, grid width).
        target_sizes: (height, width) in pixels of each original image. Where given, the cells of the padding are cut
            off first, then the rest is upsampled bilinearly in float32. Where None, maps have the size of the logits.
        return_segmentation_scores: return a dict of "segmentation" and "segmentation_scores" (classes, height, width).
        do_resize, size: as the images were prepared, where that was not with the processor's own values.
        Returns a list of int64 maps (height, width), one an image.
        """
        logits = outputs.logits.float()
        if target_sizes is None:
            scores = list(logits)
        else:
            if len(target_sizes) != len(logits):
                raise ValueError(f"There are {len(logits)} images in the outputs but {len(target_sizes)} target_sizes.")
            target_sizes = [(int(height), int(width)) for height, width in target_sizes]
            if any(min(target_size) < 1 for target_size in target_sizes):
                raise ValueError(f"target_sizes must be (height, width) of at least 1 pixel, got {target_sizes}.")
            resized = target_sizes
            if self.do_resize if do_resize is None else do_resize:
                size = self.size if size is None else SizeDict(**size)
                resized = [self._resized_size(size, self.size_divisor, *target) for target in target_sizes]
            scores = self._place_on_images(logits, resized, target_sizes)
        if return_segmentation_scores:
            return [BatchFeature({"segmentation": s.argmax(dim=0), "segmentation_scores": s}) for s in scores]
        return [s.argmax(dim=0) for s in scores]

    def _place_on_images(
        self, logits: torch.Tensor, resized: list[tuple[int, int]], target_sizes: list[tuple[int, int]]
    ) -> list[torch.Tensor]:
        """Each image's logits (classes, height, width) at its target size, padding cut off before upsampling."""
        seen = [(self.crop_size.height, self.crop_size.width)] * len(resized) if self.do_center_crop else resized
        # Without a known stride the grid is taken to cover the largest image exactly.
        cell = self.output_stride or [max(size[axis] for size in seen) / logits.shape[axis + 2] for axis in (0, 1)]
        placed = []
        for image_logits, size, seen_size, target_size in zip(logits, resized, seen, target_sizes, strict=True):
            cells = [math.ceil(side / pixels) for side, pixels in zip(seen_size, cell, strict=True)]
            if any(needed > present for needed, present in zip(cells, image_logits.shape[1:], strict=True)):
                raise ValueError(
                    f"The logits have {image_logits.shape[1]} x {image_logits.shape[2]} cells, but an image of "
                    f"{seen_size[0]} x {seen_size[1]} pixels needs {cells[0]} x {cells[1]}; if it was prepared with "
                    "another do_resize or size, pass the same here."
                )
            image_logits = image_logits[None, :, : cells[0], : cells[1]]
            covered = tuple(round(count * pixels) for count, pixels in zip(cells, cell, strict=True))
            if covered != tuple(seen_size) or self.do_center_crop:
                image_logits = F.interpolate(image_logits, size=covered, mode="bilinear", align_corners=False)
                image_logits = image_logits[..., : seen_size[0], : seen_size[1]]
            if self.do_center_crop:
                image_logits = _undo_center_crop(image_logits, size)
            placed.append(F.interpolate(image_logits, size=target_size, mode="bilinear", align_corners=False)[0])
        return placed


def _with_channel_axis(image):
    """A grey array or tensor (height, width) as (1, height, width); anything else as it is."""
    return image[None] if getattr(image, "ndim", None) == 2 else image


def _undo_center_crop(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Lays (batch, classes, height, width) back on the image of `size` it was cropped from, its border repeated."""
    padding: list[int] = []
    for axis in (3, 2):  # `F.pad` begins with the last; negative where the crop was larger than the image
        missing = size[axis - 2] - logits.shape[axis]
        padding += [int(missing / 2), missing - int(missing / 2)]
    return F.pad(logits, padding, mode="replicate")


def pil_to_rgb(image) -> torch.Tensor:
    """uint8 (3, height, width) of a PIL image of any mode, transparency composited on white.

    Of 32-bit and floating-point images black is 0 and white the first of 1 (floats), 255 and 65535 that no value
    exceeds. Where this would leave them dark or cut off, white is the largest value: of floats up to 16, and of numbers
    from 255 to 16383 and above 65535. With negative values, black is -1 and white 1 where these hold them all, and
    otherwise the smallest and the largest value. Values that are not numbers are black, infinite ones black or white.

    Raises:
        ValueError: no value is finite.
    """
    if image.mode.startswith(("I", "F")):
        pixels = tvF.pil_to_tensor(image.convert(image.mode[0]))  # torchvision reads 16 bits as signed, or not at all
        return _scale_to_8_bits(pixels, has_16_bits=image.mode.startswith("I;")).expand(3, -1, -1)
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        pixels = tvF.pil_to_tensor(image.convert("RGBA")).float()
        opacity = pixels[3:] / 255.0
        return (pixels[:3] * opacity + 255.0 * (1.0 - opacity)).round().to(torch.uint8)
    return tvF.pil_to_tensor(image.convert("RGB"))


def _check_channels(shape: tuple[int, ...], axis: ChannelDimension | None, do_convert_rgb: bool | None) -> None:
    """Raises ValueError for an array that cannot become RGB, or whose channels cannot be found without `axis`."""
    places = {None: [0, -1], "channels_first": [0], "channels_last": [-1]}[axis and ChannelDimension(axis).value]
    if (do_convert_rgb or axis is None) and not {1, 3, 4}.intersection(shape[place] for place in places):
        remedy = "give one or three of them" if do_convert_rgb else "name their axis with input_data_format"
        raise ValueError(f"An image of shape {tuple(shape)} does not have 1, 3 or 4 channels: {remedy}.")


def _array_to_8_bits(image):
    """uint8 values of an array or a tensor of bools or wide integers; uint8 and floats are returned as they are."""
    pixels = image if isinstance(image, torch.Tensor) else torch.from_numpy(image)
    if pixels.dtype == torch.int8:
        raise ValueError("An image of int8 does not say which of its values is black: give uint8, from 0 to 255.")
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.is_floating_point() or pixels.dtype == torch.uint8 or pixels.numel() == 0:
        return image
    return _scale_to_8_bits(pixels.long(), has_16_bits=pixels.dtype == torch.uint16)


def _scale_to_8_bits(pixels: torch.Tensor, has_16_bits: bool) -> torch.Tensor:
    """uint8 values of signed integers or floats, black and white chosen as `pil_to_rgb` says."""
    black, white = (0.0, 65535.0) if has_16_bits else _black_and_white(pixels)
    pixels = pixels.to(torch.float64).nan_to_num(nan=black, posinf=white, neginf=black)
    return ((pixels - black) * (255.0 / (white - black))).round().clamp(0, 255).to(torch.uint8)


def _black_and_white(pixels: torch.Tensor) -> tuple[float, float]:
    """The values that stand for black and for white where the type does not say; see `pil_to_rgb`."""
    is_float = pixels.is_floating_point()
    finite = pixels[pixels.isfinite()] if is_float else pixels
    if finite.numel() == 0:
        raise ValueError("The image holds no finite value.")
    low, high = finite.min().item(), finite.max().item()
    if low < -0.05 * max(high, 0):  # what resampling with bicubic filters leaves below zero is black
        return (-1.0, 1.0) if is_float and -1 <= low and high <= 1 else (low, max(high, low + 1))
    if is_float and high <= 16:
        return 0.0, max(high, 1.0)
    return 0.0, 255.0 if high <= 255 else 65535.0 if 16384 <= high <= 65535 else high


def _check_floats(images: list[torch.Tensor], do_rescale: bool) -> None:
    """Warns of floats that have the range of normalization's input already; raises ValueError for nan and infinity."""
    for image in images:
        if image.is_floating_point():
            low, high = image.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise ValueError("An image holds values that are not finite; replace them first.")
            if do_rescale and low >= 0 and 0 < high <= 1:
                warnings.warn(
                    "An image holds floating-point values between 0 and 1, and is divided by 255 all the same, which "
                    "makes it black: give do_rescale=False for images that are scaled to 0 to 1.",
                    stacklevel=2,
                )


__all__ = ["LocAtViTImageProcessor", "pil_to_rgb"]
