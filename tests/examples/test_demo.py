import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    *("--train-scenes", "60", "--validation-scenes", "12"),
    *("--pretrain-length", "2 steps", "--segment-length", "2 steps"),
)


def demo(folder: Path, *options: str) -> subprocess.CompletedProcess:
    paths = ("--output", str(folder / "output"), "--work", str(folder / "work"))
    return subprocess.run(
        [sys.executable, "-m", "examples.digits", *paths, *TINY, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder)


@pytest.mark.slow
def test_the_demo_writes_a_page_that_stands_alone(finished):
    folder, process = finished
    assert process.returncode == 0, process.stderr
    output = folder / "output"
    page = (output / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    report = (output / "report.md").read_text()
    assert {f"figures/{path.name}" for path in (output / "figures").iterdir()} == set(
        re.findall(r"figures/\w+\.png", report)
    )
    assert len(re.findall(r"^\| (?:ViT|LocAtViT) \| \d", report, re.MULTILINE)) == 2
    assert {path.name for path in (output / "models").iterdir()} == {
        f"{name}-{task}" for name in ("vit", "locatvit") for task in ("classification", "segmentation")
    }
    assert {path.name for path in folder.iterdir()} == {"output", "work"}


@pytest.mark.slow
def test_a_second_run_reuses_what_is_there(finished):
    folder, _ = finished
    again = demo(folder)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("from an earlier run") == 4


@pytest.mark.slow
def test_a_failing_stage_leaves_no_page(tmp_path):
    failed = demo(tmp_path, "--pretrain-length", "soon")
    assert failed.returncode == 1
    assert "A duration reads" in failed.stderr + failed.stdout
    assert not (tmp_path / "output").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "thesis.tex").write_text("precious")
    refused = demo(tmp_path)
    assert refused.returncode == 1 and "holds something else" in refused.stdout
    assert (tmp_path / "output" / "thesis.tex").read_text() == "precious"


@pytest.mark.slow
def test_control_c_leaves_nothing_half_written(tmp_path):
    paths = ("--output", str(tmp_path / "output"), "--work", str(tmp_path / "work"))
    options = ("--train-scenes", "60", "--validation-scenes", "12", "--pretrain-length", "100000 steps")
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.digits", *paths, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    checkpoints = tmp_path / "work" / "runs" / "pretrain" / "vit" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("step_*")):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in output
    assert {path.name for path in tmp_path.iterdir()} == {"work"}
    assert not list(tmp_path.glob("**/.partial-*"))
