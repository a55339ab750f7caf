"""The card of a checkpoint folder: `card.yaml`, which people edit, and what is rendered from it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ...utils.io import atomic_write, read_json
from ..config import read_config
from .fields import CARD_FILE, Card, CardError, Result, build_card
from .rendering import render_card, render_results
from .results import results_from
from .sources import check_same, read_source, read_yaml


def write_card(folder: Path, card: Card) -> None:
    """Write card.yaml, README.md and `.eval_results/` of a checkpoint folder, whose config.json says the rest.

    Raises:
        CardError: A field is unfilled; nothing is written then.
    """
    folder = Path(folder)
    text, results = render_card(read_config(folder), card), render_results(card)
    atomic_write(folder / CARD_FILE, dump_card(card))
    atomic_write(folder / "README.md", text)
    for name in ("measured.yaml", "published.yaml"):
        path = folder / ".eval_results" / name
        if name in results:
            atomic_write(path, results[name])
        else:
            path.unlink(missing_ok=True)


def read_card(folder: Path) -> Card:
    """The card of a checkpoint folder, from its card.yaml. To be published it also has to pass `check_card`.

    Raises:
        CardError: There is none, or it does not say what a card says.
    """
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        raise CardError(
            f"{folder} has no {CARD_FILE}, which says where its weights come from; `locatvit convert` and the programs "
            "in training/ write it."
        )
    return load_card(path)


def dump_card(card: Card) -> str:
    """A card as card.yaml holds it: without what is empty."""
    content = {name: _without_none(value) for name, value in dataclasses.asdict(card).items() if value}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def load_card(path: Path) -> Card:
    """The card in a YAML file.

    Raises:
        CardError: A field is unknown, missing or of another type; the message names it.
    """
    content = read_yaml(Path(path))
    return build_card(content, Path(path).name)


def update_card(folder: Path, source: Path | None = None, results: Sequence[Path] = (), **facts: Any) -> Card:
    """Render the card of a checkpoint folder anew, and return it.

    Args:
        folder: The checkpoint.
        source: A file of `model_cards/` about this checkpoint.
        results: Result files, see `results_from`; a number that was measured again replaces the earlier one.
        facts: Further fields of the card.

    Raises:
        CardError: One of them is wrong, or a field is unfilled; nothing is written then.
    """
    card = read_card(folder)
    if source is not None:
        expected, said = read_source(source)
        check_same(read_config(Path(folder)), expected, f"{folder} is not a {said.title}, which {source} is about")
        card = card.filled_from(said)
    rows = {_measurement(row): row for row in card.results}
    for path in results:
        rows |= {_measurement(row): row for row in results_from(_read_record(Path(path)))}
    card = dataclasses.replace(card, results=list(rows.values()), **facts)
    write_card(folder, card)
    return card


def _measurement(result: Result) -> tuple[str, ...]:
    protocol = (result.protocol or "").replace("at update", "at step")  # as cards said before
    return result.task, result.dataset, result.split, result.metric, protocol


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise CardError(f"Cannot read the result {path}: {error}.") from None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


__all__ = ["dump_card", "load_card", "read_card", "update_card", "write_card"]
