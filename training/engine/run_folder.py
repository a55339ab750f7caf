"""The folder of a run: its settings, which decide whether it may be continued, and its files."""

import contextlib
from functools import partial
from pathlib import Path

import yaml
from accelerate import Accelerator

from locatvit_hf.utils.io import atomic_write, claim_folder, load_yaml, remove
from training.engine.arguments import console, default_values, public_settings, runtime_options
from training.engine.checkpoints import find_damage, list_checkpoints
from training.engine.settings import RunArguments

SETTINGS = "arguments.yaml"
RESULTS = "all_results.json"
INTERRUPTED = "interrupted"
"""Launchers have exit codes of their own: a scheduler reads from this empty file that the run wants to go on."""
OVERWRITTEN = ".overwritten"
"""Of a run that --overwrite began and that has not ended: the same command goes on with it."""


def stored_settings(arguments: RunArguments) -> str:
    """What makes a run what it is, as YAML: a run that differs in it is another run."""
    left_out = runtime_options(type(arguments)) | {"output_dir"}
    settings = {name: value for name, value in public_settings(arguments).items() if name not in left_out}
    return yaml.safe_dump(settings, sort_keys=False)


def open_run_folder(accelerator: Accelerator, arguments: RunArguments, held: contextlib.ExitStack) -> Path:
    """The output folder, holding `arguments.yaml`; a folder of another run is refused unless `overwrite`.

    `overwrite` counts once: a run that it began, and that was stopped or killed, goes on.

    Args:
        accelerator: Of the processes of the run.
        arguments: Settings of the program.
        held: Lets the folder go when it is closed; until then no other run may write there.

    Raises:
        ValueError: The folder cannot be written, is being written, or holds a run or a checkpoint with other settings.
    """
    if arguments.output_dir is None:
        raise ValueError("Name a folder for the results with --output_dir.")
    output = Path(arguments.output_dir)
    report = partial(console.print, markup=False, style="yellow")
    settings, main = stored_settings(arguments), accelerator.is_main_process
    try:
        if main and not arguments.dry_run:
            held.enter_context(claim_folder(output, report))
            if arguments.overwrite:
                _overwrite(output, settings)
        accelerator.wait_for_everyone()
        if not arguments.dry_run:
            _refuse_another_run(output, arguments)
        if main:
            output.mkdir(parents=True, exist_ok=True)
        if main and not arguments.dry_run:
            (output / INTERRUPTED).unlink(missing_ok=True)
            atomic_write(output / SETTINGS, settings)
    except OSError as error:
        raise ValueError(f"Cannot write to the output folder {output}: {error.strerror}.") from None
    accelerator.wait_for_everyone()
    return output


def _overwrite(output: Path, settings: str) -> None:
    """Delete the run in a folder, unless the same command began it in this way and it has not ended."""
    begun = output / OVERWRITTEN
    if begun.is_file() and (output / SETTINGS).is_file() and (output / SETTINGS).read_text("utf-8") == settings:
        console.print(
            f"The run in {output} was begun with --overwrite and has not ended, so it goes on; delete the folder to "
            "begin anew.",
            markup=False,
        )
        return
    remove(output / "checkpoints")
    for name in (RESULTS, SETTINGS):
        (output / name).unlink(missing_ok=True)
    begun.touch()


def _refuse_another_run(output: Path, arguments: RunArguments) -> None:
    """Raises ValueError where the folder holds a run or a checkpoint with other settings."""
    checkpoints = list_checkpoints(output / "checkpoints")
    whole = [path for path in checkpoints[-1:] if find_damage(path, of=[SETTINGS]) is None]
    earlier = [path / SETTINGS for path in whole]
    earlier += [output / SETTINGS] if checkpoints or (output / RESULTS).is_file() else []
    new = yaml.safe_load(stored_settings(arguments))
    # A run of an earlier version does not name the options that came later, and ran as their defaults do.
    defaults = {name: value for name, value in default_values(type(arguments)).items() if name in new}
    for file in (file for file in earlier if file.is_file()):
        old = defaults | load_yaml(file.read_text(encoding="utf-8"))
        changed = sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))
        if changed:
            raise ValueError(
                f"{file.parent} holds a run with other settings ({', '.join(changed)}): choose another --output_dir, "
                "or --overwrite it."
            )
