"""The README is true: its snippets run, its table counts, and its links lead somewhere."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import locatvit_hf
from locatvit_hf import LocAtViTConfig, LocAtViTForImageClassification
from tests.docs.snippets import ROOT, read_blocks, run_blocks
from tests.processes import run_program

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples and a photograph."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    return folder


def test_snippets_run(reader: Path) -> None:
    """All in one process, in the order in which a reader pastes them into one session."""
    assert len(SNIPPETS) == 3
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(reader / "modules")}
    program = "\n".join(SNIPPETS)
    run = run_program("-c", program, folder=reader, environment=environment)
    assert run.returncode == 0, run.stderr
    *answers, again, shapes = run.stdout.splitlines()
    config = json.loads((ROOT / "examples" / "checkpoints" / "locatvit-classification" / "config.json").read_text())
    assert len(answers) == 3 and {answer[6:] for answer in answers} <= set(config["label2id"]), answers
    assert again == answers[0][6:]  # from the folder that carries its code
    assert shapes == "[(1, 96, 8, 11), (1, 96, 8, 11)]"  # 90 x 120 pixels become 64 x 88, in patches of 8
    masks = list(reader.glob("*.png"))
    assert masks and all(Image.open(mask).size == (120, 90) for mask in masks)


def test_first_steps_and_commands_run(reader: Path) -> None:
    """Without the installation, which the tests have behind them."""
    blocks = [code for language, code in read_blocks(ROOT / "README.md") if language == "sh" and "locatvit " in code]
    assert len(blocks) == 1
    lines = [
        line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("locatvit ")
    ]
    (reader / "photos").mkdir()
    shutil.copy(reader / "photo.jpg", reader / "photos")
    run_blocks([("sh", line) for line in lines], reader)
    maps = np.asarray(Image.open(reader / "masks" / "maps" / "scene.png"))
    assert maps.shape == (64, 64) and len(np.unique(maps)) > 1  # the digits stand out
    assert (reader / "look" / "photo.html").is_file()


@pytest.mark.parametrize("preset", ["tiny", "small", "base", "large"])
def test_table_of_models(preset: str) -> None:
    row = re.search(rf'^\| `"{preset}"` \|(.*)\|$', README, re.MULTILINE)[1]
    layers, width, heads, parameters, _ = (cell.strip() for cell in row.split("|"))
    counted = []
    for locat in (False, True):
        config = LocAtViTConfig.from_preset(preset, num_labels=1000, use_gaussian=locat, use_refinement=locat)
        assert [config.num_hidden_layers, config.hidden_size, config.num_attention_heads] == list(
            map(int, (layers, width, heads))
        )
        with torch.device("meta"):
            model = LocAtViTForImageClassification(config)
        counted.append(sum(parameter.numel() for parameter in model.parameters()))
    assert parameters == " → ".join(f"{number:,}" for number in counted)


FAMILY_ROW = re.compile(r'^\| `(\w+)Config` \| `"(\w+)"` \| ([\d, →]+) \|', re.MULTILINE)


@pytest.mark.parametrize(("prefix", "preset", "parameters"), FAMILY_ROW.findall(README))
def test_table_of_the_other_families(prefix: str, preset: str, parameters: str) -> None:
    config_class = getattr(locatvit_hf, f"{prefix}Config")
    switches = [{}] if prefix == "PaCaViT" else [{"use_gaussian": on, "use_refinement": on} for on in (False, True)]
    counted = []
    for switch in switches:
        with torch.device("meta"):
            config = config_class.from_preset(preset, num_labels=1000, **switch)
            model = getattr(locatvit_hf, f"{prefix}ForImageClassification")(config)
        counted.append(f"{sum(parameter.numel() for parameter in model.parameters()):,}")
    assert parameters.strip() == " → ".join(counted)


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for block, inline in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, re.MULTILINE):
        target = block or inline
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"`make {target}` is not in the Makefile"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
