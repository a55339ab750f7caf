"""Image files and folders of them."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ..utils.images import MAX_MEGAPIXELS, CorruptImageError, list_images, read_image, readable_name, remark_on_frames
from ..utils.io import disk_is_full
from .outputs import OutputFolder, Source
from .segmenter import Segmenter

VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"}


def find_sources(
    paths: list[Path], output: Path | None = None, report: Callable[[str], None] = lambda sentence: None
) -> list[Source]:
    """Find the files among `paths`, and the images and videos below the folders among them.

    Args:
        paths: Files and folders; of folders, `list_images` says what is looked at.
        output: The folder for results; what is below it is no source.
        report: Called with a sentence for each kind of files that a folder holds and that were left out.

    Returns:
        Each file once, sorted by folder. Results are named like the file without its suffix, or with it where several
        files differ in nothing else.

    Raises:
        ValueError: A path leads nowhere, a folder holds neither images nor videos, or two results would have one name.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            listed = list_images(path, VIDEO_SUFFIXES)
            inside = [path / name for name in sorted(listed.images, key=Path)]
            if output is not None:
                inside = [file for file in inside if output.resolve() not in file.resolve().parents]
            for sentence in listed.remarks:
                report(sentence)
            if not inside:
                raise ValueError(f"The folder {readable_name(path)} holds no images and no videos.")
            found.update((file, file.relative_to(path)) for file in inside)
        elif path.exists():
            found[path] = Path(path.name)
        else:
            raise ValueError(f"There is no file or folder {readable_name(path)}.")
    shared = Counter(name.with_suffix("") for name in found.values())
    sources = [
        Source(path, name.with_suffix("") if shared[name.with_suffix("")] == 1 else name)
        for path, name in found.items()
    ]
    twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise ValueError(
            f"Several inputs are named {readable_name(twice[0])}, and would overwrite each other: segment them apart."
        )
    return sources


def is_video(path: Path) -> bool:
    """Whether the suffix of a file is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def segment_files(
    segmenter: Segmenter,
    sources: list[Source],
    output: OutputFolder,
    batch_size: int,
    advance: Callable[[], None] = lambda: None,
    max_megapixels: float = MAX_MEGAPIXELS,
    report: Callable[[str], None] = lambda sentence: None,
) -> Iterator[CorruptImageError | OSError]:
    """Segment image files into a folder, and yield what could not be read, or written for reasons of its own.

    Files are read and results written beside the model's work.

    Args:
        segmenter: The model.
        sources: The image files, from `find_sources`.
        output: The folder to write.
        batch_size: Images that are segmented at once.
        advance: Called after each file.
        max_megapixels: Larger images are not read.
        report: Called with a sentence for each file of several frames or pages, of which the first is used.

    Raises:
        OSError: The disk is full.
    """
    batches = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        reading: list[Future[tuple[str, Image.Image]]] = []
        writing: list[Future[None]] = []
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            images, states = {}, {}
            read = reading or [pool.submit(_read, source, max_megapixels) for source in batch]
            reading = [pool.submit(_read, source, max_megapixels) for source in following]
            for source, future in zip(batch, read, strict=True):
                try:
                    states[source], images[source] = future.result()
                    for sentence in remark_on_frames(source.path, images[source]):
                        report(sentence)
                except (CorruptImageError, OSError) as error:
                    yield error
                    advance()
            class_maps = segmenter(list(images.values()))
            yield from _failures(writing)
            writing = [
                pool.submit(output.write, source, states[source], image, class_map)
                for (source, image), class_map in zip(images.items(), class_maps, strict=True)
            ]
            for _ in images:
                advance()
        yield from _failures(writing)


def _read(source: Source, max_megapixels: float) -> tuple[str, Image.Image]:
    """The state of a file and the image in it; the state first, in case the file is being written."""
    return source.state(), read_image(source.path, None, max_megapixels)


def _failures(writing: list[Future[None]]) -> Iterator[OSError]:
    for future in writing:
        try:
            future.result()
        except OSError as error:
            if disk_is_full(error):
                raise
            yield error
