"""Files: what people wrote comes in, what programs write is whole or absent."""

import codecs
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows, where leftovers of a killed process stay
    fcntl = None  # type: ignore[assignment]

MAX_NAME = 255
"""Bytes of a file's name on all common systems."""


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Args:
        path: A file of a user: a list of names, JSON or YAML.

    Returns:
        The text without the mark; ends of lines stay as they are.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The file has another encoding; one sentence says which and what to do.
    """
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise ValueError(f"{path} is in UTF-16, as some Windows programs write it: save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not in UTF-8 (byte 0x{content[error.start]:02x} at {error.start}): save it as UTF-8."
        ) from None


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file of a user, whatever ends them, without blanks around them and without empty ones.

    Raises what `read_text` raises.
    """
    return [line.strip() for line in re.split(r"\r\n|\r|\n", read_text(path)) if line.strip()]


def read_json(path: str | Path) -> Any:
    """Read a JSON file of a user.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The file is not UTF-8, or not JSON; one sentence says where.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.") from None
    except RecursionError:
        raise ValueError(f"{path} is not JSON that can be read: it is nested too deeply.") from None


def atomic_write(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Write a file that is whole or as before; its folder is made where it is missing.

    Args:
        path: The file.
        content: Its text, or what fills a temporary file beside `path`, which then gets its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix tells libraries the format.
    temporary = path.with_name(fitting_name(f".partial-{path.stem}", path.suffix))
    try:
        temporary.write_text(content, encoding="utf-8") if isinstance(content, str) else content(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as `atomic_write` does; numbers that JSON does not know (nan) become null."""
    atomic_write(path, json.dumps(_without_nan(content), indent=2) + "\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextlib.contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it replaces `folder` at the end, and vanishes where anything is raised.

    A process killed in between leaves a hidden folder beside `folder`, and `folder` as it was; the next to write
    `folder` removes it.
    """
    folder = Path(folder).absolute()
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
    """Remove what processes that were killed while they wrote `folder` left beside it, and nothing that is in use."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.(partial|replaced)")
    for leftover in [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]:
        partial = leftover.with_suffix(".partial")  # held by its writer, also while the writer has `replaced`
        lock = _lock(partial) if partial.is_dir() else None
        if lock is not None or (fcntl is not None and not partial.exists()):
            shutil.rmtree(leftover, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def fitting_name(stem: str, ending: str) -> str:
    """`stem` and `ending` as the name of a file, its middle replaced by a hash where it would be too long."""
    if len(os.fsencode(stem + ending)) <= MAX_NAME:
        return stem + ending
    ending = f"-{sha256(os.fsencode(stem))[:8]}{ending}"
    return os.fsencode(stem)[: MAX_NAME - len(os.fsencode(ending))].decode(errors="ignore") + ending


def sha256(content: Path | bytes | Iterable[bytes]) -> str:
    """The SHA-256 of a file of any size, of bytes, or of pieces one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    if isinstance(content, Path):
        with content.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    else:
        for piece in [content] if isinstance(content, bytes) else content:
            digest.update(piece)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """What an error says on one line without its last stop, or its class where it says nothing."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


__all__ = [
    "atomic_directory",
    "atomic_write",
    "fitting_name",
    "one_line",
    "read_json",
    "read_lines",
    "read_text",
    "sha256",
    "write_json",
]
