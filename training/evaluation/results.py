"""What the programs of this folder share: their settings, their processes, and the file that each of them writes."""

import contextlib
import dataclasses
import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from huggingface_hub.dataclasses import strict
from torch import nn

from locatvit_hf.utils.console import hide_credentials
from locatvit_hf.utils.io import sha256, write_json
from training.data import load_splits
from training.data.loading import Split
from training.engine.arguments import console, option, public_settings
from training.engine.distributed import create_processes
from training.engine.resuming import program_of
from training.engine.settings import DataArguments

LIBRARIES = ("locatvit-hf", "torch", "torchvision", "transformers", "datasets", "timm", "faiss-cpu", "faiss-gpu")


@strict
@dataclass(kw_only=True)
class EvaluationArguments(DataArguments):
    """Settings of every evaluation."""

    pretrained: str | None = option(None, "Folder or Hub name of the model.")
    output_dir: str | None = option(None, "Receives the result, a JSON file.")
    eval_batch_size: int = option(64, "Images that a process puts through the model at once.", least=1)
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "Compute in half precision where that is safe.")
    seed: int = option(0, "Seed of everything that is drawn: weights, order, augmentation, dropout.")


def start_evaluation(arguments: EvaluationArguments) -> Accelerator:
    """The processes and devices that `accelerate launch` gives, and an output folder that can be written.

    Raises:
        ValueError: Where it cannot, or no model is named.
    """
    if arguments.pretrained is None:
        raise ValueError("Name the model to evaluate with --pretrained: a folder or a Hub name.")
    if arguments.output_dir is None:
        raise ValueError("Name a folder for the results with --output_dir.")
    accelerator = create_processes(mixed_precision=arguments.mixed_precision)
    try:
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"Cannot write to the output folder {arguments.output_dir}: {error.strerror}.") from None
    return accelerator


def load_validation(arguments: EvaluationArguments, segmentation: bool = False) -> tuple[Split, list[str] | None]:
    """The validation split and the names of its classes. There need not be a training split."""
    if arguments.validation_share is None:
        split, limit = arguments.validation_split, arguments.max_validation_samples
        arguments = dataclasses.replace(arguments, train_split=split, max_train_samples=limit)
    splits = load_splits(arguments, segmentation, evaluation=True)
    return splits.validation, splits.label_names


def tell(accelerator: Accelerator, sentence: str) -> None:
    """Print a warning, from one process."""
    if accelerator.is_main_process:
        console.print(sentence, markup=False, style="yellow")


class Meter:
    """Images a second over all processes, and the most memory that one of them held."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.images, self.seconds = accelerator, 0, 0.0

    @contextlib.contextmanager
    def measure(self) -> Iterator["Meter"]:
        """Times this block, in which the images of `counted` are gone through."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)
        began = time.perf_counter()
        yield self
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        self.seconds += time.perf_counter() - began

    def counted(self, loader: Iterable) -> Iterator[Any]:
        """The batches of a loader, (images, labels, …); their images are counted."""
        for batch in loader:
            yield batch
            self.images += len(batch[1])

    def report(self) -> dict[str, Any]:
        """`images_per_second`, by the slowest process, and `peak_memory_bytes`, the same in all processes.

        Of a CUDA device what torch allocated on it, otherwise what the process held since it started (resident).
        """
        device, processor = self.accelerator.device, platform.processor() or platform.machine()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()
        mine = torch.tensor([self.images, self.seconds, peak or 0], dtype=torch.float64)
        mine = mine.float() if device.type == "mps" else mine
        everyone = self.accelerator.gather(mine.to(device)[None]).cpu()
        return {
            "images_per_second": (everyone[:, 0].sum() / everyone[:, 1].max().clamp(min=1e-9)).item(),
            "peak_memory_bytes": int(everyone[:, 2].max()) or None,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {processor}",
            "num_processes": self.accelerator.num_processes,
        }


def resident_peak() -> int | None:
    """Bytes of memory that this process held at most; None where the system does not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_result(
    meter: Meter, arguments: Any, metrics: dict[str, Any], model: nn.Module, **details: Any
) -> dict[str, Any]:
    """Write `PROGRAM.json` into the output folder, atomically and from one process, print it, and return its content.

    Its entries: `task`, `dataset`, `dataset_config`, `split`, `metrics` (name to number, or to numbers by class),
    `model` (as it was named), `model_type`, `model_hash`, `parameters`, `images_per_second`, `peak_memory_bytes`,
    `device`, `num_processes`, `settings` (all of the program), `versions`, `date` (UTC), and `details`, which win.

    Raises:
        OSError: Where it cannot be written; an earlier file stays then.
    """
    result = {
        "task": program_of(arguments),
        "dataset": hide_credentials(arguments.dataset),
        "dataset_config": arguments.dataset_config,
        "split": arguments.validation_split,
        "metrics": metrics,
        "model": arguments.pretrained,
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "model_hash": model_hash(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **meter.report(),
        **details,
        "settings": public_settings(arguments),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if meter.accelerator.is_main_process:
        path = Path(arguments.output_dir) / f"{result['task']}.json"
        write_json(path, result)
        scalars = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        console.print(", ".join(f"{name} {value:.4f}" for name, value in scalars.items()), markup=False)
        memory = f"{(result['peak_memory_bytes'] or 0) / 2**20:,.0f} MiB"
        console.print(f"{result['images_per_second']:.1f} images a second, {memory}. Result in {path}.", markup=False)
    meter.accelerator.wait_for_everyone()
    return result


def model_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of all tensors: of the weights, however they were stored."""
    return sha256(_pieces(model.state_dict()))


def _pieces(state: dict[str, torch.Tensor]) -> Iterator[bytes]:
    for name, tensor in sorted(state.items()):
        tensor = tensor.detach().cpu().contiguous()
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found
