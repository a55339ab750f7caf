"""Curves, example predictions and what a LocAt model has learned about distances, sent to experiment trackers."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from torch import nn

from locatvit_hf.locat import Gaussian, LocAtGaussian
from locatvit_hf.utils.io import sha256
from training.engine.arguments import public_settings
from training.engine.settings import RunArguments

TRACKERS = ("tensorboard", "trackio", "wandb")


def check_trackers(names: list[str]) -> None:
    """Raises ValueError for a tracker that is unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"There is no tracker {name!r}; choose among {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"The tracker {name} is not installed: pip install {name}.")


class Trackers:
    """The trackers of a run; a continued run goes on in the same ones.

    Args:
        accelerator: Made with the trackers of `arguments`.
        output: The run's folder, which holds their files and names the run.
        step: Steps that are already done.
    """

    def __init__(self, accelerator: Accelerator, arguments: RunArguments, output: Path, step: int):
        self.accelerator = accelerator
        self.names = list(arguments.trackers)
        if not self.names:
            return
        settings, folder = public_settings(arguments), output.resolve()
        # Runs in folders of one name are different runs.
        run = f"{folder.name}-{sha256(str(folder).encode())[:8]}"
        options = {
            "tensorboard": {"purge_step": step + 1},
            "trackio": {"name": run, "resume": "allow"},
            "wandb": {"name": folder.name, "id": run, "resume": "allow", "dir": str(output)},
        }
        accelerator.init_trackers("locatvit-hf", init_kwargs=options)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log({"arguments": f"<pre>{yaml.safe_dump(settings, sort_keys=False)}</pre>"}, step=step)
            else:
                tracker.store_init_configuration(json.loads(json.dumps(settings, default=str)))

    def log(self, prefix: str, values: dict[str, Any], step: int) -> None:
        """Scalars under `prefix/name`; anything else is left out."""
        scalars = {
            f"{prefix}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if self.names and scalars:
            self.accelerator.log(scalars, step=step)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """One image."""
        if not self.accelerator.is_main_process:
            return
        for tracker in self.accelerator.trackers if self.names else ():
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [image]}, step=step)
            else:
                tracker.log({name: importlib.import_module("trackio").Image(image)}, step=step)

    def close(self) -> None:
        """Write what is left."""
        for tracker in self.accelerator.trackers if self.names else ():
            tracker.finish()
        self.accelerator.trackers = []


class GaussianReader:
    """Mean variance and amplitude of the Gaussians of every layer, read while a model is evaluated.

    Of each evaluation the first batch counts. While the model trains, nothing is read.
    """

    def __init__(self, model: nn.Module):
        self.found: dict[int, tuple[float, float, float]] = {}
        predictors = [module for module in model.modules() if isinstance(module, LocAtGaussian)]
        for layer, predictor in enumerate(predictors):
            predictor.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int):
        def read(predictor: LocAtGaussian, inputs: tuple, gaussian: Gaussian) -> None:
            if predictor.training or layer in self.found:
                return
            with torch.no_grad():
                # What a model adds to the variance before it inverts it is part of the width of its Gaussian.
                rows, columns = gaussian.inverse_variance.float().reciprocal().flatten(0, -2).mean(dim=0).tolist()
                self.found[layer] = (rows, columns, gaussian.amplitude.float().mean().item())

        return read

    def take(self) -> dict[str, float]:
        """`layer_1/variance_rows` and so on, in patches squared, of the evaluation that has just ended."""
        names = ("variance_rows", "variance_columns", "amplitude")
        values = {
            f"layer_{layer + 1}/{name}": value
            for layer, found in sorted(self.found.items())
            for name, value in zip(names, found, strict=True)
        }
        self.found = {}
        return values
