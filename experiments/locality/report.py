"""From the stored runs: `python -m experiments.locality.report` writes docs/evidence.md with its figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")

import numpy as np
import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from locatvit_hf.cli.console import friendly_errors

from .analysis import BLOCK, COMPARISONS, MEASURES, NUM_RESAMPLES, class_iou, compare
from .compare_curves import FARTHEST, PROGRAMS, curve_spread
from .runs import COST, MODELS, PLAN, RESULTS, ROOT, Run, load_runs, run_name

# The paper's numbers beside ours (ViT-Tiny sizes): ADE20K mIoU of the frozen probe and ImageNet-1k top-1, in percent.
PUBLISHED = {
    "vit": (17.30, 72.39),
    "gaussian": (18.98, 73.16),
    "refinement": (21.60, 73.71),
    "locatvit": (23.47, 73.94),
    "regvit": (15.98, 72.90),
    "locat_regvit": (24.39, 74.08),
    "mean_pooling": (19.65, 72.50),
    "no_position": (15.13, 69.36),
    "locat_no_position": (22.69, 73.10),
}
COLORS = {"vit": "#8a8f98", "gaussian": "#1d4e89", "refinement": "#2a9d8f", "locatvit": "#d9480f"}
STYLE = {"font.size": 9, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@friendly_errors
def main(
    results: Annotated[Path, typer.Option(help="Folder with one JSON a run.")] = RESULTS,
    output: Annotated[Path, typer.Option(help="Folder of the document.")] = ROOT / "docs",
) -> None:
    """Write `evidence.md`, and its figures in `assets/evidence`."""
    cost = results / COST.name
    write_document(load_runs(results), json.loads(cost.read_text("utf-8")) if cost.is_file() else None, output)


def write_document(runs: list[Run], cost: dict | None, output: Path) -> None:
    """What was fixed before the first run; then tables, figures and the discussion of all finished runs.

    cost: what `experiments.locality.cost` stored, if it ran.
    """
    figures = output / "assets" / "evidence"
    figures.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        drawn = draw_figures(runs)
        for name, figure in drawn.items():
            figure.savefig(figures / f"{name}.png", dpi=130, metadata={"Software": None})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "points": points, "interval": interval, "commits": commits}
    text = environment.get_template("page.md.jinja").render(
        models=MODELS,
        rows=[row for model in MODELS if (row := summarize(runs, model))],
        measures=list(MEASURES),
        comparisons=list_comparisons(runs),
        class_rows=class_table(runs),
        figures=list(drawn),
        apart=[run.name for run in runs if run.model in COLORS],
        first=[run.name for run in runs if run.seed == 0],
        cost=cost,
        published=PUBLISHED,
        missing=[run_name(*entry) for entry in PLAN if run_name(*entry) not in {run.name for run in runs}],
        runs=runs,
        spreads=list_spreads(runs),
        farthest=FARTHEST,
        resamples=NUM_RESAMPLES,
        block=BLOCK,
        discussion=(Path(__file__).parent / "discussion.md").read_text(encoding="utf-8").strip(),
    )
    (output / "evidence.md").write_text(text, encoding="utf-8")


def summarize(runs: list[Run], model: str) -> dict | None:
    """What the first table says of a model: (mean, standard deviation or None) of each measure over its seeds."""
    mine = [run for run in runs if run.model == model]
    if not mine:
        return None
    values = {name: [float(function(run)) for run in mine] for name, (function, _) in MEASURES.items()}
    return {
        "model": model,
        "seeds": ", ".join(str(run.seed) for run in mine),
        "parameters": mine[0].content["pretrain"]["parameters"],
        "values": {name: spread(found) for name, found in values.items()},
    }


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None for that of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def list_comparisons(runs: list[Run]) -> list[dict]:
    """Every planned comparison that has a seed, in every measure."""
    found = [
        {"model": model, "other": other, "measure": measure, "difference": compare(runs, model, other, measure)}
        for model, other in COMPARISONS
        for measure in MEASURES
    ]
    return [entry for entry in found if entry["difference"] is not None]


def list_spreads(runs: list[Run]) -> list[tuple[str, list[float]]]:
    """Of each model with several seeds, how far each curve of `compare_curves` varies with the seed."""
    found = []
    for model in MODELS:
        mine = [run for run in runs if run.model == model]
        if len(mine) > 1:
            of_curves = [(key, *curve) for key, curves in PROGRAMS.values() for curve in curves]
            found.append((model, [curve_spread(mine, *curve) for curve in of_curves]))
    return found


def class_table(runs: list[Run]) -> list[tuple[str, dict[str, tuple[float, float | None]]]]:
    """Of each class of CamVid, the IoU of every model: mean and deviation over its seeds; empty without runs."""
    if not runs:
        return []
    names = list(runs[0].content["probe"]["metrics"]["per_category_iou"])
    present = [model for model in MODELS if any(run.model == model for run in runs)]
    iou = {model: np.array([class_iou(run) for run in runs if run.model == model]) for model in present}
    return [(name, {model: spread(iou[model][:, index]) for model in present}) for index, name in enumerate(names)]


def draw_figures(runs: list[Run]) -> dict[str, Figure]:
    """Name -> figure; none without runs."""
    if not runs:
        return {}
    figures = {"scores": draw_scores(runs), "curves": draw_curves(runs), "features": draw_features(runs)}
    if any(run.seed == 0 and run.content["gaussians"] for run in runs):
        figures["gaussians"] = draw_gaussians(runs)
    if any(run.seed == 0 and run.model in COLORS for run in runs):
        figures["maps"] = draw_maps(runs)
    return figures


def draw_scores(runs: list[Run]) -> Figure:
    """One dot a run: frozen mIoU and accuracy of every model."""
    present = [model for model in MODELS if any(run.model == model for run in runs)]
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 0.7 + 0.32 * len(present)), layout="constrained", sharey=True)
    for ax, measure in zip(axes, ("frozen mIoU", "accuracy"), strict=True):
        for row, model in enumerate(present):
            values = [100 * float(MEASURES[measure][0](run)) for run in runs if run.model == model]
            color = COLORS.get(model, "#555555")
            ax.plot(values, [row] * len(values), "o", color=color, alpha=0.8)
            ax.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=color)
        ax.set(title=f"{measure}, %", yticks=range(len(present)), yticklabels=[MODELS[model] for model in present])
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    return figure


def draw_curves(runs: list[Run]) -> Figure:
    """Training loss and validation accuracy of all runs of the four models that the paper takes apart."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 2.8), layout="constrained")
    for run in (run for run in runs if run.model in COLORS):
        for ax, curve, name in ((axes[0], "train_curve", "loss"), (axes[1], "validation_curve", "accuracy")):
            points = run.content["pretrain"][curve]
            scale = 100 if name == "accuracy" else 1
            label = MODELS[run.model] if run.seed == 0 else None
            ax.plot(
                [p["epoch"] for p in points],
                [scale * p[name] for p in points],
                color=COLORS[run.model],
                label=label,
                lw=1.2,
            )
    axes[0].set(xlabel="epoch", title="training loss")
    axes[1].set(xlabel="epoch", title="validation accuracy, %")
    axes[1].legend(frameon=False)
    return figure


