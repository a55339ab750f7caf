"""The command `locatvit`. Each verb has a file with a function in typer's annotations, which is registered here."""

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


for verb in (card, convert, info, look, push, segment, serve):
    app.command()(verb)

__all__ = ["app"]
