"""What a segmentation run leaves in its folder: label maps, overlays, a legend, and `labels.json`."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..utils.colors import background_class, class_colors, overlay_segmentation
from ..utils.images import CorruptImageError, open_image
from ..utils.io import atomic_write, fitting_name

SOURCE_STATE = "source"
"""The entry in which a label map says from which state of its image it was made."""
LARGEST_OVERLAY = 2048
"""Pixels of the longer side of an overlay; label maps keep the size of their image."""


class Source(NamedTuple):
    """A file, and the relative path without a suffix under which its results are written."""

    path: Path
    name: Path

    def state(self) -> str:
        """Size in bytes and time of the last change in nanoseconds: another file, or a changed one, has others."""
        status = self.path.stat()
        return f"{status.st_size} {status.st_mtime_ns}"


class OutputFolder:
    """The folder of one run, which the same command finds again and continues.

    Files appear under their names when they are complete. `labels.json` holds the names and colors of the ids, and
    the `settings` of the run: what was made with others is not continued.

    Args:
        folder: The folder, which is made where it is missing.
        id2label: The names of the classes by their ids.
        settings: All that results depend on, as JSON can hold it.

    Raises:
        ValueError: The folder holds the results of other settings.
    """

    def __init__(self, folder: Path, id2label: dict[int, str], settings: dict[str, Any]):
        self.folder = folder
        self.background, self.colors = background_class(id2label), class_colors(id2label)
        described = {
            "settings": settings,
            "labels": [
                {"id": label, "name": name, "color": "#" + bytes(self.colors[label]).hex()}
                for label, name in id2label.items()
            ],
        }
        path = folder / "labels.json"
        if path.exists():
            try:
                same = json.loads(path.read_text(encoding="utf-8")) == described
            except ValueError:
                same = False
            if not same:
                raise ValueError(
                    f"{folder} holds the results of another model or of other options: choose another --output, or "
                    "delete it."
                )
            return
        from ..visualization.segmentation import legend_figure  # loads matplotlib

        legend = legend_figure(id2label, self.colors)
        atomic_write(folder / "legend.png", lambda target: legend.savefig(target, dpi=160, bbox_inches="tight"))
        text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        atomic_write(path, text)

    def map_path(self, name: Path) -> Path:
        """Where the label map of an image goes, by the name of its `Source`."""
        return self.folder / "maps" / name.with_name(fitting_name(name.name, ".png"))

    def overlay_path(self, name: Path) -> Path:
        """Where the overlay of an image goes."""
        return self.folder / "overlays" / name.with_name(fitting_name(name.name, ".jpg"))

    def video_path(self, name: Path) -> Path:
        """Where the overlay of a video goes."""
        return self.folder / "overlays" / name.with_name(fitting_name(name.name, ".mp4"))

    def holds(self, source: Source) -> bool:
        """Whether both results of an image are there, and were made from the file as it is now."""
        if not (self.map_path(source.name).exists() and self.overlay_path(source.name).exists()):
            return False
        try:
            with open_image(self.map_path(source.name), math.inf) as label_image:
                return label_image.info.get(SOURCE_STATE) == source.state()
        except (CorruptImageError, OSError):
            return False

    def holds_video(self, source: Source) -> bool:
        """Whether the overlay of a video is there, and was made from the file as it is now."""
        try:
            with av.open(str(self.video_path(source.name))) as container:
                return container.metadata.get("comment") == source.state()
        except (OSError, av.FFmpegError):
            return False

    def write(self, source: Source, state: str, image: Image.Image, class_map: np.ndarray) -> None:
        """Write the label map and the overlay of an image.

        Args:
            source: Where the image was read from.
            state: Of the source, before it was read: of a file that changed since, the results are made anew.
            image: The image in RGB.
            class_map: Its class ids (height, width), uint8 or uint16.
        """
        noted = PngInfo()
        noted.add_text(SOURCE_STATE, state)
        label_image, overlay = self.label_image(class_map), self.overlay(image, class_map)
        atomic_write(self.overlay_path(source.name), lambda path: overlay.save(path, quality=90))
        atomic_write(self.map_path(source.name), lambda path: label_image.save(path, pnginfo=noted))

    def label_image(self, class_map: np.ndarray) -> Image.Image:
        """Class ids as an image: 8 bits with the colors as its palette, or 16 bits of gray."""
        label_image = Image.fromarray(class_map)
        if class_map.dtype == np.uint8:
            label_image.putpalette(self.colors.tobytes())
        return label_image

    def overlay(self, image: Image.Image, class_map: np.ndarray) -> Image.Image:
        """The colors of class ids (height, width) over their image, no larger than `LARGEST_OVERLAY`."""
        small = image.copy()
        small.thumbnail((LARGEST_OVERLAY, LARGEST_OVERLAY))
        if small.size != image.size:
            class_map = np.asarray(Image.fromarray(class_map).resize(small.size, Image.Resampling.NEAREST))
        return overlay_segmentation(small, class_map, self.colors, background=self.background, ignore_index=None)
