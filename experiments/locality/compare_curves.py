"""Whether a program came to what is stored of a run:
`python -m experiments.locality.compare_curves vit-0 runs/again/pretrain`.

Same kind of machine, same numbers of threads, same versions: the same curves, digit for digit. Elsewhere sums round
differently, and a run drifts away as another seed would; `curve_spread` says how far that is.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from locatvit_hf.cli.console import friendly_errors

from .runs import RESULTS, Run, load_runs

# Program -> its key in a stored run, and the curves that are compared: (curve, quantity).
PROGRAMS = {
    "pretrain": ("pretrain", [("train_curve", "loss"), ("validation_curve", "accuracy")]),
    "segment": ("probe", [("train_curve", "loss"), ("validation_curve", "mean_iou")]),
}
# In spreads: a rule of thumb. Two runs of other seeds are 1.4 apart in the mean, and one in five is farther than this.
FARTHEST = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@friendly_errors
def main(
    name: Annotated[str, typer.Argument(help="Of the stored run: vit-0.")],
    again: Annotated[Path, typer.Argument(help="Output folder of training.pretrain or training.segment.")],
    results: Annotated[Path, typer.Option(help="Folder with one JSON a run.")] = RESULTS,
) -> None:
    """Compare the curves; exit with 1 where they are too far apart."""
    runs = load_runs(results)
    stored = next((run for run in runs if run.name == name), None)
    if stored is None:
        raise ValueError(f"No run {name!r} is stored; there are {', '.join(run.name for run in runs) or 'none'}.")
    try:
        record = json.loads((again / "all_results.json").read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{again} holds no finished run: there is no all_results.json.") from None
    key, curves = PROGRAMS[record["program"]]
    far = False
    for curve, quantity in curves:
        ours, theirs = (curve_of(content[curve], quantity) for content in (record, stored.content[key]))
        if ours.shape != theirs.shape:
            raise ValueError(f"{again} has {len(ours)} points of the {curve}, {name} has {len(theirs)}.")
        distance = float(np.sqrt(np.mean((ours - theirs) ** 2)))
        spread = curve_spread((run for run in runs if run.model == stored.model), key, curve, quantity)
        if distance == 0:
            said = "identical"
        elif spread is None:
            said, far = f"{distance:.4f} apart; with one seed stored, nobody can say whether that is much", True
        else:
            said = f"{distance:.4f} apart, {distance / spread:.2f} times the spread over seeds"
            far |= distance > FARTHEST * spread
        Console(soft_wrap=True).print(f"{name} {key}, {curve}, {quantity} at {len(ours)} points: {said}.")
    raise typer.Exit(int(far))


def curve_of(points: list[dict], quantity: str) -> np.ndarray:
    """The values of one quantity along a curve."""
    return np.array([point[quantity] for point in points], float)


def curve_spread(runs: Iterable[Run], key: str, curve: str, quantity: str) -> float | None:
    """How far the curves of several seeds of a model lie apart: their standard deviation, root mean square over the
    points. None of one seed.
    """
    curves = [curve_of(run.content[key][curve], quantity) for run in runs]
    return float(np.sqrt(np.mean(np.var(curves, axis=0, ddof=1)))) if len(curves) > 1 else None


if __name__ == "__main__":
    app()
