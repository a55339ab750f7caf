"""Class ids of images of any size, in memory that does not grow with the classes."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel

from ..image_processing_locatvit import LocAtViTImageProcessor
from .inference import average_windows

# Scores (classes, rows, columns) that exist at once at the size of an image: 64 MiB in float32.
SCORES_AT_ONCE = 2**24


class Segmenter:
    """A segmentation model that answers with class ids (height, width) of the images' own sizes.

    window: None shrinks or enlarges each image to the processor's size. A number of pixels instead leaves the image at
        its own size and slides a window of that side over it, two thirds of a window at a time.
    Raises ValueError for a processor that does not keep whole images, and for a window that the model cannot take.
    """

    def __init__(self, model: PreTrainedModel, processor: LocAtViTImageProcessor, window: int | None = None):
        if not getattr(processor, "size_divisor", None) or not processor.output_stride:
            raise ValueError(
                "The checkpoint's image processor does not keep whole images: segmentation needs one from "
                "`LocAtViTImageProcessor.from_model_config(config, segmentation=True)`."
            )
        if window is not None and (window < 1 or window % processor.size_divisor):
            raise ValueError(f"For this model a window is a multiple of {processor.size_divisor} pixels, not {window}.")
        self.model, self.processor, self.window = model.eval(), processor, window
        self.id2label: dict[int, str] = dict(sorted(model.config.id2label.items()))

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image]) -> list[np.ndarray]:
        """Class ids of RGB images, as uint8, or uint16 for more than 256 classes.

        Images run through the model together where they are resized to one size: padding would change what attention
        sees, and results would depend on the batch.
        """
        found = [torch.empty(0)] * len(images)
        if self.window is not None:
            for index, image in enumerate(images):
                found[index] = self._segment_in_windows(image)
        else:
            prepared = [self.processor(image, return_tensors="pt")["pixel_values"][0] for image in images]
            groups: dict[torch.Size, list[int]] = {}
            for index, pixels in enumerate(prepared):
                groups.setdefault(pixels.shape, []).append(index)
            for indices in groups.values():
                logits = self._compute_logits(torch.stack([prepared[index] for index in indices]))
                for index, image_logits in zip(indices, logits, strict=True):
                    found[index] = upsampled_argmax(image_logits, (images[index].height, images[index].width))
        dtype = np.uint8 if len(self.id2label) <= 256 else np.uint16
        return [class_map.cpu().numpy().astype(dtype) for class_map in found]

    def _segment_in_windows(self, image: Image.Image) -> torch.Tensor:
        def logits_of(rows: slice, columns: slice) -> torch.Tensor:
            box = (columns.start, rows.start, min(columns.stop, image.width), min(rows.stop, image.height))
            pixels = self.processor(image.crop(box), do_resize=False, return_tensors="pt")["pixel_values"]
            return self._compute_logits(pixels)

        logits = average_windows(logits_of, (image.height, image.width), self.window, None, self.processor)[0]
        cells = zip(logits.shape[1:], self.processor.output_stride, strict=True)
        covered = tuple(round(count * pixels) for count, pixels in cells)
        return upsampled_argmax(logits, covered)[: image.height, : image.width]

    def _compute_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values.to(self.model.device)).logits.float()


def upsampled_argmax(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The most likely class of logits (classes, cells, cells), upsampled bilinearly strip by strip.

    Returns (height, width) as uint8, or int32 for more than 256 classes: int64 would be most of the memory.
    """
    (num_classes, cells, _), (height, width) = logits.shape, size
    dtype = torch.uint8 if num_classes <= 256 else torch.int32
    strips = []
    for rows in torch.arange(height, device=logits.device).split(max(SCORES_AT_ONCE // (num_classes * width), 1)):
        position = ((rows + 0.5) * (cells / height) - 0.5).clamp(min=0)
        above = position.long()
        below = (above + 1).clamp(max=cells - 1)
        strip = torch.lerp(logits[:, above], logits[:, below], (position - above)[:, None])
        strip = F.interpolate(strip[None], size=(len(rows), width), mode="bilinear", align_corners=False)
        strips.append(strip[0].argmax(dim=0).to(dtype))
    return torch.cat(strips)
