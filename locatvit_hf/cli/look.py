"""`locatvit look IMAGE... --model M`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .console import MAX_MEGAPIXELS, MaxMegapixels, console, friendly_errors, silence_transformers, warn


@friendly_errors
def look(
    images: Annotated[list[Path], typer.Argument(help="Images of any size.", show_default=False)],
    model: Annotated[str, typer.Option(help="The checkpoint that looks: a folder or a Hub id.")],
    baseline: Annotated[str | None, typer.Option(help="A second checkpoint to show beside it, as a plain ViT.")] = None,
    patch: Annotated[
        list[str] | None,
        typer.Option(help="ROW,COLUMN of a patch to ask, from 1; may be repeated. By default three that differ."),
    ] = None,
    layer: Annotated[int | None, typer.Option(min=1, help="The layer to ask, from 1; by default a late one.")] = None,
    output: Annotated[Path, typer.Option(help="The folder to write.")] = Path("look"),
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model's Hub repository.")] = None,
) -> None:
    """Draw where a model looks, how far its Gaussians reach and what its features tell apart."""
    from collections import Counter
    from functools import partial

    from ..inference import Checkpoint
    from ..utils.images import CorruptImageError, read_image, readable_name, remark_on_frames
    from ..utils.io import atomic_write, fitting_name
    from ..visualization import figures
    from ..visualization.activations import read_layers
    from ..visualization.html_report import build_report

    silence_transformers()
    twice = [stem for stem, count in Counter(path.stem for path in images).items() if count > 1]
    if twice:
        raise ValueError(
            f"Several images are named {readable_name(twice[0])}, and would overwrite each other: look at them apart."
        )
    loaded = {}
    for path in images:
        try:
            loaded[path.stem] = read_image(path, max_megapixels=max_megapixels)
        except CorruptImageError as error:
            if path == images[-1] and not loaded:
                raise
            warn(f"Skipped: {error}")
            continue
        for sentence in remark_on_frames(path, loaded[path.stem]):
            warn(sentence)
    chosen = [_parse_patch(text) for text in patch or []]

    models, processors = {}, {}
    for checkpoint, its_revision in ((model, revision), (baseline, None)):
        if checkpoint is not None:
            name = Path(checkpoint).name if Path(checkpoint).name not in models else checkpoint
            opened = Checkpoint(checkpoint, its_revision)
            processors[name] = opened.create_processor(segmentation=True)
            models[name] = opened.load_encoder()

    for stem, image in loaded.items():
        layers = {
            name: read_layers(found, processors[name](image, return_tensors="pt")["pixel_values"])
            for name, found in models.items()
        }
        ours = next(iter(layers.values()))
        if layer is not None and layer > len(ours):
            raise ValueError(f"{model} has {len(ours)} layers; there is no layer {layer}.")
        index = figures.default_layer(ours) if layer is None else layer - 1
        grid = ours[index].grid
        for row, column in chosen:
            if row >= grid[0] or column >= grid[1]:
                raise ValueError(
                    f"Layer {index + 1} sees {stem} as {grid[0]} rows and {grid[1]} columns of patches; there is no "
                    f"patch {row + 1},{column + 1}."
                )
        patches = chosen or figures.default_queries(ours[index])
        drawn, missing = figures.draw_figures(image, layers, index, patches)
        for sentence in missing:
            console.print(sentence, markup=False)
        for name, figure in drawn.items():
            atomic_write(output / fitting_name(stem, f"-{name}.png"), partial(figure.savefig, dpi=160))
        page = build_report(readable_name(stem), image, layers, index, patches[0])
        report = output / fitting_name(stem, ".html")
        atomic_write(report, page)
        console.print(f"[bold]{escape(readable_name(report))}[/bold], and {len(drawn)} figures beside it.")


def _parse_patch(text: str) -> tuple[int, int]:
    row, _, column = text.partition(",")
    try:
        place = int(row) - 1, int(column) - 1
    except ValueError:
        place = (-1, -1)
    if min(place) < 0:
        raise ValueError(f"--patch takes ROW,COLUMN, two numbers from 1, as in --patch 3,5; got {text}.")
    return place


__all__ = ["look"]
