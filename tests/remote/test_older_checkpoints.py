"""Checkpoints of an earlier layout of the package: their own code loads them, and so do the installed classes."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation

import locatvit_hf  # noqa: F401 (registers its classes)
from tests.conversion.layouts import remote_outputs

OLDER = Path(__file__).resolve().parents[1] / "fixtures" / "before_restructuring"
NAMES = sorted(path.name for path in OLDER.iterdir() if path.is_dir())
AUTO_CLASSES = {"classifier": AutoModelForImageClassification, "segmenter": AutoModelForSemanticSegmentation}
# As the fixture was made, of 40 x 48 pixels: padding, and a grid that is not the native one.
PIXEL_VALUES = torch.linspace(-1, 1, 3 * 40 * 48).reshape(1, 3, 40, 48).sin()


def assert_same_logits(actual: torch.Tensor, name: str) -> None:
    """Float32 sums in another order: a few hundred terms of size one in each of some ten layers."""
    expected = load_file(OLDER / name / "expected.safetensors")["logits"]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_there_is_one_of_each_family() -> None:
    assert len(NAMES) == 8 and {name.partition("-")[2] for name in NAMES} == AUTO_CLASSES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_an_older_checkpoint_loads_with_the_installed_classes(name: str) -> None:
    model = AUTO_CLASSES[name.partition("-")[2]].from_pretrained(OLDER / name)
    assert type(model).__module__.startswith("locatvit_hf.")
    with torch.no_grad():
        assert_same_logits(model(PIXEL_VALUES).logits, name)


def test_older_checkpoints_load_with_the_code_that_they_carry(tmp_path: Path) -> None:
    for name in NAMES:
        shutil.copytree(OLDER / name, tmp_path / name)
        zipfile.ZipFile(OLDER / "code.zip").extractall(tmp_path / name)
    observed = remote_outputs({tmp_path / name: {"x": PIXEL_VALUES} for name in NAMES})
    for name in NAMES:
        assert_same_logits(observed[name]["x"], name)
