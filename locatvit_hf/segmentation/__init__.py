"""Segmentation of whole images, folders, videos and data sets."""

from .inference import (
    InferenceArguments,
    average_windows,
    check_inference,
    compute_logits,
    predict,
    prepare,
    scaled_size,
    segment_image,
)
from .outputs import OutputFolder
from .segmenter import Segmenter, upsampled_argmax

__all__ = [
    "InferenceArguments",
    "OutputFolder",
    "Segmenter",
    "average_windows",
    "check_inference",
    "compute_logits",
    "predict",
    "prepare",
    "scaled_size",
    "segment_image",
    "upsampled_argmax",
]
