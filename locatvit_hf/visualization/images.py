"""Pictures as their owners see them."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from ..image_processing_locatvit import pil_to_rgb
from ..writing import one_line

# Formats that Pillow hands to other programs, or that hold drawings and weather, are not read.
FORMATS = sorted(
    {name for name in Image.registered_extensions().values() if name in Image.OPEN}
    - {"EPS", "WMF", "HDF5", "GRIB", "BUFR", "FPX", "MIC"}
)
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


class CorruptImageError(ValueError):
    """An image that cannot be read; the message says which and why."""


def read_image(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """An image of any mode as 8-bit RGB, turned as its EXIF orientation says, transparency composited on white.

    name: what messages call it; by default its path.
    Raises CorruptImageError where there is a file without a readable image, OSError where there is no file.
    """
    name = name or str(source)
    if isinstance(source, str | Path):
        source = Path(source)
        if not source.exists():
            raise FileNotFoundError(f"There is no image file {name}.")
        if source.is_dir():
            raise IsADirectoryError(f"{name} is a folder; an image file is needed here.")
    try:
        with Image.open(source, formats=FORMATS) as image:
            pixels = pil_to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise CorruptImageError(f"{name} is no image file of a known format.") from None
    except Exception as error:  # the decoders of Pillow raise errors of a dozen kinds
        raise CorruptImageError(f"{name} cannot be decoded: {one_line(error)}.") from None
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
