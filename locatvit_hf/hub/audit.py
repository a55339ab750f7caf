"""`locatvit info`: what is in a checkpoint, found by reading. Nothing of it is imported, unpickled or run."""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

import huggingface_hub
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

import locatvit_hf

from ..configuration_utils_locat import FamilyConfigMixin
from ..image_processing_locatvit import LocAtViTImageProcessor, LocAtViTImageProcessorKwargs
from ..utils.io import one_line, sha256
from ..utils.registry import FAMILIES, PACKAGE
from .card.fields import CARD_FILE
from .config import IMPLEMENTATIONS, RepositoryError, build_config, family_config, model_class, read_object
from .hub_api import HubError, read_snapshot, with_retries
from .repository import (
    CHECKSUMS,
    INDEX,
    PICKLES,
    PROCESSOR_MAP,
    WEIGHTS,
    read_checksums,
)

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
EXPECTED = {CONFIG, PROCESSOR, INDEX, CHECKSUMS, CARD_FILE, "README.md", "LICENSE", ".gitattributes"}
# Suffixes of what people look at or read.
HARMLESS = (".md", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".yaml", ".yml", ".txt", ".json")
# Machine code and compiled Python.
EXECUTABLE = (".so", ".pyd", ".pyc", ".dll", ".dylib", ".exe")
# Files that transformers reads before those shown here, or that lead it to another checkpoint.
REDIRECTING = {"processor_config.json", "adapter_config.json"}
# Folders that git and huggingface_hub keep beside a download: nothing loads their content, so it is counted alone.
OTHERS = {".git", ".cache"}
# Settings that make transformers fetch code from elsewhere.
FOREIGN = ("custom_pipelines", *IMPLEMENTATIONS)
# What transformers writes into a config.json beside the fields of its class, or reads there under an older name.
SETTINGS_OF_THE_LIBRARY = {"auto_map", "torch_dtype", "transformers_version", "num_labels", "_commit_hash"}
SETTINGS_OF_THE_PROCESSOR = {"auto_map", "image_processor_type", "processor_class", "feature_extractor_type"}
# Larger files than these are not text that a person would read.
LARGEST_TEXT = 4 << 20
LARGEST_HEADER = 100 << 20
GPU_KERNEL = "triton_locat.py"
"""What it computes runs on a GPU with Triton alone."""


@dataclass(frozen=True)
class CheckpointFile:
    """A file of a checkpoint.

    Attributes:
        path: Relative to the checkpoint, with `/` between folders.
        size: In bytes.
        sha256: Where known.
        verdict: What it is, in a few words.
        level: "fine", "note" for a file that is not expected, or "alarm" where running or loading it may do something
            else than what this package does.
        lines: Of code.
    """

    path: str
    size: int
    sha256: str | None
    verdict: str
    level: str = "fine"
    lines: int = 0


@dataclass
class Inspection:
    """What a checkpoint holds. `alarms` are the sentences that a person must read before its code runs."""

    name: str
    release: str
    commit: str | None = None
    family: str | None = None
    architecture: str | None = None
    image_size: Any = None
    patch_size: Any = None
    labels: int | None = None
    parameters: int | None = None
    expected_parameters: int | None = None
    gmacs: float | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    files: list[CheckpointFile] = field(default_factory=list)
    diffs: dict[str, str] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def code(self, but: Collection[str] = ()) -> tuple[int, int]:
        """How many files of code it carries, and how many lines they are together. but: files that do not count."""
        lines = [file.lines for file in self.files if file.path.endswith(".py") and file.path not in but]
        return len(lines), sum(lines)


