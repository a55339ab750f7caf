"""Semantic segmentation: models measured on labeled images."""
