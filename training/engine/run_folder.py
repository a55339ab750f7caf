"""The folder of a run: its settings, which decide whether it may be continued, and its files."""

import dataclasses
import shutil
from pathlib import Path

import yaml
from accelerate import Accelerator

from locatvit_hf.utils.io import atomic_write
from training.engine.arguments import default_values, runtime_options
from training.engine.checkpoints import list_checkpoints
from training.engine.settings import RunArguments

SETTINGS = "arguments.yaml"
RESULTS = "all_results.json"
INTERRUPTED = "interrupted"
"""Launchers have exit codes of their own: a scheduler reads from this empty file that the run wants to go on."""


def stored_settings(arguments: RunArguments) -> str:
    """What makes a run what it is, as YAML: a run that differs in it is another run."""
    left_out = runtime_options(type(arguments)) | {"output_dir"}
    settings = {name: value for name, value in dataclasses.asdict(arguments).items() if name not in left_out}
    return yaml.safe_dump(settings, sort_keys=False)


def open_run_folder(accelerator: Accelerator, arguments: RunArguments) -> Path:
    """The output folder, holding `arguments.yaml`; a folder of another run is refused unless `overwrite`.

    Raises:
        ValueError: The folder cannot be written, or holds a run or a checkpoint with other settings.
    """
    if arguments.output_dir is None:
        raise ValueError("Name a folder for the results with --output_dir.")
    output = Path(arguments.output_dir)
    try:
        if arguments.overwrite and not arguments.dry_run and accelerator.is_main_process:
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
            for name in (RESULTS, SETTINGS):
                (output / name).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        if not arguments.dry_run:
            _refuse_another_run(output, arguments)
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            (output / INTERRUPTED).unlink(missing_ok=True)
            if not arguments.dry_run:
                settings = stored_settings(arguments)
                atomic_write(output / SETTINGS, settings)
    except OSError as error:
        raise ValueError(f"Cannot write to the output folder {output}: {error.strerror}.") from None
    accelerator.wait_for_everyone()
    return output


def _refuse_another_run(output: Path, arguments: RunArguments) -> None:
    """Raises ValueError where the folder holds a run or a checkpoint with other settings."""
    checkpoints = list_checkpoints(output / "checkpoints")
    earlier = [checkpoints[-1] / SETTINGS] if checkpoints else []
    earlier += [output / SETTINGS] if checkpoints or (output / RESULTS).is_file() else []
    new = yaml.safe_load(stored_settings(arguments))
    # A run of an earlier version does not name the options that came later, and ran as their defaults do.
    defaults = {name: value for name, value in default_values(type(arguments)).items() if name in new}
    for file in (file for file in earlier if file.is_file()):
        old = defaults | yaml.safe_load(file.read_text(encoding="utf-8"))
        changed = sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))
        if changed:
            raise ValueError(
                f"{file.parent} holds a run with other settings ({', '.join(changed)}): choose another --output_dir, "
                "or --overwrite it."
            )
