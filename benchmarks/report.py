"""What was measured, for people: JSON, Markdown, a plot and the terminal."""

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
import transformers
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table

from locatvit_hf.utils.io import atomic_write

from .measure import SIZES, growth_exponent, paired_ratios, quartiles

ROOT = Path(__file__).resolve().parents[1]
OURS = {"attention": "locat"}  # whose ratio a goal is about, by mode; elsewhere "locatvit"
# Ours and the formula written out stand out; the others share a muted palette.
EMPHASIS = {
    "locatvit": "#c1121f",
    "locat": "#c1121f",
    "pacavit": "#1d4e89",
    "locatswin": "#e07a1f",
    "literal": "#111111",
}
LEGEND = """Everything in a table was measured in one process, interleaved: in each round every model runs once, in
random order. Times and ratios are medians over the rounds, with quartiles. A ratio is taken within a round, to timm's
plain ViT of the same size; for attention alone, to PyTorch's without a bias. `baseline` is our model with both ideas
off, `literal` ours with the bias of the formula term by term, `separable` with the bias as a padded product of factors.
A train step is forward, loss and backward. Step MB is how far one step rises above the idle model, process MB the
high-water mark of the whole process; on CPU each model has a fresh one. GMACs are of the forward pass of one image."""


# -------------------------------------------------------------------------------------------------------------- where
def hardware() -> dict[str, str | int]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = found[1].strip() if found else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "timm": timm.__version__, "commit": commit(),
    }  # fmt: skip


def commit(*folders: str) -> str:
    """The short hash of the checkout, with "+" where the code in `folders` differs from it; "unknown" outside of git.

    Without folders, that of the package.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", *(folders or ["locatvit_hf"])], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def host_kind(suite: str) -> str:
    """A folder name for machines like this one: the processor and its cores, or the GPU."""
    facts = hardware()
    name = facts["gpu"] if suite == "gpu" else f"{facts['cpu']} {facts['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ------------------------------------------------------------------------------------------------------------- tables
def ratios(cell: dict, name: str) -> list[float] | None:
    """Time of a model over the reference's, round by round; None where one of them was not measured."""
    seconds, reference = (cell["models"].get(key, {}).get("seconds") for key in (name, cell["reference"]))
    return paired_ratios(seconds, reference) if seconds and reference else None


def spread(values: list[float] | None, digits: int = 2) -> str:
    """Median and quartiles."""
    if not values:
        return "not measured"
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def cell_title(cell: dict) -> str:
    precision = "" if cell["dtype"] == "float32" else f", {cell['dtype']}"
    return f"{cell['scale']} {cell['image_size']}, batch {cell['batch']}, {cell['mode']}{precision}"


