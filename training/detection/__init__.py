"""What detectors learn from: annotated images, and their augmentation."""

from .annotations import DetectionDataArguments, DetectionSplits, load_detection_splits, read_coco, read_objects
from .augmentation import (
    DetectionAugmentation,
    DetectionTransform,
    EvaluationCollator,
    collate_training,
)

__all__ = [
    "DetectionAugmentation",
    "DetectionDataArguments",
    "DetectionSplits",
    "DetectionTransform",
    "EvaluationCollator",
    "collate_training",
    "load_detection_splits",
    "read_coco",
    "read_objects",
]
