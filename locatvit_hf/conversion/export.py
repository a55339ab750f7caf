"""Writing a folder that is complete or absent: everything goes into a hidden sibling first, which is then renamed."""

import contextlib
import importlib.metadata
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import ConversionError

try:
    import fcntl
except ImportError:  # not on Windows, where leftovers of a killed process stay
    fcntl = None


def check_destination(folder: Path, overwrite: bool) -> None:
    """Raises ConversionError where `folder` exists and may not be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ConversionError(f"{folder} exists and is no folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConversionError(f"{folder} exists and is not empty; pass --overwrite to replace it.")


@contextlib.contextmanager
def complete_or_absent(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder to write into; it becomes `folder` at the end, and vanishes where anything is raised.

    A process killed in between leaves a hidden folder beside `folder`, and `folder` as it was; the next to write
    `folder` removes it.
    """
    check_destination(folder, overwrite)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    partial, replaced = (folder.parent / f".{folder.name}.{mark}.{kind}" for kind in ("partial", "replaced"))
    partial.mkdir()
    lock = _lock(partial)
    try:
        yield partial
        if folder.is_dir():
            os.rename(folder, replaced)
        try:
            os.rename(partial, folder)
        except OSError:
            if replaced.is_dir():
                os.rename(replaced, folder)
            raise
        _remove_leftovers(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds `folder` while this process lives; None where another holds it, or nothing can."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed while they wrote `folder` left beside it, and nothing that is in use."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.(partial|replaced)")
    for leftover in [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]:
        partial = leftover.with_suffix(".partial")  # held by its writer, also while the writer has `replaced`
        lock = _lock(partial) if partial.is_dir() else None
        if lock is not None or (fcntl is not None and not partial.exists()):
            shutil.rmtree(leftover, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def licence_text() -> str:
    """The licence of this package, from where it is installed or from its checkout."""
    checkout = Path(__file__).resolve().parents[2] / "LICENSE"
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    text = importlib.metadata.distribution("locatvit-hf").read_text("licenses/LICENSE")
    if text is None:
        raise ConversionError("The installation of locatvit-hf lacks its licence; install it again.")
    return text


__all__ = ["check_destination", "complete_or_absent", "licence_text"]
