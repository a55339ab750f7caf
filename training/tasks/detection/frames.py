"""Annotations compared with the files of their images: their sizes, and what EXIF turns."""

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from training.data.images import CorruptImageError, Header, read_header
from training.tasks.detection.objects import Annotated, Notes, size_inside
from training.tasks.detection.segmentations import check_segmentation, turn_points, turn_segmentation


class _Frame(NamedTuple):
    """What the annotations of an image are made for, and what makes that upright.

    Attributes:
        size: The [width, height] in pixels of the image as annotated.
        orientation: That of EXIF where the annotations are for the stored pixels, otherwise 1.
        upright: The [width, height] in pixels of the image as `decode_image` gives it.
    """

    size: list[int]
    orientation: int
    upright: list[int]


def fit_to_images(annotated: Annotated, source: str, label_orientation: str | None) -> None:
    """Compare annotations with the files of their images: leave out what covers nothing, turn what EXIF turns.

    Afterwards sizes and coordinates are those of the images as `decode_image` gives them, upright. Boxes may still
    reach over the edge, as evaluation has them; training cuts them.

    Args:
        annotated: The split, whose objects and notes are changed.
        source: What messages call it.
        label_orientation: See `DetectionDataArguments`.

    Raises:
        ValueError: Annotations are made for images of another size, or segmentations cannot be decoded.
    """
    numbers = [number for number, image in enumerate(annotated.objects) if image["annotations"]]
    for image in annotated.objects:
        image["size"] = image["size"] if image["annotations"] else None  # nothing depends on it
    frames, wrong = [], list[tuple[dict, Any, _Frame]]()
    for number, header in zip(numbers, _read_headers(annotated.images, numbers), strict=True):
        image = annotated.objects[number]
        frame = _find_frame(image, header, label_orientation, annotated.notes)
        if frame is None:
            image["annotations"] = []
        elif image["size"] not in (None, frame.size):
            wrong.append((image, header, frame))
        else:
            frames.append((image, frame))
    if wrong:
        image, file, frame = wrong[0]
        stored = f", {list(file.size)} before EXIF turns it" if list(file.size) != frame.upright else ""
        raise ValueError(
            f"The annotations are for an image of {image['size']} pixels, but {image['name']} of {source} has "
            f"{frame.upright}{stored}. It is one of {len(wrong)} such of {len(numbers)} images."
        )
    _refuse_other_boxes(frames, source)
    for image, frame in frames:
        kept = (_fit(entry, frame, source, annotated.notes) for entry in image["annotations"])
        image.update(size=frame.upright, annotations=[entry for entry in kept if entry is not None])


def _find_frame(
    image: dict[str, Any], header: Header | None, label_orientation: str | None, notes: Notes
) -> _Frame | None:
    """The frame of an image, None where nothing is known of it."""
    if header is None:  # it cannot be decoded either, and is counted where it is met
        if image["size"] is None:
            notes.add("images that cannot be read, without their objects", image["name"])
            return None
        return _Frame(image["size"], 1, image["size"])
    stored, orientation = list(header.size), header.orientation
    upright = stored[::-1] if orientation > 4 else stored
    if orientation == 1:
        return _Frame(upright, 1, upright)
    # The annotations, too, may know which way they are meant: by the size of run lengths, or by boxes beyond the edge.
    masks = [entry.get("segmentation") for entry in image["annotations"]]
    sizes = [mask.get("size") for mask in masks if isinstance(mask, dict)]
    known = [image["size"], *(size[::-1] for size in sizes if isinstance(size, list))]
    fitting = [size for size in (upright, stored) if size in known]
    if not fitting and image["size"] is None:
        fitting = [size for size in (upright, stored) if _fits(image["annotations"], size)]
    unclear = upright == stored or len(fitting) != 1
    as_stored = label_orientation == "stored" if unclear else fitting == [stored]
    if as_stored:
        notes.add(
            "images that EXIF turns and whose annotations are for the stored pixels, turned with them", image["name"]
        )
        return _Frame(stored, orientation, upright)
    if unclear and label_orientation is None:
        notes.add(
            "images that EXIF turns and whose annotations are taken as for the turned image; give --label_orientation "
            "stored where they belong to the pixels as they are stored, turned where this is right",
            image["name"],
        )
    return _Frame(upright, 1, upright)


