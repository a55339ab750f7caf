"""Finding and reading checkpoints: a local path or a Hub id, in one of the layouts that the reference and timm write.

Nothing in a checkpoint is executed: pickles are read with `weights_only=True`, always.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..configuration_utils_locat import pair
from ..utils.io import load_yaml, one_line, read_json
from .errors import ConversionError
from .safe_pickle import MAX_OPCODES, find_code, has_too_many_opcodes, protocol_of
from .validation import check_type

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
RUN_SUFFIXES = (".pth.tar", ".pth", ".pt")
# The best checkpoint of a run is what was evaluated; the last is what is left where no validation was run.
RUN_FILES = ("model_best.pth.tar", "last.pth.tar")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# The class in which training programs keep their settings, those of args.yaml.
NAMESPACE = "argparse.Namespace"
# What training runs store besides tensors and settings: histories, paths. None of it is needed or imported.
INERT_GLOBALS = (
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Float16", "Int64", "Int32", "Bool", "Str")),
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
)


class Inert:
    """Stands for an object of a pickle that we do not need: it takes any argument and any state, and keeps nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class StoredSettings(Inert):
    """Stands for the settings that a training program stored in a checkpoint: what they are, and no methods."""

    def __setstate__(self, state):
        self.settings = dict(state) if isinstance(state, Mapping) else {}


class SettingsLoader(yaml.SafeLoader):
    """YAML whose tags of Python become plain lists, mappings and texts: nothing is imported and nothing called."""

    def construct_python(self, suffix: str, node: yaml.Node) -> Any:
        """The content of a node with a tag of Python: `!!python/tuple [3, 4]` is a list."""
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node, deep=True)
        return self.construct_scalar(node)


SettingsLoader.add_multi_constructor("tag:yaml.org,2002:python/", SettingsLoader.construct_python)


# Where in a file the weights are, the first that it has; and the moving average of them.
WEIGHT_KEYS, EMA_KEY = ("state_dict", "model"), "state_dict_ema"

Shapes = Mapping[str, tuple[int, ...]]

PREPROCESSING_TYPES = {
    "mean": "a list of numbers",
    "std": "a list of numbers",
    "crop_pct": "a number",
    "crop_mode": "text",
    "interpolation": "text",
    "input_size": "three whole numbers",
    "img_size": "a whole number or two of them",
}
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
# Around the whole model, in any order: distributed training, torch.compile, and timm's models in transformers.
WRAPPERS = ("module.", "_orig_mod.", "timm_model.")
# Setting of timm's and the reference's training programs -> argument of the model.
SETTINGS = {
    "num_classes": "num_classes",
    "gp": "global_pool",
    "in_chans": "in_chans",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "drop_block": "drop_block_rate",
}
RATES = ("drop_rate", "drop_path_rate", "drop_block_rate")
# Entries of config.json with the names of the classes; the second is that of timm's first repositories.
LABEL_NAMES = ("label_names", "labels")
# The `model_type` of timm's models in transformers, whose config.json is timm's.
TIMM_WRAPPER = "timm_wrapper"


