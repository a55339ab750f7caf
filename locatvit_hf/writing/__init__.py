"""What people are left with: files that are whole or absent, and errors that fit on a line."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_NAME = 255
"""Bytes of a file's name on all common systems."""


def fitting_name(stem: str, ending: str) -> str:
    """`stem` and `ending` as the name of a file, its middle replaced by a hash where it would be too long."""
    if len(os.fsencode(stem + ending)) <= MAX_NAME:
        return stem + ending
    ending = f"-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]}{ending}"
    return os.fsencode(stem)[: MAX_NAME - len(os.fsencode(ending))].decode(errors="ignore") + ending


def write_complete(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, which then gets its name, or is removed where it failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix tells libraries the format.
    temporary = path.with_name(fitting_name(f".partial-{path.stem}", path.suffix))
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """What an error says on one line without its last stop, or its class where it says nothing."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


__all__ = ["fitting_name", "one_line", "write_complete"]
