"""Detection and instance segmentation: annotated images, their augmentation, and Mask R-CNN."""

from .annotations import DetectionDataArguments, DetectionSplits, load_detection_splits, read_coco, read_objects
from .augmentation import (
    DetectionAugmentation,
    DetectionTransform,
    EvaluationCollator,
    collate_training,
    normalized_pixels,
)
from .model import Detector, DetectorSettings, load_detector, load_encoder, pyramid_config

__all__ = [
    "DetectionAugmentation",
    "DetectionDataArguments",
    "DetectionSplits",
    "DetectionTransform",
    "Detector",
    "DetectorSettings",
    "EvaluationCollator",
    "collate_training",
    "load_detection_splits",
    "load_detector",
    "load_encoder",
    "normalized_pixels",
    "pyramid_config",
    "read_coco",
    "read_objects",
]
