"""Encoded images as they stand in datasets, and what training and evaluation make of them."""

import io
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets.utils.file_utils import is_local_path, xopen
from PIL import ExifTags, Image
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from locatvit_hf.utils.images import (
    MAX_MEGAPIXELS,
    CorruptImageError,
    keep_notes,
    load_upright,
    open_image,
    to_rgb,
)
from locatvit_hf.utils.io import one_line

MIN_REDUCED = 2
"""Pillow calls 2 fast and 3 almost indistinguishable (`reducing_gap`); a crop is interpolated in any case."""


def decode_image(entry: Any, rgb: bool = False, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Decode an image of a dataset, turned as its EXIF orientation says, as pipelines and `datasets` do.

    Args:
        entry: A dict with `bytes` or `path`, these alone, pixels as an array, or a decoded image.
        rgb: Convert to 8-bit RGB as `LocAtViTImageProcessor` does. A JPEG file that needs neither a turn nor a
            conversion is returned with its pixels still encoded: they are decoded where they are first used, see
            `crop_and_resize`.
        max_megapixels: Larger images are not decoded.

    Returns:
        The image; `orientation_of` tells by which orientation it was turned, and `remark_on_frames` whether its file
        holds more.

    Raises:
        CorruptImageError: The image cannot be decoded; the message is the end of a sentence that begins with its name.
    """
    image = _open(entry, max_megapixels)
    # Orientations stand in EXIF, or in XMP where there is none; Pillow reads both.
    if image.format == "JPEG" and rgb and image.mode == "RGB" and not {"exif", "xmp"} & image.info.keys():
        return image
    image = load_upright(image)
    if not rgb:
        return image
    try:
        return keep_notes(to_rgb(image), image)
    except Exception as error:  # such as a palette that is not whole
        raise CorruptImageError(f"cannot be decoded: {one_line(error)}") from None


class Header(NamedTuple):
    """What a file says of its image before the pixels.

    Attributes:
        size: Width and height of the stored pixels.
        orientation: 1 to 8, as EXIF has them; `decode_image` turns all but 1.
    """

    size: tuple[int, int]
    orientation: int


def read_header(entry: Any) -> Header:
    """Size and orientation of an image without decoding it, for the entries of `decode_image` and for open files.

    Raises:
        CorruptImageError: The image cannot be read.
    """
    path = entry.get("path") if isinstance(entry, dict) and entry.get("bytes") is None else entry
    if isinstance(path, str) and is_local_path(path):
        try:
            with open(path, "rb") as file:
                file.peek()  # Pillow opens one file at a time; threads can wait for their disks side by side
                return _header_of(open_image(file, math.inf))  # reads no more than it needs
        except OSError as error:
            raise CorruptImageError(f"cannot be read: {error.strerror or one_line(error)}") from None
    return _header_of(_open(entry, math.inf))


def _header_of(image: Image.Image) -> Header:
    try:
        # The method of the base class: that of PNG files decodes all pixels first.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF turns nothing, as in `load_upright`
        orientation = 1
    size = image.size
    if hasattr(image, "tag_v2") and orientation in range(5, 9):  # Pillow gives the size of the turned pixels for TIFF
        size = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
    return Header(size, orientation if orientation in range(1, 9) else 1)


def crop_and_resize(
    image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int], mode: InterpolationMode
) -> Image.Image:
    """`image.crop(box).resize(size)` of an RGB image, within two of 255 levels, in half of the time.

    A JPEG file whose pixels are still encoded is decoded at a half, quarter or eighth of its size where this leaves the
    crop at least `MIN_REDUCED` times as large as the result.

    Raises OSError, as Pillow does, for pixels that cannot be decoded.

    Args:
        box: Left, top, right and bottom in pixels.
        size: Height and width in pixels.
        mode: Bilinear or bicubic.
    """
    if image.format == "JPEG" and image.fp is not None:
        width, height = image.size
        smallest = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) / MIN_REDUCED
        if smallest >= 2:
            image.draft("RGB", (round(width / smallest), round(height / smallest)))
            reduction = round(width / image.width)
            box = tuple(round(side / reduction) for side in box)
            pixels = tvF.pil_to_tensor(image)
        else:
            try:
                pixels = decode_jpeg(torch.frombuffer(image.fp.getbuffer(), dtype=torch.uint8), ImageReadMode.RGB)
            except RuntimeError as error:
                raise OSError(str(error).partition("\n")[0]) from None
    else:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    left, top, right, bottom = box
    crop = pixels[None, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)  # a fast path of torch
    resized = interpolate(crop, size, mode=mode.value, antialias=True)[0]
    return Image.fromarray(resized.permute(1, 2, 0).contiguous().numpy())


def name_of(entry: Any, default: str) -> str:
    """The file of an entry where it is known, otherwise `default`."""
    path = entry.get("path") if isinstance(entry, dict) else entry if isinstance(entry, str) else None
    return path or default


def _open(entry: Any, max_megapixels: float) -> Image.Image:
    """An image whose pixels may be encoded still; of a file with all its bytes in memory."""
    if isinstance(entry, Image.Image):
        return entry
    if isinstance(entry, dict):
        entry = entry["bytes"] if entry.get("bytes") is not None else entry.get("path")
    try:
        if isinstance(entry, str):
            with open(entry, "rb") if is_local_path(entry) else xopen(entry, "rb") as file:
                entry = file.read()
        if isinstance(entry, bytes) or hasattr(entry, "read"):
            return open_image(io.BytesIO(entry) if isinstance(entry, bytes) else entry, max_megapixels)
        if entry is not None:
            return Image.fromarray(np.asarray(entry))
    except CorruptImageError:
        raise
    except Exception as error:  # those of remote file systems, and of arrays that are not images
        reason = getattr(error, "strerror", None) or one_line(error)
        raise CorruptImageError(f"cannot be read: {reason}") from None
    raise CorruptImageError("holds no image")
