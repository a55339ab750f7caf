"""`locatvit convert SOURCE OUT`."""

from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging

from ..conversion.convert import convert as run
from .console import console, friendly_errors


@friendly_errors
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with config.json and weights, a training run or its *.pth.tar, or a Hub id.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average (state_dict_ema) of a run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
) -> None:
    """Convert a checkpoint of the reference, or a plain ViT of timm, into a folder that transformers loads."""
    logging.disable_progress_bar()
    conversion = run(source, out, ema=ema, overwrite=overwrite, revision=revision, report=_print)
    millions = conversion.num_parameters / 1e6
    console.print(f"[green]{conversion.model_class}[/green], {millions:.2f} M parameters, is in [bold]{out}[/bold].")


def _print(line: str) -> None:
    console.print(line, markup=False)


__all__ = ["convert"]
