"""Class ids of whole images from a segmentation model: at once or in windows, also mirrored and at several scales."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from PIL import Image
from transformers import PreTrainedModel

from ..image_processing_locatvit import LocAtViTImageProcessor

SCORES_AT_ONCE = 2**24
"""Scores (classes, rows, columns) that exist at once at the size of an image: 64 MiB in float32."""


@strict
@dataclass(kw_only=True)
class InferenceArguments:
    """How a whole image is segmented; the defaults are the papers' test, one pass over the whole image."""

    inference: Literal["whole", "sliding"] = field(
        default="whole", metadata={"help": "Whole images, or overlapping windows whose logits are averaged."}
    )
    window_size: int = field(
        default=512, metadata={"help": "Side of a window in pixels of the resized image.", "least": 1}
    )
    window_stride: int | None = field(
        default=None, metadata={"help": "Pixels from one window to the next; by default two thirds of a window."}
    )
    test_flip: bool = field(default=False, metadata={"help": "Average with what the mirrored image gives."})
    test_scales: list[float | int] = field(
        default_factory=lambda: [1.0], metadata={"help": "Average over these multiples of the test size."}
    )


class Segmenter:
    """A segmentation model that answers with class ids (height, width) of the images' own sizes.

    Images run through the model together where they are resized to one size: padding would change what attention sees,
    and results would depend on the batch. At the size of an image there are scores of a strip of rows at a time, so
    that memory does not grow with the number of classes.

    Args:
        model: A segmentation model; it is put into evaluation mode.
        processor: Its image processor, which keeps whole images.
        arguments: How images are segmented; by default each at once.
        native_size: Leave images at their own size instead of resizing them, and slide windows of
            `arguments.window_size` over them. Their pixels are prepared window by window.

    Raises:
        ValueError: The processor does not keep whole images, or the model cannot take these windows or scales.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: LocAtViTImageProcessor,
        arguments: InferenceArguments | None = None,
        native_size: bool = False,
    ):
        self.arguments = arguments or InferenceArguments()
        check_inference(processor, self.arguments)
        if native_size and (
            self.arguments.inference != "sliding" or self.arguments.test_flip or self.arguments.test_scales != [1.0]
        ):
            raise ValueError("Images of their native size are segmented in windows, at one scale and without a flip.")
        self.model, self.native_size = model.eval(), native_size
        self.processor: Any = processor  # whose `size_divisor` and `output_stride` are set, as `check_inference` found
        self.id2label: dict[int, str] = dict(sorted(model.config.id2label.items()))

    def __call__(self, images: list[Image.Image]) -> list[np.ndarray]:
        """Segment RGB images.

        Returns:
            The class ids (height, width) of each image, as uint8, or uint16 for more than 256 classes.
        """
        if self.native_size:
            found = [self._segment_native_size(image) for image in images]
        else:
            views = [prepare_views(self.processor, image, self.arguments) for image in images]
            found = self.segment_views(views, [(image.height, image.width) for image in images])
        dtype = np.uint8 if len(self.id2label) <= 256 else np.uint16
        return [class_map.cpu().numpy().astype(dtype) for class_map in found]

    @torch.inference_mode()
    def segment_views(self, views: list[list[torch.Tensor]], sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        """Segment images that are prepared already.

        Args:
            views: Of each image its pixels (channels, height, width) at each scale, from `prepare_views`.
            sizes: The (height, width) in pixels of each result.

        Returns:
            The class ids (height, width) of each image on the model's device, as uint8, or int32 for more than 256
            classes.
        """
        groups: dict[tuple, list[int]] = {}
        for index, of_image in enumerate(views):
            groups.setdefault(tuple(view.shape for view in of_image), []).append(index)
        found = [torch.empty(0)] * len(views)
        for indices in groups.values():
            logits: list[torch.Tensor] = []
            for of_scale in zip(*(views[index] for index in indices), strict=True):
                pixels = torch.stack(of_scale).to(self.model.device)
                logits.append(self.compute_logits(pixels))
                if self.arguments.test_flip:
                    logits.append(self.compute_logits(pixels.flip(-1)).flip(-1))
            for position, index in enumerate(indices):
                found[index] = upsampled_argmax([view[position] for view in logits], sizes[index])
        return found

    @torch.inference_mode()
    def compute_logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes, cells, cells) in float32 of pixels (batch, channels, height, width).

        In windows, overlaps are averaged cell by cell: windows start where cells do, so nothing is kept at the size of
        the image, and a window that covers the image gives exactly what the whole image gives.
        """
        if self.arguments.inference == "whole":
            return self.model(pixel_values=pixels).logits.float()

        def logits_of(rows: slice, columns: slice) -> torch.Tensor:
            return self.model(pixel_values=pixels[..., rows, columns]).logits.float()

        return self._average_windows(logits_of, pixels.shape[-2], pixels.shape[-1])

    @torch.inference_mode()
    def _segment_native_size(self, image: Image.Image) -> torch.Tensor:
        def logits_of(rows: slice, columns: slice) -> torch.Tensor:
            box = (columns.start, rows.start, min(columns.stop, image.width), min(rows.stop, image.height))
            pixels = self.processor(image.crop(box), do_resize=False, return_tensors="pt")["pixel_values"]
            return self.model(pixel_values=pixels.to(self.model.device)).logits.float()

        logits = self._average_windows(logits_of, image.height, image.width)[0]
        cells = zip(logits.shape[1:], self.processor.output_stride, strict=True)
        covered = tuple(round(count * pixels) for count, pixels in cells)
        return upsampled_argmax([logits], covered)[: image.height, : image.width]

    def _average_windows(
        self, logits_of: Callable[[slice, slice], torch.Tensor], height: int, width: int
    ) -> torch.Tensor:
        """Logits (batch, classes, cells, cells) of an image of `height` and `width` pixels.

        logits_of: the logits (batch, classes, cells, cells) of the pixels in some rows and columns.
        """
        window, divisor, cell = self.arguments.window_size, self.processor.size_divisor, self.processor.output_stride
        stride = self.arguments.window_stride or max(window * 2 // 3, 1)
        total = count = torch.empty(0)
        for top in _window_starts(height, window, stride, divisor):
            for left in _window_starts(width, window, stride, divisor):
                logits = logits_of(slice(top, top + window), slice(left, left + window))
                if not total.numel():
                    total = logits.new_zeros(*logits.shape[:2], -(-height // cell[0]), -(-width // cell[1]))
                    count = logits.new_zeros(total.shape[-2:])
                rows = slice(top // cell[0], top // cell[0] + logits.shape[-2])
                columns = slice(left // cell[1], left // cell[1] + logits.shape[-1])
                total[..., rows, columns] += logits
                count[rows, columns] += 1
        return total / count


def check_inference(processor: LocAtViTImageProcessor, arguments: InferenceArguments) -> None:
    """Check that images which this processor prepares can be segmented in this way.

    Raises:
        ValueError: The processor does not keep whole images, or the model cannot take these windows or scales.
    """
    divisor, window, stride = processor.size_divisor, arguments.window_size, arguments.window_stride
    if not divisor or not processor.output_stride:
        raise ValueError(
            "The checkpoint's image processor does not keep whole images: segmentation needs one from "
            "`LocAtViTImageProcessor.from_model_config(config, segmentation=True)`."
        )
    if arguments.inference == "sliding":
        if window < 1 or window % divisor:
            raise ValueError(f"For this model a window must be a multiple of {divisor} pixels, not {window}.")
        if stride is not None and not 0 < stride <= window:
            raise ValueError(f"window_stride must be from 1 to the {window} pixels of a window, not {stride}.")
    if not arguments.test_scales or min(arguments.test_scales) <= 0:
        raise ValueError(f"test_scales must be numbers above 0, at least one, got {arguments.test_scales}.")


def prepare_views(
    processor: LocAtViTImageProcessor, image: Image.Image, arguments: InferenceArguments
) -> list[torch.Tensor]:
    """The pixels (channels, height, width) of an image at each of `test_scales`."""
    size = {side: pixels for side, pixels in dict(processor.size).items() if pixels is not None}
    return [
        processor(
            image,
            size={side: max(round(pixels * scale), 1) for side, pixels in size.items()},
            return_tensors="pt",
        )["pixel_values"][0]
        for scale in arguments.test_scales
    ]


def upsampled_argmax(views: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """The most likely class of each pixel, of logits that are upsampled bilinearly strip by strip.

    Args:
        views: Logits (classes, cells, cells) of one image. Of several views the probabilities are averaged; of a single
            one the logits already tell the class.
        size: The (height, width) of the image in pixels.

    Returns:
        (height, width) as uint8, or int32 for more than 256 classes: int64 would be most of the memory.
    """
    num_classes, (height, width) = len(views[0]), size
    dtype = torch.uint8 if num_classes <= 256 else torch.int32
    at_once = max(SCORES_AT_ONCE // (num_classes * width), 1)
    strips = []
    for rows in torch.arange(height, device=views[0].device).split(at_once):
        scores = torch.zeros(())
        for logits in views:
            cells = logits.shape[1]
            position = ((rows + 0.5) * (cells / height) - 0.5).clamp(min=0)
            above = position.long()
            below = (above + 1).clamp(max=cells - 1)
            strip = torch.lerp(logits[:, above], logits[:, below], (position - above)[:, None])
            strip = F.interpolate(strip[None], size=(len(rows), width), mode="bilinear", align_corners=False)[0]
            scores = strip if len(views) == 1 else scores + strip.softmax(dim=0)
        strips.append(scores.argmax(dim=0).to(dtype))
    return torch.cat(strips)


def _window_starts(length: int, window: int, stride: int, divisor: int) -> list[int]:
    """First pixels of the windows along one side: all start at multiples, the last ends with the last whole or part."""
    last = max(-(-length // divisor) * divisor - window, 0)
    return sorted({start // divisor * divisor for start in range(0, last, stride)} | {last})


__all__ = ["InferenceArguments", "Segmenter", "check_inference", "prepare_views", "upsampled_argmax"]
