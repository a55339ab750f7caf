"""`locatvit push`: a checkpoint goes to the Hub in one commit, checked before and complete or not at all."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from .card import read_card, write_card
from .hub_api import HubError, NotThereError, Snapshot, read_snapshot, require_token, with_retries
from .repository import CHECKSUMS, INDEX, PICKLES, build_repository, write_checksums

# Files of an earlier upload that would contradict the new ones; whatever else is there, such as images, stays.
REPLACED = ("*.py", "*.safetensors", INDEX, CHECKSUMS, *(f"*{suffix}" for suffix in PICKLES))


@dataclass(frozen=True)
class Changes:
    """Paths of an upload by what becomes of them, and for changed text (lines added, lines removed)."""

    added: list[str]
    changed: list[str]
    removed: list[str]
    unchanged: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


@dataclass(frozen=True)
class Upload:
    """What an upload did: the commit that now holds the files, and the address to open."""

    commit: str
    url: str
    changes: Changes


def compare(folder: Path, snapshot: Snapshot | None) -> Changes:
    """What uploading a folder would change in a repository; None is one that does not exist yet."""
    there = {} if snapshot is None else snapshot.files
    here = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    same = {name for name, path in here.items() if name in there and there[name].equals(path)}
    stale = [
        name
        for name in there
        if name.startswith(".eval_results/")
        or ("/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in REPLACED))
    ]
    return Changes(
        added=[name for name in here if name not in there],
        changed=[name for name in here if name in there and name not in same],
        removed=sorted(name for name in stale if name not in here),
        unchanged=sorted(same),
    )


def count_lines(folder: Path, snapshot: Snapshot, name: str, report: Callable[[str], None]) -> tuple[int, int] | None:
    """(lines added, lines removed) of a changed file; None where it is not text.

    Raises:
        HubError: The Hub refuses.
    """
    repository = snapshot.repository
    there = with_retries(
        lambda: huggingface_hub.hf_hub_download(repository, name, revision=snapshot.commit), repository, report
    )
    try:
        before, after = (path.read_text(encoding="utf-8").splitlines() for path in (Path(there), folder / name))
    except UnicodeDecodeError:
        return None
    lines = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    return sum(line.startswith("+") for line in lines), sum(line.startswith("-") for line in lines)


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    tag: str | None = None,
    message: str = "Upload model",
    report: Callable[[str], None] = lambda line: None,
) -> Upload:
    """Make a repository hold the files of `folder`, in one commit; code and weights of an earlier upload go.

    Where it fails, the repository is as it was, and the same call can be repeated.

    Args:
        folder: See `assemble`.
        repository: Its name on the Hub.
        private: Create the repository as a private one.
        revision: The branch to commit to, created where it is missing.
        pull_request: Propose the commit instead of making it.
        tag: Name the commit.
        message: Of the commit.
        report: Called with lines to show.

    Raises:
        HubError: The Hub refuses.
    """
    require_token()
    snapshot, tagged = check_target(
        folder, repository, private=private, revision=revision, pull_request=pull_request, tag=tag, report=report
    )
    if snapshot is None:
        create_repository(repository, private, report)
    if revision is not None:
        with_retries(
            lambda: huggingface_hub.create_branch(repository, branch=revision, exist_ok=True), repository, report
        )

    def commit() -> Upload:
        # Read again each time: an earlier attempt may have arrived although its answer was lost.
        now = read_snapshot(repository, revision, report)
        changes = compare(folder, now)
        if not changes:
            return Upload(now.commit, f"{huggingface_hub.constants.ENDPOINT}/{repository}/commit/{now.commit}", changes)
        info = huggingface_hub.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, folder / name) for name in (*changes.added, *changes.changed)),
                *(CommitOperationDelete(name) for name in changes.removed),
            ],
            commit_message=message,
            revision=revision,
            create_pr=pull_request,
            parent_commit=now.commit,
        )
        return Upload(info.oid, info.pr_url or info.commit_url, changes)

    done = with_retries(commit, repository, report)
    if tag is not None and tagged is None:
        try:
            with_retries(
                lambda: huggingface_hub.create_tag(repository, tag=tag, revision=done.commit), repository, report
            )
        except HubError as error:
            raise HubError(f"{repository} has the files, but not the tag; repeat the command: {error}") from error
    return done


def check_target(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    tag: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Snapshot | None, str | None]:
    """What is there before `upload` is called with the same arguments, and the commit of the tag where it exists.

    A repository that the token may not see is one that is not there.

    Raises:
        HubError: The upload would be refused. Nothing is changed.
    """
    snapshot = find_snapshot(repository, revision, report)
    if pull_request and snapshot is None:
        raise NotThereError(f"There is no repository {repository} that a pull request could change, or it is private.")
    if private and snapshot is not None and not snapshot.private:
        raise HubError(f"{repository} exists and is public: make it private on the Hub first, or choose another name.")
    tagged = None if snapshot is None else _commit_of_tag(repository, tag, report)
    if snapshot and tagged and (tagged != snapshot.commit or compare(folder, snapshot)):
        raise HubError(f"{repository} has a tag {tag} already, at {tagged[:7]}: choose another tag.")
    return snapshot, tagged


def create_repository(
    repository: str, private: bool = False, report: Callable[[str], None] = lambda line: None
) -> None:
    """Make an empty repository where there is none.

    Raises:
        HubError: It may not be written.
    """
    require_token()
    with_retries(
        lambda: huggingface_hub.create_repo(repository, private=private or None, exist_ok=True), repository, report
    )


def find_snapshot(repository: str, revision: str | None, report: Callable[[str], None]) -> Snapshot | None:
    """What an upload is compared with: the branch, or `main` where the branch is new, or None.

    Raises:
        HubError: The Hub refuses.
    """
    for name in dict.fromkeys((revision, None)):
        try:
            return read_snapshot(repository, name, report)
        except NotThereError:
            continue
    return None


def _commit_of_tag(repository: str, tag: str | None, report: Callable[[str], None]) -> str | None:
    if tag is None:
        return None
    refs = with_retries(lambda: huggingface_hub.list_repo_refs(repository), repository, report)
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


def assemble(
    folder: Path,
    destination: Path,
    repository: str,
    revision: str = "main",
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Fill a folder with the repository of a checkpoint: everything that is uploaded.

    Args:
        folder: The checkpoint.
        destination: The empty folder to fill.
        repository: The name on the Hub.
        revision: What the snippets of the card pin.
        report: Called with lines to show.

    Raises:
        RepositoryError: The folder is not a complete checkpoint of this package.
        CardError: Its card is missing or not complete.
    """
    build_repository(folder, destination)
    for name in [path.name for path in destination.glob("*.py") if (folder / path.name).is_file()]:
        if (folder / name).read_bytes() != (destination / name).read_bytes():
            report(f"{name} of {folder} is not that of the installed package, which is taken instead.")
    card = read_card(folder)
    title = card.title or repository.split("/")[-1]
    write_card(destination, dataclasses.replace(card, title=title, repository=repository, revision=revision))
    write_checksums(destination)


__all__ = ["Changes", "Upload", "assemble", "check_target", "compare", "count_lines", "create_repository", "upload"]