@dataclass
class SourceCheckpoint:
    """A checkpoint of other code: what it says about itself, and its tensors, which are read once, when asked for.

    Attributes:
        source: As the user wrote it.
        layout: Of its files, in words.
        weights_file: Where the tensors are.
        architecture: The reference's (or timm's) name, None where the layout stores only arguments.
        arguments: Init arguments of the model, on top of what the name stands for.
        preprocessing: Any of "mean", "std", "crop_pct", "crop_mode", "interpolation" and "size" ([height, width] in
            pixels).
        label_names: Names of the classes in order, or None.
        is_named: Whether something besides the shapes of its tensors says which model it is.
        remarks: Sentences about what it says of itself more than once.
        loaded: What the weights file holds, where it was read already; see `content`.
    """

    source: str
    layout: str
    weights_file: Path
    architecture: str | None
    arguments: dict[str, Any]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] | None = None
    is_named: bool = True
    remarks: list[str] = field(default_factory=list)
    loaded: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def content(self) -> dict[str, Any]:
        """What the weights file holds.

        Raises:
            ConversionError: The file is damaged or holds more than data.
        """
        if self.loaded is None:
            self.loaded = load_tensors(self.weights_file)
        return self.loaded

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name without prefixes around the whole model -> shape of each tensor."""
        wrapped = [self.content[key] for key in (*WEIGHT_KEYS, EMA_KEY) if isinstance(self.content.get(key), Mapping)]
        tensors = without_wrappers(wrapped[0] if wrapped else self.content).items()
        return {name: tuple(tensor.shape) for name, tensor in tensors if isinstance(tensor, torch.Tensor)}


def find(source: str, revision: str | None = None) -> Path:
    """The file or folder of a checkpoint; a Hub id ("owner/name", or "hf-hub:owner/name") is downloaded first."""
    if Path(source).expanduser().exists():
        return Path(source).expanduser()
    repo_id = source.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if not HUB_ID.fullmatch(repo_id):
        raise ConversionError(f"There is no file or folder {source}.")
    try:
        # Safetensors first: the same weights as a pickle need not be downloaded too.
        for patterns in (["*.json", "args.yaml", "*.safetensors"], ["pytorch_model.bin", "*.pth.tar"]):
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
            if any(folder.glob("*.safetensors")):
                break
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(f"There is no file or folder {source}, and no such Hub repository: {reason}") from error
    return folder


def read_checkpoint(path: Path, source: str | None = None) -> SourceCheckpoint:
    """Read the configuration beside the weights at `path`, a file or a folder.

    Args:
        path: See `find`.
        source: As the user wrote it; by default the path.

    Raises:
        ConversionError: No known layout is found.
    """
    source = source or str(path)
    if path.is_file():
        if path.name.endswith(RUN_SUFFIXES) or not (path.parent / "config.json").is_file():
            return _read_run(path, source)
        return _read_configured(path.parent, path, source)
    if (path / "config.json").is_file():
        weights = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not weights:
            raise ConversionError(f"{source} holds config.json but no weights; expected {' or '.join(WEIGHT_FILES)}.")
        return _read_configured(path, weights[0], source)
    checkpoints = sorted(file for file in path.iterdir() if file.name.endswith((*RUN_SUFFIXES, *WEIGHT_FILES)))
    preferred = (*RUN_FILES, *WEIGHT_FILES)
    chosen = [path / name for name in preferred if path / name in checkpoints] or checkpoints
    if not chosen:
        raise ConversionError(f"{source} holds neither config.json with weights nor a training run (*.pth.tar).")
    if chosen[0].name not in preferred and len(chosen) > 1:
        raise ConversionError(f"{source} holds {len(chosen)} checkpoints and no {RUN_FILES[0]}; name one of the files.")
    return _read_run(chosen[0], source)


def _read_configured(folder: Path, weights: Path, source: str) -> SourceCheckpoint:
    """config.json beside the weights: of timm (with "architecture"), or the init arguments of the reference's model."""
    file = folder / "config.json"
    try:
        config = read_json(file)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if not isinstance(config, dict):
        raise ConversionError(f"{file} is not a JSON object.")
    if "model_type" in config and config["model_type"] != TIMM_WRAPPER:
        kind = config["model_type"]
        advice = (
            "it is in our format already" if str(kind).startswith(("loca", "paca")) else "start from it with from_vit"
        )
        raise ConversionError(f"{source} is a transformers checkpoint of model_type {kind!r}: {advice}.")
    # timm's first repositories have the entries of `pretrained_cfg` beside those around it.
    _check_types(file, config, {"model_args": "a mapping", "pretrained_cfg": "a mapping"})
    cfg, arguments = config.get("pretrained_cfg") or config, dict(config.get("model_args") or {})
    architecture = config.get("architecture") or cfg.get("architecture")
    if architecture is None:
        return SourceCheckpoint(source, "init arguments in config.json", weights, None, config)
    for entries in (config, cfg):
        kinds = {"architecture": "text", "num_classes": "a whole number", "global_pool": "text"}
        _check_types(file, entries, {**kinds, **dict.fromkeys(LABEL_NAMES, "a list or a mapping")})
    if config.get("global_pool") is not None:
        arguments.setdefault("global_pool", config["global_pool"])
    num_classes = config.get("num_classes", cfg.get("num_classes"))
    if num_classes is not None:
        arguments.setdefault("num_classes", num_classes)
    preprocessing = _preprocessing(file, cfg)
    size = cfg.get("input_size")
    if size is not None:
        arguments.setdefault("in_chans", size[0])
        if cfg.get("fixed_input_size", True):
            arguments.setdefault("img_size", list(size[1:]))
    given = (entries[name] for entries in (config, cfg) for name in LABEL_NAMES if entries.get(name))
    return SourceCheckpoint(
        source,
        "timm's config.json",
        weights,
        _without_tag(architecture),
        arguments,
        preprocessing,
        _in_order(file, next(given, None)),
    )


