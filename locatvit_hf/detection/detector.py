"""Mask R-CNN and Faster R-CNN on the encoders of this package, made of the parts of torchvision."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel

from ..configuration_utils_locat import channel_values, pair
from ..image_processing_locatvit import pil_to_rgb
from ..inference import Checkpoint
from ..utils.images import CorruptImageError, load_upright, read_image
from ..utils.io import read_json
from .heads import NUM_LEVELS, AlignedRoIHeads, DetectorResize, ExactRPNHead, PyramidRoIAlign


@strict
@dataclass(kw_only=True)
class DetectorSettings:
    """What a detector is besides its encoder; the defaults are Mask R-CNN with a feature pyramid."""

    masks: bool = field(default=True, metadata={"help": "Mask R-CNN; without, Faster R-CNN: boxes alone."})
    pyramid_channels: int = field(
        default=256, metadata={"help": "Channels of every map of the feature pyramid.", "least": 1}
    )
    anchor_scale: int = field(default=8, metadata={"help": "Side of an anchor in cells of its map.", "least": 1})
    test_shortest_side: int = field(
        default=800, metadata={"help": "Short side of an image in evaluation, in pixels.", "least": 1}
    )
    longest_side: int = field(default=1333, metadata={"help": "No side is longer, in evaluation.", "least": 1})
    score_threshold: float | int = field(
        default=0.05, metadata={"help": "Detections below are left out.", "least": 0, "most": 1}
    )
    max_detections: int = field(default=100, metadata={"help": "Detections of an image.", "least": 1})
    # As many as mmdetection, with which the paper trained, takes from its region proposal network.
    train_proposals_per_level: int = field(
        default=2000,
        metadata={"help": "Best boxes of a map of the pyramid before overlapping ones are left out.", "least": 1},
    )
    train_proposals: int = field(
        default=1000, metadata={"help": "Best boxes of an image that are then left.", "least": 1}
    )
    test_proposals_per_level: int = field(
        default=1000, metadata={"help": "As in training, of an image in evaluation.", "least": 1}
    )
    test_proposals: int = field(
        default=1000, metadata={"help": "As in training, of an image in evaluation.", "least": 1}
    )
    roi_aligned: bool = field(
        default=True,
        metadata={"help": "Read maps and masks at the centers of their cells; false: half a cell beside, as once."},
    )


OLDER_SETTINGS = {"train_proposals": 2000, "roi_aligned": False}
"""What detectors were trained with whose `detector.json` does not name it."""


class PyramidEncoder(nn.Module):
    """Our encoder and a feature pyramid on its four maps, as torchvision's detectors expect it."""

    def __init__(self, encoder: PreTrainedModel, channels: int):
        super().__init__()
        self.encoder = encoder
        self.pyramid = FeaturePyramidNetwork(encoder.channels, channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid({str(level): maps for level, maps in enumerate(self.encoder(images).feature_maps)})


class Detector(nn.Module):
    """Mask R-CNN, or Faster R-CNN, on an encoder of this package (PaCa-ViT paper, section 4.2).

    Args:
        encoder: A backbone with four maps, see `pyramid_config`.
        categories: `{"id": …, "name": …}` of each category; a label is a place in this list.
        settings: What the detector is besides its encoder.
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
        resize = DetectorResize(settings.test_shortest_side, settings.longest_side, settings.roi_aligned)
        self.model = GeneralizedRCNN(PyramidEncoder(encoder, channels), regions, heads, resize)

    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(self, *options: Any) -> None:
        """Recompute activations of the encoder in the backward pass, as `PreTrainedModel` does."""
        self.encoder.gradient_checkpointing_enable(*options)

    @property
    def encoder(self) -> PreTrainedModel:
        """The backbone below the feature pyramid."""
        return self.model.backbone.encoder

    def forward(
        self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]] | None = None
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """Detect, or compute the loss.

        Args:
            images: Pixels (3, height, width) of each image, normalized.
            targets: In training, of each image its `boxes` (n, 4), [left, top, right, bottom] in pixels, its `labels`
                (n,), and with masks its `masks` (n, height, width).

        Returns:
            In training the terms of the loss by name. Otherwise, of each image, best first: `boxes` (n, 4) in its
            pixels, `labels` (n,), `scores` (n,), and with masks `masks` (n, height, width) of bool.
        """
        if self.training:
            return self.model(images, targets and [{**target, "labels": target["labels"] + 1} for target in targets])
        results = self.model(images)
        for result in results:
            result["labels"] = result["labels"] - 1
        return results

    @torch.inference_mode()
    def detect(self, image: str | Path | Image.Image) -> dict[str, Any]:
        """Detect what is on one image.

        Args:
            image: An image of any mode and size, or its path. It is turned as its EXIF orientation says.

        Returns:
            Best first: `boxes` (n, 4), [left, top, right, bottom] in pixels of the turned image, `labels` (n,), their
            `names`, `scores` (n,), and with masks `masks` (n, height, width) of bool.

        Raises:
            ValueError: The image cannot be decoded.
            OSError: There is no such file.
        """
        config = self.encoder.config
        mean, std = (channel_values(values, config.num_channels) for values in (config.image_mean, config.image_std))
        if not isinstance(image, Image.Image):
            image = read_image(image)
        try:
            pixels = normalize_pixels(pil_to_rgb(load_upright(image)), mean, std)
        except CorruptImageError as error:
            raise ValueError(f"The image {error}.") from None
        (result,) = self.eval()([pixels.to(next(self.parameters()).device)])
        return {**result, "names": [self.categories[label]["name"] for label in result["labels"].tolist()]}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder as a checkpoint, and beside it what makes it a detector, for `load_detector`.

        Args:
            folder: The folder, which is made where it is missing.
        """
        folder = Path(folder)
        self.encoder.save_pretrained(folder)
        weights = {name: weight for name, weight in self.model.state_dict().items() if not _is_of_encoder(name)}
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "detector.safetensors")
        content = {"settings": asdict(self.settings), "categories": self.categories}
        (folder / "detector.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_of_encoder(name: str) -> bool:
    return name.startswith("backbone.encoder.")


def load_detector(name: str | Path, revision: str | None = None) -> Detector:
    """Load the detector that `Detector.save_pretrained` wrote, ready to detect.

    Args:
        name: A folder, or a Hub id.
        revision: A branch, tag or commit of the Hub repository; by default its main branch.

    Returns:
        The detector in evaluation mode, in float32 on the CPU.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: The checkpoint is not a detector, or its weights are not whole.
    """
    checkpoint = Checkpoint(str(name), revision)
    described, weights = (checkpoint.find_file(file) for file in ("detector.json", "detector.safetensors"))
    if described is None or weights is None:
        raise ValueError(f"{name} is not a detector: it lacks detector.json or detector.safetensors.")
    description = read_json(described)
    encoder = checkpoint.load_model(backbone_class(checkpoint.config), torch.float32, "cpu")
    settings = DetectorSettings(**{**OLDER_SETTINGS, **description["settings"]})
    detector = Detector(encoder, description["categories"], settings)
    names = detector.model.load_state_dict(load_file(weights), strict=False)
    lacking = [name for name in names.missing_keys if not _is_of_encoder(name)]
    if lacking or names.unexpected_keys:
        raise ValueError(f"The detector.safetensors of {name} does not fit: {(lacking + names.unexpected_keys)[0]}.")
    return detector.eval()


def pyramid_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set a configuration of any family to four maps: those of its stages, or of a simple pyramid where it has none.

    The maps of a ViT, all of one stride, are read at the quarters of its depth and brought to four strides.

    Args:
        config: The configuration of the encoder, which is changed.

    Returns:
        The same configuration.

    Raises:
        ValueError: The model has fewer layers than maps.
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


def backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a configuration's backbone: `AutoBackbone.from_pretrained` does not take local folders."""
    with torch.device("meta"):
        return type(AutoBackbone.from_config(config))


def normalize_pixels(pixels: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """The uint8 pixels (3, height, width) of a whole image as float32, normalized by channel."""
    return tvF.normalize(tvF.to_dtype(pixels, torch.float32, scale=True), mean, std)