class Folder:
    """A checkpoint here."""

    commit = None

    def __init__(self, folder: Path):
        self.folder = folder
        self.sizes, self.remarks = dict[str, int](), list[str]()
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_dir() and path.is_symlink():
                self.remarks.append(f"{name.as_posix()} is a link to a folder, which is not looked at.")
            elif path.is_file() and name.parts[0] not in OTHERS:
                self.sizes[name.as_posix()] = path.stat().st_size
        for hidden in sorted(OTHERS):
            if count := sum(path.is_file() for path in (folder / hidden).rglob("*")):
                self.remarks.append(f"The hidden folder {hidden} holds {count:,} files, which are not looked at.")

    def path(self, name: str) -> Path:
        """Where the content of a file is."""
        return self.folder / name

    def sha256(self, name: str) -> str | None:
        return sha256(self.path(name))

    def header(self, name: str) -> dict[str, Any]:
        """The tensors that a safetensors file says it holds. Raises ValueError where that is not what it holds."""
        with self.path(name).open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(LARGEST_HEADER, self.sizes[name] - 8):
                raise ValueError("it has no header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        check_tensors(header, self.sizes[name] - 8 - length)
        return header


class Remote:
    """A checkpoint on the Hub, of which the text is downloaded into the cache, and the weights are not."""

    def __init__(self, repository: str, revision: str | None, report: Callable[[str], None]):
        self.snapshot = read_snapshot(repository, revision, report)
        self.report = report
        self.commit = self.snapshot.commit
        self.sizes = {name: file.size for name, file in sorted(self.snapshot.files.items())}
        self.remarks: list[str] = []

    def path(self, name: str) -> Path:
        repository = self.snapshot.repository
        return Path(
            with_retries(
                lambda: huggingface_hub.hf_hub_download(repository, name, revision=self.commit), repository, self.report
            )
        )

    def sha256(self, name: str) -> str | None:
        """The Hub knows it of a large file; what is small is downloaded for it."""
        file = self.snapshot.files[name]
        return file.sha256 or (sha256(self.path(name)) if file.size <= LARGEST_TEXT else None)

    def header(self, name: str) -> dict[str, Any]:
        repository = self.snapshot.repository
        found = with_retries(
            lambda: huggingface_hub.HfApi().parse_safetensors_file_metadata(repository, name, revision=self.commit),
            repository,
            self.report,
        )
        tensors = {
            key: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
            for key, tensor in found.tensors.items()
        }
        check_tensors(tensors, self.sizes[name], exactly=False)
        return tensors


def check_tensors(tensors: dict[str, Any], size: int, exactly: bool = True) -> None:
    """Whether tensors lie one after the other in their file, each as long as its shape says.

    Args:
        tensors: By name, each with `dtype`, `shape` and `data_offsets`, as the header of the file says.
        size: Bytes of the file behind its header.
        exactly: The tensors fill the file; otherwise they may be shorter.

    Raises:
        ValueError: They do not; the message names the first that does not.
    """
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda entry: entry[1]["data_offsets"]):
        shape, (start, stop) = tensor["shape"], tensor["data_offsets"]
        bits = 8 if tensor["dtype"] == "BOOL" else int(re.search(r"\d+", tensor["dtype"])[0])  # type: ignore[index]
        if start != end or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"the tensor {name} does not follow the one before it")
        if (stop - start) * 8 != prod(shape) * bits:
            raise ValueError(f"the tensor {name} has {stop - start:,} bytes, not those of its shape {list(shape)}")
        end = stop
    if end > size or (exactly and end < size):
        raise ValueError(f"it holds {size:,} bytes of tensors, and its header says {end:,}")


def inspect(name: str, revision: str | None = None, report: Callable[[str], None] = lambda line: None) -> Inspection:
    """Read a checkpoint, and compare it with the installed release.

    Args:
        name: A folder or a Hub id.
        revision: A branch, tag or commit of the Hub repository.
        report: Called with a line before each wait for the Hub.

    Raises:
        RepositoryError: It is not a checkpoint of this package.
        HubError: The Hub refuses.
    """
    folder = Path(name)
    if folder.exists() and not (folder / CONFIG).is_file():
        raise RepositoryError(f"{name} is not a checkpoint: it is not a folder with a {CONFIG}.")
    source = Folder(folder) if folder.exists() else Remote(name, revision, report)
    if CONFIG not in source.sizes:
        raise RepositoryError(f"{name} is not a checkpoint: it has no {CONFIG}.")
    content = read_object(source.path(CONFIG))
    found = Inspection(name, locatvit_hf.__version__, commit=source.commit)
    config = build_config(content, name)
    _describe_model(found, config, name)
    found.notes += source.remarks
    _check_maps(found, source, content, config)
    _check_settings(found, source, content, config)
    loaded = _loaded_weights(found, source, content)
    _read_weights(found, source, loaded)
    _compare_files(found, source)
    if found.parameters and found.parameters != found.expected_parameters:
        found.notes.append(
            f"The weights hold {found.parameters:,} numbers, and the model needs {found.expected_parameters:,}."
        )
    return found


def _describe_model(found: Inspection, config: PreTrainedConfig, name: str) -> None:
    """What the configuration says, by the installed class, built without memory."""
    ours, built = family_config(config), model_class(config, name)
    found.family, found.architecture, found.labels = ours.model_type, built.__name__, config.num_labels
    found.image_size, found.patch_size = ours.image_size, getattr(ours, "patch_size", None)
    height, width = (ours.image_size,) * 2 if isinstance(ours.image_size, int) else ours.image_size
    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = built(config).eval()
            model(torch.empty(1, ours.num_channels, height, width))
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise RepositoryError(f"The config.json of {name} describes no model that can be built.") from error
    # Buffers of a batch norm are saved too.
    found.expected_parameters = sum(tensor.numel() for tensor in model.state_dict().values())
    found.gmacs = counter.get_total_flops() / 2e9


