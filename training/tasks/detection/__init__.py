"""What detectors learn from: annotated images, and their augmentation."""

from .augmentation import DetectionAugmentation, DetectionTransform, EvaluationCollator, collate_training
from .coco import read_coco
from .objects import read_objects
from .splits import DetectionDataArguments, DetectionSplits, load_detection_splits

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
