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

__all__ = [
    "InferenceArguments",
    "average_windows",
    "check_inference",
    "compute_logits",
    "predict",
    "prepare",
    "scaled_size",
    "segment_image",
]