def _check_maps(found: Inspection, source: Folder | Remote, content: dict[str, Any], config: PreTrainedConfig) -> None:
    """What `trust_remote_code=True` would import: classes by another name than ours are an alarm."""
    expected = FAMILIES[config.model_type].auto_map if isinstance(config, FamilyConfigMixin) else {}
    maps = {CONFIG: (content, expected)}
    if PROCESSOR in source.sizes:
        maps[PROCESSOR] = (read_object(source.path(PROCESSOR)), PROCESSOR_MAP)
    for file, (settings, known) in maps.items():
        auto_map = settings.get("auto_map") or {}
        for auto_class, target in auto_map.items() if isinstance(auto_map, dict) else [("auto_map", auto_map)]:
            if known.get(auto_class) != target:
                found.alarms.append(f"{file} makes {auto_class} load {target}, which is not a class of this package.")
            elif f"{target.partition('.')[0]}.py" not in source.sizes:
                found.notes.append(f"{file} makes {auto_class} load {target}, whose file is missing.")
        foreign = _find_keys({**settings, "auto_map": None}, {"auto_map", *FOREIGN})
        found.alarms += [f"{file} sets {key}, which can make transformers run code from elsewhere." for key in foreign]
    for file, size in source.sizes.items():
        if PurePosixPath(file).name in REDIRECTING:
            found.alarms.append(f"{file} makes transformers load something else than what is shown here.")
        elif file.endswith(".json") and file not in maps and size <= LARGEST_TEXT:
            try:
                foreign = _find_keys(json.loads(source.path(file).read_text(encoding="utf-8")), {"auto_map", *FOREIGN})
            except (ValueError, RecursionError):
                continue  # no library can read it either
            found.alarms += [f"{file} sets {key}, which can make transformers run foreign code." for key in foreign]


def _check_settings(
    found: Inspection, source: Folder | Remote, content: dict[str, Any], config: PreTrainedConfig
) -> None:
    """Settings that no class of this package has: transformers may act on them, and other programs."""
    parts = {CONFIG: (content, config)}
    if not isinstance(config, FamilyConfigMixin):
        parts[f"The backbone_config of {CONFIG}"] = content["backbone_config"], config.backbone_config
    for where, (settings, built) in parts.items():
        known = {field.name for field in fields(built)} | type(built)().to_dict().keys() | SETTINGS_OF_THE_LIBRARY
        found.alarms += [
            f"{where} sets {name}, which is no setting of {type(built).__name__}: transformers may act on it."
            for name in sorted(settings.keys() - known - set(FOREIGN) - {"transformers_weights"})
        ]
    if PROCESSOR in source.sizes:
        settings = read_object(source.path(PROCESSOR))
        known = LocAtViTImageProcessor().to_dict().keys() | get_type_hints(LocAtViTImageProcessorKwargs).keys()
        found.alarms += [
            f"{PROCESSOR} sets {name}, which is no setting of LocAtViTImageProcessor: transformers may act on it."
            for name in sorted(settings.keys() - known - SETTINGS_OF_THE_PROCESSOR - set(FOREIGN))
        ]


def _loaded_weights(found: Inspection, source: Folder | Remote, content: dict[str, Any]) -> list[str]:
    """The files of weights that transformers loads, in the order in which it looks for them."""
    chosen = content.get("transformers_weights")
    if chosen is not None:
        found.alarms.append(f"{CONFIG} makes transformers load {chosen} in place of {WEIGHTS}.")
        index = chosen if str(chosen).endswith(".index.json") else None
        files = [] if index else [chosen]
    else:
        files = [WEIGHTS] if WEIGHTS in source.sizes else []
        index = INDEX if not files and INDEX in source.sizes else None
    if index in source.sizes:
        shards = read_object(source.path(index)).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise RepositoryError(f"{index} of {found.name} is damaged: it names no file for each tensor.")
        files = sorted(set(shards.values()))
    missing = [str(file) for file in [*files, *([index] if index else [])] if file not in source.sizes]
    if missing:
        named = CONFIG if chosen is not None and missing[-1] == chosen else index
        raise RepositoryError(f"{named} of {found.name} names the weights {', '.join(missing)}, which are not there.")
    pickled = [name for name in source.sizes if name.endswith(".bin.index.json")]
    found.alarms += [f"{name} makes transformers load pickles, which can run code." for name in pickled]
    return files


