"""The Hub as these tools see it: what a repository holds, patience with a busy server, and refusals as sentences."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..utils.io import one_line, sha256

# Seconds between attempts where the Hub is down or busy.
RETRY_DELAYS = (1, 2, 4, 8)
# Any failure of the HTTP library below huggingface_hub, which is not the same one in all its versions.
HTTP_ERROR = HfHubHTTPError.__mro__[1]

Result = TypeVar("Result")


class HubError(ValueError):
    """What the Hub refused, or why it could not be asked: one sentence."""


class NotThereError(HubError):
    """There is no such repository or revision, or the token may not see it."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: `sha256` where it is stored by LFS, else only the hash of its git object."""

    path: str
    size: int
    git_hash: str
    sha256: str | None

    def equals(self, file: Path) -> bool:
        """Whether it has the content of a file here."""
        if file.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return sha256(file) == self.sha256
        content = file.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == self.git_hash


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    repository: str
    commit: str
    private: bool
    files: dict[str, RemoteFile]


def read_snapshot(repository: str, revision: str | None, report: Callable[[str], None]) -> Snapshot:
    """What a repository holds at a branch, tag or commit; see `with_retries` for `report`.

    Raises:
        HubError: The Hub refuses, or cannot be asked.
    """
    info = with_retries(
        lambda: huggingface_hub.model_info(repository, revision=revision, files_metadata=True), repository, report
    )
    files = [
        RemoteFile(file.rfilename, file.size or 0, file.blob_id or "", file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or []
    ]
    return Snapshot(repository, info.sha, bool(info.private), {file.path: file for file in files})


def with_retries(function: Callable[[], Result], repository: str, report: Callable[[str], None]) -> Result:
    """Call a function of huggingface_hub, again after a while where the Hub is down, cut off or busy.

    Args:
        function: Without arguments.
        repository: The subject of messages.
        report: Called with a line before each wait.

    Raises:
        HubError: It stays refused.
    """
    waits = iter(RETRY_DELAYS)
    while True:
        try:
            return function()
        except (HTTP_ERROR, LocalTokenNotFoundError, HFValidationError, OfflineModeIsEnabled, RuntimeError) as error:
            # huggingface_hub wraps what goes wrong with a large file into a RuntimeError.
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            if not isinstance(cause, Exception):
                raise
            sentence = _sentence(cause, repository)
            if (wait := next(waits, None)) is None or not _passes(cause):
                missing = isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError)
                raise (NotThereError if missing else HubError)(sentence) from error
            report(f"{sentence} Trying again in {wait} s.")
            time.sleep(wait)


def require_token() -> None:
    """Refuse to go on where nobody is logged in.

    Raises:
        HubError: There is no token.
    """
    if huggingface_hub.get_token() is None:
        raise HubError(LOGIN)


def _passes(error: Exception) -> bool:
    """Whether waiting may help: the connection broke, or the server is down or busy."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, HTTP_ERROR)


def _sentence(error: Exception, repository: str) -> str:
    has_token = huggingface_hub.get_token() is not None
    if isinstance(error, LocalTokenNotFoundError):
        return LOGIN
    if isinstance(error, RepositoryNotFoundError):
        if has_token:
            return f"There is no repository {repository} on the Hub, or it is private and your token may not read it."
        return f"There is no repository {repository} on the Hub, or it is private and you are not logged in: {HOW}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no such branch, tag or commit."
    if isinstance(error, OfflineModeIsEnabled):
        return f"Cannot ask the Hub for {repository}, because HF_HUB_OFFLINE is set: unset it, or name a folder."
    if isinstance(error, HFValidationError):
        return f"{repository} is neither a folder nor the name of a Hub repository, which looks like `name/model`."
    if not isinstance(error, HfHubHTTPError):
        return f"Cannot reach the Hub at {huggingface_hub.constants.ENDPOINT}: {one_line(error)}."
    status = error.response.status_code
    if status == 401:
        return LOGIN if not has_token else f"The Hub does not accept your token (401): {HOW}."
    if status == 403:
        return f"Your token may not write to {repository} (403): use one with the right to write there."
    if status == 412:
        return f"Somebody else changed {repository} in the meantime: repeat the command."
    return f"The Hub answered {status}{_explanation(error)} for {repository}."


def _explanation(error: HfHubHTTPError) -> str:
    message = " ".join((error.server_message or "").split()).rstrip(".")
    return f" ({message})" if message else ""


HOW = "run `hf auth login`, or set HF_TOKEN"
LOGIN = f"You are not logged in to the Hub: {HOW}."

__all__ = ["HubError", "NotThereError", "RemoteFile", "Snapshot", "with_retries", "read_snapshot", "require_token"]
