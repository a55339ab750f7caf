"""A checkpoint is opened once, and says in a sentence what is wrong with it."""

import json
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch

from locatvit_hf import LocAtViTConfig, LocAtViTForSemanticSegmentation, LocAtViTImageProcessor
from locatvit_hf.inference import Checkpoint
from tests.factories import SMALLEST
from tests.processes import run_program
from tests.remote.conftest import HERE, serve_hub, start

SMALL = SMALLEST["locatvit"]
SEGMENT = """
import sys
from collections import Counter
opened = Counter()
sys.addaudithook(lambda event, values: opened.update([str(values[0]).split("/")[-1]]) if event == "open" else None)
from PIL import Image
import locatvit_hf
assert "locatvit_hf.conversion" not in sys.modules, "from_vit is loaded when it is called"
import locatvit_hf.detection
from locatvit_hf.inference import Checkpoint
checkpoint = Checkpoint(sys.argv[1])
checkpoint.fingerprint()
(class_map,) = checkpoint.load_segmenter()([Image.new("RGB", (20, 12))])
assert class_map.shape == (12, 20)
print(opened["config.json"], opened["preprocessor_config.json"])
print({"matplotlib", "datasets", "pycocotools", "training"} & sys.modules.keys())
"""
PUSH = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("tester/m")
HfApi().upload_folder(folder_path=sys.argv[1], repo_id="tester/m")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "segmenter"
    torch.manual_seed(0)
    LocAtViTForSemanticSegmentation(LocAtViTConfig(**SMALL, segmentation_hidden_size=8)).save_pretrained(path)
    return path


def test_a_folder_is_read_once_and_with_the_package_alone(folder: Path) -> None:
    run = run_program("-c", SEGMENT, folder, folder=HERE.parents[1])
    assert run.stdout == "1 1\nset()\n", run.stdout + run.stderr


def test_each_file_of_a_repository_is_asked_for_once(folder: Path, tmp_path: Path) -> None:
    """Also by a branch: it may move meanwhile, so that all files come from the commit of the first one."""
    segment = f"import sys; sys.path.insert(0, {str(HERE.parents[1])!r})\n{SEGMENT}"
    with serve_hub() as hub:
        start(tmp_path, hub, "-c", PUSH, folder)
        before = len(requests_to(hub))
        start(tmp_path, hub, "-c", segment, "tester/m")
        asked = Counter(line.split("/")[-1] for line in requests_to(hub)[before:] if line.startswith("GET"))
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        assert asked[name] == 1, asked


def requests_to(hub: str) -> list[str]:
    with urllib.request.urlopen(f"{hub}/loopback/requests") as answer:
        return json.load(answer)


def test_a_missing_processor_is_that_of_the_configuration(folder: Path, tmp_path: Path) -> None:
    expected = Checkpoint(str(folder)).load_processor().to_dict()
    del expected["auto_map"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = Checkpoint(str(tmp_path)).load_processor()
    assert type(found) is LocAtViTImageProcessor and found.to_dict() == expected
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Checkpoint(str(tmp_path)).load_processor()


def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    model = LocAtViTForSemanticSegmentation.from_pretrained(folder)
    torch.nn.init.constant_(next(model.parameters()), torch.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hold numbers that are not finite"):
        Checkpoint(str(tmp_path)).load_segmenter()
