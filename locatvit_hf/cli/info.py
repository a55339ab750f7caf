"""`locatvit info PATH_OR_ID`."""

from typing import Annotated

import typer

from .console import console, escape_terminal, friendly_errors, warn


@friendly_errors
def info(
    checkpoint: Annotated[str, typer.Argument(help="A folder or a Hub id.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what is in a checkpoint without running any of it; exit with 1 where something is alarming."""
    import dataclasses
    import json

    from transformers.utils import logging

    from ..hub.audit import inspect

    logging.set_verbosity_error()
    found = inspect(checkpoint, revision, warn)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        _print_model(found)
        _print_files(found)
        _print_diffs(found)
        _print_advice(found)
    if found.alarms:
        raise typer.Exit(1)


def _print_model(found) -> None:
    from rich import box
    from rich.table import Table

    from ..hub.audit import GPU_KERNEL

    table = Table(
        title=escape_terminal(found.name), title_justify="left", title_style="bold", box=box.SIMPLE, show_header=False
    )
    dtypes = ", ".join(f"{name} {count:,}" for name, count in found.dtypes.items())
    files, lines = found.code()
    files_read, lines_read = found.code(but=[GPU_KERNEL])
    code = f"{files} files, {lines:,} lines"
    if files_read < files:
        code += f"; without the GPU kernel {files_read} files, {lines_read:,} lines"
    rows = {
        "model": f"{found.architecture} ({found.family})",
        "image, patch": f"{found.image_size}, {found.patch_size or '-'} pixels",
        "classes": found.labels,
        "parameters": f"{found.parameters:,}",
        "dtypes": dtypes or "-",
        "GMACs": f"{found.gmacs:.3f}",
        "code": code,
        "commit": found.commit,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, escape_terminal(value))
    console.print(table, soft_wrap=False)


def _print_files(found) -> None:
    from rich import box
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("lines", justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    styles = {"fine": "", "note": "yellow", "alarm": "bold red"}
    for file in found.files:
        lines = f"{file.lines:,}" if file.lines else ""
        cells = (escape_terminal(file.path), decimal(file.size), lines, escape_terminal(file.verdict))
        table.add_row(*cells, style=styles[file.level])
    console.print(table, soft_wrap=False)


def _print_diffs(found) -> None:
    styles = {"+": "green", "-": "red", "@": "cyan"}
    for diff in found.diffs.values():
        for line in diff.split("\n"):
            console.print(escape_terminal(line), style=styles.get(line[:1], ""))
        console.print()


def _print_advice(found) -> None:
    for note in found.notes:
        console.print(escape_terminal(note), style="yellow")
    if found.alarms:
        console.print("[bold white on red] Do not run this code before you have read it. [/]")
        for alarm in found.alarms:
            console.print(escape_terminal(f"- {alarm}"), style="bold red")
    else:
        console.print(f"[green]All its code is that of locatvit-hf {found.release}.[/green]")
    if found.commit:
        console.print(
            escape_terminal(f'To load exactly this:\n  revision="{found.commit}",\n  code_revision="{found.commit}",')
        )


__all__ = ["info"]