def _find_keys(content: Any, names: set[str]) -> list[str]:
    """Which of the names are keys with a value anywhere in JSON content, each once."""
    found, waiting = [], [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            found += [name for name, value in part.items() if name in names and value and name not in found]
        waiting += list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else []
    return found


def _read_weights(found: Inspection, source: Folder | Remote, loaded: list[str]) -> None:
    """Parameters and dtypes of the files that are loaded, from the headers alone; the others are checked too."""
    dtypes: Counter[str] = Counter()
    for name in [name for name in source.sizes if name.endswith(".safetensors")]:
        try:
            for tensor in source.header(name).values():
                dtypes[tensor["dtype"]] += prod(tensor["shape"]) if name in loaded else 0
        except HubError:
            raise
        except Exception as error:  # whatever a damaged header leads to
            reason = one_line(error) if type(error) is ValueError else "its header is none"
            raise RepositoryError(f"{name} of {found.name} is damaged: {reason}.") from error
        if name not in loaded:
            found.notes.append(f"{name} holds weights that transformers does not load.")
    found.dtypes = {name: count for name, count in dtypes.items() if count}
    found.parameters = sum(dtypes.values())
    if not found.parameters:
        found.notes.append(f"There are no weights in safetensors ({WEIGHTS}).")


def _compare_files(found: Inspection, source: Folder | Remote) -> None:
    """A verdict on each file: code is compared with the installed release, the rest with the recorded checksums."""
    recorded = {}
    if CHECKSUMS in source.sizes and source.sizes[CHECKSUMS] <= LARGEST_TEXT:
        recorded = read_checksums(source.path(CHECKSUMS).read_text(encoding="utf-8", errors="replace"))
    else:
        found.notes.append(f"It has no {CHECKSUMS}, so nothing says whether its weights are those that were published.")
    for name, size in source.sizes.items():
        digest = source.sha256(name)
        verdict, level = _judge(found, source, name, size)
        if name in recorded and digest is not None and digest != recorded[name]:
            verdict, level = f"{verdict}; NOT WHAT {CHECKSUMS} RECORDS", "alarm"
            found.alarms.append(f"{name} is not what was published: its SHA-256 differs from {CHECKSUMS}.")
        elif verdict == "weights" and name in recorded:
            verdict = "weights, as recorded" if digest is not None else "weights, too large to compare from here"
        elif verdict == "weights" and recorded:
            verdict, level = f"weights that {CHECKSUMS} DOES NOT RECORD", "alarm"
            found.alarms.append(f"{name} is not among the files that {CHECKSUMS} records.")
        is_code = name.endswith(".py") and size <= LARGEST_TEXT
        lines = len(source.path(name).read_bytes().splitlines()) if is_code else 0
        found.files.append(CheckpointFile(name, size, digest, verdict, level, lines))
    gone = sorted(set(recorded) - set(source.sizes))
    found.alarms += [f"{name} is recorded in {CHECKSUMS} and is not there." for name in gone]


def _judge(found: Inspection, source: Folder | Remote, name: str, size: int) -> tuple[str, str]:
    """What a file is, and how bad that is; see CheckpointFile."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".py":
        return _judge_code(found, source, name, size)
    if suffix in PICKLES:
        found.alarms.append(f"{name} is a pickle, which can run code when it is loaded.")
        return "PICKLE: loading it can run code", "alarm"
    if suffix in EXECUTABLE:
        found.alarms.append(f"{name} is compiled code.")
        return "COMPILED CODE", "alarm"
    if PurePosixPath(name).name in REDIRECTING:
        return "LEADS ELSEWHERE", "alarm"
    if suffix == ".safetensors" and "/" not in name:
        return "weights", "fine"
    if name in EXPECTED or name.startswith(".eval_results/"):
        return "expected", "fine"
    if suffix in HARMLESS:
        return "not needed by the model", "fine"
    found.notes.append(f"{name} is a file that nobody expects in a checkpoint.")
    return "unexpected", "note"


def _judge_code(found: Inspection, source: Folder | Remote, name: str, size: int) -> tuple[str, str]:
    release = f"locatvit-hf {found.release}"
    installed = PACKAGE / name
    if "/" in name or name == "__init__.py" or not installed.is_file():
        found.alarms.append(f"{name} is code that is not of this package.")
        return "UNKNOWN CODE", "alarm"
    if size > LARGEST_TEXT:
        found.alarms.append(f"{name} is not that of {release}, and much larger.")
        return f"CHANGED against {release}", "alarm"
    ours, theirs = installed.read_bytes(), source.path(name).read_bytes()
    if ours == theirs:
        return f"identical to {release}", "fine"
    found.alarms.append(f"{name} differs from that of {release}.")
    before, after = (text.decode("utf-8", errors="backslashreplace").split("\n") for text in (ours, theirs))
    lines = difflib.unified_diff(before, after, f"{release}/{name}", f"{found.name}/{name}", lineterm="")
    found.diffs[name] = "\n".join(lines)
    return f"CHANGED against {release}", "alarm"


__all__ = ["GPU_KERNEL", "CheckpointFile", "Inspection", "inspect"]