def draw_features(runs: list[Run]) -> Figure:
    """Medians over images, layer by layer: how alike patches are, and how like the class token."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 2.8), layout="constrained", sharey=True)
    for run in (run for run in runs if run.model in COLORS):
        for ax, name in zip(axes, ("patches", "class_token"), strict=True):
            medians = [quartiles[1] for quartiles in run.content["features"][name]]
            label = MODELS[run.model] if run.seed == 0 else None
            ax.plot(range(1, len(medians) + 1), medians, color=COLORS[run.model], label=label, lw=1.2)
    axes[0].set(xlabel="layer", title="cosine of two patches of an image")
    axes[1].set(xlabel="layer", title="cosine of a patch and the class token")
    axes[0].legend(frameon=False)
    return figure


def draw_gaussians(runs: list[Run]) -> Figure:
    """What the Gaussians have learned, layer by layer: median and quartiles, first seed of each model."""
    chosen = [run for run in runs if run.content["gaussians"] and run.seed == 0]
    figure, axes = plt.subplots(1, 3, figsize=(7.6, 2.6), layout="constrained")
    for run in chosen:
        layers = range(1, len(run.content["gaussians"]) + 1)
        color = COLORS.get(run.model)
        for ax, name in zip(axes, ("rows", "columns", "amplitude"), strict=True):
            low, middle, high = zip(*(layer[name] for layer in run.content["gaussians"]), strict=True)
            (line,) = ax.plot(layers, middle, color=color, label=MODELS[run.model], lw=1.2)
            ax.fill_between(layers, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axes[0].set(xlabel="layer", title="deviation down, patches")
    axes[1].set(xlabel="layer", title="deviation across, patches")
    axes[2].set(xlabel="layer", title="amplitude, in logits")
    axes[1].sharey(axes[0])
    axes[0].legend(frameon=False)
    return figure


def draw_maps(runs: list[Run]) -> Figure:
    """Of one validation image, the likeness of every patch to the class token, in the last layers."""
    chosen = [run for run in runs if run.seed == 0 and run.model in COLORS]
    figure, axes = plt.subplots(len(chosen), 3, figsize=(7.6, 1.95 * len(chosen)), layout="constrained", squeeze=False)
    for row, run in zip(axes, chosen, strict=True):
        maps = run.content["features"]["map"]
        for ax, layer in zip(row, range(len(maps) - 3, len(maps)), strict=True):
            values = np.array([line.split() for line in maps[layer]], float)
            picture = ax.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
            ax.set(xticks=[], yticks=[], title=f"{MODELS[run.model]}, layer {layer + 1}")
    figure.colorbar(picture, ax=axes, shrink=0.6, label="cosine to the class token")
    return figure


def percent(value: tuple[float, float | None]) -> str:
    """(mean, deviation) of shares as "12.3 ± 0.4"."""
    mean, deviation = value
    return f"{100 * mean:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "")


def points(value: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * value:+.2f}"


def interval(bounds: tuple[float, float] | None) -> str:
    """In points; a dash where there is none."""
    return f"{points(bounds[0])} to {points(bounds[1])}" if bounds is not None else "–"


def commits(by_program: dict[str, list[str]]) -> str:
    """Those of pretraining and of the probe."""
    return "; ".join(", ".join(by_program[program]) for program in ("pretrain", "segment"))


if __name__ == "__main__":
    app()
