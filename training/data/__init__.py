"""Reading labeled images, and handing every process its part of every batch."""

from .dataset import TrainingSamples, create_evaluation_loader, create_training_loader
from .description import describe_data
from .loading import Splits, load_split, load_splits, read_label_names, subsample_evenly
from .samplers import StepSampler, sample_randomness

__all__ = [
    "Splits",
    "TrainingSamples",
    "StepSampler",
    "create_evaluation_loader",
    "create_training_loader",
    "describe_data",
    "load_split",
    "load_splits",
    "read_label_names",
    "sample_randomness",
    "subsample_evenly",
]