def _fit(entry: dict[str, Any], frame: _Frame, source: str, notes: Notes) -> dict[str, Any] | None:
    """An object of the upright image, or None where it covers nothing of it."""
    name, (left, top, right, bottom) = entry["name"], entry["box"]
    if right <= left or bottom <= top:
        notes.add("boxes without area, left out", name)
        return None
    if min(size_inside(entry["box"], frame.size)) <= 0:
        notes.add("boxes outside of their image, left out", name)
        return None
    if not _fits([entry], frame.size):
        notes.add("boxes that reach over the edge of their image, cut there in training", name)
    entry = dict(entry)
    if "segmentation" in entry:
        try:
            segmentation, num_left_out = check_segmentation(entry["segmentation"], frame.size)
        except ValueError as error:
            raise ValueError(f"The {name} of {source} has {error}.") from None
        if segmentation is None:
            notes.add("segmentations that cover nothing of their image, left out", name)
            return None
        if num_left_out:
            notes.add("segmentations with polygons that cover nothing, used without these", name)
        entry["segmentation"] = segmentation
    if frame.orientation != 1:
        x1, y1, x2, y2 = turn_points(entry["box"], frame.size, frame.orientation)
        entry["box"] = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
        if "segmentation" in entry:
            entry["segmentation"] = turn_segmentation(entry["segmentation"], frame.size, frame.orientation)
    return entry


def _fits(entries: list[dict[str, Any]], size: list[int]) -> bool:
    """Whether boxes lie inside of an image, or less than a pixel beyond."""
    boxes = [entry["box"] for entry in entries]
    return all(min(box[:2]) >= -1 and box[2] <= size[0] + 1 and box[3] <= size[1] + 1 for box in boxes)


def _refuse_other_boxes(frames: list[tuple[dict[str, Any], _Frame]], source: str) -> None:
    """Raises ValueError where all boxes look like fractions, or like the corners that other formats have."""
    entries = [(entry, frame.size) for image, frame in frames for entry in image["annotations"]]
    # Left, top, width and height, as they were given.
    given = [([x1, y1, x2 - x1, y2 - y1], size) for (x1, y1, x2, y2), size in ((e["box"], size) for e, size in entries)]
    if any(box[2] > 0 < box[3] for box, _ in given) and all(max(box) <= 1 for box, _ in given):
        raise ValueError(
            f"The boxes of {source} are all within 1 pixel, so they seem to be fractions of the image: give them as "
            "[left, top, width, height] in pixels."
        )
    num_beyond = sum(not _fits([entry], size) for entry, size in entries)
    if num_beyond > 1 and all(
        box[0] < box[2] <= size[0] + 1 and box[1] < box[3] <= size[1] + 1 and min(box) >= 0 for box, size in given
    ):
        raise ValueError(
            f"The boxes of {source} seem to be [left, top, right, bottom], as which all fit their images: as [left, "
            f"top, width, height] in pixels, which they must be, {num_beyond} of {len(given)} reach over the edge."
        )


class _Memory(io.RawIOBase):
    """Bytes in a table as a file: what is not read of them stays on the disk."""

    def __init__(self, content: pa.Buffer):
        self.content, self.place = memoryview(content).cast("B"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = max(offset + (0, self.place, len(self.content))[whence], 0)
        return self.place

    def readinto(self, target: Any) -> int:
        read = self.content[self.place : self.place + len(target)]
        target[: len(read)] = read
        self.place += len(read)
        return len(read)


def _read_headers(images: datasets.Dataset, numbers: list[int]) -> list[Header | None]:
    """Size and orientation of these images, None for files that cannot be read; their pixels stay where they are."""

    def read(entry: pa.StructScalar) -> Header | None:
        content = entry["bytes"].as_buffer() if entry["bytes"].is_valid else None
        try:
            path = entry["path"].as_py()
            return read_header(io.BufferedReader(_Memory(content)) if content is not None else path)
        except CorruptImageError:
            return None

    wanted, headers = set(numbers), list[Header | None]()
    rows = images.select_columns(["image"]).with_format("arrow")
    with ThreadPoolExecutor(8) as pool:  # files on a network answer late, but many at once
        for start in range(0, len(rows), 1000):
            stop = min(start + 1000, len(rows))
            if chosen := [number - start for number in range(start, stop) if number in wanted]:
                entries = rows[start:stop]["image"]
                headers += pool.map(read, [entries[place] for place in chosen])
    return headers
