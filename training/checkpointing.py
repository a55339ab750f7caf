"""Checkpoints that are either complete or absent, and interruptions that save first."""

import contextlib
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

STEP_DIGITS = 8


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to fill; it takes that name when the block ends well and vanishes when not.

    A folder that stands at `path` stays until the new one is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
    finally:
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write atomically; numbers that JSON does not know (nan) become null."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(_without_nan(content), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Save what `accelerator` prepared and registered as `folder/step_…`, then drop all but the `keep` newest.

    Raises OSError where it cannot be written, for example on a full disk; earlier checkpoints are left alone then.
    """
    path = folder / f"step_{step:0{STEP_DIGITS}d}"
    temporary = folder / f".{path.name}.part"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # The zip writer of torch and safetensors report a full disk as errors of their own.
        raise OSError(f"Cannot write the checkpoint {path}: {error}") from None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in the order of their steps."""
    return sorted(folder.glob("step_" + "[0-9]" * STEP_DIGITS))


class Interruption:
    """While open, SIGTERM and the first Ctrl-C set `signal` instead of ending the program; a second Ctrl-C ends it."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "Interruption":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
