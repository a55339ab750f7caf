"""What people are left with: files that are whole or absent, and errors that fit on a line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_complete(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, which then gets its name, or is removed where it failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{path.name}")  # the suffix tells libraries the format
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """What an error says on one line without its last stop, or its class where it says nothing."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


__all__ = ["one_line", "write_complete"]
