"""Exported models, what the package itself computes with them, and ways to run programs as on other machines."""

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

from locatvit_hf import LocAtViTImageProcessor
from tests.factories import FAMILIES, model_class, tiny_config
from tests.processes import run_program

HERE = Path(__file__).resolve().parent
LABELS = {0: "tree", 1: "road", 2: "sky"}
# Of the family that is checked in every respect.
FIELDS = {"num_register_tokens": 1, "image_mean": [0.4, 0.5, 0.6]}

# The files of code beside the weights of each family.
SHARED = {"configuration_utils_locat.py", "image_processing_locatvit.py", "layers_locat.py", "modeling_utils_locat.py"}
GAUSSIAN = {"attention_locat.py", "locat.py"}
KERNELS = {"blockwise_locat.py", "triton_locat.py"}
# Swin has a mask in every window, which no kernel takes, and PaCa-ViT has no Gaussian.
CODE = {
    family: SHARED | used | {f"configuration_{family}.py", f"modeling_{family}.py"}
    for family, used in {
        "locatvit": GAUSSIAN | KERNELS,
        "locatjumbo": GAUSSIAN | KERNELS,
        "locatswin": GAUSSIAN,
        "pacavit": set(),
    }.items()
}
# What `locatvit push` uploads besides.
PUBLISHED = {"CHECKSUMS.sha256", "LICENSE", "README.md", "card.yaml", "config.json", "model.safetensors"}
PUBLISHED |= {"preprocessor_config.json"}

Answers = dict[str, dict[str, object]]
AskRemoteUser = Callable[..., list[Answers]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `FAMILY/classifier` and `FAMILY/segmenter` as `save_pretrained` leaves them, and a `photo.png`."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    for family in FAMILIES:
        fields = FIELDS if family == "locatvit" else {}
        for name, task in (("classifier", "ForImageClassification"), ("segmenter", "ForSemanticSegmentation")):
            config = tiny_config(family, num_labels=3, id2label=LABELS, segmentation_hidden_size=16, **fields)
            model = model_class(family, task)(config)
            with torch.no_grad():
                for parameter in model.parameters():  # as far from the initial values as training goes
                    parameter.add_(0.2 * torch.randn_like(parameter))
            model.save_pretrained(folder / family / name)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pixels[5:15, 30:50] = 255
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def expected(exported: Path) -> dict[str, dict[str, object]]:
    """The answer that each check of `remote_user.py` must give, by family, computed with the package."""
    answers = {family: expected_answers(exported, family) for family in FAMILIES}
    # The segmentation must not be trivial, or a wrong one could pass for it.
    assert len(answers["locatvit"]["segmentation_pipeline"]) > 1
    return answers


@torch.no_grad()
def expected_answers(exported: Path, family: str) -> dict[str, object]:
    image = Image.open(exported / "photo.png")
    folders = [exported / family / name for name in ("classifier", "segmenter")]
    classifier = model_class(family).from_pretrained(folders[0])
    segmenter = model_class(family, "ForSemanticSegmentation").from_pretrained(folders[1])
    backbone = model_class(family, "Backbone").from_pretrained(folders[0], out_indices=[1, 2])
    crop, whole = map(LocAtViTImageProcessor.from_pretrained, folders)
    pixel_values, whole_values = (processor(image, return_tensors="pt").pixel_values for processor in (crop, whole))
    classes = classifier(pixel_values).logits
    pooled = classifier.base_model(pixel_values).pooler_output
    scores = segmenter(whole_values).logits
    probabilities = classes.softmax(dim=-1)[0]
    order = probabilities.argsort(descending=True)[:2].tolist()
    segments = pipeline("image-segmentation", model=segmenter, image_processor=whole)(image)
    answers = {
        "config": {"model_type": family, "hidden_size": 32, "id2label": LABELS[1]},
        "image_processor": pixel_values.flatten()[:100].tolist(),
        # Class 7 is one class still.
        "label_maps": [[1, *whole_values.shape[-2:]], "torch.int64", [7]],
        "model": pooled.flatten().tolist(),
        "classifier": classes.flatten().tolist(),
        "segmenter": scores.flatten().tolist(),
        "new_segmentation_head": [1, 5, *(side // 8 for side in pixel_values.shape[-2:])],
        "backbone": backbone(pixel_values).feature_maps[-1].flatten().tolist(),
        "classification_pipeline": [[LABELS[index], probabilities[index].item()] for index in order],
        "segmentation_pipeline": sorted(
            [segment["label"], list(segment["mask"].size), segment["mask"].histogram()[255]] for segment in segments
        ),
        "features_pipeline": pooled[0].tolist(),
        "save_again": sorted(path.name for path in folders[0].iterdir()),
        "push_again": None,
    }
    return answers


@pytest.fixture(scope="module")
def ask_remote_user(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> AskRemoteUser:
    """`ask_remote_user(*requests, hub=None)`: answers of a person with transformers alone, on a clean machine.

    A request is what `remote_user.py` says; the image and a target are there.
    """

    def ask(*requests: dict[str, object], hub: str | None = None) -> list[Answers]:
        machine = tmp_path_factory.mktemp("machine")
        common = {"image": str(exported / "photo.png"), "target": str(machine / "saved")}
        (machine / "requests.json").write_text(json.dumps([common | request for request in requests]))
        start(machine, hub, "-I", HERE / "remote_user.py", "requests.json", "answers.json")
        return json.loads((machine / "answers.json").read_text())

    return ask


def folders(parent: Path) -> dict[str, str]:
    """The models of a request, from a folder that holds both."""
    return {name: str(parent / name) for name in ("classifier", "segmenter")}


def repositories(prefix: str) -> dict[str, str]:
    """The models of a request, from two repositories of a Hub."""
    return {name: f"{prefix}-{name}" for name in ("classifier", "segmenter")}


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


def start(machine: Path, hub: str | None, *arguments: str | Path) -> None:
    """Runs `python ARGUMENTS` as on another machine, and fails the test where the program fails."""
    run = run_program(*arguments, folder=machine, environment=environment_of(machine, hub))
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
