"""Checkpoints opened by their name, and class ids of whole images, folders, videos and datasets."""

from .checkpoint import Checkpoint
from .segmenter import InferenceArguments, Segmenter

__all__ = ["Checkpoint", "InferenceArguments", "Segmenter"]
