"""Semantic segmentation: augmentation, and models measured on labeled images."""
