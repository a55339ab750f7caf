"""Exported models, what the package itself computes with them, and ways to start people on other machines."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from locatvit_hf import (
    LocAtViTBackbone,
    LocAtViTConfig,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
    LocAtViTImageProcessor,
)

HERE = Path(__file__).resolve().parent
LABELS = {0: "tree", 1: "road", 2: "sky"}

Answers = dict[str, dict[str, object]]
AskStranger = Callable[..., Answers]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `classifier/` and `segmenter/` as `save_pretrained` leaves them, and a `photo.png`."""
    folder = tmp_path_factory.mktemp("exported")
    config = LocAtViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=1,
        segmentation_hidden_size=16,
        id2label=LABELS,
        image_mean=[0.4, 0.5, 0.6],
    )
    torch.manual_seed(0)
    for name, model_class in (
        ("classifier", LocAtViTForImageClassification),
        ("segmenter", LocAtViTForSemanticSegmentation),
    ):
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():  # as far from the initial values as training goes
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pixels[5:15, 30:50] = 255
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def expected(exported: Path) -> dict[str, object]:
    """The answer that each check of `stranger.py` must give, computed with the package."""
    image = Image.open(exported / "photo.png")
    classifier = LocAtViTForImageClassification.from_pretrained(exported / "classifier")
    segmenter = LocAtViTForSemanticSegmentation.from_pretrained(exported / "segmenter")
    backbone = LocAtViTBackbone.from_pretrained(exported / "classifier", out_indices=[1, 2])
    crop = LocAtViTImageProcessor.from_pretrained(exported / "classifier")
    whole = LocAtViTImageProcessor.from_pretrained(exported / "segmenter")
    pixel_values = crop(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        classes = classifier(pixel_values).logits
        pooled = classifier.locatvit(pixel_values).pooler_output
        features = backbone(pixel_values).feature_maps[-1]
        scores = segmenter(whole(image, return_tensors="pt").pixel_values).logits
    probabilities = classes.softmax(dim=-1)[0]
    order = probabilities.argsort(descending=True)[:2].tolist()
    segments = pipeline("image-segmentation", model=segmenter, image_processor=whole)(image)
    answers = {
        "config": {"model_type": "locatvit", "hidden_size": 32, "id2label": LABELS[1]},
        "image_processor": pixel_values.flatten()[:100].tolist(),
        # 40 x 60 pixels: the short side becomes 32, the long one 48; class 7 is one class still.
        "label_maps": [[1, 32, 48], "torch.int64", [7]],
        "model": pooled.flatten().tolist(),
        "classifier": classes.flatten().tolist(),
        "segmenter": scores.flatten().tolist(),
        "new_segmentation_head": [1, 5, 4, 4],
        "backbone": features.flatten().tolist(),
        "classification_pipeline": [[LABELS[index], probabilities[index].item()] for index in order],
        "segmentation_pipeline": sorted(
            [segment["label"], list(segment["mask"].size), segment["mask"].histogram()[255]] for segment in segments
        ),
        "features_pipeline": pooled[0].tolist(),
        "save_again": sorted(path.name for path in (exported / "classifier").iterdir()),
        "push_again": None,
    }
    # The segmentation must not be trivial, or a wrong one could pass for it.
    assert len(answers["segmentation_pipeline"]) > 1
    return answers


@pytest.fixture(scope="module")
def ask_stranger(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> AskStranger:
    """`ask_stranger(checks, models, target=None, push=None, hub=None, revision=None)`: answers of a new person on a
    clean machine."""

    def ask(
        checks: list[str],
        models: dict[str, str],
        target: Path | None = None,
        push: str | None = None,
        hub: str | None = None,
        revision: str | None = None,
    ) -> Answers:
        machine = tmp_path_factory.mktemp("machine")
        request = {"checks": checks, "models": models, "image": str(exported / "photo.png"), "push": push}
        request |= {"target": str(target or machine / "saved"), "revision": revision}
        (machine / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-I", HERE / "stranger.py", "request.json", "answer.json"]
        start(command, machine, hub)
        return json.loads((machine / "answer.json").read_text())

    return ask


@contextmanager
def serve_hub() -> Iterator[str]:
    """The address of a Hub in a process of its own."""
    process = subprocess.Popen([sys.executable, "-I", HERE / "loopback_hub.py"], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with serve_hub() as address:
        yield address


def environment_of(machine: Path, hub: str | None) -> dict[str, str]:
    """That of another machine: a home of its own, empty caches, our environment unknown.

    With `hub` it talks to that Hub and nobody else, without it is offline.
    """
    kept = ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HOME": str(machine), "HF_HOME": str(machine / "hf"), "HF_MODULES_CACHE": str(machine / "modules")}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    if hub is None:
        return environment | {"HF_HUB_OFFLINE": "1"}
    return environment | {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_XET": "1"}


def start(command: list[str | Path], machine: Path, hub: str | None) -> None:
    """Run a program as on another machine, in its own working directory. Fails the test where the program fails."""
    run = subprocess.run(
        command, cwd=machine, env=environment_of(machine, hub), capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr


def assert_answer(answers: Answers, expected: dict[str, object], check: str) -> None:
    """The check ran through, and its value is the expected one."""
    assert "error" not in answers[check], answers[check]["error"]
    _assert_close(answers[check]["value"], expected[check], check)


def _assert_close(value: object, expected: object, where: str) -> None:
    if isinstance(expected, list):
        assert isinstance(value, list) and len(value) == len(expected), f"{where}: {value} instead of {expected}"
        for index, (item, other) in enumerate(zip(value, expected, strict=True)):
            _assert_close(item, other, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, abs=1e-5), where
    else:
        assert value == expected, where
