"""Image files: which of them a folder holds, and how each is read, for every program and the command line alike."""

import os
import threading
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError

from ..image_processing_locatvit import pil_to_rgb
from .io import one_line

try:  # Pillow reads the photos of many telephones only with this package
    from pillow_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()

# Formats that Pillow hands to other programs, or knows by name without decoding them, are not read.
FORMATS = sorted(
    {name for name in Image.registered_extensions().values() if name in Image.OPEN}
    - {"EPS", "WMF", "HDF5", "GRIB", "BUFR", "FPX", "MIC", "MPEG"}
)
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} | {".mpo"}
"""Suffixes of image files in lower case; Pillow opens .mpo, of two lenses, as the JPEG that it begins with."""

HEIC_SUFFIXES = {".heic", ".heif", ".hif"} - SUFFIXES
"""Suffixes that are images once pillow-heif is installed; empty where it is."""

MAX_MEGAPIXELS = 179
"""Images with more pixels are not decoded unless asked for: Pillow's own limit, against files made to fill memory."""

PAGE_MEGAPIXELS = 50
"""The same on a page that anyone may send images to: what telephones take, in a few hundred MB of memory."""

SYSTEM_NAMES = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "__macosx",
    "system volume information",
    "lost+found",
}
"""Files and folders that systems leave among those of people, in lower case."""

MAX_NAMED = 3
"""Names in a line about what was left out."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what brings the stored pixels upright; 1 is upright already."""

_TURNED_BY = "turned by EXIF orientation"
_NUM_FRAMES = "number of frames"
_lifting = threading.Lock()


class CorruptImageError(ValueError):
    """An image that cannot be read; the message says why, and that of `read_image` also says which."""


class FolderFiles(NamedTuple):
    """What is below a folder, as paths relative to it with `/` between folders, sorted as text.

    Attributes:
        files: All files but those that are hidden or of the system.
        broken_links: Links that lead nowhere.
        loops: Links to a folder in which they are themselves, which are not entered.
        empty: Folders in which there is nothing.
    """

    files: list[str]
    broken_links: list[str]
    loops: list[str]
    empty: list[str]


class FolderImages(NamedTuple):
    """The images below a folder, as paths relative to it with `/` between folders, sorted as text.

    Attributes:
        images: Files with the suffix of an image.
        loops: As in `FolderFiles`.
        remarks: A sentence for each kind of what was left out, with the number and the first names.
    """

    images: list[str]
    loops: list[str]
    remarks: list[str]


def list_files(folder: str | Path) -> FolderFiles:
    """List the files below a folder and below the folders that links in it lead to.

    Hidden files and folders, whose names begin with a dot, and those of `SYSTEM_NAMES` are ignored.

    Raises:
        OSError: The folder, or one below it, cannot be read.
    """
    found = FolderFiles([], [], [], [])
    _walk(str(folder), "", (_identity(folder),), found)
    for names in found:
        names.sort()
    return found


def _walk(folder: str, prefix: str, above: tuple, found: FolderFiles) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
                continue
            name = prefix + entry.name
            if entry.is_dir():
                if entry.is_symlink() and _identity(entry.path) in above:
                    found.loops.append(name)
                    continue
                before = sum(map(len, found))
                _walk(entry.path, f"{name}/", (*above, _identity(entry.path)), found)
                if sum(map(len, found)) == before:
                    found.empty.append(name)
            elif entry.is_file():
                found.files.append(name)
            elif entry.is_symlink():
                found.broken_links.append(name)


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def list_images(folder: str | Path, also: Collection[str] = ()) -> FolderImages:
    """List the images below a folder, see `list_files`, and say what was left out.

    Args:
        folder: An existing folder.
        also: Further suffixes in lower case, such as those of videos, that count as images.
    """
    found = list_files(folder)
    images, remarks = choose_images(found.files, also)
    return FolderImages(images, found.loops, remarks + remarks_on_links(found))


