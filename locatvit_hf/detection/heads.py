"""Parts of a detector that read maps and masks at the centers of cells, where torchvision is half a cell beside."""

import math

import torch
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
    paste_masks_in_image,
)
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import initLevelMapper
from torchvision.transforms.v2 import functional as tvF

NUM_LEVELS = 5
"""Maps of the pyramid: four of the encoder, and one of half the last one's size."""


def shortest_side_size(size: tuple[int, int], shortest: int, longest: int) -> list[int]:
    """The (height, width) of an image that is resized to these limits of its sides, all in pixels."""
    ratio = min(shortest / min(size), longest / max(size))
    return [max(int(side * ratio), 1) for side in size]


class DetectorResize(GeneralizedRCNNTransform):
    """Training images keep the size that augmentation drew for each; at other times they get that of evaluation.

    The images are normalized already.

    Args:
        shortest_side: The short side of an image in evaluation, in pixels.
        longest_side: The most pixels of its long side.
        aligned: Whether masks are drawn to a fraction of a pixel, see `DetectorSettings.roi_aligned`.
    """

    def __init__(self, shortest_side: int, longest_side: int, aligned: bool):
        super().__init__(shortest_side, longest_side, image_mean=[0.0] * 3, image_std=[1.0] * 3)
        self.aligned = aligned

    def resize(self, image: torch.Tensor, target: dict | None = None) -> tuple[torch.Tensor, dict | None]:
        if self.training:
            return image, target
        # As augmentation resizes: torchvision's own does not blur what it makes smaller.
        size = shortest_side_size(image.shape[-2:], self.min_size[-1], self.max_size)
        return tvF.resize(image, size, antialias=True), target

    def postprocess(
        self,
        result: list[dict[str, torch.Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, torch.Tensor]]:
        """Bring boxes (n, 4) and masks (n, height, width), of bool, to the size of their images in pixels."""
        if self.training:
            return result
        for found, resized, size in zip(result, image_shapes, original_image_sizes, strict=True):
            found["boxes"] = resize_boxes(found["boxes"], resized, size)
            if "masks" in found and self.aligned:
                found["masks"] = paste_masks(found["masks"], found["boxes"], size)
            elif "masks" in found:
                found["masks"] = paste_masks_in_image(found["masks"], found["boxes"], size)[:, 0] > 0.5
        return result


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks of boxes as masks of the image, to a fraction of a pixel; torchvision's own moves boxes to whole pixels.

    Args:
        masks: Probabilities (n, 1, side, side) over each box.
        boxes: Boxes (n, 4), [left, top, right, bottom] in pixels.
        size: The (height, width) of the image in pixels.

    Returns:
        Masks (n, height, width) of bool: where the probability at the center of a pixel is above a half.
    """
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    # Pixel i has its center at i + 0.5.
    first = (boxes[:, :2] - 0.5).ceil().clamp(min=0).long().tolist()
    last = (boxes[:, 2:] - 0.5).floor().long().tolist()
    for number, ((left, top), (right, bottom)) in enumerate(zip(first, last, strict=True)):
        right, bottom = min(right, size[1] - 1), min(bottom, size[0] - 1)
        if right < left or bottom < top:
            continue
        x1, y1, x2, y2 = boxes[number].float()
        columns = torch.arange(left, right + 1, device=masks.device) + 0.5
        rows = torch.arange(top, bottom + 1, device=masks.device) + 0.5
        places = torch.meshgrid((rows - y1) / (y2 - y1) * 2 - 1, (columns - x1) / (x2 - x1) * 2 - 1, indexing="ij")
        grid = torch.stack(places[::-1], dim=-1)[None]
        values = F.grid_sample(masks[number : number + 1].float(), grid, align_corners=False)[0, 0]
        pasted[number, top : bottom + 1, left : right + 1] = values > 0.5
    return pasted


class PyramidRoIAlign(MultiScaleRoIAlign):
    """RoIAlign over the pyramid.

    It is told the strides: torchvision would guess them from the first images that it sees, whose padding misleads it.

    Args:
        output_size: Cells along each side of what is pooled.
        stride: The stride of the first map in pixels; that of each further map is twice as large.
        aligned: Whether coordinates count from the corner of the first cell, so that its center lies at half a cell, as
            in Detectron2 and mmdetection. torchvision's own pooling takes it to lie at 0.
    """

    def __init__(self, output_size: int, stride: float, aligned: bool):
        levels = [str(level) for level in range(NUM_LEVELS - 1)]
        super().__init__(levels, output_size=output_size, sampling_ratio=0)
        self.aligned = aligned
        self.scales = [1 / (stride * 2**level) for level in range(len(levels))]
        first = round(math.log2(stride))
        self.map_levels = initLevelMapper(first, first + len(levels) - 1, canonical_scale=224, canonical_level=4)

    def forward(
        self, x: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """Pool maps (batch, channels, height, width) to (boxes of all images, channels, *output_size)."""
        maps = [x[name] for name in self.featmap_names]
        regions = torch.cat([F.pad(of_image, (1, 0), value=number) for number, of_image in enumerate(boxes)])
        levels = self.map_levels(boxes)
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (values, scale) in enumerate(zip(maps, self.scales, strict=True)):
            there = torch.where(levels == level)[0]
            found = roi_align(
                values, regions[there], self.output_size, scale, self.sampling_ratio, aligned=self.aligned
            )
            pooled[there] = found.to(pooled.dtype)
        return pooled


class ExactRPNHead(RPNHead):
    """torchvision's head, whose answers are float32: in half precision, boxes would be off by pixels."""

    def forward(self, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Scores and offsets of every map."""
        scores, offsets = super().forward(x)
        return [of_map.float() for of_map in scores], [of_map.float() for of_map in offsets]


class AlignedRoIHeads(RoIHeads):
    """torchvision's heads, with `aligned` also for the masks that they learn from, and boxes in float32.

    The masks are read where the box lies, half a pixel beside where torchvision reads them.
    """

    aligned = True

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Detections of every image, with masks (n, 1, side, side) over their boxes, and the terms of the loss."""
        if self.training:
            proposals, matches, labels, offsets = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, box_offsets = (answer.float() for answer in self.box_predictor(pooled))
        if not self.training:
            found = self.postprocess_detections(class_logits, box_offsets, proposals, image_shapes)
            result = [
                dict(zip(("boxes", "scores", "labels"), of_image, strict=True)) for of_image in zip(*found, strict=True)
            ]
            if self.has_mask():
                logits = self._mask_logits(features, found[0], image_shapes)
                for of_image, masks in zip(result, maskrcnn_inference(logits, found[2]), strict=True):
                    of_image["masks"] = masks
            return result, {}
        class_loss, box_loss = fastrcnn_loss(class_logits, box_offsets, labels, offsets)
        losses = {"loss_classifier": class_loss, "loss_box_reg": box_loss}
        if self.has_mask():
            objects = [torch.where(of_image > 0)[0] for of_image in labels]
            boxes = [of_image[which] for of_image, which in zip(proposals, objects, strict=True)]
            matches = [of_image[which] for of_image, which in zip(matches, objects, strict=True)]
            logits = self._mask_logits(features, boxes, image_shapes)
            read_at = [of_image - 0.5 for of_image in boxes] if self.aligned else boxes
            truth = ([target[name] for target in targets or ()] for name in ("masks", "labels"))
            losses["loss_mask"] = maskrcnn_loss(logits, read_at, *truth, matches)
        return [], losses

    def _mask_logits(
        self, features: dict, boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))).float()
