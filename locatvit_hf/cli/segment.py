"""`locatvit segment IMAGE|FOLDER|VIDEO... --model M`."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .console import (
    MAX_MEGAPIXELS,
    MaxMegapixels,
    console,
    error_console,
    friendly_errors,
    silence_transformers,
    warn,
)


@friendly_errors
def segment(
    model: Annotated[str, typer.Option(help="A segmentation checkpoint: a folder or a Hub id.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(help="Images, videos, and folders of them, which are searched below too.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder to write; the same command continues in it.")] = Path(
        "segmented"
    ),
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one size that run through the model at once.")] = 8,
    window: Annotated[
        int | None,
        typer.Option(
            help="Leave images at their own size and slide a window of so many pixels over them, for large images and "
            "small things; by default an image is resized to what the checkpoint was made for."
        ),
    ] = None,
    frame_maps: Annotated[bool, typer.Option("--frame-maps", help="Also write a label map of each frame.")] = False,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Segment a dataset into parquet: a Hub id or a folder. For many GPUs: "
            "`accelerate launch -m locatvit_hf.cli segment --dataset ...`."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="The split of --dataset.")] = "train",
    column: Annotated[str, typer.Option(help="The column of --dataset that holds the images.")] = "image",
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model's Hub repository.")] = None,
) -> None:
    """Write label maps and color overlays of images, folders, videos or a dataset."""
    if bool(inputs) == bool(dataset):
        raise ValueError("Name images, videos or folders to segment, or a --dataset, and not both.")
    from ..inference import Checkpoint, InferenceArguments
    from ..inference.files import find_sources
    from ..inference.outputs import OutputFolder
    from ..utils.io import claim_folder

    silence_transformers()
    sources = find_sources(inputs or [], output, warn)
    checkpoint = Checkpoint(model, revision)
    windows = InferenceArguments(inference="sliding", window_size=window) if window is not None else None
    # Of a dataset, each process moves the model to a device of its own.
    segmenter = checkpoint.load_segmenter(windows, native_size=window is not None, device="cpu" if dataset else None)
    settings = {
        "model": _name_of(model),
        "revision": revision,
        "weights": checkpoint.fingerprint(),
        "window": window,
        "frame_maps": frame_maps,
    }
    if dataset:
        _segment_dataset(segmenter, dataset, split, column, output, settings, batch_size, max_megapixels)
    else:
        with claim_folder(output, warn):
            folder = OutputFolder(output, segmenter.id2label, settings)
            _segment_sources(segmenter, sources, folder, batch_size, frame_maps, max_megapixels)


def _segment_sources(segmenter, sources, output, batch_size: int, frame_maps: bool, max_megapixels: float) -> None:
    from ..inference.files import is_video, segment_files
    from ..inference.video import count_frames, segment_video
    from ..utils.images import CorruptImageError
    from ..utils.io import disk_is_full, one_line

    images = [source for source in sources if not is_video(source.path)]
    videos = [source for source in sources if is_video(source.path)]
    waiting_images = [source for source in images if not output.holds(source)]
    waiting_videos = [source for source in videos if not output.holds_video(source)]
    corrupt = 0
    with _progress() as progress:
        if waiting_images:
            task = progress.add_task("images", total=len(waiting_images))
            advance = partial(progress.advance, task)
            for error in segment_files(segmenter, waiting_images, output, batch_size, advance, max_megapixels, warn):
                corrupt += 1
                warn(f"Skipped: {one_line(error)}.")
        for source in waiting_videos:
            task = progress.add_task(source.path.name, total=count_frames(source.path))
            try:
                segment_video(segmenter, source, output, batch_size, frame_maps, partial(progress.advance, task))
            except (CorruptImageError, OSError) as error:
                if disk_is_full(error):
                    raise
                corrupt += 1
                warn(f"Skipped: {one_line(error)}.")
    waiting = len(waiting_images) + len(waiting_videos)
    _summarize(waiting - corrupt, len(sources) - waiting, corrupt, output.folder)


def _segment_dataset(segmenter, name, split, column, folder, settings, batch_size: int, max_megapixels: float) -> None:
    import torch

    try:
        import datasets
        from accelerate import PartialState

        from ..inference.dataset import count_empty, open_dataset, rows_of, segment_dataset, shard_path
    except ImportError as error:
        raise ValueError(f"--dataset needs {error.name}: pip install 'locatvit-hf[training]'") from error
    from ..inference.outputs import OutputFolder
    from ..utils.io import claim_folder

    datasets.disable_progress_bars()
    state = PartialState(cpu=not torch.cuda.is_available())  # else processes without GPUs would not know each other
    segmenter.model.to(state.device)
    settings = {
        **settings,
        "dataset": _name_of(name),
        "split": split,
        "column": column,
        "processes": state.num_processes,
    }
    with contextlib.ExitStack() as held:
        if state.is_main_process:
            held.enter_context(claim_folder(folder, warn))
        with state.main_process_first():
            report = warn if state.is_main_process else lambda sentence: None
            rows = open_dataset(name, split, column, report)
            output = OutputFolder(folder, segmenter.id2label, settings)
        place = state.process_index, state.num_processes
        with _progress(disable=not state.is_local_main_process) as progress:
            task = progress.add_task("rows", total=len(rows_of(len(rows), *place)))
            options = dict[str, Any](
                advance=partial(progress.advance, task), max_megapixels=max_megapixels, report=warn
            )
            for skipped in segment_dataset(segmenter, rows, column, output, batch_size, *place, **options):
                warn(f"Skipped: {skipped}")
        state.wait_for_everyone()
        if state.is_main_process:
            empty = sum(count_empty(shard_path(output, process, place[1])) for process in range(place[1]))
            unreadable = (
                f", [yellow]{empty} of them empty because the image could not be read[/yellow]" if empty else ""
            )
            console.print(f"{len(rows)} rows are in [bold]{escape(str(folder))}[/bold]{unreadable}.")
    state.destroy_process_group()


def _summarize(done: int, before: int, corrupt: int, folder: Path) -> None:
    parts = [f"[green]{done} segmented[/green]"]
    parts += [f"{before} were there already"] if before else []
    parts += [f"[yellow]{corrupt} could not be read or written[/yellow]"] if corrupt else []
    console.print(", ".join(parts) + f": [bold]{escape(str(folder))}[/bold]")
    if corrupt and not done and not before:
        raise typer.Exit(1)


def _name_of(model: str) -> str:
    """A folder by its full path, so that a run continues from anywhere."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _progress(disable: bool = False):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=error_console, disable=disable)


__all__ = ["segment"]
