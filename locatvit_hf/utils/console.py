"""What is printed or written down of an address says nothing that only its owner should know."""

import re
from typing import Any

from rich.console import Console
from rich.text import Text

# Scheme, user info up to the last @ of the host, host and path, query. Libraries that take an address for a path join
# its slashes.
_ADDRESS = re.compile(r"\b([a-zA-Z][\w+.-]*://|https?:/)(?:[^\s/?#'\"]*@)?([^\s?#'\"]*)(?:\?[^\s#'\"]*)?")


def hide_credentials(value: Any) -> Any:
    """Text with user info and query left out of every address in it; lists and mappings of text likewise.

    Both may hold passwords and signatures, as in `https://user:password@host/train.parquet?signature=…`.
    """
    if isinstance(value, str):
        return _ADDRESS.sub(r"\1\2", value) if ":/" in value else value
    if isinstance(value, dict):
        return {name: hide_credentials(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(hide_credentials, value))
    return value


class PublicConsole(Console):
    """A console of long lines that leaves credentials out of the addresses in them."""

    def __init__(self, stderr: bool = False):
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does, without credentials."""
        super().print(*map(_public, objects), **options)


def _public(shown: Any) -> Any:
    if isinstance(shown, Text):
        return shown if hide_credentials(shown.plain) == shown.plain else Text(hide_credentials(shown.plain))
    return hide_credentials(shown)


__all__ = ["PublicConsole", "hide_credentials"]
