"""Mask R-CNN and Faster R-CNN on our encoders, of the parts of torchvision."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.dataclasses import strict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
    paste_masks_in_image,
)
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel

from locatvit_hf.configuration_utils_locat import channel_values, pair
from training.data.images import CorruptImageError, decode_image
from training.detection.augmentation import normalized_pixels, shortest_side_size

NUM_LEVELS = 5
"""Maps of the pyramid: four of the encoder, and one of half the last one's size."""


@strict
@dataclass(kw_only=True)
class DetectorSettings:
    """What a detector is besides its encoder; the defaults are Mask R-CNN with a feature pyramid."""

    masks: bool = field(default=True, metadata={"help": "Mask R-CNN; without, Faster R-CNN: boxes alone."})
    pyramid_channels: int = 256
    anchor_scale: int = field(default=8, metadata={"help": "Side of an anchor in cells of its map."})
    test_shortest_side: int = field(default=800, metadata={"help": "Short side of an image in evaluation, in pixels."})
    longest_side: int = 1333
    score_threshold: float | int = field(default=0.05, metadata={"help": "Detections below are left out."})
    max_detections: int = field(default=100, metadata={"help": "Detections of an image."})
    # As many as mmdetection, with which the paper trained, takes from its region proposal network.
    train_proposals_per_level: int = field(
        default=2000, metadata={"help": "Best boxes of a map of the pyramid before overlapping ones are left out."}
    )
    train_proposals: int = field(default=1000, metadata={"help": "Best boxes of an image that are then left."})
    test_proposals_per_level: int = field(default=1000, metadata={"help": "As in training, of an image in evaluation."})
    test_proposals: int = field(default=1000, metadata={"help": "As in training, of an image in evaluation."})
    roi_aligned: bool = field(
        default=True,
        metadata={"help": "Read maps and masks at the centres of their cells; false: half a cell beside, as once."},
    )


OLDER_SETTINGS = {"train_proposals": 2000, "roi_aligned": False}
"""What detectors were trained with whose `detector.json` does not name it."""


