"""Why a pickle was refused, from its opcodes alone: nothing in it is executed or imported."""

import pickletools
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

# torch.save used to write several pickles one after the other, the content last but one.
LARGEST_NUMBER_OF_PICKLES = 5
MAX_OPCODES = 1_000_000
"""A checkpoint with 10,000 tensors has some 300,000."""
# What a checkpoint of tensors and plain data asks for: types, and functions that put tensors together.
HARMLESS = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|set|complex)"
    r"|torch\.[a-z]+\d\w*|torch\.(bool|Size|Tensor|device|nn\.parameter\.Parameter|serialization\._get_layout)"
    r"|torch\.((cuda|sparse|storage)\.)*\w+(Tensor|Storage)|torch\.(_utils|_tensor)\._rebuild_\w+"
)


def find_code(file: Path, harmless: Collection[str]) -> str | None:
    """The first function or class that a pickle asks for and that is not data; None where there is none.

    Args:
        file: Read up to the damage where it is damaged.
        harmless: Dotted names that are data besides tensors.
    """
    try:
        with _open_pickles(file) as stream:
            for name in _globals_of(stream):
                if name not in harmless and not HARMLESS.fullmatch(name):
                    return name
    except Exception:  # whatever the damaged byte led to
        pass
    return None


def has_too_many_opcodes(file: Path) -> bool:
    """Whether a pickle has more than `MAX_OPCODES`, which loading would take minutes for; a damaged one has not."""
    try:
        with _open_pickles(file) as stream:
            for _ in range(LARGEST_NUMBER_OF_PICKLES):
                for number, _ in enumerate(pickletools.genops(stream)):
                    if number > MAX_OPCODES:
                        return True
    except Exception:  # whatever the damaged byte led to; what loads the file says more
        pass
    return False


def protocol_of(file: Path) -> int:
    """The version of pickle's format in which a file is written; 0 where it is damaged or no pickle."""
    protocol = 0
    try:
        with _open_pickles(file) as stream:
            for opcode, argument, _ in pickletools.genops(stream):
                protocol = int(argument or 0) if opcode.name == "PROTO" else protocol
    except Exception:  # whatever the damaged byte led to
        return 0
    return protocol


def _open_pickles(file: Path) -> IO[bytes]:
    """The pickle inside the archive that torch.save writes, or the file itself."""
    if not zipfile.is_zipfile(file):
        return file.open("rb")
    archive = zipfile.ZipFile(file)
    return archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _globals_of(stream: IO[bytes]) -> Iterator[str]:
    """Dotted names of all functions and classes. From protocol 4 on they are two strings on the stack, or in the memo.

    Raises ValueError at the first byte that is not an opcode.
    """
    for _ in range(LARGEST_NUMBER_OF_PICKLES):
        strings: list[str] = []
        memo: dict[int, str] = {}
        top = ""  # what is on the stack, where it is a string
        argument: Any
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                yield argument.replace(" ", ".").replace("__builtin__.", "builtins.")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(strings[-2:])
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = top
            elif "PUT" in opcode.name:
                memo[argument] = top
            else:
                top = memo.get(argument, "") if "GET" in opcode.name else argument if "UNICODE" in opcode.name else ""
                strings = [*strings[-1:], top] if top else strings


__all__ = ["MAX_OPCODES", "find_code", "has_too_many_opcodes", "protocol_of"]
