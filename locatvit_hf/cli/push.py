"""`locatvit push FOLDER REPOSITORY`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import console, error_console, friendly_errors, silence_transformers, warn


@friendly_errors
def push(
    folder: Annotated[Path, typer.Argument(help="The checkpoint: a folder with config.json.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Its name on the Hub, as in me/my-model.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to commit to; by default main.")] = None,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Propose the commit as a pull request instead of making it.")
    ] = False,
    tag: Annotated[
        str | None, typer.Option(help="Name the commit, as in v1.0; the snippets of the card then pin it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
) -> None:
    """Publish a checkpoint on the Hub: weights, code, processor, license and card, in one checked commit."""
    if pull_request and (revision or tag):
        other = "revision" if revision else "tag"
        raise ValueError(f"--pull-request and --{other} exclude each other: a pull request proposes a change of main.")
    import tempfile

    from ..hub.hub_api import HubError, require_token
    from ..hub.push import assemble, check_target, find_snapshot, upload
    from ..hub.repository import verify_repository

    silence_transformers()
    options = dict[str, Any](private=private, revision=revision, pull_request=pull_request, tag=tag, report=warn)
    if not dry_run:
        require_token()
    with tempfile.TemporaryDirectory(prefix="locatvit-") as place:
        built = Path(place)
        assemble(folder, built, repository, tag or revision or "main", warn)
        if not dry_run:
            check_target(built, repository, **options)
        with error_console.status("Loading the repository without this package"):
            difference = verify_repository(built)
        console.print(f"The repository loads without this package; largest difference of its output: {difference:.2g}.")
        if dry_run:
            _print_changes(built, find_snapshot(repository, revision, warn), repository)
            console.print("Nothing was uploaded.")
            try:
                check_target(built, repository, **options)
            except HubError as error:
                raise HubError(f"It would be refused: {error}") from error
            return
        done = upload(built, repository, **options)
    counts = [
        f"{len(names)} {what}"
        for what, names in (
            ("added", done.changes.added),
            ("changed", done.changes.changed),
            ("removed", done.changes.removed),
        )
        if names
    ]
    console.print(f"[green]{', '.join(counts) or 'Nothing to change'}[/green]: [bold]{done.url}[/bold]")
    if pull_request and done.changes:
        console.print("The pull request waits there to be merged.")
    else:
        console.print(f'Load it with revision="{tag or done.commit}".', markup=False)


def _print_changes(built: Path, snapshot, repository: str) -> None:
    """A table of what uploading `built` would do; `snapshot` is what is there, or None."""
    from rich import box
    from rich.filesize import decimal
    from rich.table import Table

    from ..hub.push import compare, count_lines

    changes = compare(built, snapshot)
    there = f"{repository} at {snapshot.commit[:7]}" if snapshot else f"{repository}, which is new or not yours to see"
    table = Table(title=f"Upload to {there}", title_justify="left", box=box.SIMPLE)
    for name in ("", "file", "size", "lines"):
        table.add_column(name, justify="right" if name in ("size", "lines") else "left", overflow="fold")
    for name in changes.added:
        table.add_row("added", name, decimal((built / name).stat().st_size), "", style="green")
    for name in changes.changed:
        lines = None if name.endswith(".safetensors") else count_lines(built, snapshot, name, warn)
        counted = "+{} -{}".format(*lines) if lines else ""
        table.add_row("changed", name, decimal((built / name).stat().st_size), counted, style="yellow")
    for name in changes.removed:
        table.add_row("removed", name, decimal(snapshot.files[name].size), "", style="red")
    for name in changes.unchanged:
        table.add_row("unchanged", name, decimal((built / name).stat().st_size), "", style="dim")
    console.print(table, soft_wrap=False)


__all__ = ["push"]
