"""Files: what people wrote comes in, what programs write is whole or absent."""

import codecs
import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # not on Windows, where leftovers of a killed process stay
    fcntl = None  # type: ignore[assignment]

MAX_NAME = 255
"""Bytes of a file's name on all common systems."""
OUT_OF_MEMORY = "There is not enough memory for this: a smaller batch, image or model takes less."
LONGEST_LINE = 500
"""Characters of what an error of another library is quoted with."""
MAX_YAML_DEPTH = 100
MAX_YAML_NODES = 1_000_000
ORPHANS_END = 30
"""Seconds in which the processes that a killed one started have ended too."""


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


def load_yaml(text: str | bytes, loader: type = yaml.SafeLoader) -> Any:
    """The content of YAML text, which is refused before it is built where it would take more than honest files do.

    Raises:
        yaml.YAMLError: It is not YAML, refers to itself, nests deeper than `MAX_YAML_DEPTH`, or stands for more than
            `MAX_YAML_NODES` values, its aliases written out.
    """
    sizes: dict[str, int] = {}  # of what has a name, its aliases written out
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 0))
            if len(open_nodes) > MAX_YAML_DEPTH:
                raise yaml.YAMLError(f"it nests deeper than {MAX_YAML_DEPTH} levels")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            name, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{event.anchor} stands inside of what it names, or names nothing")
            name, size = None, sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            name, size = event.anchor, 1
        else:
            continue
        if name is not None:
            sizes[name] = size
        outer, count = open_nodes[-1]
        open_nodes[-1] = outer, count + size
        if count + size > MAX_YAML_NODES:
            raise yaml.YAMLError(f"it stands for more than {MAX_YAML_NODES:,} values")
    return yaml.load(text, loader)


def atomic_write(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Write a file that is whole or as before, also after a power failure; its folder is made where it is missing.

    Args:
        path: The file.
        content: Its text, or what fills a temporary file beside `path`, which then gets its name.
    """
    make_folder(path.parent)
    # The suffix tells libraries the format; the process, that writers of one file do not share it.
    temporary = path.with_name(fitting_name(f".partial-{os.getpid()}-{path.stem}", path.suffix))
    try:
        temporary.write_text(content, encoding="utf-8") if isinstance(content, str) else content(temporary)
        durable_rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing, so that a power failure does not take them away."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _flush(path.parent)


def durable_rename(source: Path, target: Path) -> None:
    """Rename a file, or a folder with all that is in it, so that a power failure leaves it whole or as before.

    Args:
        source: What was written; it reaches the disk before its new name does.
        target: In the same folder. A file there is replaced; a folder is exchanged in one operation on Linux and macOS.
    """
    for folder, _, files in os.walk(source):
        for name in files:
            if not os.path.islink(os.path.join(folder, name)):
                _flush(Path(folder, name))
        _flush(Path(folder))
    # Beside a partial folder that another process must not take for a leftover, see `_remove_leftovers`.
    replaced = source.with_name(f"{source.name.removesuffix('.partial')}.replaced")
    if not source.is_dir():
        _flush(source)
        os.replace(source, target)
    elif not target.is_dir():
        source.rename(target)
    elif _exchange(source, target):
        source.rename(replaced)
    else:
        target.rename(replaced)
        try:
            source.rename(target)
        except OSError:
            replaced.rename(target)
            raise
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one operation; False where the system cannot."""
    paths = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "linux":
            current, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
            return ctypes.CDLL(None).renameat2(current, paths[0], current, paths[1], exchange) == 0
        if sys.platform == "darwin":
            return ctypes.CDLL(None).renamex_np(*paths, 2) == 0  # RENAME_SWAP
    except AttributeError:  # a C library without it
        pass
    return False


def _flush(path: Path) -> None:
    """Have a file, or the list of the files of a folder, reach the disk."""
    is_folder, windows = path.is_dir(), os.name == "nt"
    if is_folder and windows:
        return  # Windows opens no folders, and writes their lists by itself
    # Windows flushes only what is open for writing; elsewhere files may be for reading alone.
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems flush no folders: they write their lists when the files are flushed.
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Delete a folder, which is whole until it is gone: a crash in between leaves parts under a hidden name alone."""
    if folder.is_dir():
        hidden = _hidden_name(folder, "replaced")
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _hidden_name(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.{kind}")


@contextlib.contextmanager
def claim_folder(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder as its only writer inside this block; the folder is made where it is missing.

    The process may claim it again. When it ends, however it does, the folder is free.

    Args:
        folder: Where results are written.
        report: Called with a sentence where the file system knows no locks.

    Raises:
        OSError: The folder cannot be written.
        ValueError: Another process holds it; the message names the process and its host.
    """
    make_folder(folder)
    lock, note = FileLock(folder / ".lock", is_singleton=True), folder / ".writer"
    deadline, locked = time.monotonic() + ORPHANS_END, False
    while not locked:
        try:
            lock.acquire(timeout=0)
            locked = True
        except Timeout:
            host, number = _read_writer(note)
            # What a killed process started, such as a process that loads data, ends some seconds after it.
            if host != socket.gethostname() or _is_alive(number) or time.monotonic() > deadline:
                writer = f"process {number} on {host}" if number else "another process"
                raise ValueError(
                    f"{folder} is being written by {writer}: wait until it ends, or choose another folder."
                ) from None
            time.sleep(0.2)
        except NotImplementedError:
            report(f"The file system of {folder} knows no locks: see to it that nothing else writes there.")
            break
    try:
        note.write_text(f"{socket.gethostname()}\n{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        note.unlink(missing_ok=True)
        if locked:
            lock.release()


def _read_writer(note: Path) -> tuple[str, int]:
    """Host and process that hold a folder; empty and 0 where it does not say."""
    try:
        host, number = note.read_text(encoding="utf-8").split()
        return host, int(number)
    except (OSError, ValueError):
        return "", 0


def _is_alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


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
    make_folder(folder.parent)
    partial = _hidden_name(folder, "partial")
    partial.mkdir()
    lock = _lock(partial)
    try:
        yield partial
        durable_rename(partial, folder)
        _remove_leftovers(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space, so that the next one will fail too."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was asked for that is not there, of the machine or of a device."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def one_line(error: BaseException) -> str:
    """What an error says on one line without its last stop, cut where it is long; its class where it says nothing."""
    said = " ".join(str(error)[: 2 * LONGEST_LINE].split()).rstrip(".") or type(error).__name__
    return said if len(said) <= LONGEST_LINE else f"{said[:LONGEST_LINE]}…"


__all__ = [
    "OUT_OF_MEMORY",
    "atomic_directory",
    "atomic_write",
    "claim_folder",
    "disk_is_full",
    "durable_rename",
    "fitting_name",
    "is_out_of_memory",
    "load_yaml",
    "make_folder",
    "one_line",
    "read_json",
    "read_lines",
    "read_text",
    "remove",
    "sha256",
    "write_json",
]
