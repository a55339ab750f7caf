"""Writes the weights of a golden case in the layouts that the reference writes."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from tests.golden import GOLDEN, GoldenCase


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
