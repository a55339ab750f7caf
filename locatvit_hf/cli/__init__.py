"""The command `locatvit`. One file a verb: a function with typer's annotations, registered here."""

import typer

from .card import card
from .convert import convert
from .info import info
from .look import look
from .push import push
from .segment import segment
from .serve import serve

app = typer.Typer(
    name="locatvit",
    help="Locality-attending vision transformers for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _verbs() -> None:
    """Keeps `locatvit` a command of verbs while it has a single one."""


app.command()(card)
app.command()(convert)
app.command()(info)
app.command()(look)
app.command()(push)
app.command()(segment)
app.command()(serve)

__all__ = ["app"]
