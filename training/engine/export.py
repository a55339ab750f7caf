"""A trained model as a Hub folder: weights, code, processor, license and a card filled with what was measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import BaseImageProcessor

import locatvit_hf
from locatvit_hf.hub import card
from locatvit_hf.hub.config import family_of
from locatvit_hf.hub.push import create_repository, upload
from locatvit_hf.hub.repository import license_text, write_checksums
from locatvit_hf.utils.io import atomic_directory, write_json
from training.engine.arguments import default_values, public_settings, runtime_options
from training.engine.run_folder import RESULTS
from training.engine.settings import ProgramArguments


def save_pretrained(model: nn.Module, processor: BaseImageProcessor, folder: Path) -> None:
    """Weights, configuration, code and processor, as transformers writes them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_model(
    folder: Path,
    model: nn.Module,
    processor: BaseImageProcessor,
    save: Callable[[nn.Module, BaseImageProcessor, Path], None] = save_pretrained,
) -> None:
    """Write a complete or no folder: what `save` writes, and the license of the code.

    Raises:
        OSError: Where it cannot be written, for example on a full disk; an earlier folder stays then.
    """
    try:
        with atomic_directory(folder) as temporary:
            save(model, processor, temporary)
            (temporary / "LICENSE").write_text(license_text(), encoding="utf-8")
    except Exception as error:  # safetensors reports a full disk as an error of its own
        raise OSError(f"Cannot write the model {folder}: {error}") from None


def write_card(folder: Path, arguments: ProgramArguments, results: dict[str, Any]) -> None:
    """Write the card of an exported model of one of our families; leave other models alone.

    Args:
        results: Of the run, as in `all_results.json`.
    """
    family = family_of(folder)
    if family is None:
        return
    dataset, start = getattr(arguments, "dataset", None), getattr(arguments, "pretrained", None)
    dataset = card.public_name(dataset) if dataset else card.UNKNOWN
    defaults = default_values(type(arguments))
    # What is of no use to a reader who wants to repeat the run.
    left_out = runtime_options(type(arguments)) | {"output_dir", "label_names"}
    options = {
        option: card.public_name(value) if isinstance(value, str) else value
        for option, value in public_settings(arguments).items()
        if option not in left_out and value != defaults[option]
    }
    repository = arguments.push_to_hub
    facts = card.Card(
        title=repository.split("/")[-1] if repository else f"{family} on {dataset}",
        repository=repository or folder.name,
        revision="main" if repository else None,
        datasets=[dataset],
        weights_license=card.UNKNOWN,
        base_model=None if start is None or Path(start).exists() else start,
        training=card.Training(
            program=results["program"],
            version=locatvit_hf.__version__,
            updates=results["updates"],
            step=results["exported"]["step"],
            batch_size=arguments.batch_size,
            processes=results["num_processes"],
            start=card.public_name(start) if start else None,
            options=options,
        ),
        results=card.results_from(results | {"versions": {"locatvit-hf": locatvit_hf.__version__}}),
    )
    card.write_card(folder, facts)


def write_results(
    output: Path, arguments: ProgramArguments, results: dict[str, Any], report: Callable[[str], None]
) -> None:
    """Write `all_results.json` and the card of the exported model, and push the model where that is asked for.

    Args:
        output: The folder of the run, with the exported model in it.
        arguments: Settings of the program.
        results: The content of `all_results.json`.
        report: Called with a line for each.

    Raises:
        ValueError: The exported model is not there, or the repository cannot be written.
    """
    folder, repository = output / "model", arguments.push_to_hub
    write_json(output / RESULTS, results)
    write_card(folder, arguments, results)
    if not folder.is_dir():
        raise ValueError(
            f"Results in {output / RESULTS}, but the model that was exported at step {results['exported']['step']} "
            f"is not in {folder} any more: --overwrite the run to train it again."
        )
    report(f"Model in {folder}, results in {output / RESULTS}.")
    if repository is not None:
        write_checksums(folder)
        # In one commit, replacing code that the folder no longer has.
        pushed = upload(folder, repository, message="Upload model, processor and card", report=print)
        report(f"Pushed to {pushed.url}")


def open_repository(repository: str) -> None:
    """Create the repository where it does not exist, before hours of training rather than after.

    Raises:
        ValueError: Where it cannot be written.
    """
    create_repository(repository, report=print)
