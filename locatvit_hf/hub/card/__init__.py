"""The card of a checkpoint: README.md with its metadata, and `.eval_results/`, rendered from facts and nothing else.

fields       what a card says that config.json does not, as in `card.yaml`
results      numbers that programs measured
description  what is said of each family and of its data
sources      `model_cards/`, what is known of checkpoints before their weights are
rendering    README.md and `.eval_results/`
storage      reads and writes the card of a folder
"""

from .fields import (
    CARD_FILE,
    UNKNOWN,
    Card,
    CardError,
    Conversion,
    Published,
    Result,
    Training,
    check_card,
)
from .rendering import MINIMUM_TRANSFORMERS, PIPELINES, render_card, render_results
from .results import metrics_of, public_name, results_from
from .sources import read_source
from .storage import dump_card, load_card, read_card, update_card, write_card

__all__ = [
    "CARD_FILE",
    "MINIMUM_TRANSFORMERS",
    "PIPELINES",
    "UNKNOWN",
    "Card",
    "CardError",
    "Conversion",
    "Published",
    "Result",
    "Training",
    "check_card",
    "dump_card",
    "load_card",
    "metrics_of",
    "public_name",
    "read_card",
    "read_source",
    "render_card",
    "render_results",
    "results_from",
    "update_card",
    "write_card",
]
