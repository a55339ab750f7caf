"""Images with their boxes and masks: augmented together for training, whole for evaluation."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvF

from locatvit_hf.detection.detector import normalize_pixels
from locatvit_hf.utils.images import to_rgb
from training.engine.arguments import option
from training.tasks.detection.objects import read_objects


@strict
@dataclass(kw_only=True)
class DetectionAugmentation:
    """Joint augmentation of images, boxes and masks; sides are in pixels."""

    shortest_sides: list[int] = option([800], "The short side of a training image is one of these.", least=1)
    longest_side: int = option(1333, "No side is longer, in training and in evaluation.", least=1)
    horizontal_flip: float | int = option(0.5, "Probability of mirroring an image.", least=0, most=1)
    crop: float | int = option(
        0.0, "Probability of resizing to `crop_shortest_sides` and cropping first.", least=0, most=1
    )
    crop_shortest_sides: list[int] = option(
        [400, 500, 600], "Short side of an image before that crop, one of these.", least=1
    )
    crop_size: list[int] = option([384, 600], "Smallest and largest side of that crop.", least=1)


class DetectionTransform:
    """Maps (image, objects) to (normalized pixels (3, height, width), target) for training.

    A target has `boxes` (n, 4) as [left, top, right, bottom] in pixels of the new image, `labels` (n,), and with
    `masks` also `masks` (n, height, width) of 0 and 1. Boxes are cut at the edges of the image; objects of which a crop
    leaves less than a pixel are left out.

    Args:
        arguments: The augmentation.
        masks: Whether targets have masks.
        mean: Of the three channels, in 0 to 1.
        std: Of the three channels, in 0 to 1.
    """

    def __init__(self, arguments: DetectionAugmentation, masks: bool, mean: list[float], std: list[float]):
        self.masks = masks
        crop_size = arguments.crop_size
        if len(crop_size) != 2 or not 0 < crop_size[0] <= crop_size[1]:
            raise ValueError(f"crop_size is the smallest and the largest side of a crop, not {crop_size}.")
        crop = [
            RandomShortestSide(arguments.crop_shortest_sides),
            RandomSizedCrop(*crop_size),
            v2.SanitizeBoundingBoxes(),
        ]
        self.transform = v2.Compose(
            [
                v2.RandomApply(crop, arguments.crop),
                RandomShortestSide(arguments.shortest_sides, max_size=arguments.longest_side),
                v2.RandomHorizontalFlip(arguments.horizontal_flip),
                v2.ClampBoundingBoxes(),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __call__(self, image: Image.Image, objects: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        read = read_objects(image, objects, self.masks)
        size = image.height, image.width
        target = {"boxes": tv_tensors.BoundingBoxes(read["boxes"], format="XYXY", canvas_size=size)}
        target["labels"] = read["labels"]
        if self.masks:
            masks = [torch.from_numpy(coco_mask.decode(mask)) for mask in read["masks"]]
            target["masks"] = tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))
        pixels, target = self.transform(tv_tensors.Image(tvF.pil_to_tensor(to_rgb(image))), target)
        target = {name: value.as_subclass(torch.Tensor) for name, value in target.items()}
        # Only boxes without area are lost here, which `load_detection_splits` has counted; the loss cannot take them.
        kept = (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(dim=1)
        return pixels.as_subclass(torch.Tensor), {name: value[kept] for name, value in target.items()}


class RandomShortestSide(v2.RandomShortestSize):
    """torchvision's transform, with masks around the centers of pixels, as images are resized and boxes are counted."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"size": [max(side, 1) for side in super().make_params(flat_inputs)["size"]]}  # of one line, 0 is left

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            resized = tvF.resize_image(inpt.as_subclass(torch.Tensor), params["size"], InterpolationMode.NEAREST_EXACT)
            return tv_tensors.wrap(resized, like=inpt)
        return super().transform(inpt, params)


class RandomSizedCrop(v2.Transform):
    """A crop whose sides are drawn between two lengths in pixels, or are those of the image where it is smaller."""

    def __init__(self, smallest: int, largest: int):
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        image = next(entry for entry in flat_inputs if isinstance(entry, tv_tensors.Image))
        params = {}
        for side, start, length in (("height", "top", image.shape[-2]), ("width", "left", image.shape[-1])):
            low, high = min(self.smallest, length), min(self.largest, length)
            params[side] = int(torch.randint(low, high + 1, ()))
            params[start] = int(torch.randint(0, length - params[side] + 1, ()))
        return params

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return self._call_kernel(tvF.crop, inpt, **params)


def collate_training(rows: list[tuple]) -> tuple[list, list]:
    """Images of different sizes and their targets, as two lists."""
    images, targets = zip(*rows, strict=True)
    return list(images), list(targets)


class EvaluationCollator:
    """Turns rows (image, objects) into a list of normalized pixels (3, height, width), and one of references."""

    def __init__(self, masks: bool, mean: list[float], std: list[float]):
        self.masks, self.mean, self.std = masks, mean, std

    def __call__(self, rows: list[tuple]) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
        pixels = [normalize_pixels(tvF.pil_to_tensor(to_rgb(image)), self.mean, self.std) for image, _ in rows]
        return pixels, [read_objects(image, objects, self.masks) for image, objects in rows]
