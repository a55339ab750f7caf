"""What a card says that config.json does not: its fields, and what is wrong with a card."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.dataclasses import type_validator

CARD_FILE = "card.yaml"
UNKNOWN = "unknown"
"""Where nobody says: the card says so in a sentence. A field that was forgotten is refused instead."""

# What people leave where a fact belongs.
PLACEHOLDERS = ("", "todo", "tbd", "fixme", "...", "[more information needed]")
# Type of a field -> what it is in words, and how it is written.
TYPES: dict[Any, tuple[str, str]] = {
    **dict.fromkeys((str, str | None), ("text", "it in quotes")),
    list[str]: ("a list of texts", 'it as ["first", "second"]'),
    float: ("a number", "it without quotes and units, as 0.5"),
    int: ("a whole number", "it without quotes and units, as 100"),
    dict[str, Any]: ("fields with their values", "one field per line, indented"),
}


class CardError(ValueError):
    """A card cannot be written or read; the message names the field and what to do."""


@dataclass(kw_only=True)
class Result:
    """A number that was measured with these weights.

    Attributes:
        task: As the Hub calls it.
        dataset: A Hub name, or what people call it.
        split: Of the dataset.
        metric: Its name among `training/metrics`, or any other.
        value: As the metric gives it: a fraction between 0 and 1 where it is an accuracy, an IoU or an average
            precision.
        protocol: How it was measured, a phrase.
        date: ISO 8601.
        code: Versions that it was measured with.
    """

    task: str
    dataset: str
    split: str
    metric: str
    value: float
    protocol: str
    date: str | None = None
    code: str | None = None


@dataclass(kw_only=True)
class Published:
    """A number that a publication gives for this architecture, in percent, as printed there.

    Attributes:
        task: As the Hub calls it.
        dataset: A Hub name, or what people call it.
        split: Of the dataset.
        metric: Its name.
        percent: The number.
        protocol: How it was measured, as far as the source says.
        source: The table.
        url: Where that is.
    """

    task: str
    dataset: str
    split: str
    metric: str
    percent: float
    protocol: str
    source: str
    url: str


@dataclass(kw_only=True)
class Training:
    """How the weights were trained here.

    Attributes:
        program: Of `training/`.
        version: Of this package.
        updates: Steps of the whole run.
        step: The step whose weights these are.
        batch_size: Images of all processes.
        processes: How many there were.
        start: The weights it began with, None for random ones.
        options: Of the program, where they differ from its defaults.
    """

    program: str
    version: str
    updates: int
    step: int
    batch_size: int
    processes: int
    start: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Conversion:
    """Where converted weights come from.

    Attributes:
        source: A folder or a Hub name.
        layout: Of its files, in words.
        part: Which of its weights were taken.
        file: The one that held them.
        sha256: Of that file.
        tensors: What became of them, a sentence.
        difference: The largest between the outputs of the converted model in memory and of the folder, loaded again.
        version: Of this package.
    """

    source: str
    layout: str
    part: str
    file: str
    sha256: str
    tensors: str
    difference: float
    version: str


@dataclass(kw_only=True)
class Card:
    """What a card says that config.json does not.

    Attributes:
        title: Of the model.
        repository: What the snippets load, a Hub name ("owner/name") or the name of a folder.
        revision: The tag or commit that the snippets pin; a Hub name needs one.
        datasets: What the weights learned from, Hub names where there are such, or "unknown".
        weights_license: As the Hub abbreviates it ("mit"), or "unknown"; that of the code is MIT.
        base_model: Hub name of what the weights were trained further from.
        upstream: Address of the original.
        recipe: The file in `training/recipes/` of the published experiment.
        remarks: Sentences for this card alone.
        results: Numbers that were measured with these weights.
        published: Numbers of a publication.
        training: How the weights were trained here; this or `conversion` says where they come from.
        conversion: Where converted weights come from.
    """

    title: str | None = None
    repository: str | None = None
    revision: str | None = None
    datasets: list[str] = field(default_factory=list)
    weights_license: str | None = None
    base_model: str | None = None
    upstream: str | None = None
    recipe: str | None = None
    remarks: str | None = None
    results: list[Result] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)
    training: Training | None = None
    conversion: Conversion | None = None

    def filled_from(self, source: "Card") -> "Card":
        """This card with what `source` says, which wins wherever it says anything.

        Except of weights that were trained here: what they learned from, and under which license they are, is up to
        whoever trained them.
        """
        said = {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if getattr(source, f.name)}
        if self.conversion is None:
            said = {name: value for name, value in said.items() if name not in ("datasets", "weights_license")}
        return dataclasses.replace(self, **said)


def check_card(card: Card) -> None:
    """Refuse a card that is not complete.

    Raises:
        CardError: A field is unfilled; the message names the first.
    """
    for name in ("title", "repository", "datasets", "weights_license"):
        if not getattr(card, name):
            raise _unfilled(name)
    if "/" in (card.repository or "") and not card.revision:
        raise _unfilled("revision")
    if card.training is None and card.conversion is None:
        raise CardError("The card is incomplete: neither training nor conversion says where the weights come from.")
    facts = dataclasses.asdict(card)
    if card.training is not None:
        del facts["training"]["options"]  # an option may be empty
    _check_filled(facts, "")


def build_card(content: dict[str, Any], where: str) -> Card:
    """The card with these fields.

    Args:
        content: Field -> value, as YAML reads them.
        where: Their file, the subject of messages.

    Raises:
        CardError: A field is unknown, missing or of another type; the message names it.
    """
    parts = {"training": Training, "conversion": Conversion}
    rows: dict[str, type] = {"results": Result, "published": Published}
    built = dict(content)
    for name, part in parts.items():
        if built.get(name) is not None:
            built[name] = _build(part, built[name], f"{where}: {name}")
    for name, row in rows.items():
        listed = built.get(name) or []
        if not isinstance(listed, list):
            raise CardError(f"{where}: {name} must be a list, one entry per number.")
        built[name] = [_build(row, entry, f"{where}: {name} {index}") for index, entry in enumerate(listed, 1)]
    return _build(Card, built, where)


def _build(cls: type, content: Any, where: str) -> Any:
    if not isinstance(content, dict):
        raise CardError(f"{where} must be a list of fields with their values.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := set(content) - set(fields):
        raise CardError(f"{where} has no field {min(unknown, key=str)!r}; it has {', '.join(fields)}.")
    for name, f in fields.items():
        optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if not optional and content.get(name) is None:
            raise CardError(f"{where} is incomplete: the field {name} is unfilled.")
    said = {name: value for name, value in content.items() if value is not None}
    for name, value in said.items():
        check_type(fields[name].type, value, f"{where}: the field {name}")
    return cls(**said)


def check_type(kind: Any, value: Any, where: str) -> None:
    """Refuse a value that YAML reads as another type.

    Raises:
        CardError: The message says the expected type and what to do.
    """
    try:
        type_validator(where, value, float | int if kind is float else kind)
    except TypeError:
        expected, remedy = TYPES[kind]
        raise CardError(f"{where} must be {expected}, not {value!r}; write {remedy}.") from None


def _check_filled(value: Any, name: str) -> None:
    """Raises CardError for a placeholder anywhere below `value`."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_filled(entry, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, entry in enumerate(value, 1):
            _check_filled(entry, f"{name} {index}")
    elif isinstance(value, str) and value.strip().lower() in PLACEHOLDERS:
        raise _unfilled(name)


def _unfilled(name: str) -> CardError:
    return CardError(f"The card is incomplete: the field {name} is unfilled; write it into {CARD_FILE}.")


__all__ = [
    "CARD_FILE",
    "UNKNOWN",
    "Card",
    "CardError",
    "Conversion",
    "Published",
    "Result",
    "Training",
    "build_card",
    "check_card",
    "check_type",
]