def _read_run(weights: Path, source: str) -> SourceCheckpoint:
    """A checkpoint of a training program with its settings, in args.yaml beside it or in itself; or weights alone."""
    file, where, content = weights.parent / "args.yaml", f"training run, {weights.name}", None
    if file.is_file():
        settings = read_settings(file)
    else:
        content = load_tensors(weights)
        stored = content.get("args")
        settings = stored.settings if isinstance(stored, StoredSettings) else {}
        if not settings.get("model"):
            return SourceCheckpoint(source, "weights alone", weights, None, {}, is_named=False, loaded=content)
        file = weights
    kinds = dict.fromkeys(("num_classes", "in_chans"), "a whole number")
    kinds |= dict.fromkeys(("drop", "drop_path", "drop_block"), "a number")
    _check_types(file, settings, {"model": "text", "model_kwargs": "a mapping", "gp": "text", **kinds})
    arguments = dict(settings.get("model_kwargs") or {})
    # `img_size` of the training program sets the loader, not the model: only these and `model_kwargs` reach the model.
    remarks = []
    for setting, argument in SETTINGS.items():
        value = settings.get(setting)
        if value is None or arguments.setdefault(argument, value) == value:
            continue
        given = f"{setting}={value!r} but {argument}={arguments[argument]!r} in model_kwargs"
        if argument not in RATES:
            raise ConversionError(f"{file} gives {given}.")
        remarks.append(f"Took the rate in model_kwargs: {file.name} gives {given}.")
    architecture = _without_tag(settings["model"])
    preprocessing = _preprocessing(file, settings)
    return SourceCheckpoint(
        source, where, weights, architecture, arguments, preprocessing, remarks=remarks, loaded=content
    )


