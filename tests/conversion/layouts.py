"""Writes the weights of a golden case in the layouts that the reference writes, and loads what became of them."""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.golden import GOLDEN, GoldenCase
from tests.processes import run_program

# A process that knows nothing of this package loads every folder by the Auto class of its task.
REMOTE_USER = """
import json
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "locatvit_hf":
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, NoPackage())
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file, save_file

for folder in map(Path, sys.argv[1:]):
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    _, has_head, task = architecture.partition("For")
    auto_class = getattr(transformers, f"AutoModel{has_head}{task}")
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    assert "locatvit_hf" not in sys.modules and type(model).__module__.startswith("transformers_modules")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__name__ == "LocAtViTImageProcessor"
    with torch.no_grad():
        outputs = {name: model(image)[0].contiguous() for name, image in load_file(f"{folder}.inputs").items()}
    save_file(outputs, f"{folder}.outputs")
"""


def remote_outputs(inputs: Mapping[Path, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """What models say in one process where this package cannot be imported.

    inputs: folder of a model -> name -> pixel values, the folders being neighbors. Returns name of the folder -> name
    -> logits, or last hidden states of a model without a head.
    """
    for folder, tensors in inputs.items():
        save_file(dict(tensors), f"{folder}.inputs")
        root = folder.parent
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules")}
    environment.pop("PYTHONPATH", None)
    process = run_program("-c", REMOTE_USER, *inputs, folder=root, environment=environment)
    assert process.returncode == 0, process.stderr
    return {folder.name: load_file(f"{folder}.outputs") for folder in inputs}


def write_mixin(case: GoldenCase, folder: Path) -> Path:
    """(a) init arguments in config.json, with what the reference's own `save_pretrained` adds to them."""
    folder.mkdir()
    arguments = json.loads((GOLDEN / "hub_layouts" / "mixin" / "config.json").read_text())
    size = [case.arguments["img_size"]] * 2
    (folder / "config.json").write_text(json.dumps({**arguments, **case.arguments, "img_size": size}))
    save_file(case.state, folder / "model.safetensors")
    return folder


def write_timm(case: GoldenCase, folder: Path, **changes) -> Path:
    """(b) timm's config.json with model_args. `changes` replace top-level entries; None removes one."""
    folder.mkdir()
    config = json.loads((GOLDEN / "hub_layouts" / "timm" / "config.json").read_text())
    arguments = {name: value for name, value in case.arguments.items() if name != "num_classes"}
    config.update(architecture=case.architecture, num_classes=case.arguments["num_classes"], model_args=arguments)
    config.update(changes)
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(case.state, folder / "model.safetensors")
    return folder


def run_settings(case: GoldenCase) -> dict:
    """The part of a training run's args.yaml that says what the model is, among what says how it was trained."""
    arguments = {name: value for name, value in case.arguments.items() if name != "num_classes"}
    return {
        "model": case.architecture,
        "num_classes": case.arguments["num_classes"],
        "gp": None,
        "img_size": None,
        "in_chans": None,
        "mean": None,
        "std": None,
        "crop_pct": None,
        "interpolation": "",
        "drop_path": 0.1,
        "epochs": 300,
        "lr": 1e-3,
        "model_kwargs": arguments,
    }


def write_run(case: GoldenCase, folder: Path, file: str = "model_best.pth.tar", **settings) -> Path:
    """(c) a training run: tensors with the prefix of distributed training, and what else a run stores. Settings win."""
    folder.mkdir(exist_ok=True)
    checkpoint = {
        "epoch": 299,
        "arch": case.architecture,
        "state_dict": {f"module.{name}": tensor for name, tensor in case.state.items()},
        "state_dict_ema": {f"module.{name}": tensor + 0.01 for name, tensor in case.state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "args": argparse.Namespace(model=case.architecture, output=Path("output"), lr=1e-3),
        "metric": np.float64(71.5),
        "version": 2,
    }
    torch.save(checkpoint, folder / file)
    (folder / "args.yaml").write_text(yaml.safe_dump({**run_settings(case), **settings}))
    return folder
