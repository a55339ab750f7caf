"""Class maps of whole images from a segmentation model: at once or in windows, also mirrored and at several scales."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from transformers import PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from ..image_processing_locatvit import LocAtViTImageProcessor


@strict
@dataclass(kw_only=True)
class InferenceArguments:
    """How a whole image is segmented; the defaults are the papers' test, one pass over the whole image."""

    inference: Literal["whole", "sliding"] = field(
        default="whole", metadata={"help": "Whole images, or overlapping windows whose logits are averaged."}
    )
    window_size: int = field(default=512, metadata={"help": "Side of a window in pixels of the resized image."})
    window_stride: int | None = field(
        default=None, metadata={"help": "Pixels from one window to the next; by default two thirds of a window."}
    )
    test_flip: bool = field(default=False, metadata={"help": "Average with what the mirrored image gives."})
    test_scales: list[float | int] = field(
        default_factory=lambda: [1.0], metadata={"help": "Average over these multiples of the test size."}
    )


@torch.inference_mode()
def segment_image(
    model: PreTrainedModel,
    processor: LocAtViTImageProcessor,
    image: Image.Image,
    arguments: InferenceArguments | None = None,
) -> torch.Tensor:
    """Class ids (height, width) of one image, at its own size."""
    arguments = arguments or InferenceArguments()
    check_inference(processor, arguments)
    sizes = [scaled_size(processor, scale) for scale in arguments.test_scales]
    pixels = [view.to(model.device) for view in prepare(processor, image, sizes)]
    return next(predict(model, processor, [pixels], [(image.height, image.width)], arguments))[1]


def predict(
    model: PreTrainedModel,
    processor: LocAtViTImageProcessor,
    images: list[list[torch.Tensor]],
    sizes: list[tuple[int, int]],
    arguments: InferenceArguments,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Pairs of an image's index and its class ids (height, width).

    images: for each image its pixels (channels, height, width) at each of `test_scales`, from `prepare`.
    sizes: (height, width) of each map.
    Images run through the model together only where they have one size: padding would change what attention sees, and
    results would depend on the batch. At the size of the maps there are scores of one image at a time.
    """
    groups: dict[tuple, list[int]] = {}
    for index, views in enumerate(images):
        groups.setdefault(tuple(view.shape for view in views), []).append(index)
    for indices in groups.values():
        logits: list[tuple[dict, torch.Tensor]] = []
        for position, scale in enumerate(arguments.test_scales):
            pixels, size = torch.stack([images[index][position] for index in indices]), scaled_size(processor, scale)
            logits.append((size, compute_logits(model, processor, pixels, arguments)))
            if arguments.test_flip:
                logits.append((size, compute_logits(model, processor, pixels.flip(-1), arguments).flip(-1)))
        for position, index in enumerate(indices):
            scores = 0.0
            for size, view in logits:
                placed = processor.post_process_semantic_segmentation(
                    SemanticSegmenterOutput(logits=view[position : position + 1]),
                    target_sizes=[sizes[index]],
                    return_segmentation_scores=True,
                    size=size,
                )[0]["segmentation_scores"]
                # Probabilities of several views are averaged; of a single one the logits already tell the class.
                scores = placed if len(logits) == 1 else scores + placed.softmax(dim=0)
            yield index, scores.argmax(dim=0)


def prepare(processor: LocAtViTImageProcessor, image: Image.Image, sizes: list[dict]) -> list[torch.Tensor]:
    """The pixels (channels, height, width) of an image at each of `sizes`."""
    return [processor(image, size=size, return_tensors="pt")["pixel_values"][0] for size in sizes]


def scaled_size(processor: LocAtViTImageProcessor, scale: float) -> dict[str, int]:
    """The processor's `size` times `scale`."""
    return {side: max(round(pixels * scale), 1) for side, pixels in dict(processor.size).items() if pixels is not None}


def check_inference(processor: LocAtViTImageProcessor, arguments: InferenceArguments) -> None:
    """Raises ValueError for a processor that does not keep whole images, or windows and scales that it cannot serve."""
    divisor, window, stride = processor.size_divisor, arguments.window_size, arguments.window_stride
    if divisor is None:
        raise ValueError(
            "The image processor crops: segmentation needs one from `from_model_config(segmentation=True)`."
        )
    if arguments.inference == "sliding" and (window % divisor or not (stride is None or 0 < stride <= window)):
        raise ValueError(
            f"For this model window_size must be a multiple of {divisor} pixels and window_stride at most as large; "
            f"got {window} and {stride}."
        )
    if not arguments.test_scales or min(arguments.test_scales) <= 0:
        raise ValueError(f"test_scales must be numbers above 0, at least one, got {arguments.test_scales}.")


def compute_logits(
    model: PreTrainedModel, processor: LocAtViTImageProcessor, pixels: torch.Tensor, arguments: InferenceArguments
) -> torch.Tensor:
    """Logits (batch, classes, cells, cells) of pixels (batch, channels, height, width), in float32.

    In windows, overlaps are averaged cell by cell: windows start where cells do, so nothing is kept at the size of the
    image, and a window that covers the image gives exactly what the whole image gives.
    """
    if arguments.inference == "whole":
        return model(pixel_values=pixels).logits.float()

    def logits_of(rows: slice, columns: slice) -> torch.Tensor:
        return model(pixel_values=pixels[..., rows, columns]).logits.float()

    size, window = tuple(pixels.shape[-2:]), arguments.window_size
    return average_windows(logits_of, size, window, arguments.window_stride, processor)


def average_windows(
    logits_of: Callable[[slice, slice], torch.Tensor],
    size: tuple[int, int],
    window: int,
    stride: int | None,
    processor: LocAtViTImageProcessor,
) -> torch.Tensor:
    """Logits (batch, classes, cells, cells) of a whole image of `size` (height, width) in pixels.

    logits_of: the logits (batch, classes, cells, cells) of the pixels in some rows and columns.
    window, stride: in pixels; without a stride, windows are two thirds of a window apart.
    """
    stride, divisor = stride or max(window * 2 // 3, 1), processor.size_divisor
    (height, width), cell = size, processor.output_stride
    total = count = None
    for top in _window_starts(height, window, stride, divisor):
        for left in _window_starts(width, window, stride, divisor):
            logits = logits_of(slice(top, top + window), slice(left, left + window))
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], -(-height // cell[0]), -(-width // cell[1]))
                count = logits.new_zeros(total.shape[-2:])
            rows = slice(top // cell[0], top // cell[0] + logits.shape[-2])
            columns = slice(left // cell[1], left // cell[1] + logits.shape[-1])
            total[..., rows, columns] += logits
            count[rows, columns] += 1
    return total / count


def _window_starts(length: int, window: int, stride: int, divisor: int) -> list[int]:
    """First pixels of the windows along one side: all start at multiples, the last ends with the last whole or part."""
    last = max(-(-length // divisor) * divisor - window, 0)
    return sorted({start // divisor * divisor for start in range(0, last, stride)} | {last})