def read_settings(file: Path) -> dict[str, Any]:
    """Read an args.yaml without running what it names.

    Args:
        file: In UTF-8, or in UTF-16 with a byte order mark; tags of Python become plain data.

    Returns:
        Setting -> value, `model` among them.

    Raises:
        ConversionError: It is not valid YAML, or names no model.
    """
    try:
        settings = load_yaml(file.read_bytes(), SettingsLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConversionError(f"{file} is not valid YAML: {one_line(error)}.") from error
    if not isinstance(settings, dict) or not settings.get("model"):
        raise ConversionError(f"{file} does not name a model.")
    return settings


def unnamed(checkpoint: SourceCheckpoint) -> str:
    """Say what to write beside weights whose model nothing names.

    Args:
        checkpoint: Of weights alone.

    Returns:
        The sentence, with the number of classes where the head shows it.
    """
    file, shapes = checkpoint.weights_file, checkpoint.shapes
    head = next((shapes[name] for name in ("head.weight", "head.fc.weight") if name in shapes), None)
    classes = f" and `num_classes: {head[0]}`" if head else ""
    return (
        f"There is no args.yaml beside {file.name} in {file.parent}; without it the model is unknown. "
        f"{'Two lines' if head else 'One line'} in it are enough: `model: vit_tiny_patch16_224`, or what else timm or "
        f"the reference calls the model{classes}."
    )


def _without_tag(architecture: str) -> str:
    """`vit_base_patch16_224` of `timm/vit_base_patch16_224.augreg_in1k`: tags name weights, not models."""
    return str(architecture).split("/")[-1].split(".")[0]


def _check_types(file: Path, settings: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Raises ConversionError for the first setting that is given and not of its kind."""
    for name, kind in kinds.items():
        if settings.get(name) not in (None, ""):
            check_type(f"{file} gives", name, settings[name], kind)


def _in_order(file: Path, names: Any) -> list[str] | None:
    """Names of classes in the order of their ids, from a list or from a mapping of id to name."""
    if isinstance(names, Mapping):
        try:
            names = {int(index): name for index, name in names.items()}
            names = [names[index] for index in range(len(names))]
        except (KeyError, TypeError, ValueError):
            raise ConversionError(f"{file} names its classes by other keys than their ids from 0.") from None
    return [str(name) for name in names] if names else None


def _preprocessing(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `settings`, read from `file`, say about the images. Raises ConversionError for a value of a wrong kind."""
    _check_types(file, settings, PREPROCESSING_TYPES)
    found = {name: settings.get(name) for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}
    size, side = settings.get("input_size"), settings.get("img_size")
    if size or side:
        found["size"] = sides = list(size[1:] if size else pair(side))
        if min(sides) <= 0:
            raise ConversionError(f"{file} gives images of {sides} pixels, which must be positive.")
    if found["interpolation"] and found["interpolation"] not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        raise ConversionError(f"{file} gives the unknown interpolation={found['interpolation']!r}; known are {known}.")
    return {name: value for name, value in found.items() if value not in (None, "", [])}


def read_state(checkpoint: SourceCheckpoint, ema: bool = False) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a checkpoint, and in words where in the file they were.

    Args:
        checkpoint: See `read_checkpoint`.
        ema: Take the moving average of a training run.

    Raises:
        ConversionError: The file does not have them, is damaged, or holds something that is not data.
    """
    file = checkpoint.weights_file
    content = checkpoint.content
    available = [key for key in (*WEIGHT_KEYS, EMA_KEY) if isinstance(content.get(key), Mapping)]
    wanted = [key for key in available if (key == EMA_KEY) == ema]
    if wanted:
        state, where = content[wanted[0]], wanted[0]
    elif ema:
        raise ConversionError(f"{file.name} holds no state_dict_ema.")
    elif available:
        raise ConversionError(f"{file.name} holds no state_dict, but a state_dict_ema: pass --ema to take it.")
    else:
        state, where = content, "all"
    strange = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if strange or not state:
        problem = f"{strange[0]} is not a tensor" if strange else "it is empty"
        raise ConversionError(f"{file.name} holds no state dict: {problem}.")
    return without_wrappers(state), where


def without_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the prefixes that every one of its names carries; see `WRAPPERS`."""
    state = dict(state)
    while state and (prefix := next((p for p in WRAPPERS if all(str(name).startswith(p) for name in state)), None)):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def load_tensors(file: Path) -> dict[str, Any]:
    """A safetensors file, or a pickle of tensors and plain data. No code of the pickle is run, whatever it asks for."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise ConversionError(f"{file.name} is damaged or incomplete: {_first_line(error)}.") from error
    if has_too_many_opcodes(file):
        raise ConversionError(
            f"{file.name} is refused: its pickle has more than MAX_OPCODES = {MAX_OPCODES:,} opcodes."
        )
    try:
        known = [(StoredSettings, NAMESPACE), *((Inert, name) for name in INERT_GLOBALS)]
        with warnings.catch_warnings(), torch.serialization.safe_globals(known):
            warnings.simplefilter("ignore")  # about pickles of another protocol, which are refused below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damaged byte led to, and advises to run the code
        raise ConversionError(_why_refused(file, error)) from error
    if not isinstance(content, Mapping):
        raise ConversionError(f"{file.name} holds no state dict but a {type(content).__name__}.")
    return dict(content)


def _why_refused(file: Path, error: Exception) -> str:
    """One sentence of ours for what torch said about a pickle."""
    code, protocol = find_code(file, (NAMESPACE, *INERT_GLOBALS)), protocol_of(file)
    if code is not None:
        return f"{file.name} is refused: its pickle asks for {code}, which is code and not data."
    if "unrecognized function" in str(error):
        return f"{file.name} is refused: its pickle calls an object, which is code."
    if "Unsupported operand" in str(error) and protocol > 2:
        return (
            f"{file.name} is a pickle of protocol {protocol}, of which PyTorch reads only 2 safely; save it with that."
        )
    return f"{file.name} is damaged or no checkpoint of PyTorch."


def _first_line(error: Exception) -> str:
    """What went wrong; only the kind of error where its message is empty or a bare value."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines and " " in lines[0] else type(error).__name__


__all__ = ["Inert", "SourceCheckpoint", "find", "load_tensors", "read_checkpoint", "read_state", "unnamed"]
