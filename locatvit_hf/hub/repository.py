"""A checkpoint folder becomes a repository: only what belongs there, and loaded once as its users will load it."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, PreTrainedConfig

from ..configuration_utils_locat import FamilyConfigMixin
from ..image_processing_locatvit import LocAtViTImageProcessor
from ..utils.io import sha256, write_json
from ..utils.registry import FAMILIES, PACKAGE, files_with_imports
from .card.fields import CARD_FILE
from .config import RepositoryError, family_config, model_class, read_config, read_object, without_code

WEIGHTS, INDEX, CHECKSUMS = "model.safetensors", "model.safetensors.index.json", "CHECKSUMS.sha256"
# Suffixes of files that are pickles: whoever loads one runs what it says.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
# Pickles that Trainer leaves, and that hold no weights.
TRAINING_STATE = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
# What makes a detector of the encoder beside it, see locatvit_hf/detection/.
DETECTOR = ("detector.json", "detector.safetensors")
PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_locatvit.LocAtViTImageProcessor"}
# What the card says changes without the model: it has no checksum.
WITHOUT_CHECKSUM = ("README.md", CARD_FILE, ".eval_results", CHECKSUMS)
# Float32 adds up in another order where another number of threads runs.
LARGEST_DIFFERENCE = 1e-5


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, their headers read.

    Raises:
        RepositoryError: One is missing or damaged, or the weights are a pickle.
    """
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        names = read_object(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise RepositoryError(f"{folder / INDEX} does not say which tensor is in which file.")
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        found = (path.name for path in folder.iterdir() if path.suffix in PICKLES)
        pickles = sorted(name for name in found if name not in TRAINING_STATE)
        if pickles:
            raise RepositoryError(
                f"The weights of {folder} are a pickle, {pickles[0]}, which can run code on the machine that loads it: "
                "load it where you trust it, and save it again with `save_pretrained`."
            )
        raise RepositoryError(f"{folder} holds no weights: there is no {WEIGHTS}.")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise RepositoryError(f"{file} is missing, damaged or incomplete.") from error
    return files


def build_repository(folder: Path, destination: Path) -> PreTrainedConfig:
    """Fill the empty folder `destination` with what a repository of the checkpoint `folder` holds, but for the card.

    Returns:
        The configuration.

    Raises:
        RepositoryError: `folder` is not a complete checkpoint of this package.
    """
    config, content = read_config(folder), without_code(read_object(folder / "config.json"))
    architecture = model_class(config, str(folder)).__name__
    detector = [folder / name for name in DETECTOR if (folder / name).is_file()]
    for file in (*weight_files(folder), *detector):
        _link(file, destination / file.name)
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        shutil.copyfile(folder / INDEX, destination / INDEX)

    processor = folder / "preprocessor_config.json"
    if not processor.is_file():
        segments = architecture.endswith("ForSemanticSegmentation")
        fresh = LocAtViTImageProcessor.from_model_config(family_config(config), segmentation=segments)
        fresh.save_pretrained(destination)
        processor = destination / processor.name
    settings = read_object(processor)
    settings["auto_map"] = PROCESSOR_MAP
    # All the code that goes with a model of transformers around our backbone.
    code = files_with_imports("image_processing_locatvit")
    if isinstance(config, FamilyConfigMixin):
        family = FAMILIES[config.model_type]
        content["auto_map"], code = family.auto_map, family.code_files
    for name in code:
        shutil.copyfile(PACKAGE / name, destination / name)
    write_json(destination / "config.json", content)
    write_json(destination / processor.name, settings)
    (destination / "LICENSE").write_text(license_text(), encoding="utf-8")
    return config


def license_text() -> str:
    """The license of this package, from where it is installed or from its checkout."""
    checkout = Path(__file__).resolve().parents[2] / "LICENSE"
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    text = importlib.metadata.distribution("locatvit-hf").read_text("licenses/LICENSE")
    if text is None:
        raise RepositoryError("The installation of locatvit-hf lacks its license; install it again.")
    return text


def write_checksums(folder: Path) -> None:
    """Writes the SHA-256 of every file that decides what the model computes, as `sha256sum --check` reads it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    lines = [
        f"{sha256(path)}  {name}\n"
        for path, name in zip(files, names, strict=True)
        if name.split("/")[0] not in WITHOUT_CHECKSUM
    ]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def read_checksums(text: str) -> dict[str, str]:
    """The SHA-256 of each path that CHECKSUMS.sha256 lists; lines of another form are left out."""
    lines = (line.split(maxsplit=1) for line in text.splitlines())
    return {words[1].lstrip("*"): words[0].lower() for words in lines if len(words) == 2}


@torch.no_grad()
def verify_repository(folder: Path) -> float:
    """Load a repository where this package is missing.

    Returns:
        The largest difference of its output from the package's.

    Raises:
        RepositoryError: It does not load, lacks weights, or differs.
    """
    config = read_config(folder)
    ours, alone = family_config(config), isinstance(config, FamilyConfigMixin)
    name = model_class(config, str(folder)).__name__
    if alone:
        auto_names = {
            path.partition(".")[2]: auto_name for auto_name, path in FAMILIES[config.model_type].auto_map.items()
        }
        # AutoBackbone takes no folders.
        name = auto_names[name].replace("AutoBackbone", "AutoModel")
    model, loading = getattr(transformers, name).from_pretrained(
        folder, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise RepositoryError(f"The weights lack {len(missing)} tensors of the model, such as {missing[0]}.")
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)

    height, width = (ours.image_size,) * 2 if isinstance(ours.image_size, int) else ours.image_size
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, ours.num_channels, height, width, generator=generator)
    pixels = np.random.default_rng(0).integers(0, 256, (height + 16, width + 8, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as machine:
        image, inputs, outputs = (Path(machine) / name for name in ("image.png", "in.safetensors", "out.safetensors"))
        Image.fromarray(pixels).save(image)
        save_file({"pixel_values": pixel_values}, inputs)
        program = Path(__file__).with_name("clean_load.py")
        command: list[str | Path] = [sys.executable, "-I", program, folder.resolve(), name, image, inputs, outputs]
        command += [] if alone else ["--with-package"]
        run = subprocess.run(command, cwd=machine, env=_clean_environment(machine), capture_output=True, text=True)
        if run.returncode != 0:
            reason = (run.stderr.strip().splitlines() or ["it was killed"])[-1]
            raise RepositoryError(f"The repository does not load in a clean process: {reason}")
        found = load_file(outputs)
    expected = {
        "output": model.eval()(pixel_values)[0],
        "pixel_values": processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"],
    }
    largest = 0.0
    for what, tensor in expected.items():
        same_shape = found[what].shape == tensor.shape
        difference = (found[what] - tensor).abs().max().item() if same_shape else float("inf")
        if not difference <= LARGEST_DIFFERENCE * max(1.0, tensor.abs().max().item()):
            if not tensor.isfinite().all():
                raise RepositoryError("The weights give an output that is not finite.")
            raise RepositoryError(
                f"The repository does not compute what this package computes: its {what} differs by {difference:.3g}."
            )
        largest = max(largest, difference)
    return largest


def _clean_environment(machine: str) -> dict[str, str]:
    """Ours without what Python and the libraries of Hugging Face read from it; offline, with empty caches."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    caches = {"HF_HOME": f"{machine}/hf", "HF_MODULES_CACHE": f"{machine}/modules"}
    return inherited | caches | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def _link(file: Path, destination: Path) -> None:
    """A link where the system allows it: weights are large."""
    try:
        destination.symlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, destination)


__all__ = [
    "build_repository",
    "license_text",
    "read_checksums",
    "verify_repository",
    "weight_files",
    "write_checksums",
]
