"""Reading labelled images, and handing every process its share of every batch."""

from .dataset import TrainingSamples, create_evaluation_loader, create_training_loader
from .description import describe_data
from .loading import Splits, load_split, load_splits, read_label_names, spread
from .samplers import UpdateSampler, sample_randomness

__all__ = [
    "Splits",
    "TrainingSamples",
    "UpdateSampler",
    "create_evaluation_loader",
    "create_training_loader",
    "describe_data",
    "load_split",
    "load_splits",
    "read_label_names",
    "sample_randomness",
    "spread",
]
