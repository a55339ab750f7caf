"""Values computed by the official code, how they are stored here, and how a test compares with them.

`tests/fixtures/golden/locat_golden.json` holds whole models in float64 whose weights follow a rule (`rule_weights`),
and the Gaussian and refinement modules alone. `tests/fixtures/golden/checkpoints/NAME.{json,safetensors}` hold small
models in float32 with their own weights, inputs, features, tokens, logits and gradients:

    state.NAME          weights, by the names of the official code; training mode is the same weights
    I.input, I.logits   the I-th input (batch, 3, height, width) and its logits, whole
    I.bias.first        the Gaussian of the first layer (batch, heads, rows, tokens), every `bias_row_stride`-th row
    I.features.K        layer K's output before the norm, patches only, (batch, channels, height, width)
    I.tokens            tokens after the final norm; I.tokens_prr after the refinement too, (batch, tokens, channels)
    train.logits        logits of input 0 in training mode; grad.NAME: gradients of (train.logits * train.weight).sum()

To keep the repository small, tensors other than weights, inputs and logits are stored as the evenly spaced entries that
`sample` takes. Compare with `case.error(name, tensor)`, which samples `tensor` likewise.
`python -m tests.golden FOLDER NAME...` makes these files from the whole ones.
"""

import json
import math
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from locatvit_hf.conversion.converters import CONVERTERS, Converter
from locatvit_hf.conversion.key_mapping import KeyTable, rename, source_shapes

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
VIT_CHECKPOINTS = ("locatvit", "locatvit_reg4", "locatvit_nopos", "locatvit_grid32", "vit_baseline", "locatrope")
# Stored in the same way, compared with in files of their own.
OTHER_CHECKPOINTS = ("locatswin", "locatjumbo")
LARGEST_SAMPLE = 2048


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most about 2048 entries of a tensor, evenly spaced in row-major order, as one dimension.

    The step is odd, so that over tensors with even sides it visits every row and every channel.
    """
    step = math.ceil(tensor.numel() / LARGEST_SAMPLE)
    return tensor.reshape(-1)[:: step + (step + 1) % 2]


def is_whole(name: str) -> bool:
    """Whether a tensor of a golden file is stored with all its entries."""
    return name.startswith(("state.", "train.")) or name.endswith((".input", ".logits"))


@dataclass(frozen=True)
class GoldenCase:
    """One small model of the official code. `arguments` are its init arguments, `tensors` the file as stored."""

    name: str
    architecture: str
    arguments: dict
    num_inputs: int
    bias_row_stride: int
    tensors: dict[str, torch.Tensor]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Weights by the names of the official code."""
        return {name[6:]: tensor for name, tensor in self.tensors.items() if name.startswith("state.")}

    @property
    def converter(self) -> Converter:
        """How the converter treats the case."""
        return converter_of(self.architecture)

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration as the converter builds it. `vit_baseline` sets gaug and prr to false in its arguments."""
        return self.converter.build_config(self.architecture, self.arguments)

    def input(self, index: int) -> torch.Tensor:
        return self.tensors[f"{index}.input"]

    def error(self, name: str, tensor: torch.Tensor) -> float:
        """The largest absolute difference between a stored tensor and the whole tensor that a test computed."""
        stored = self.tensors[name]
        if not is_whole(name):
            tensor = sample(tensor)
        assert stored.shape == tensor.shape, (name, stored.shape, tensor.shape)
        return (stored - tensor.detach()).abs().max().item()

    def gradient_error(self, name: str, gradient: torch.Tensor) -> float:
        """Norm of the difference of a gradient (reference's name), relative where the norm is not tiny."""
        stored = self.tensors[f"grad.{name}"]
        difference, norm = (stored - sample(gradient)).norm().item(), stored.norm().item()
        return difference if norm < 1e-6 else difference / norm


def converter_of(architecture: str) -> Converter:
    """The converter of a name in the golden files."""
    return next(converter for converter in CONVERTERS if converter.recognize(architecture, {}))


def load_case(name: str) -> GoldenCase:
    """A golden checkpoint, for example one of `VIT_CHECKPOINTS`."""
    record = json.loads((GOLDEN / "checkpoints" / f"{name}.json").read_text())
    family, _, variant = record["kind"].partition("_")
    return GoldenCase(
        name=name,
        architecture="_".join(filter(None, (family, "tiny", variant))),
        arguments=record["args"],
        num_inputs=len(record["inputs"]),
        bias_row_stride=record.get("bias_row_stride", 1),
        tensors=load_file(GOLDEN / "checkpoints" / f"{name}.safetensors"),
    )


def load_models(families: tuple[str, ...] = ("locatvit", "vit")) -> list[dict]:
    """Float64 cases whose architecture begins with one of `families`: dicts with model, kwargs, input, logits_0, ..."""
    models = json.loads((GOLDEN / "locat_golden.json").read_text())["models"]
    return [model for model in models if model["model"].split("_")[0] in families]


def load_modules() -> list[dict]:
    """Cases of the Gaussian alone (with "init") and of the refinement alone (without)."""
    return json.loads((GOLDEN / "locat_golden.json").read_text())["modules"]


def model_input(shape: list[int]) -> torch.Tensor:
    """The float64 input of the cases of `load_models`."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal(shape))


def rule_normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float64 normal numbers that depend on nothing but the name and the shape."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def rule_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float64 weight that the rule of the golden values gives to the reference's tensor `name`."""
    numbers, last = rule_normal(name, shape), name.split(".")[-1]
    if len(shape) == 1 and name.endswith(".weight"):
        return 1 + 0.1 * numbers
    if last in ("gamma", "gamma_1", "gamma_2"):
        return 0.5 + 0.1 * numbers
    if "gaug" in name.split(".") or name == "rope.freqs":
        return 0.5 * numbers
    if last in ("relative_position_bias_table", "cls_token", "reg_token", "pos_embed"):
        return 0.2 * numbers
    if len(shape) >= 2:
        return numbers / math.sqrt(math.prod(shape[1:]))
    return 0.05 * numbers


def rule_weights(table: KeyTable, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Float64 weights by the names of the reference, for the tensors of a key table of `locatvit_hf.conversion`."""
    wanted = source_shapes(table, shapes)
    return {name: torch.from_numpy(rule_weight(name, shape)) for name, shape in wanted.items()}


def load_weights(model: torch.nn.Module, table: KeyTable, state: dict[str, torch.Tensor]) -> None:
    """Loads weights by the names of the reference into one of our models, in its type; every tensor must match."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(rename(state, table, shapes))


def compact(folder: Path, names: list[str]) -> None:
    """Stores the golden files of `folder` here, sampled."""
    (GOLDEN / "checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "locat_golden.json", GOLDEN / "locat_golden.json")
    shutil.copytree(
        folder / "checkpoints" / "hub_layouts",
        GOLDEN / "hub_layouts",
        ignore=shutil.ignore_patterns("*.safetensors"),  # the weights are those of `locatvit`
        dirs_exist_ok=True,
    )
    for name in names:
        tensors = load_file(folder / "checkpoints" / f"{name}.safetensors")
        tensors = {key: tensor if is_whole(key) else sample(tensor).clone() for key, tensor in tensors.items()}
        save_file(tensors, GOLDEN / "checkpoints" / f"{name}.safetensors")
        record = json.loads((folder / "checkpoints" / f"{name}.json").read_text())
        (GOLDEN / "checkpoints" / f"{name}.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    compact(Path(sys.argv[1]), sys.argv[2:])
