"""Checkpoints that are either complete or absent, and interruptions that save first."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

from accelerate import Accelerator
from safetensors import SafetensorError

STEP_DIGITS = 8


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, keep: int, best_step: int | None, texts: dict[str, str]
) -> None:
    """Save what `accelerator` prepared and registered as `folder/step_…`, then drop all but the `keep` newest.

    Args:
        best_step: Of the best evaluation; a checkpoint of that step is kept too.
        texts: What the checkpoint says about its run, by the names of the files.

    Raises:
        OSError: Where it cannot be written, for example on a full disk; earlier checkpoints are left alone then.
    """
    path = folder / f"step_{step:0{STEP_DIGITS}d}"
    temporary = folder / f".partial-{path.name}"
    try:
        if accelerator.is_main_process:
            for leftover in folder.glob(".partial-step_*"):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")
        accelerator.wait_for_everyone()
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
            if old.name != f"step_{best_step or 0:0{STEP_DIGITS}d}":
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """Load what `save_checkpoint` saved. Raises ValueError for a checkpoint of another model, or a damaged one."""
    try:
        accelerator.load_state(str(path))
    except (RuntimeError, ValueError, KeyError, OSError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise ValueError(
            f"Cannot continue from the checkpoint {path}: {reason}. Remove it to continue from the one before, or "
            f"--overwrite the run."
        ) from None
    accelerator.step = 0  # counts the accumulation steps of the current step


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in the order of their steps."""
    return sorted(folder.glob("step_" + "[0-9]" * STEP_DIGITS))


def load_newest(
    accelerator: Accelerator,
    checkpoints: list[Path],
    is_finite: Callable[[], bool],
    report: Callable[[str], None],
    remedy: str,
) -> None:
    """Load the newest checkpoint with finite weights; newer ones, which earlier versions wrote, are set aside.

    Args:
        accelerator: What it prepared and registered is loaded.
        checkpoints: In the order of their steps.
        is_finite: Whether what was loaded is finite.
        report: Called with a sentence for each checkpoint that is set aside.
        remedy: What to start anew with where no checkpoint is finite.

    Raises:
        ValueError: No checkpoint holds finite weights.
    """
    left = list(checkpoints)
    while left:
        load_checkpoint(accelerator, left[-1])
        if is_finite():
            break
        left.pop()
    else:
        raise ValueError(
            f"No checkpoint in {checkpoints[0].parent} holds finite weights: --overwrite the run, with {remedy}."
        )
    for bad in checkpoints[len(left) :]:
        aside = bad.with_name(f"not_finite_{bad.name}")
        report(f"{bad} holds weights that are not finite: it is now {aside.name}, and {left[-1].name} goes on.")
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
    accelerator.wait_for_everyone()


class GracefulShutdown:
    """While open, SIGTERM, SIGUSR1 and the first Ctrl-C set `signal` instead of ending the program.

    SIGTERM comes from a scheduler, SIGUSR1 from one that was asked to warn in time. A second Ctrl-C ends the program.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "GracefulShutdown":
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
