"""Members of tar files, which are read to their very end: a file that was cut looks like a shorter one."""

import tarfile
from collections.abc import Iterator

from datasets.utils.file_utils import xopen


class _Header(tarfile.TarInfo):
    """A header that must be one, or the mark at the end of an archive; `tarfile` takes anything else for the end."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # of all versions, but not in the stubs
            raise
        except tarfile.HeaderError as error:
            reason = "it has no mark at its end, so it was cut off or never closed" if not buf else str(error)
            raise tarfile.ReadError(reason) from None


def read_members(file: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, compressed or not, on this machine or at an address, without their content.

    Raises:
        ValueError: It is no tar file, is damaged, or was cut, also between two members.
    """
    try:
        with xopen(file, "rb") as source, tarfile.open(fileobj=source, tarinfo=_Header) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined] # an archive remembers every member
                yield member
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file} is not a tar file that can be read: {error}.") from None


__all__ = ["read_members"]
