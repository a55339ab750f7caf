"""Small checkpoints, and a page that serves both from a process of its own."""

import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from locatvit_hf import (
    LocAtViTConfig,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
    PaCaViTConfig,
    PaCaViTForImageClassification,
)

SIZES = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
NAMES = {0: "road", 1: "sky <b>", 2: "tree"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    models = {
        "classifier": LocAtViTForImageClassification(LocAtViTConfig(**SIZES, id2label=NAMES)),
        "segmenter": LocAtViTForSemanticSegmentation(LocAtViTConfig(**SIZES, id2label=NAMES)),
        "clusters": PaCaViTForImageClassification(
            PaCaViTConfig.from_preset("tiny", image_size=64, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1])
        ),
    }
    backbone = LocAtViTConfig(**{**SIZES, "num_hidden_layers": 4}, feature_pyramid=True, out_indices=[1, 2, 3, 4])
    upernet = UperNetConfig(backbone_config=backbone, hidden_size=8, auxiliary_channels=8, id2label=NAMES)
    models["upernet"] = UperNetForSemanticSegmentation(upernet)
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    gradient = torch.linspace(0, 255, 90 * 120).reshape(90, 120).to(torch.uint8).numpy()
    Image.fromarray(gradient).convert("RGB").save(folder / "wide.png")
    Image.fromarray(gradient.T).convert("RGB").save(folder / "tall.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    return folder


@pytest.fixture(scope="session")
def address(checkpoints):
    """Of a page that serves the classifier and the segmenter side by side."""
    command = [sys.executable, "-m", "locatvit_hf.cli", "serve", "--host", "127.0.0.1"]
    for name in ("classifier", "segmenter"):
        command += ["--model", str(checkpoints / name)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "GRADIO_SERVER_PORT": ""}
    environment.pop("GRADIO_SERVER_PORT")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        for line in server.stdout:
            if found := re.search(r"http://\S+", line):
                yield found[0]
                break
        else:
            pytest.fail("The page did not start.")
    finally:
        server.kill()
        server.wait()
