"""`python -m benchmarks.run --suite cpu|gpu|growth`: ours beside timm's and transformers' models, in one process.

Results are written after every cell, so that an interrupted run keeps what it has measured.
"""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from locatvit_hf.cli.console import friendly_errors

from . import measure, report

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)
console.width = max(console.width, 140)  # the tables are wide; a pipe would get 80 columns


@app.command()
@friendly_errors
def main(
    suite: Annotated[str, typer.Option(help="cpu, gpu, or growth (of time and memory with the pixels).")] = "cpu",
    sizes: Annotated[str, typer.Option(help="Image sides to measure, as 224,512; default all.")] = "",
    names: Annotated[str, typer.Option("--models", help="Who takes part, as locatvit,literal; default all.")] = "",
    only: Annotated[str, typer.Option(help="Only cells whose name matches this pattern, as tiny-512.*train.")] = "",
    budget: Annotated[float, typer.Option(help="Seconds of interleaved rounds for each cell.")] = 60.0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for what torch chooses.")] = 0,
    memory: Annotated[bool, typer.Option(help="Whether to measure memory on CPU, in processes of their own.")] = True,
    startup: Annotated[bool, typer.Option(help="Whether to time imports and first predictions (suite cpu).")] = True,
    update: Annotated[bool, typer.Option(help="Keep cells of the last results that are not selected now.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for results.")] = report.ROOT / "benchmarks" / "results",
) -> None:
    """Measure, print and store. What is not selected or cannot run here is marked "not measured"."""
    cells, wanted = measure.cells_of(suite), [name for name in names.split(",") if name]
    known = {name for cell in cells for name in cell.candidates(suite)}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"No model {unknown[0]!r} in suite {suite!r}; there are {', '.join(sorted(known))}.")
    selected = {cell.name for cell in cells if is_selected(cell, sizes, only)}
    if not selected:
        raise ValueError(f"No cell matches; there are {', '.join(cell.name for cell in cells)}.")
    if budget <= 0 or threads < 0:
        raise ValueError("--budget must be above 0 and --threads at least 0.")
    if threads:
        torch.set_num_threads(threads)

    folder = output / f"{suite}-{report.host_kind(suite)}"
    last = {}
    if update and (folder / "results.json").exists():
        last = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    kept = {cell["name"]: cell for cell in last.get("cells", [])}
    results = {
        "suite": suite,
        "command": "python -m benchmarks.run " + " ".join(sys.argv[1:]),
        "hardware": report.hardware(),
        "cells": [kept.get(cell.name, not_measured(cell, "not selected")) for cell in cells],
        "startup": last.get("startup", {}),
    }
    device = "cuda" if suite == "gpu" else "cpu"
    for index, cell in enumerate(cells):
        if cell.name not in selected:
            continue
        if device == "cuda" and not torch.cuda.is_available():
            results["cells"][index] = not_measured(cell, "no CUDA device")
            continue
        console.print(f"{cell.name} …", style="dim")
        candidates = cell.candidates(suite)
        taking_part = [name for name in candidates if not wanted or name in wanted or name == cell.reference]
        records = measure.measure_cell(cell, taking_part, budget, device, memory)
        results["cells"][index] = describe(cell, models=records, commit=report.commit())
        report.write(results, folder)
        report.show({**results, "cells": [results["cells"][index]], "startup": {}}, console)
    if suite == "cpu" and startup:
        console.print("startup …", style="dim")
        results["startup"] = measure.startup()
    report.write(results, folder)
    console.rule()
    report.show(results, console)
    console.print(f"Written to {folder}")


def is_selected(cell: measure.Cell, sizes: str, only: str) -> bool:
    """Whether the options ask for this cell. Raises ValueError for sizes or a pattern that cannot be read."""
    try:
        chosen = [int(size) for size in sizes.split(",") if size]
        return (not chosen or cell.image_size in chosen) and re.search(only, cell.name) is not None
    except (ValueError, re.error):
        raise ValueError(f"--sizes must be numbers as 224,512 and --only a pattern: {sizes!r}, {only!r}.") from None


def describe(cell: measure.Cell, **more) -> dict:
    """The record of a cell in results.json."""
    return {"name": cell.name, **asdict(cell), "reference": cell.reference, **more}


def not_measured(cell: measure.Cell, why: str) -> dict:
    return describe(cell, models={}, missing=why)


if __name__ == "__main__":
    app()
