"""What a power failure would leave of a folder, at every moment of a program that writes into it."""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
Files = dict[str, bytes]


class Disk:
    """The contents of the files and folders below `root` that have reached the disk.

    Args:
        root: An empty folder.

    Attributes:
        left: What each power failure would have left, the files by their paths. Of a file it is what it held when it
            was last flushed. Its name is there at once, as where a journal is written before the data; or it is there
            when its folder was flushed, and gone when its folder was flushed after that.
    """

    def __init__(self, root: Path):
        self.root, self.left = root, dict[str, list[Files]](eager=[], lazy=[])
        self._numbers, self._known = count(), dict[int, int]()  # an inode is used again; a number is not
        self._contents, self._names = dict[int, bytes](), dict[int, dict[str, int]]()

    def flushed(self, descriptor: int) -> None:
        """Takes note of a file or a folder that was flushed."""
        number = self._number(os.fstat(descriptor))
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self._names[number] = {entry.name: self._number(entry.stat()) for entry in os.scandir(descriptor)}
        else:
            self._contents[number] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def fail(self) -> None:
        """Takes down what a power failure would leave now."""
        alive, eager, lazy = set[int](), Files(), Files()
        for folder, _, files in os.walk(self.root):
            alive.add(os.stat(folder).st_ino)
            for name in files:
                status = os.stat(os.path.join(folder, name))
                alive.add(status.st_ino)
                path = os.path.relpath(os.path.join(folder, name), self.root)
                eager[path] = self._contents.get(self._number(status), b"")
        self._known = {inode: number for inode, number in self._known.items() if inode in alive}
        self._collect(self._number(os.stat(self.root)), "", lazy)
        for kind, files in (("eager", eager), ("lazy", lazy)):
            if files not in self.left[kind][-1:]:
                self.left[kind].append(files)

    def _collect(self, folder: int, prefix: str, files: Files) -> None:
        for name, number in self._names.get(folder, {}).items():
            if number in self._names or number not in self._contents:
                self._collect(number, f"{prefix}{name}/", files)
            else:
                files[prefix + name] = self._contents[number]

    def _number(self, status: os.stat_result) -> int:
        return self._known.setdefault(status.st_ino, next(self._numbers))


_watching: list[Disk] = []


def _audit(event: str, arguments: tuple) -> None:
    """Before every change of a file's name, and before files are opened to be written."""
    if not _watching or (event not in CHANGES and event != "open"):
        return
    (disk,) = _watching
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if event == "open" and not str(arguments[0]).startswith(str(disk.root)):
        return
    _watching.clear()
    disk.fail()
    _watching.append(disk)


@contextlib.contextmanager
def recorded(root: Path) -> Iterator[Disk]:
    """Fails the power of the disk of a folder before every file operation of this process inside this block."""
    sys.addaudithook(_audit)
    flush, disk = os.fsync, Disk(root)

    def fsync(descriptor: int) -> None:
        _watching.clear()
        disk.fail()
        disk.flushed(descriptor)
        _watching.append(disk)
        flush(descriptor)

    os.fsync = fsync
    _watching.append(disk)
    try:
        yield disk
    finally:
        os.fsync = flush
        _watching.clear()


def write_files(files: Files, folder: Path) -> None:
    """Lays out what a power failure left."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
