"""Text that people write by hand, on any system."""

import codecs
import json
import re
from pathlib import Path
from typing import Any


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


__all__ = ["read_json", "read_lines", "read_text"]
