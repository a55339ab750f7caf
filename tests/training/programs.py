"""Starting the programs the way a user does."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def start(program: str, settings: dict, *options: str, as_file: bool = False) -> subprocess.Popen:
    """`python -m training.PROGRAM --config RECIPE OPTIONS`, with the recipe written beside the output folder."""
    recipe = Path(settings["output_dir"]).with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(settings))
    target = [str(ROOT / "training" / f"{program}.py")] if as_file else ["-m", f"training.{program}"]
    return subprocess.Popen(
        [sys.executable, *target, "--config", str(recipe), *options],
        cwd=ROOT if not as_file else recipe.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(program: str, settings: dict, *options: str, as_file: bool = False) -> subprocess.CompletedProcess:
    """Start and wait; the caller looks at `returncode`."""
    process = start(program, settings, *options, as_file=as_file)
    output, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
