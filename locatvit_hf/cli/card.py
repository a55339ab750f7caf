"""`locatvit card FOLDER`."""

from pathlib import Path
from typing import Annotated

import typer

from .console import console, friendly_errors


@friendly_errors
def card(
    folder: Annotated[Path, typer.Argument(help="The checkpoint: a folder with config.json and card.yaml.")],
    source: Annotated[
        Path | None, typer.Option(help="What is published about this checkpoint: a file of model_cards/.")
    ] = None,
    result: Annotated[
        list[Path] | None, typer.Option(help="A JSON result of training/evaluation/ to add; may be repeated.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    license: Annotated[str | None, typer.Option(help="License of the weights as the Hub abbreviates it: mit.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="What the weights learned from, a Hub name if it has one; may be repeated.")
    ] = None,
) -> None:
    """Render the card of a checkpoint anew, from its config.json and card.yaml and from what is given here."""
    from ..hub.card import update_card

    facts = {"title": title, "weights_license": license, "datasets": dataset}
    written = update_card(folder, source, result or (), **{name: said for name, said in facts.items() if said})
    numbers = f"{len(written.results)} measured and {len(written.published)} published numbers"
    console.print(f"[green]{written.title}[/green]: {numbers} in [bold]{folder / 'README.md'}[/bold].")


__all__ = ["card"]
