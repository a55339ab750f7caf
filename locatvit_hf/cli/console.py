"""What the verbs share: one console, and errors that are a sentence instead of a traceback."""

import functools
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..utils.images import MAX_MEGAPIXELS

MaxMegapixels = Annotated[
    float, typer.Option(min=0, help="Larger images are not read, in millions of pixels, for they may fill the memory.")
]
console = Console(highlight=False, soft_wrap=True)
error_console = Console(stderr=True, highlight=False, soft_wrap=True)


def escape_terminal(value: object) -> Text:
    """Text of a stranger for the terminal: what would steer it, or be invisible, is written out."""
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(value))
    return Text("".join(shown))


def friendly_errors(verb: Callable) -> Callable:
    """Prints what a verb raises because of its input in red and exits with 1; a bug keeps its traceback."""

    @functools.wraps(verb)
    def wrapped(*args, **kwargs):
        try:
            return verb(*args, **kwargs)
        except (ValueError, OSError) as error:
            error_console.print(escape_terminal(" ".join(str(error).split())), style="red")
            raise typer.Exit(1) from error

    return wrapped


__all__ = ["MAX_MEGAPIXELS", "MaxMegapixels", "console", "error_console", "friendly_errors", "escape_terminal"]
