"""What the verbs share: two consoles, and errors that are a sentence instead of a traceback."""

import functools
from collections.abc import Callable
from typing import Annotated

import typer
from rich.text import Text

from ..utils.console import PublicConsole
from ..utils.images import MAX_MEGAPIXELS
from ..utils.io import OUT_OF_MEMORY, is_out_of_memory

MaxMegapixels = Annotated[
    float, typer.Option(min=0, help="Larger images are not read, in millions of pixels, for they may fill the memory.")
]
console, error_console = PublicConsole(), PublicConsole(stderr=True)


def escape_terminal(value: object) -> Text:
    """Text of a stranger for the terminal: what would steer it, or be invisible, is written out."""
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(value))
    return Text("".join(shown))


def warn(sentence: str) -> None:
    """Print a sentence about what was left out, refused or tried again."""
    error_console.print(escape_terminal(sentence), style="yellow")


def friendly_errors(verb: Callable) -> Callable:
    """Print what a verb raises because of its input in red, and exit with 1; a bug keeps its traceback."""

    @functools.wraps(verb)
    def wrapped(*args, **kwargs):
        try:
            return verb(*args, **kwargs)
        except (ValueError, OSError) as error:
            error_console.print(escape_terminal(" ".join(str(error).split())), style="red")
            raise typer.Exit(1) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            error_console.print(OUT_OF_MEMORY, style="red")
            raise typer.Exit(1) from error

    return wrapped


def silence_transformers() -> None:
    """Keep progress bars and remarks of transformers out of what a verb prints."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


__all__ = [
    "MAX_MEGAPIXELS",
    "MaxMegapixels",
    "console",
    "error_console",
    "escape_terminal",
    "friendly_errors",
    "silence_transformers",
    "warn",
]
