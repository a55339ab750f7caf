"""Videos, frame by frame."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import av
from PIL import Image

from ..utils.images import CorruptImageError
from ..utils.io import atomic_write
from .outputs import OutputFolder, Source
from .segmenter import Segmenter


def count_frames(path: Path) -> int | None:
    """The frames of a video as its file says, or its length times its rate; None where it says neither."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.frames:
                return stream.frames
            if stream.average_rate and container.duration:
                return max(round(container.duration / av.time_base * stream.average_rate), 1)
    except (av.FFmpegError, IndexError):
        pass
    return None


def segment_video(
    segmenter: Segmenter,
    source: Source,
    output: OutputFolder,
    batch_size: int,
    frame_maps: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write `overlays/NAME.mp4` with the frame rate of a video, and with `frame_maps` `maps/NAME/000000.png`, ….

    A batch of frames is held at a time.

    Args:
        segmenter: The model.
        source: The video file.
        output: The folder to write.
        batch_size: Frames that are segmented at once.
        frame_maps: Whether a label map of each frame is written.
        advance: Called after each frame.

    Raises:
        CorruptImageError: The file holds no video that can be decoded.
        OSError: The file is gone, or the results cannot be written.
    """
    state = source.state()
    if not source.path.stat().st_size:
        raise CorruptImageError(f"{source.path} is empty.")
    atomic_write(
        output.video_path(source.name),
        lambda target: _write_overlays(segmenter, source, state, target, output, batch_size, frame_maps, advance),
    )


def _write_overlays(
    segmenter: Segmenter,
    source: Source,
    state: str,
    target: Path,
    output: OutputFolder,
    batch_size: int,
    frame_maps: bool,
    advance: Callable[[], None],
) -> None:
    path, name = source
    try:
        with _open_film(path) as film, av.open(str(target), "w", format="mp4") as sink:
            sink.metadata["comment"] = state
            frames, stream, number = _frames(film, path), None, 0
            while batch := list(islice(frames, batch_size)):
                for image, class_map in zip(batch, segmenter(batch), strict=True):
                    if frame_maps:
                        path_of_map = output.map_path(name / f"{number:06d}")
                        atomic_write(path_of_map, output.label_image(class_map).save)
                    overlay = output.overlay(image, class_map)
                    stream = stream or _add_stream(sink, film.streams.video[0].average_rate or 25, overlay.size)
                    overlay = overlay.crop((0, 0, stream.width, stream.height))
                    sink.mux(stream.encode(av.VideoFrame.from_image(overlay)))
                    number += 1
                    advance()
            if stream is None:
                raise CorruptImageError(f"{path} holds no frame that can be decoded.")
            sink.mux(stream.encode())
    except av.FFmpegError as error:  # what is read raises errors of its own
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"Cannot write {output.video_path(name)}: {reason}") from None


def _open_film(path: Path) -> av.container.InputContainer:
    try:
        film = av.open(str(path))
    except av.FFmpegError as error:
        raise CorruptImageError(f"{path} cannot be decoded: {error.strerror or error}.") from None
    if not film.streams.video:
        film.close()
        raise CorruptImageError(f"{path} holds no video.")
    return film


def _frames(film: av.container.InputContainer, path: Path) -> Iterator[Image.Image]:
    """The frames as RGB images, turned as the video says."""
    try:
        for frame in film.decode(video=0):
            image = frame.to_image()
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
    except av.FFmpegError as error:
        raise CorruptImageError(f"{path} cannot be decoded: {error.strerror or error}.") from None


def _add_stream(sink: av.container.OutputContainer, rate, size: tuple[int, int]) -> av.VideoStream:
    """H.264 where FFmpeg has it, else MPEG-4. Both halve the color planes, so sides are even."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    stream = sink.add_stream(codec, rate=rate)
    stream.width, stream.height = (max(side // 2 * 2, 2) for side in size)
    stream.pix_fmt = "yuv420p"
    if codec == "mpeg4":
        stream.bit_rate = 8_000_000
    return stream