class _Resize(GeneralizedRCNNTransform):
    """Training images keep the size that augmentation drew for each; at other times they get that of evaluation.

    The images are normalized already. aligned: see `DetectorSettings.roi_aligned`.
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
        """Boxes and masks of the images in their own size; masks (n, height, width) are of bool."""
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
        masks: probabilities (n, 1, side, side) over each box.
        boxes: (n, 4), [left, top, right, bottom] in pixels.
        size: height and width of the image.

    Returns:
        (n, height, width) of bool: where the probability at the center of a pixel is above a half.
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


class PyramidEncoder(nn.Module):
    """Our encoder and a feature pyramid on its four maps, as torchvision's detectors expect it."""

    def __init__(self, encoder: PreTrainedModel, channels: int):
        super().__init__()
        self.encoder = encoder
        self.pyramid = FeaturePyramidNetwork(encoder.channels, channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid({str(level): maps for level, maps in enumerate(self.encoder(images).feature_maps)})


class PyramidRoIAlign(MultiScaleRoIAlign):
    """RoIAlign over the pyramid, whose first map has this stride in pixels.

    Told the strides: torchvision would guess them from the first images that it sees, whose padding misleads it.
    aligned: whether coordinates count from the corner of the first cell, so that its center lies at half a cell, as in
        Detectron2 and mmdetection. torchvision's own pooling takes it to lie at 0.
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
        """(boxes of all images, channels, *output_size) of maps (batch, channels, height, width)."""
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
        matches, labels, offsets = None, None, None
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
            truth = [target["masks"] for target in targets], [target["labels"] for target in targets]
            losses["loss_mask"] = maskrcnn_loss(logits, read_at, *truth, matches)
        return [], losses

    def _mask_logits(
        self, features: dict, boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))).float()


class Detector(nn.Module):
    """Mask R-CNN, or Faster R-CNN, on one of our encoders (PaCa-ViT paper, section 4.2; the parts are torchvision's).

    encoder: a backbone with four maps, see `pyramid_config`.
    categories: {"id": …, "name": …}; a label is a place in this list.
    """

    def __init__(self, encoder: PreTrainedModel, categories: list[dict[str, Any]], settings: DetectorSettings):
        super().__init__()
        self.categories, self.settings = categories, settings
        config, channels = encoder.config, settings.pyramid_channels
        num_classes, hidden = len(categories) + 1, 4 * channels  # torchvision counts the background as class 0
        stride = max(pair(config.patch_size)) / (4 if getattr(config, "feature_pyramid", False) else 1)
        anchors = tuple((settings.anchor_scale * stride * 2**level,) for level in range(NUM_LEVELS))
        ratios = (0.5, 1.0, 2.0)
        regions = RegionProposalNetwork(
            AnchorGenerator(anchors, (ratios,) * NUM_LEVELS),
            ExactRPNHead(channels, len(ratios)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={
                "training": settings.train_proposals_per_level,
                "testing": settings.test_proposals_per_level,
            },
            post_nms_top_n={"training": settings.train_proposals, "testing": settings.test_proposals},
            nms_thresh=0.7,
        )
        heads = AlignedRoIHeads(
            PyramidRoIAlign(7, stride, settings.roi_aligned),
            TwoMLPHead(channels * 7**2, hidden),
            FastRCNNPredictor(hidden, num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=None,  # 10, 10, 5, 5
            score_thresh=settings.score_threshold,
            nms_thresh=0.5,
            detections_per_img=settings.max_detections,
        )
        heads.aligned = settings.roi_aligned
        if settings.masks:
            heads.mask_roi_pool = PyramidRoIAlign(14, stride, settings.roi_aligned)
            heads.mask_head = MaskRCNNHeads(channels, (channels,) * 4, dilation=1)
            heads.mask_predictor = MaskRCNNPredictor(channels, channels, num_classes)
        resize = _Resize(settings.test_shortest_side, settings.longest_side, settings.roi_aligned)
        self.model = GeneralizedRCNN(PyramidEncoder(encoder, channels), regions, heads, resize)

    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(self, *options: Any) -> None:
        """As in transformers, of the encoder."""
        self.encoder.gradient_checkpointing_enable(*options)

    @property
    def encoder(self) -> PreTrainedModel:
        """The backbone below the feature pyramid."""
        return self.model.backbone.encoder

    def forward(
        self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]] | None = None
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """images: each (3, height, width), normalized. targets: `boxes`, `labels`, `masks`, see `DetectionTransform`.

        Returns the terms of the loss in training, else for each image `boxes` (n, 4) in its pixels, `labels` (n,),
        `scores` (n,), best first, and with masks `masks` (n, height, width) of bool.
        """
        if self.training:
            return self.model(images, [{**target, "labels": target["labels"] + 1} for target in targets])
        results = self.model(images)
        for result in results:
            result["labels"] = result["labels"] - 1
        return results

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> dict[str, Any]:
        """What is on one image: as `forward`, with the `names` of the categories.

        The image may be of any mode; it is turned as its EXIF orientation says, and boxes and masks are those of the
        turned image. Raises ValueError for an image that cannot be decoded.
        """
        config = self.encoder.config
        mean, std = (channel_values(values, config.num_channels) for values in (config.image_mean, config.image_std))
        try:
            image = decode_image(image, rgb=True)
        except CorruptImageError as error:
            raise ValueError(f"The image {error}.") from None
        pixels = normalized_pixels(image, mean, std)
        (result,) = self.eval()([pixels.to(next(self.parameters()).device)])
        return {**result, "names": [self.categories[label]["name"] for label in result["labels"].tolist()]}

    def save_pretrained(self, folder: str | Path) -> None:
        """The encoder as a Hub folder; beside it what makes it a detector, for `load_detector`."""
        folder = Path(folder)
        self.encoder.save_pretrained(folder)
        weights = {name: weight for name, weight in self.model.state_dict().items() if not _is_of_encoder(name)}
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "detector.safetensors")
        content = {"settings": asdict(self.settings), "categories": self.categories}
        (folder / "detector.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_of_encoder(name: str) -> bool:
    return name.startswith("backbone.encoder.")


def load_detector(folder: str | Path) -> Detector:
    """The detector that `Detector.save_pretrained` wrote, ready to detect; a local folder or a name on the Hub.

    Raises ValueError for a folder without one.
    """
    if not Path(folder).is_dir():
        folder = snapshot_download(str(folder))
    folder = Path(folder)
    if not (folder / "detector.json").is_file():
        raise ValueError(f"{folder} holds no detector: it has no detector.json.")
    content = json.loads((folder / "detector.json").read_text(encoding="utf-8"))
    encoder = load_encoder(folder, AutoConfig.from_pretrained(folder))
    settings = DetectorSettings(**{**OLDER_SETTINGS, **content["settings"]})
    detector = Detector(encoder, content["categories"], settings)
    names = detector.model.load_state_dict(load_file(folder / "detector.safetensors"), strict=False)
    lacking = [name for name in names.missing_keys if not _is_of_encoder(name)]
    if lacking or names.unexpected_keys:
        raise ValueError(f"{folder / 'detector.safetensors'} does not fit: {(lacking + names.unexpected_keys)[0]}.")
    return detector.eval()


def pyramid_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Sets a configuration of any family to four maps: those of its stages, or of a simple pyramid where it has none.

    The maps of a ViT, all of one stride, are read at the quarters of its depth and brought to four strides.
    """
    depth = config.num_hidden_layers
    if hasattr(config, "feature_pyramid"):
        if depth < 4:
            raise ValueError(f"A feature pyramid for detection reads four layers, and the model has {depth}.")
        config.feature_pyramid = True
    config.set_output_features_output_indices(
        out_indices=[depth * quarter // 4 for quarter in (1, 2, 3, 4)], out_features=None
    )
    return config


def load_encoder(pretrained: str | Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The weights of any checkpoint of the family as a backbone of this configuration, in float32."""
    # `AutoBackbone.from_pretrained` does not take local folders, but knows the class of a configuration.
    with torch.device("meta"):
        backbone_class = type(AutoBackbone.from_config(config))
    return backbone_class.from_pretrained(pretrained, config=config, dtype=torch.float32)
