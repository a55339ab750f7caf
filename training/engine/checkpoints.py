"""Checkpoints that are whole or absent, also after a power failure, and hold data that is never run as code."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from locatvit_hf.utils.io import durable_rename, make_folder, one_line, read_json, remove, sha256
from training.engine.progress import RunState

STEP_DIGITS = 8
MANIFEST = "manifest.json"
"""Size and SHA-256 of every other file of a checkpoint."""
RUN_STATE = "run_state.json"


class Checkpoints:
    """The checkpoints of a run, `folder/step_…`.

    They keep what the accelerator prepared, the state of the run as JSON, and further weights as safetensors. Nothing
    in them is run when they are loaded; of what DeepSpeed writes, its own loader decides.

    Args:
        accelerator: Saves and loads what it prepared, in all processes.
        folder: Of the checkpoints.
        state: Of the run.
        holders: Objects with `state_dict` and `load_state_dict` of named tensors, such as averaged weights, by the
            names of their files.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, state: RunState, holders: Mapping[str, Any]):
        self.accelerator, self.folder, self.state, self.holders = accelerator, folder, state, holders

    def save(self, keep: int, texts: Mapping[str, str]) -> None:
        """Save the step that was just done, then drop all but the `keep` newest checkpoints and the best one.

        Args:
            keep: Number of the newest to keep.
            texts: What the checkpoint says about its run, by the names of the files.

        Raises:
            OSError: It cannot be written, for example on a full disk; earlier checkpoints are left alone then.
        """
        accelerator, path = self.accelerator, self.folder / _name(self.state.step)
        partial = path.with_name(f".partial-{broadcast_object_list([os.getpid()])[0]}-{path.name}")
        states = {name: holder.state_dict() for name, holder in self.holders.items()}
        try:
            if accelerator.is_main_process:
                for leftover in self.folder.glob(".*step_*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                make_folder(self.folder)
                partial.mkdir()
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                for name, text in {**texts, RUN_STATE: self.state.to_json()}.items():
                    (partial / name).write_text(text, encoding="utf-8")
                for name, tensors in states.items():
                    # Of its own storage each, as safetensors wants them.
                    own = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
                    save_file(own, partial / f"{name}.safetensors")
                write_manifest(partial)
                durable_rename(partial, path)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            # The zip writer of torch and safetensors report a full disk as errors of their own.
            raise OSError(f"Cannot write the checkpoint {path}: {error}") from None
        if accelerator.is_main_process:
            for old in list_checkpoints(self.folder)[:-keep]:
                if old.name != _name(self.state.best_step or 0):
                    remove(old)
        accelerator.wait_for_everyone()

    def load_newest(self, is_finite: Callable[[], bool], report: Callable[[str], None], remedy: str) -> None:
        """Load the newest checkpoint with finite weights; newer ones, which earlier versions wrote, are set aside.

        Args:
            is_finite: Whether what was loaded is finite.
            report: Called with a sentence for each checkpoint that is set aside.
            remedy: What to start anew with where no checkpoint is finite.

        Raises:
            ValueError: A checkpoint is of another model, or none holds finite weights.
        """
        checkpoints, bad = list_checkpoints(self.folder), list[Path]()
        for path in reversed(checkpoints):
            self._load(path)
            if is_finite():
                break
            bad.append(path)
        else:
            raise ValueError(
                f"No checkpoint in {self.folder} holds finite weights: --overwrite the run, with {remedy}."
            )
        for other in bad:
            report(
                f"{other} holds weights that are not finite: it is now not_finite_{other.name}; {path.name} goes on."
            )
            self._set_aside(other, "not_finite")

    def drop_damaged(self, report: Callable[[str], None]) -> None:
        """Set the newest checkpoints aside until one fits its manifest.

        Args:
            report: Called with a sentence for each of them.

        Raises:
            ValueError: The newest was written by a version whose checkpoints have no manifest.
        """
        for path in reversed(_folders(self.folder)):
            if not (path / MANIFEST).exists() and any(path.glob("custom_checkpoint_*.pkl")):
                raise ValueError(
                    f"{path} was written by an earlier version, in files that could run code when they are loaded: "
                    "continue with that version, or --overwrite the run."
                )
            # One process reads the files, and all are told.
            found = [find_damage(path) if self.accelerator.is_main_process else None]
            (damage,) = broadcast_object_list(found)
            if damage is None:
                return
            report(f"{path} is damaged ({damage}): it is now damaged_{path.name}, and the one before is used.")
            self._set_aside(path, "damaged")

    def _set_aside(self, path: Path, reason: str) -> None:
        if self.accelerator.is_main_process:
            aside = path.with_name(f"{reason}_{path.name}")
            remove(aside)
            path.rename(aside)
        self.accelerator.wait_for_everyone()

    def _load(self, path: Path) -> None:
        """Raises ValueError for a checkpoint of another model."""
        try:
            self.accelerator.load_state(str(path))
            self.state.load_json((path / RUN_STATE).read_text(encoding="utf-8"))
            for name, holder in self.holders.items():
                holder.load_state_dict(load_file(path / f"{name}.safetensors"))
        except (RuntimeError, ValueError, KeyError, OSError, EOFError, SafetensorError, UnpicklingError) as error:
            reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
            raise ValueError(
                f"Cannot continue from the checkpoint {path}: {reason}. Remove it to continue from the one before, or "
                f"--overwrite the run."
            ) from None
        self.accelerator.step = 0  # counts the accumulation steps of the current step


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints whose files are there with the sizes that they were written with, in the order of their steps."""
    return [path for path in _folders(folder) if find_damage(path, of=()) is None]


def write_manifest(path: Path) -> None:
    """Write down what the files of a checkpoint are."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)
    described = {
        file.relative_to(path).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)} for file in files
    }
    (path / MANIFEST).write_text(json.dumps({"files": described}, indent=1), encoding="utf-8")


def find_damage(path: Path, of: Iterable[str] | None = None) -> str | None:
    """What does not fit the manifest of a checkpoint, None where all fits.

    Args:
        path: The folder.
        of: Files whose content is compared; by default all. Sizes always are.
    """
    try:
        files = read_json(path / MANIFEST)["files"]
        for name, noted in files.items():
            size = (path / name).stat().st_size
            if size != noted["size"]:
                return f"{name} has {size} bytes and had {noted['size']}"
        for name in files if of is None else of:
            if sha256(path / name) != files[name]["sha256"]:
                return f"{name} has another content than was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read: {one_line(error)}"
    return None


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_" + "[0-9]" * STEP_DIGITS))


def _name(step: int) -> str:
    return f"step_{step:0{STEP_DIGITS}d}"
