"""Object detection and instance segmentation: detectors on the encoders of this package."""

from .detector import Detector, DetectorSettings, load_detector, pyramid_config

__all__ = ["Detector", "DetectorSettings", "load_detector", "pyramid_config"]
