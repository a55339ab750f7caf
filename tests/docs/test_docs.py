"""Every code block of the documentation runs, its links lead somewhere, and the site builds."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from transformers import AutoBackbone, pipeline

from locatvit_hf import PaCaViTConfig
from locatvit_hf.cli import app
from locatvit_hf.detection import Detector, DetectorSettings, pyramid_config

from .snippets import ROOT, read_blocks, run_blocks

DOCS = ROOT / "docs"
# Those that start many processes or compile.
SLOW = {"train.md", "export.md", "look.md", "recipes.md", "convert.md", "publish.md"}
PAGES = sorted(path.name for path in DOCS.glob("*.md") if read_blocks(path))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small detector that has learned nothing, and therefore finds something everywhere."""
    config = PaCaViTConfig(hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, num_clusters=[4, 4, 4, 0])
    settings = DetectorSettings(pyramid_channels=8, test_shortest_side=64, max_detections=3)
    folder = tmp_path_factory.mktemp("detector")
    encoder = AutoBackbone.from_config(pyramid_config(config))
    Detector(encoder, [{"id": 1, "name": "cat"}], settings).save_pretrained(folder)
    return folder


@pytest.fixture
def reader(tmp_path: Path, detector: Path) -> Path:
    """A folder with the examples, a detector, a photo and two datasets."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my-detector").symlink_to(detector)
    random = np.random.default_rng(0)

    def save(path: Path, *shape: int, top: int = 256) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, top, shape, dtype=np.uint8)).save(path)

    save(tmp_path / "photo.jpg", 90, 120, 3)
    Image.fromarray(random.integers(0, 65536, (90, 120), dtype=np.uint16)).save(tmp_path / "scan.png")
    for label in ("cat", "dog"):
        for number in range(8):
            save(tmp_path / "photos" / label / f"{number}.jpg", 70, 80, 3)
    for number in range(8):
        save(tmp_path / "streets" / "image" / f"{number}.jpg", 64, 96, 3)
        save(tmp_path / "streets" / "label" / f"{number}.png", 64, 96, top=3)
    (tmp_path / "names.json").write_text(json.dumps({"0": "road", "1": "car", "2": "tree"}))
    (tmp_path / "training").symlink_to(ROOT / "training")
    return tmp_path


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in PAGES])
def test_blocks_run(page: str, reader: Path) -> None:
    blocks = read_blocks(DOCS / page)
    printed = run_blocks(blocks, reader)
    assert f"block {len(blocks)} " in printed
    assert " ERROR " not in printed.replace("is not supported for image-segmentation", "")


@pytest.mark.parametrize("kind", ["16-bit", "alpha"])
def test_files_that_pipelines_read_otherwise(kind: str, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippet answers as for the same picture in 8 bits; a pipeline that opens the file does not.

    Where the last assertion fails, pipelines have learned to open such files, and the section can go.
    """
    monkeypatch.chdir(reader)
    rows, columns = np.mgrid[:90, :120]
    wave = ((np.sin(rows / 9) + np.cos(columns / 13) + 2) * 63).astype(np.uint8)
    if kind == "alpha":
        wave[20:60, 30:90] = 255
        pixels = np.stack([wave, wave, wave, np.where(wave == 255, 0, 255)], axis=-1).astype(np.uint8)
        pixels[20:60, 30:90, :3] = (200, 0, 0)  # hidden
        Image.fromarray(pixels).save("scan.png")
    else:
        Image.fromarray(wave.astype(np.uint16) * 257).save("scan.png")
    Image.fromarray(wave).convert("RGB").save("plain.png")
    blocks = [code for _, code in read_blocks(DOCS / "index.md")]
    first, *_, snippet = [code for code in blocks if "AutoImageProcessor" in code or "scan.png" in code]
    session: dict = {}
    exec(first, session)
    exec(snippet, session)
    segmenter = pipeline("image-segmentation", model=session["model"], image_processor=session["processor"])
    for name, same in (("plain.png", True), ("scan.png", False)):
        masks = {segment["label"]: np.asarray(segment["mask"]) > 0 for segment in segmenter(name)}
        found = sum(session["model"].config.label2id[label] * mask for label, mask in masks.items())
        agreeing = np.mean(found == session["class_map"].numpy())
        assert (agreeing > 0.99) == same  # not all of them: rounding decides where two classes tie


@pytest.mark.slow
def test_training_commands_of_the_readme_run(reader: Path) -> None:
    """The recipe reads the data set that lies beside the checkout: a small one stands in for it here."""
    (block,) = [code for _, code in read_blocks(ROOT / "README.md") if "training.pretrain" in code]
    home = reader / "checkout"
    home.mkdir()
    for name in ("training", "photos", "streets", "names.json"):
        (home / name).symlink_to(reader / name)
    (home / "my-checkpoint").symlink_to(ROOT / "examples" / "checkpoints" / "locatvit-classification")
    for split in ("train", "validation"):
        for label in ("cat", "dog"):
            shutil.copytree(reader / "photos" / label, reader / "shared" / "data" / "tiny_imagenet" / split / label)
    short = "--validation_share 0.25 --length '1 epochs' --batch_size 4"
    commands = block.replace("\\\n", " ").splitlines()
    assert len(commands) == 3
    options = {"training.finetune": short, "training.segment": f"{short} --resize 64 --crop_size 64"}
    for command in commands:
        run_blocks([("sh", f"{command} {options.get(command.split()[2], '')}")], home)


def test_commands_that_are_only_shown_exist() -> None:
    """Of text blocks, which need the Hub, a browser or the files of others: the verbs and options are there."""
    command, shown = typer.main.get_command(app), 0
    for page in (*DOCS.glob("*.md"), ROOT / "README.md"):
        for block in re.findall(r"^```text\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("locatvit "):
                    verb, *arguments = shlex.split(line)[1:]
                    command.commands[verb].make_context(verb, arguments)
                    shown += 1
    assert shown >= 6


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(path.name in navigation for path in DOCS.glob("*.md"))


def test_site_builds_without_a_warning_and_asks_no_other_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    start = (tmp_path / "site" / "index.html").read_text()
    assert "fonts.g" not in start
    assert 'src="http' not in start
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "Average over these multiples of the test size." in reference
    configurations, _, _ = reference.partition('id="images"')
    assert "<em>required" not in configurations
    fields = dict(re.findall(r"<code>(\w+)</code>.*?<code>([^<]*)</code>\s*</td>\s*</tr>", configurations, re.DOTALL))
    assert fields["patch_size"] == "16" and fields["crop_pct"] == "0.9" and fields["out_indices"] == "None"


def test_numbers_on_speed_are_those_that_were_measured() -> None:
    """Each cell of the table stands in the stored results, in the row of that name."""
    results = (ROOT / "benchmarks" / "results" / "cpu-intel-r-xeon-r-processor-2-cores" / "results.md").read_text()
    rows = [
        line.split(" | ")
        for line in (DOCS / "speed.md").read_text().splitlines()
        if line.startswith(("| tiny", "| base"))
    ]
    assert len(rows) == 5
    for name, *cells in rows:
        measured = "\n".join(line for line in results.splitlines() if line.startswith(f"{name} |"))
        assert all(f"| {cell.strip(' |')} |" in measured for cell in cells), name
