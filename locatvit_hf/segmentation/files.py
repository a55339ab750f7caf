"""Image files and folders of them."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ..visualization.images import SUFFIXES, CorruptImageError, read_image
from .outputs import OutputFolder, Source
from .segmenter import Segmenter

VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"}


def find_sources(paths: list[Path], output: Path | None = None) -> list[Source]:
    """The files among `paths` and the images and videos below the folders among them, each once, sorted by folder.

    Results are named like the file without its suffix, or with it where several files differ in nothing else.
    output: the folder for results; what lies below it is no source.
    Raises ValueError where a path leads nowhere or a folder holds neither images nor videos.
    """
    known = SUFFIXES | VIDEO_SUFFIXES
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file())
            if output is not None:
                inside = [file for file in inside if output.resolve() not in file.resolve().parents]
            if not inside:
                raise ValueError(f"The folder {path} holds no images and no videos.")
            found.update((file, file.relative_to(path)) for file in inside)
        elif path.exists():
            found[path] = Path(path.name)
        else:
            raise ValueError(f"There is no file or folder {path}.")
    shared = Counter(name.with_suffix("") for name in found.values())
    sources = [
        Source(path, name.with_suffix("") if shared[name.with_suffix("")] == 1 else name)
        for path, name in found.items()
    ]
    twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise ValueError(f"Several inputs are named {twice[0]}, and would overwrite each other: segment them apart.")
    return sources


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def segment_files(
    segmenter: Segmenter,
    sources: list[Source],
    output: OutputFolder,
    batch_size: int,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[CorruptImageError]:
    """Segment image files into a folder, and yield what could not be read.

    advance: called after each file. Files are read and results written beside the model's work.
    """
    batches = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        reading: list[Future[Image.Image]] = []
        writing: list[Future[None]] = []
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            images = {}
            read = reading or [pool.submit(read_image, source.path) for source in batch]
            reading = [pool.submit(read_image, source.path) for source in following]
            for source, future in zip(batch, read, strict=True):
                try:
                    images[source] = future.result()
                except CorruptImageError as error:
                    yield error
                    advance()
            class_maps = segmenter(list(images.values()))
            for future in writing:
                future.result()
            writing = [
                pool.submit(output.write, source, image, class_map)
                for (source, image), class_map in zip(images.items(), class_maps, strict=True)
            ]
            for _ in images:
                advance()
        for future in writing:
            future.result()