def choose_images(names: Iterable[str], also: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Divide names of files: those of images, and a sentence for each kind of the others."""
    images, heic, others = list[str](), list[str](), list[str]()
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        kind = images if suffix in SUFFIXES or suffix in also else heic if suffix in HEIC_SUFFIXES else others
        kind.append(name)
    remarks = []
    if heic:
        remarks.append(left_out(heic, "HEIC image", "HEIC images", "pip install pillow-heif lets them be read"))
    if others:
        remarks.append(left_out(others, "file that is not an image", "files that are not images"))
    return images, remarks


def remarks_on_links(found: FolderFiles) -> list[str]:
    """A sentence for each kind of links that were not followed."""
    remarks = []
    if found.broken_links:
        remarks.append(left_out(found.broken_links, "link that leads nowhere", "links that lead nowhere"))
    if found.loops:
        kinds = "link to a folder in which it is itself", "links to folders in which they are themselves"
        remarks.append(left_out(found.loops, *kinds))
    return remarks


def left_out(names: list[str], one: str, several: str, remedy: str = "") -> str:
    """A sentence about what was left out: how many, of what kind, and the first names.

    Args:
        names: Names of what was left out.
        one, several: What one of them is, and what several are.
        remedy: What to do about it, the end of the sentence.
    """
    shown = ", ".join(map(readable_name, names[:MAX_NAMED])) + (", …" if len(names) > MAX_NAMED else "")
    return f"Left out {len(names)} {one if len(names) == 1 else several}: {shown}{remedy and '; '}{remedy}."


def remark_on_repeats(names: Iterable[str | None]) -> list[str]:
    """A sentence about images that a list or a table names several times, or none."""
    repeated = [readable_name(name) for name, count in Counter(names).items() if name and count > 1]
    if not repeated:
        return []
    shown = ", ".join(repeated[:MAX_NAMED]) + (", …" if len(repeated) > MAX_NAMED else "")
    return [f"Took several times what is named several times, {len(repeated)} of the images: {shown}."]


def readable_name(name: str | Path) -> str:
    """The name of a file as text: bytes that are not UTF-8, as older systems wrote them, are read as Latin-1."""
    name = str(name)
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        return os.fsencode(name).decode("latin-1")


def stem_of(name: str) -> str:
    """What pairs an image with its label map: the relative path without the suffix.

    In one Unicode form: macOS writes é as two characters, most others as one.
    """
    return unicodedata.normalize("NFC", os.path.splitext(readable_name(name))[0])


class NamedImages:
    """Image files below a folder, found by their relative path with or without the suffix."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        self.by_stem: dict[str, list[str]] = {}
        for name in names:
            self.by_stem.setdefault(stem_of(name), []).append(name)

    def find(self, names: list[str]) -> list[str]:
        """The file of each name, relative to the folder.

        Raises:
            ValueError: A name has no file, or several files have it.
        """
        found = [self._find(name) for name in names]
        missing = [name for name, files in zip(names, found, strict=True) if not files]
        if missing:
            near = get_close_matches(missing[0], self.by_stem, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(
                f"{self.folder} has no file {missing[0]!r} (of {len(missing)} that are missing there){hint}."
            )
        for name, files in zip(names, found, strict=True):
            if len(files) > 1:
                raise ValueError(
                    f"{self.folder} has several images named {name!r}: {', '.join(map(readable_name, files))}; keep "
                    "one of them."
                )
        return [files[0] for files in found]

    def _find(self, name: str) -> list[str]:
        """The files of a name. Its suffix counts where a file has it: a list of JPEG files serves for PNG masks too."""
        name = unicodedata.normalize("NFC", name.replace("\\", "/").removeprefix("./"))
        if name in self.by_stem:
            return self.by_stem[name]
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in SUFFIXES:
            return []
        files = self.by_stem.get(stem, [])
        return [file for file in files if file.lower().endswith(suffix.lower())] or files


def open_image(source: str | Path | BinaryIO, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Open an image file and read its header; the pixels are decoded when they are first used.

    Raises:
        CorruptImageError: The file is not an image, or has too many pixels. The message is the end of a sentence that
            begins with its name.
        OSError: There is no such file.
    """
    try:
        image = _read_header(source)
    except UnidentifiedImageError:
        raise CorruptImageError(_describe_unknown(_first_bytes(source))) from None
    except OSError as error:
        if error.errno is not None:  # of the system; the decoders raise some without a number
            raise
        raise CorruptImageError(f"cannot be decoded: {one_line(error)}") from None
    except Exception as error:  # the decoders of Pillow raise errors of a dozen kinds
        raise CorruptImageError(f"cannot be decoded: {one_line(error)}") from None
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise CorruptImageError(
            f"has {megapixels:.3g} megapixels, more than the {max_megapixels:.3g} that max_megapixels allows"
        )
    return image


def _read_header(source: str | Path | BinaryIO) -> Image.Image:
    try:
        # Pillow decodes icons when it opens them, and what is in them may be larger than their header says.
        return Image.open(source, formats=["ICO"])
    except UnidentifiedImageError:
        with _without_pillows_limit():
            return Image.open(source, formats=FORMATS)


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Ours may be higher. Pillow's is one for the whole process: one thread at a time."""
    with _lifting:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def load_upright(image: Image.Image) -> Image.Image:
    """Decode the pixels of an image and turn it as its EXIF orientation says, as viewers do.

    `orientation_of` tells afterwards by which orientation it was turned, and `remark_on_frames` whether it is the first
    of several frames or pages. Damaged EXIF turns nothing.

    Raises:
        CorruptImageError: The pixels cannot be decoded; the message as that of `open_image`.
    """
    frames = _count_frames(image)
    orientation = _read_orientation(image)  # decodes PNG files, which closes them
    limit = Image.MAX_IMAGE_PIXELS
    is_refused = image.format == "TIFF" and limit is not None and image.width * image.height > limit  # once more
    try:
        with _without_pillows_limit() if is_refused else nullcontext():
            image.load()
    except Exception as error:  # the decoders of Pillow raise errors of a dozen kinds
        raise CorruptImageError(f"cannot be decoded: {one_line(error)}") from None
    remaining = _read_orientation(image)  # Pillow has turned TIFF files by itself
    if remaining in TURNS:
        orientation, image = remaining, image.transpose(TURNS[remaining])
        for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
            image.info.pop(name, None)
    if orientation in TURNS:
        image.info[_TURNED_BY] = orientation
    if frames > 1:
        image.info[_NUM_FRAMES] = frames
    return image


def keep_notes(converted: Image.Image, image: Image.Image) -> Image.Image:
    """Note in a converted image what `load_upright` noted in the image that it was made of."""
    converted.info |= {name: image.info[name] for name in (_TURNED_BY, _NUM_FRAMES) if name in image.info}
    return converted


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation by which `load_upright` turned an image; 1 where it did not."""
    return image.info.get(_TURNED_BY, 1)


def _read_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the pixels may be good nevertheless
        return 1


def remark_on_frames(name: str | Path, image: Image.Image) -> list[str]:
    """A sentence where the file of an image that was read holds more frames or pages, or none."""
    frames = image.info.get(_NUM_FRAMES, 1)
    return [f"{readable_name(name)} holds {frames} images: only the first is used."] if frames > 1 else []


def _count_frames(image: Image.Image) -> int:
    """The frames or pages of an open file; 1 where it is closed, or does not tell."""
    # A second lens or a map of depths, and layers: the first is the image.
    if image.format in ("MPO", "PSD") or getattr(image, "fp", None) is None:
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # of a damaged file, whose first frame may be good nevertheless
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode, by the conversion of the image processor; what is RGB already as it is."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    return Image.fromarray(pil_to_rgb(image).permute(1, 2, 0).contiguous().numpy())


def read_image(
    source: str | Path | BinaryIO, name: str | None = None, max_megapixels: float = MAX_MEGAPIXELS
) -> Image.Image:
    """An image of any mode as 8-bit RGB, turned as its EXIF orientation says, transparency composited on white.

    Of several frames or pages it is the first; `remark_on_frames` says how many there are.

    Args:
        source: A file, by its path or opened for reading bytes.
        name: What messages call it; by default its path.
        max_megapixels: Larger images are refused.

    Raises:
        CorruptImageError: There is a file without an image that can be read.
        OSError: There is no file.
    """
    name = readable_name(str(source)) if name is None else name
    if isinstance(source, str | Path):
        source = Path(source)
        if not source.exists():
            raise FileNotFoundError(f"There is no image file {name}.")
        if source.is_dir():
            raise IsADirectoryError(f"{name} is a folder; an image file is needed here.")
    try:
        with open_image(source, max_megapixels) as image:
            upright = load_upright(image)
            converted = to_rgb(upright)
    except CorruptImageError as error:
        raise CorruptImageError(f"{name} {error}.") from None
    if converted is upright:
        converted = upright.copy()  # without the file
        converted.info = {}
    return keep_notes(converted, upright)


def _first_bytes(source: str | Path | BinaryIO) -> bytes:
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            return file.read(64)
    source.seek(0)
    return source.read(64)


_SIGNATURES = {
    b"\x89PNG": "is a PNG file with a damaged header",
    b"\xff\xd8": "is a JPEG file with a damaged header",
    b"RIFF": "is a WebP or another RIFF file that Pillow cannot read",
    b"%PDF": "is a PDF document, not an image",
    b"version https://git-lfs": "is a Git LFS pointer, not the image itself: git lfs pull fetches it",
    b"<": "is text in HTML or XML, not an image",
}


def _describe_unknown(head: bytes) -> str:
    """Why a file that begins with these bytes is not read, as the end of a sentence."""
    if not head:
        return "is empty"
    if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        return "is a HEIC image: pip install pillow-heif lets it be read"
    for start, reason in _SIGNATURES.items():
        if head.lstrip().startswith(start):
            return reason
    return "is not an image file of a known format"


__all__ = [
    "FORMATS",
    "MAX_MEGAPIXELS",
    "PAGE_MEGAPIXELS",
    "SUFFIXES",
    "TURNS",
    "CorruptImageError",
    "FolderFiles",
    "FolderImages",
    "NamedImages",
    "choose_images",
    "keep_notes",
    "left_out",
    "list_files",
    "list_images",
    "load_upright",
    "open_image",
    "orientation_of",
    "read_image",
    "readable_name",
    "remark_on_frames",
    "remark_on_repeats",
    "remarks_on_links",
    "stem_of",
    "to_rgb",
]
