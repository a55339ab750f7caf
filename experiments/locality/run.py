"""One run after the other: `python -m experiments.locality.run`, from training to a file in `results/`.

A run is four programs of `training/` with the recipes in `recipes/`, and `measure.py` for what they do not say. What an
interrupted run has done is not done again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.report import commit, hardware
from locatvit_hf.cli.console import friendly_errors
from locatvit_hf.utils.io import write_json
from training.evaluation.results import versions

from .measure import measure_run
from .runs import MODELS, PLAN, RECIPES, RESULTS, ROOT, run_name

# Of what the programs write.
KEPT = (
    "metrics", "arguments", "train_curve", "validation_curve", "updates", "seconds", "parameters", "num_processes",
    "model_hash", "date",
)  # fmt: skip
CODE = ("locatvit_hf", "training", "experiments/locality")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True)


@app.command()
@friendly_errors
def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}; without, all that are planned.")] = "",
    seed: Annotated[int, typer.Option(help="Of the run; only with --model.")] = 0,
    tiny_imagenet: Annotated[str, typer.Option(help="Folder of the parquet files.")] = "../shared/data/tiny_imagenet",
    camvid: Annotated[str, typer.Option(help="Folder of the parquet files.")] = "../shared/data/camvid",
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and models.")] = Path("runs/evidence"),
    results: Annotated[Path, typer.Option(help="Folder for one JSON a run.")] = RESULTS,
) -> None:
    """Train and measure what has no result yet."""
    if model and model not in MODELS:
        raise ValueError(f"There is no model {model!r}; choose one of {', '.join(MODELS)}.")
    for name, number in [(model, seed)] if model else PLAN:
        stored = results / f"{run_name(name, number)}.json"
        if not stored.is_file():
            console.print(run_name(name, number), style="bold")
            content = run(name, number, work / run_name(name, number), tiny_imagenet, camvid)
            results.mkdir(parents=True, exist_ok=True)
            write_json(stored, content)


def run(model: str, seed: int, folder: Path, tiny_imagenet: str, camvid: str) -> dict[str, Any]:
    """Train and measure one model in `folder`; returns what is stored of it.

    Raises RuntimeError where a program fails.
    """
    pretrain, probe, results = folder / "pretrain", folder / "probe", folder / "results"
    folder.mkdir(parents=True, exist_ok=True)
    history = folder / "commits.json"
    commits = json.loads(history.read_text(encoding="utf-8")) if history.is_file() else {}
    for program, recipe, dataset, options in (
        ("pretrain", f"pretrain/{model}", tiny_imagenet, {"output_dir": pretrain, "seed": seed}),
        ("segment", "segment/probe", camvid, {"output_dir": probe, "seed": seed, "pretrained": pretrain / "model"}),
        ("evaluation.knn", "evaluation/knn", tiny_imagenet, {"output_dir": results, "pretrained": pretrain / "model"}),
        (
            "evaluation.hummingbird",
            "evaluation/hummingbird",
            camvid,
            {"output_dir": results, "seed": seed, "pretrained": pretrain / "model"},
        ),
    ):
        finished = results / f"{program.removeprefix('evaluation.')}.json"
        if finished.is_file() or (options["output_dir"] / "all_results.json").is_file():
            continue
        # An interrupted program may go on with other code than it began with.
        commits[program] = list(dict.fromkeys([*commits.get(program, []), commit(*CODE)]))
        write_json(history, commits)
        command = [sys.executable, "-m", f"training.{program}", "--config", str(RECIPES / f"{recipe}.yaml")]
        command += ["--dataset", dataset, *(f"--{name}={value}" for name, value in options.items())]
        # Another number of threads adds up in another order.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if subprocess.run(command, env=environment).returncode:
            raise RuntimeError(f"training.{program} failed; the same command goes on where it can.")
    records = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in {
            "pretrain": pretrain / "all_results.json",
            "probe": probe / "all_results.json",
            "knn": results / "knn.json",
            "hummingbird": results / "hummingbird.json",
        }.items()
    }
    return {
        "model": model,
        "seed": seed,
        "commits": commits,
        "environment": {**hardware(), **versions(), "threads": 1},
        **{name: {key: record[key] for key in KEPT if key in record} for name, record in records.items()},
        **measure_run(pretrain / "model", probe / "model", tiny_imagenet, camvid),
    }


if __name__ == "__main__":
    app()
