"""The example checkpoints: small, without code, and sensible on an image that they have not seen."""

import json

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from experiments.locality.export_examples import PUBLISHED
from experiments.locality.runs import ROOT
from locatvit_hf.hub.card import read_card
from tests.processes import run_program

TINY_IMAGENET = ROOT.parent / "shared" / "data" / "tiny_imagenet"
CHECKPOINTS = ROOT / "examples" / "checkpoints"
USER = """
import json, sys
import locatvit_hf
import numpy as np
from PIL import Image
from transformers import pipeline
folder, picture = sys.argv[1:]
classifiers = [pipeline("image-classification", f"{folder}/{name}")
               for name in ("vit-classification", "locatvit-classification")]
segmenter = pipeline("image-segmentation", f"{folder}/locatvit-segmentation")
answers = [answer["label"] for classifier in classifiers for answer in classifier(picture, top_k=5)]
dtypes = {str(model.model.dtype) for model in (*classifiers, segmenter)}
masks = {entry["label"]: np.asarray(entry["mask"]) > 0 for entry in segmenter(picture)}
# Where the photograph shows the sky, and where trees.
shares = masks["sky"][:200, 350:].mean(), masks["tree"][350:, 400:].mean()
print(json.dumps([answers, sorted(dtypes), *shares]))
"""


def test_the_folders_are_small_and_hold_no_code():
    assert {path.name for path in CHECKPOINTS.iterdir()} == set(PUBLISHED)
    assert sum(path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.suffix == ".safetensors") < 5e6
    for folder in CHECKPOINTS.iterdir():
        assert not list(folder.glob("*.py")) and not any(path.is_symlink() for path in folder.iterdir())
        assert all("auto_map" not in path.read_text() for path in folder.glob("*.json"))
        card = read_card(folder)
        assert card.weights_license == "cc-by-nc-4.0" and "non-commercial" in card.remarks
        assert f"The run {PUBLISHED[folder.name][0]}-" in card.remarks


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """What a fresh process with empty caches makes of a photograph of a temple among trees."""
    folder = tmp_path_factory.mktemp("user")
    Image.fromarray(load_sample_image("china.jpg")).save(folder / "photo.png")
    environment = {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
    }
    run = run_program("-c", USER, CHECKPOINTS, folder / "photo.png", folder=folder, environment=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_they_do_sensible_things(answer):
    names, dtypes, sky, trees = answer
    known = json.loads((CHECKPOINTS / "vit-classification" / "config.json").read_text())["label2id"]
    assert len(names) == 10 and set(names) <= set(known) and not np.isin(["n01443537 goldfish"], list(known)).any()
    assert dtypes == ["torch.float32"]
    assert sky > 0.8 and trees > 0.8


@pytest.mark.skipif(not TINY_IMAGENET.is_dir(), reason="Tiny-ImageNet is not ours to ship")
@pytest.mark.parametrize("name", ["vit-classification", "locatvit-classification"])
def test_they_know_many_of_the_validation_images(name):
    """Four of each class: one in five at the first guess, two in five at the fifth; chance would be 1 % and 5 %."""
    rows = load_dataset("parquet", data_files=str(TINY_IMAGENET / "validation*"), split="train").select(
        range(0, 5000, 13)
    )
    model = AutoModelForImageClassification.from_pretrained(CHECKPOINTS / name).eval()
    processor = AutoImageProcessor.from_pretrained(CHECKPOINTS / name)
    with torch.inference_mode():
        logits = model(**processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")).logits
    hits = logits.topk(5).indices == torch.tensor(rows["label"])[:, None]
    assert hits[:, 0].float().mean() > 0.12 and hits.any(dim=1).float().mean() > 0.3
