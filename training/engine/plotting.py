"""Batches and predictions as images, for the dry run and for the trackers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as tvF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from locatvit_hf.utils.colors import background_class, class_colors

LARGEST_SIDE = 224
MOST_IMAGES = 16
CAPTION_HEIGHT = 14


def draw_batch(batch: Any, mean: Sequence[float], std: Sequence[float], names: dict[int, str]) -> Image.Image:
    """One image of what a model is given: a tile for each of the first images, with its targets.

    Args:
        batch: Tensors (batch, 3, height, width) and lists of (3, height, width), normalized, nested in any way. Beside
            them class ids (batch,), class weights (batch, classes), label maps (batch, height, width), or a list of
            dicts with `boxes` in pixels. Where there are several groups of images, such as crops of different sizes,
            each is drawn.
        mean: Of the channels, in 0 to 1.
        std: Of the channels, in 0 to 1.
        names: Of the classes.
    """
    images, labels = list[Any](), list[Any]()
    _collect(batch, images, labels)
    tiles = []
    for group in images:
        for index, pixels in enumerate(group[: MOST_IMAGES // min(len(images), 4)]):
            pixels = tvF.pil_to_tensor(restore_image(pixels, mean, std))
            text = ""
            for label in labels:
                if len(label) == len(group):
                    pixels, text = _draw_label(pixels, text, label[index], names)
            tiles.append(caption(tvF.to_pil_image(pixels), text))
    return tile(tiles)


def restore_image(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The image of normalized pixels (channels, height, width); mean and std of the channels, in 0 to 1."""
    mean, std = (torch.tensor(values, dtype=torch.float32).expand(len(pixels))[:, None, None] for values in (mean, std))
    return tvF.to_pil_image((pixels.detach().float().cpu() * std + mean).clamp(0, 1)).convert("RGB")


def caption(image: Image.Image, text: str, color: str = "black") -> Image.Image:
    """The image, made smaller where it is large, above a line of text."""
    image = image.convert("RGB")
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    if image.width < LARGEST_SIDE // 2:
        factor = LARGEST_SIDE // 2 // image.width
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if not text:
        return image
    sheet = Image.new("RGB", (image.width, image.height + CAPTION_HEIGHT), "white")
    sheet.paste(image)
    ImageDraw.Draw(sheet).text((2, image.height + 1), text, fill=color)
    return sheet


def tile(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of any sizes in rows on one sheet. Raises ValueError for an empty list."""
    if not images:
        raise ValueError("There is no image to draw.")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    widths = [max(row[column].width for row in rows if column < len(row)) + 4 for column in range(len(rows[0]))]
    heights = [max(image.height for image in row) + 4 for row in rows]
    sheet = Image.new("RGB", (sum(widths), sum(heights)), "white")
    for row_index, row in enumerate(rows):
        for column, image in enumerate(row):
            sheet.paste(image, (sum(widths[:column]) + 2, sum(heights[:row_index]) + 2))
    return sheet


def _collect(entry: Any, images: list, labels: list) -> None:
    """Sort the parts of a nested batch into groups of images and groups of labels."""
    if isinstance(entry, torch.Tensor):
        if entry.ndim == 4 and entry.shape[1] == 3 and entry.is_floating_point():
            images.append(entry)
        elif entry.ndim in (1, 2, 3):
            labels.append(entry)
    elif isinstance(entry, list | tuple) and entry:
        if all(isinstance(part, torch.Tensor) and part.ndim == 3 and part.is_floating_point() for part in entry):
            images.append(list(entry))
        elif all(isinstance(part, dict) for part in entry):
            labels.append(entry)
        else:
            for part in entry:
                _collect(part, images, labels)
    elif isinstance(entry, dict):
        for part in entry.values():
            _collect(part, images, labels)


def _draw_label(pixels: torch.Tensor, text: str, label: Any, names: dict[int, str]) -> tuple[torch.Tensor, str]:
    if isinstance(label, dict):
        boxes = label.get("boxes")
        return (draw_bounding_boxes(pixels, boxes.cpu(), width=2) if boxes is not None and len(boxes) else pixels), text
    if label.ndim == 2 and label.shape == pixels.shape[-2:]:
        background = background_class(names)
        classes = [index for index in label.unique().tolist() if index in names and index != background]
        if classes:
            masks = torch.stack([label.cpu() == index for index in classes])
            colors = [tuple(class_colors(names)[index].tolist()) for index in classes]
            pixels = draw_segmentation_masks(pixels, masks, alpha=0.6, colors=colors)
        return pixels, text
    if label.ndim == 0 and not label.is_floating_point():
        return pixels, names.get(int(label), str(int(label)))
    if label.ndim == 1 and label.is_floating_point():
        weights, classes = label.topk(min(2, len(label)))
        return pixels, ", ".join(
            f"{names.get(index, index)} {weight:.2f}"
            for weight, index in zip(weights.tolist(), classes.tolist(), strict=True)
        )
    return pixels, text
