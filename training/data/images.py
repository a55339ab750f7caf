"""Encoded images as they stand in data sets, and what training and evaluation make of them."""

import io
from typing import Any

import numpy as np
from datasets.utils.file_utils import is_local_path, xopen
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as tvF

from locatvit_hf.image_processing_locatvit import pil_to_rgb


class CorruptImageError(ValueError):
    """An image that cannot be decoded; the message says why."""


def decode_image(entry: Any, rgb: bool = False) -> Image.Image:
    """An image of a data set, turned as its EXIF orientation says, as pipelines and `datasets` do.

    entry: a dict with `bytes` or `path`, these alone, pixels as an array, or a decoded image.
    rgb: convert to 8-bit RGB as `LocAtViTImageProcessor` does. A JPEG file that needs neither a turn nor a conversion
        is returned with its pixels still encoded: they are decoded where they are first used, which gives a crop the
        chance to ask for fewer of them (`Image.draft`).
    Raises CorruptImageError.
    """
    try:
        image = _open(entry)
        if image.format == "JPEG" and rgb and image.mode == "RGB" and "exif" not in image.info:
            return image
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return to_rgb(image) if rgb else image
    except UnidentifiedImageError:
        raise CorruptImageError("no image file of a known format") from None
    except Exception as error:  # the decoders of Pillow raise errors of a dozen kinds
        raise CorruptImageError(" ".join(str(error).split()) or type(error).__name__) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode, by the conversion of the image processor."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    return tvF.to_pil_image(pil_to_rgb(image))


def name_of(entry: Any, default: str) -> str:
    """The file of an entry where it is known, otherwise `default`."""
    path = entry.get("path") if isinstance(entry, dict) else entry if isinstance(entry, str) else None
    return path or default


def _open(entry: Any) -> Image.Image:
    if isinstance(entry, Image.Image):
        return entry
    if isinstance(entry, dict):
        entry = entry["bytes"] if entry.get("bytes") is not None else entry.get("path")
    if isinstance(entry, bytes):
        return Image.open(io.BytesIO(entry))
    if isinstance(entry, str):
        if is_local_path(entry):
            return Image.open(entry)
        with xopen(entry, "rb") as file:
            return Image.open(io.BytesIO(file.read()))
    if entry is None:
        raise ValueError("there is no image")
    return Image.fromarray(np.asarray(entry))