def tables(results: dict) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of every table, the goals first."""
    cells = results["cells"]
    goals = [cell for cell in cells if cell["goal"]]
    if goals:
        header = ["", "goal", "ours", "met", "baseline", "separable", "literal"]
        yield "Goals: time over the reference's", header, [goal_row(cell) for cell in goals]
    if rows := [row for cell in cells if (row := against_literal(cell))]:
        yield "Against the formula written out", ["", "literal / ours, time", "ours / literal, step memory"], rows
    if results["suite"] == "growth":
        yield (
            "Growth: p in time or memory ~ pixels ** p",
            ["", "pixels, each side", "time", "step memory"],
            growth(cells),
        )
    if rows := per_gmac(cells):
        yield "Per GMAC: milliseconds for a billion multiply-accumulates of one image", rows[0], rows[1:]
    header = ["", "M params", "GMACs", "ms", "time / reference", "step MB", "process MB"]
    for cell in cells:
        if cell["models"]:
            yield (
                f"{cell_title(cell)} (commit {cell['commit']})",
                header,
                [model_row(cell, name) for name in cell["models"]],
            )
    for cell in cells:
        if rows := operator_rows(cell):
            title = f"Where the time goes: {cell_title(cell)}, own ms of an operator in one step"
            yield title, ["", cell["reference"], "locatvit", "difference"], rows
    if results.get("startup"):
        rows = [[f"{what.replace('_', ' ')}, {name}", spread(seconds)] for what, by_name in results["startup"].items()
                for name, seconds in by_name.items()]  # fmt: skip
        yield "Startup, seconds", ["", "seconds"], rows
    if rows := [[cell_title(cell), cell["missing"]] for cell in cells if not cell["models"]]:
        yield "Not measured", ["", "why"], rows


def goal_row(cell: dict) -> list[str]:
    mine = ratios(cell, OURS.get(cell["mode"], "locatvit"))
    met = "" if mine is None else "yes" if statistics.median(mine) <= cell["goal"] else "no"
    others = [spread(ratios(cell, name)) for name in ("baseline", "separable", "literal")]
    return [cell_title(cell), f"{cell['goal']:.2f}", spread(mine), met, *others]


def against_literal(cell: dict) -> list[str] | None:
    """How much faster ours is, and what part of the memory it takes; None where either was not measured."""
    literal, ours = (cell["models"].get(name, {}) for name in ("literal", OURS.get(cell["mode"], "locatvit")))
    faster, smaller = "not measured", "not measured"
    if "seconds" in literal and "seconds" in ours:
        faster = spread(paired_ratios(literal["seconds"], ours["seconds"]))
    if "step_bytes" in literal and "step_bytes" in ours:
        smaller = f"{ours['step_bytes'] / literal['step_bytes']:.2f}"
    return None if faster == smaller else [cell_title(cell), faster, smaller]


def model_row(cell: dict, name: str) -> list[str]:
    record = cell["models"][name]
    missing = f"not measured: {record['missing']}" if "missing" in record else "not measured"
    seconds = record.get("seconds")
    memory = [
        f"{record[key] / 1e6:.0f}" if key in record else record.get("memory_missing", "not measured")
        for key in ("step_bytes", "peak_bytes")
    ]
    return [
        name + ("" if record.get("finite", True) else " (not finite)"),
        f"{record['parameters'] / 1e6:.1f}" if record.get("parameters") else "",
        f"{record['gmacs']:.2f}" if record.get("gmacs") else "",
        spread([1e3 * second for second in seconds], 1) if seconds else missing,
        spread(ratios(cell, name)) if seconds else "",
        *memory,
    ]


def operator_rows(cell: dict, most: int = 12) -> list[list[str]]:
    """The operators whose time differs most between ours and the reference."""
    ours, reference = (cell["models"].get(name, {}).get("operators", {}) for name in ("locatvit", cell["reference"]))
    if not ours or not reference:
        return []
    difference = {name: ours.get(name, 0.0) - reference.get(name, 0.0) for name in {*ours, *reference}}
    chosen = sorted(difference, key=lambda name: -abs(difference[name]))[:most]
    return [[name, *(f"{of.get(name, 0.0):.2f}" for of in (reference, ours, difference))] for name in chosen]


def growth(cells: list[dict]) -> list[list[str]]:
    """Fitted exponents of time and memory over the pixels, a row for each model and mode."""
    rows = []
    for mode in dict.fromkeys(cell["mode"] for cell in cells):
        here = [cell for cell in cells if cell["mode"] == mode]
        for name in dict.fromkeys(name for cell in here for name in cell["models"]):
            fits = []
            for key in ("seconds", "step_bytes"):
                points = [
                    (cell["image_size"], cell["models"][name][key])
                    for cell in here
                    if cell["models"].get(name, {}).get(key)
                ]
                points = [(size, statistics.median(value) if key == "seconds" else value) for size, value in points]
                fits.append(f"{growth_exponent(*zip(*points, strict=True)):.2f}" if len(points) > 1 else "not measured")
            sizes = [str(cell["image_size"]) for cell in here if "seconds" in cell["models"].get(name, {})]
            rows.append([f"{name}, {mode}", ", ".join(sizes), *fits])
    return rows


def per_gmac(cells: list[dict]) -> list[list[str]]:
    """Header and rows: milliseconds a GMAC of the pyramids, and of PaCa-ViT over the others in the same rounds."""
    names = ["pacavit", "hf-pvtv2", "hf-segformer"]
    rows = []
    for cell in cells:
        records = [cell["models"].get(name, {}) for name in names]
        if cell["mode"] == "attention" or not records[0].get("seconds") or not any("seconds" in r for r in records[1:]):
            continue
        costs = [
            [1e3 * second / record["gmacs"] / cell["batch"] for second in record.get("seconds", [])]
            for record in records
        ]
        over = [spread(paired_ratios(costs[0], other) if other else None) for other in costs[1:]]
        rows.append([cell_title(cell), *(spread(cost, 1) for cost in costs), *over])
    return [["", *names, *(f"pacavit / {name}" for name in names[1:])], *rows] if rows else []


# ------------------------------------------------------------------------------------------------------------- output
def markdown(results: dict) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in results["hardware"].items())
    parts = [f"# Benchmarks, suite `{results['suite']}`\n\n`{results['command']}`\n\n{facts}\n\n{LEGEND}"]
    for title, header, rows in tables(results):
        lines = [header, ["---"] * len(header), *rows]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def show(results: dict, console: Console) -> None:
    """The same tables in the terminal."""
    for title, header, rows in tables(results):
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", no_wrap=not index)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def plot(results: dict, path: Path) -> None:
    """Ratios to the reference over the image size, a panel for each mode; of the growth suite, milliseconds.

    Of the tiny models, in the first precision of the suite.
    """
    grows, dtype = results["suite"] == "growth", results["cells"][0]["dtype"]
    cells = [cell for cell in results["cells"] if (cell["scale"], cell["dtype"]) == ("tiny", dtype)]
    modes = list(dict.fromkeys(cell["mode"] for cell in cells))
    figure, axes = plt.subplots(1, len(modes), figsize=(5.5 * len(modes), 4.8), squeeze=False, layout="constrained")
    for axis, mode in zip(axes[0], modes, strict=True):
        here = sorted((cell for cell in cells if cell["mode"] == mode), key=lambda cell: cell["image_size"])
        for index, name in enumerate(dict.fromkeys(name for cell in here for name in cell["models"])):
            points = []
            for cell in here:
                seconds = cell["models"].get(name, {}).get("seconds", [])
                values = [1e3 * second / cell["batch"] for second in seconds] if grows else ratios(cell, name)
                points += [(cell["image_size"], *quartiles(values))] if values else []
            if not points:
                continue
            sizes, low, middle, high = zip(*points, strict=True)
            stands_out = name in EMPHASIS
            style = {"color": EMPHASIS.get(name, plt.colormaps["Set2"](index % 8)), "zorder": 2 + stands_out}
            axis.plot(sizes, middle, "o-", label=name, ms=3, lw=2 if stands_out else 1.2, **style)
            axis.fill_between(sizes, low, high, alpha=0.15, lw=0, **style)
        axis.set(title=f"{mode}, tiny, {dtype}", xlabel="image side, pixels", xscale="log", yscale="log")
        axis.set_xlim(0.93 * SIZES[0], 1.07 * SIZES[-1])
        axis.set_ylabel("milliseconds an image" if grows else "time / reference, same round")
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False, fontsize=7, ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(results: dict, folder: Path) -> None:
    """results.json, results.md and results.png, each complete or as before."""
    contents = {
        "results.json": json.dumps(results, indent=1) + "\n",
        "results.md": markdown(results),
        "results.png": lambda path: plot(results, path),
    }
    for name, content in contents.items():
        atomic_write(folder / name, content)
