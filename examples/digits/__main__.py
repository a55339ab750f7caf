"""The paper's argument in miniature: `python -m examples.digits`.

Two small transformers of equal size, one plain and one LocAtViT, learn to name the digit in cluttered scenes from
image labels alone. Then both are frozen, and a small head learns to name every *pixel* from what they know. Both are
exported, used by a process that has never heard of this project, and compared on a page.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from locatvit_hf.utils.io import atomic_directory, sha256, write_json

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "training" / "recipes"
MODELS = {
    "vit": ["--model.use_gaussian", "false", "--model.use_refinement", "false"],
    "locatvit": [],
}
console = Console(highlight=False, soft_wrap=True)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the page and the models.")] = Path("demo_output"),
    work: Annotated[Path, typer.Option(help="Folder for what a later run reuses.")] = Path(".cache/demo"),
    train_scenes: Annotated[int, typer.Option(help="Scenes to learn from.")] = 3000,
    validation_scenes: Annotated[int, typer.Option(help="Held-out scenes.")] = 400,
    pretrain_length: Annotated[str, typer.Option(help="Image-label training, as in a recipe.")] = "16 epochs",
    segment_length: Annotated[str, typer.Option(help="Training of the probe, as in a recipe.")] = "6 epochs",
) -> None:
    """Train, export and compare; an interrupted run continues, a finished one is quickly repeated."""
    try:
        run_demo(output, work, (train_scenes, validation_scenes), pretrain_length, segment_length)
    except KeyboardInterrupt:
        console.print("\nStopped; the same command continues.", style="yellow")
        raise typer.Exit(130) from None
    except (RuntimeError, ValueError, OSError) as error:
        console.print(f"\n{error}", style="red", markup=False)
        raise typer.Exit(1) from None


def run_demo(output: Path, work: Path, num_scenes: tuple[int, int], pretrain_length: str, segment_length: str) -> None:
    """All stages; each is skipped where an earlier run has left its result in `work`.

    num_scenes: to learn from, and held out.
    Raises RuntimeError where a program fails, ValueError where a folder holds something that is not the demo's.
    """
    started = time.perf_counter()
    for folder, mark in ((output, "index.html"), (work, "settings.json")):
        if folder.exists() and any(folder.iterdir()) and not (folder / mark).is_file():
            raise ValueError(f"{folder} holds something else than this demo: name another folder.")
    lengths = [pretrain_length, segment_length]
    _open_work(work, {"scenes": list(num_scenes), "lengths": lengths, "code": _fingerprint()})
    scenes, runs = work / "scenes", work / "runs"

    with _stage("Composing scenes of digits", done=scenes.exists()) as run:
        if run:
            import datasets

            from examples.digits.scenes import make_scenes

            datasets.disable_progress_bars()
            with atomic_directory(scenes) as folder:
                make_scenes(*num_scenes).save_to_disk(str(folder))

    for stage, program, length in (
        ("Training on image labels", "pretrain", pretrain_length),
        ("Training the probe on frozen models", "segment", segment_length),
    ):
        commands = {
            name: _command(program, name, scenes, runs, length)
            for name in MODELS
            if not (runs / program / name / "all_results.json").is_file()
        }
        with _stage(stage, done=not commands) as run:
            if run:
                _run_side_by_side(commands)

    with _stage("Using the exports in a fresh process", done=(work / "predictions").exists()) as run:
        if run:
            _use_exports(work, scenes, runs)

    with _stage("Drawing the page") as _, atomic_directory(output) as folder:
        from examples.digits.html_report import write_page

        shutil.copytree(work / "models", folder / "models")
        write_page(folder, scenes, runs, work / "predictions")
    console.print(f"Done in {time.perf_counter() - started:.0f} s: open {output / 'index.html'}", style="bold")


def _command(program: str, name: str, scenes: Path, runs: Path, length: str) -> list[str]:
    command = [sys.executable, "-m", f"training.{program}", "--config", str(RECIPES / program / "digits.yaml")]
    command += ["--dataset", str(scenes), "--output_dir", str(runs / program / name), "--length", length]
    return command + (
        MODELS[name] if program == "pretrain" else ["--pretrained", str(runs / "pretrain" / name / "model")]
    )


def _use_exports(work: Path, scenes: Path, runs: Path) -> None:
    with atomic_directory(work / "models") as models:
        for name in MODELS:
            shutil.copytree(runs / "pretrain" / name / "model", models / f"{name}-classification")
            shutil.copytree(runs / "segment" / name / "model", models / f"{name}-segmentation")
    with atomic_directory(work / "predictions") as predictions:
        program = [sys.executable, "-I", str(Path(__file__).with_name("remote_user.py"))]
        folders = [str(folder.resolve()) for folder in (work / "models", scenes / "validation", predictions)]
        _check(subprocess.run([*program, *folders], cwd=predictions, capture_output=True, text=True))


def _run_side_by_side(commands: dict[str, list[str]]) -> None:
    """Run the programs at the same time, each with its share of the cores, and show how far they are."""
    threads = max(1, len(os.sched_getaffinity(0)) // len(commands)) if hasattr(os, "sched_getaffinity") else 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    columns = (
        TextColumn("  {task.description:<9}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        processes, readers = [], []
        try:
            for name, command in commands.items():
                process = subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
                task = bar.add_task(name, total=1, status="starting")
                reader = threading.Thread(target=_follow, args=(process, bar, task), daemon=True)
                reader.start()
                processes.append(process)
                readers.append(reader)
            for process in processes:
                errors = process.stderr.read()
                _check(subprocess.CompletedProcess(process.args, process.wait(), stderr=errors))
        except BaseException:
            for process in processes:
                process.terminate()  # they save a checkpoint first
            for process in processes:
                process.wait()
            raise


def _follow(process: subprocess.Popen, bar: Progress, task: int) -> None:
    for line in process.stdout:
        if match := re.match(r"(\d+)/(\d+) · (.*)", line):
            bar.update(task, completed=int(match[1]), total=int(match[2]), status=match[3])


def _check(finished: subprocess.CompletedProcess) -> None:
    if finished.returncode:
        reason = (finished.stderr or "").strip() or f"exit status {finished.returncode}"
        raise RuntimeError(f"{' '.join(finished.args[1:4])} … failed: {reason}")


@contextmanager
def _stage(title: str, done: bool = False) -> Iterator[bool]:
    """Print one line about a stage; yields whether it is to be run."""
    started = time.perf_counter()
    if done:
        yield False
        console.print(f"[green]✓[/] {title} (from an earlier run)")
        return
    if console.is_terminal:
        console.print(f"[dim]…[/] {title}", end="\r")
    yield True
    console.print(f"[green]✓[/] {title} ({time.perf_counter() - started:.0f} s)")


def _open_work(work: Path, settings: dict) -> None:
    """Keep the folder of an earlier run with the same settings and code, and start a new one otherwise."""
    stored = work / "settings.json"
    if not stored.is_file() or json.loads(stored.read_text()) != settings:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(stored, settings)


def _fingerprint() -> str:
    """Changes with the code that decides what is trained."""
    files = [
        ROOT / "examples" / "digits" / "scenes.py",
        *RECIPES.glob("*/digits.yaml"),
        *(ROOT / "locatvit_hf").glob("*.py"),
    ]
    return sha256(file.read_bytes() for file in sorted(files))


if __name__ == "__main__":
    typer.run(main)
