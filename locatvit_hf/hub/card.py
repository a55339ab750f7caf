"""The card of a checkpoint: README.md with its metadata, and `.eval_results/`, rendered from facts and nothing else.

A checkpoint folder keeps the facts in `card.yaml`, which people edit; README.md and `.eval_results/` are rendered from
it and from config.json. `model_cards/` holds the same for each checkpoint that this project would publish, as far as it
is known before its weights are: see `read_source`.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.repocard_data import eval_results_to_model_index
from transformers import AutoConfig, PreTrainedConfig, UperNetConfig

import locatvit_hf

from ..utils.io import atomic_write, one_line
from ..utils.papers import DINO
from ..utils.registry import FAMILIES
from .description import describe_family, limits_of_data

CARD_FILE = "card.yaml"
MINIMUM_TRANSFORMERS = "5.14"
UNKNOWN = "unknown"
"""Where nobody says: the card says so in a sentence. A field that was forgotten is refused instead."""

# What people leave where a fact belongs.
PLACEHOLDERS = ("", "todo", "tbd", "fixme", "...", "[more information needed]")

# Ending of a model's class -> its pipeline.
PIPELINES = {
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "Model": "image-feature-extraction",
    "Backbone": "image-feature-extraction",
}
# Program of `training/`, or task of an evaluation -> what the Hub calls it.
HUB_TASKS = {
    "pretrain": "image-classification",
    "finetune": "image-classification",
    "classification": "image-classification",
    "linear_probe": "image-classification",
    "knn": "image-classification",
    "dino": "image-classification",
    "segment": "image-segmentation",
    "segmentation": "image-segmentation",
    "hummingbird": "image-segmentation",
    "detect": "object-detection",
}


# Type of a field -> what it is in words, and how it is written.
TYPES = {
    **dict.fromkeys((str, str | None), ("text", "it in quotes")),
    list[str]: ("a list of texts", 'it as ["first", "second"]'),
    float: ("a number", "it without quotes and units, as 0.5"),
    int: ("a whole number", "it without quotes and units, as 100"),
    dict[str, Any]: ("fields with their values", "one field a line, indented"),
}


class CardError(ValueError):
    """A card cannot be written or read; the message names the field and what to do."""


@dataclass(kw_only=True)
class Result:
    """A number that was measured with these weights.

    task: as the Hub calls it. dataset: a Hub name, or what people call it. metric: its name among `training/metrics`.
    value: a share between 0 and 1, as the metric gives it. protocol: how it was measured, a phrase.
    date: ISO 8601. code: versions that it was measured with.
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

    source: the table. url: where that is. protocol: how it was measured, as far as the source says.
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

    program: of `training/`. version: of this package. start: the weights it began with, None for random ones.
    updates: of the whole run. step: the update whose weights these are. batch_size: images of all processes.
    options: of the program, where they differ from its defaults.
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

    source: folder or Hub name. layout: of its files, in words. part: which of its weights were taken.
    file, sha256: that held them. tensors: what became of them, a sentence. version: of this package.
    difference: the largest between the outputs of the converted model in memory and of the folder, loaded again.
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

    title: of the model. repository: what the snippets load, a Hub name ("owner/name") or the name of a folder.
    revision: tag or commit that the snippets pin; a Hub name needs one.
    datasets: what the weights learned from, Hub names where there are such, or "unknown".
    weights_license: as the Hub abbreviates it ("mit"), or "unknown"; that of the code is MIT.
    base_model: Hub name of what the weights were trained further from. upstream: address of the original.
    recipe: the file in `training/recipes/` of the published experiment. remarks: sentences for this card alone.
    training or conversion: where the weights come from; at least one.
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

        Except of weights that were trained here: what they learned from, and under which licence they are, is up to
        whoever trained them.
        """
        said = {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if getattr(source, f.name)}
        if self.conversion is None:
            said = {name: value for name, value in said.items() if name not in ("datasets", "weights_license")}
        return dataclasses.replace(self, **said)


def check_card(card: Card) -> None:
    """Raises CardError naming the first field that is unfilled."""
    for name in ("title", "repository", "datasets", "weights_license"):
        if not getattr(card, name):
            raise _unfilled(name)
    if "/" in card.repository and not card.revision:
        raise _unfilled("revision")
    if card.training is None and card.conversion is None:
        raise CardError("The card is incomplete: neither training nor conversion says where the weights come from.")
    facts = dataclasses.asdict(card)
    if card.training is not None:
        del facts["training"]["options"]  # an option may be empty
    _check_filled(facts, "")


def render_card(config: PreTrainedConfig, card: Card) -> str:
    """README.md: the metadata in YAML with its `model-index`, and the text.

    config: of the checkpoint; its `architectures` name the class of the model.
    Raises CardError that names an unfilled field, and where the model is none of ours.
    """
    check_card(card)
    inner = _inner_config(config)
    architecture = _architecture(config)
    pipeline = _pipeline(architecture)
    description, papers, facts = describe_family(inner)
    if card.training is not None and card.training.program == "dino":
        papers = [*papers, DINO]
    if config is not inner:
        description = f"{description} It is the backbone of a UPerNet for semantic segmentation."
    facts = {
        "Parameters": f"{count_parameters(config):,}",
        "Image size": inner.image_size,
        "Patch size": getattr(inner, "patch_size", "-"),
        **({} if pipeline == "image-feature-extraction" else {"Classes": config.num_labels}),
        **facts,
        "Normalisation": f"mean {list(inner.image_mean)}, std {list(inner.image_std)}",
    }
    text = (
        _templates()
        .get_template("card.md.jinja")
        .render(
            card=card,
            description=description,
            pipeline=pipeline,
            architecture=architecture,
            upernet=config is not inner,
            backbone_class=inner.auto_map["AutoBackbone"],
            out_indices=_middle_and_last(inner),
            options=yaml.safe_dump(card.training.options, sort_keys=False) if card.training else "",
            facts=facts,
            limits=limits_of_data(card.datasets),
            files=FAMILIES[inner.model_type].code_files,
            papers=papers,
            unknown=UNKNOWN,
            minimum_transformers=MINIMUM_TRANSFORMERS,
            shown=_shown,
        )
    )
    metadata = yaml.safe_dump(_metadata(config, card), sort_keys=False, allow_unicode=True)
    return f"---\n{metadata}---\n\n{text}"


def render_results(card: Card) -> dict[str, str]:
    """File name in `.eval_results/` -> its content: results on data sets of the Hub, as its leaderboards read them."""
    rows = {"measured": _entries(card.results), "published": []}
    if card.conversion is not None:
        rows["published"] = _entries(card.published)
    return {
        f"{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        for name, entries in rows.items()
        if entries
    }


def write_card(folder: Path, card: Card) -> None:
    """Writes card.yaml, README.md and `.eval_results/` of a checkpoint folder, whose config.json says the rest.

    Raises CardError that names an unfilled field; nothing is written then.
    """
    folder = Path(folder)
    text, results = render_card(_read_config(folder), card), render_results(card)
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

    Raises CardError where there is none, or it does not say what a card says.
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
    """The card in a YAML file. Raises CardError that names a field which is unknown, missing or of another kind."""
    content = _read_yaml(Path(path))
    return _build_card(content, Path(path).name)


def read_source(path: Path) -> tuple[PreTrainedConfig, Card]:
    """A file of `model_cards/`: the configuration of the checkpoint, and what its card says before it has weights.

    Beside the fields of a card it holds `family` and `preset`, which name a size of the paper, `architecture`, the
    class of the model, and `model`, further fields of the configuration. Its numbers are by the names of
    protocols.yaml beside it: each one in percent, or several by metric.
    """
    path = Path(path)
    content = _read_yaml(path)
    for key in ("family", "preset", "architecture"):
        if not content.get(key):
            raise CardError(f"{path.name} is incomplete: the field {key} is unfilled.")
    for key, kind in {"family": str, "preset": str, "architecture": str, "model": dict[str, Any]}.items():
        _check_type(kind, content.get(key) or kind(), f"{path.name}: the field {key}")
    family, preset, architecture = (content.pop(key) for key in ("family", "preset", "architecture"))
    if family not in FAMILIES:
        raise CardError(f"{path.name}: the family {family} is none of {', '.join(FAMILIES)}.")
    fields = {"num_labels": 1000, **(content.pop("model", None) or {})}
    config = FAMILIES[family].config_class.from_preset(preset, **fields)
    if architecture.startswith("UperNet"):
        config.out_indices = list(range(1, len(config.depths) + 1))
        config = UperNetConfig(
            backbone_config=config, auxiliary_in_channels=config.hidden_sizes[2], num_labels=fields["num_labels"]
        )
    config.architectures = [architecture]
    protocols, published = _read_yaml(path.with_name("protocols.yaml")), content.pop("published", None) or {}
    _check_type(dict[str, Any], published, f"{path.name}: the field published")
    if unknown := published.keys() - protocols.keys():
        raise CardError(f"{path.name}: protocols.yaml beside it has no {sorted(unknown)[0]}.")
    content["published"] = [
        {**protocols[name], "metric": metric, "percent": percent}
        for name, numbers in published.items()
        for metric, percent in (numbers if isinstance(numbers, dict) else {protocols[name]["metric"]: numbers}).items()
    ]
    return config, _build_card(content, path.name)


def update_card(folder: Path, source: Path | None = None, results: Sequence[Path] = (), **facts: Any) -> Card:
    """Renders the card of a checkpoint folder anew, and returns it.

    source: a file of `model_cards/` about this checkpoint. results: result files, see `results_from`; a number that
    was measured again replaces the earlier one. facts: further fields of the card.
    Raises CardError where one of them is wrong, or a field is unfilled; nothing is written then.
    """
    card = read_card(folder)
    if source is not None:
        expected, said = read_source(source)
        _check_same(_read_config(Path(folder)), expected, f"{folder} is no {said.title}, which {source} is about")
        card = card.filled_from(said)
    rows = {_measurement(row): row for row in card.results}
    for path in results:
        rows |= {_measurement(row): row for row in results_from(_read_record(Path(path)))}
    card = dataclasses.replace(card, results=list(rows.values()), **facts)
    write_card(folder, card)
    return card


def _measurement(result: Result) -> tuple[str, ...]:
    return result.task, result.dataset, result.split, result.metric, result.protocol


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CardError(f"Cannot read the result {path}: {error}.") from None


def _check_same(config: PreTrainedConfig, expected: PreTrainedConfig, message: str) -> None:
    """Raises CardError, with what differs, unless both describe models of one class with the same weights."""
    inner, other = _inner_config(config), _inner_config(expected)
    # What decides the function without deciding the shape of a weight.
    switches = ("use_refinement", "num_attention_heads", "num_heads", "pooling")
    checks = {
        "its family": (inner.model_type, other.model_type),
        "its class": (_architecture(config), _architecture(expected)),
        **{name: (getattr(inner, name, None), getattr(other, name, None)) for name in switches},
    }
    wrong = next((f"{name} is {ours}, not {theirs}" for name, (ours, theirs) in checks.items() if ours != theirs), None)
    if wrong is None and _shapes(config) != _shapes(expected):
        wrong = "its weights have other names or shapes"
    if wrong is not None:
        raise CardError(f"{message}: {wrong}.")


def results_from(record: dict[str, Any]) -> list[Result]:
    """The numbers of a result file: what a program of `training/evaluation/` wrote, or `all_results.json` of a run.

    Only shares (accuracies, IoU, average precision) are results; losses and the like are not. Raises CardError where
    the record is neither.
    """
    try:
        if "task" in record:
            settings, kind, metrics, split = record, record["task"], record["metrics"], record["split"]
            protocol = kind.replace("_", " ").replace("knn", "k-NN")
            if record.get("num_images"):
                protocol += f", {record['num_images']:,} images"
        else:
            settings, kind, metrics = record["arguments"], record["program"], record["exported"]["metrics"]
            protocol = f"{'k-NN ' if kind == 'dino' else ''}while training, at update {record['exported']['step']:,}"
            split = settings.get("validation_split") or "validation"
        return [
            Result(
                task=HUB_TASKS.get(kind, kind),
                dataset=public_name(settings["dataset"]),
                split=split,
                metric=metric,
                value=round(value, 5),
                protocol=protocol,
                date=record.get("date"),
                code=_versions(record.get("versions")),
            )
            for metric, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value) and _is_share(metric)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise CardError(f"The record is no result of a program in training/: {error!r}.") from None


def _is_share(metric: str) -> bool:
    return any(part in metric for part in ("accuracy", "iou", "_ap", "_ar"))


def family_of(folder: Path) -> str | None:
    """The model type of a checkpoint folder of one of our families, also below a UPerNet; None for other models.

    Raises CardError where its config.json cannot be read.
    """
    try:
        content = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CardError(f"Cannot read the config.json of {folder}: {error}.") from None
    types = (content.get("model_type"), (content.get("backbone_config") or {}).get("model_type"))
    return next((name for name in types if name in FAMILIES), None)


def public_name(name: str) -> str:
    """A data set or model as a reader may see it: of a path of this machine only the last part."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def count_parameters(config: PreTrainedConfig) -> int:
    """Of the model that `config.architectures` names."""
    return sum(parameter.numel() for parameter in _empty_model(config).parameters())


def _shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in _empty_model(config).named_parameters()}


def _empty_model(config: PreTrainedConfig) -> transformers.PreTrainedModel:
    name = _architecture(config)
    model_class = getattr(locatvit_hf, name, None) or getattr(transformers, name, None)
    if model_class is None:
        raise CardError(f"config.json names the class {name}, which is none of locatvit_hf or transformers.")
    with torch.device("meta"):
        return model_class(config)


def _metadata(config: PreTrainedConfig, card: Card) -> dict[str, Any]:
    """The YAML at the top of README.md.

    Results of one source are one entry of the `model-index`; published ones stand there only for the weights of their
    authors, not for weights trained anew.
    """
    inner = _inner_config(config)
    metrics = list(dict.fromkeys(result.metric for result in card.results))
    on_hub = [name for name in card.datasets if "/" in name]
    data = ModelCardData(
        license=card.weights_license,
        library_name="transformers",
        pipeline_tag=_pipeline(_architecture(config)),
        tags=[*(["custom_code"] if config is inner else []), "vision", inner.model_type],
        datasets=on_hub or None,
        metrics=metrics or None,
        base_model=card.base_model,
    ).to_dict()
    groups: dict[Any, list[EvalResult]] = {}
    measured = {}
    if "/" in card.repository:
        measured = {
            "source_name": "measured with these weights",
            "source_url": f"https://huggingface.co/{card.repository}",
        }
    for result in card.results:
        groups.setdefault(None, []).append(_eval_result(result, result.value, **measured))
    if card.conversion is not None:
        for result in card.published:
            row = _eval_result(result, _share(result), source_name=result.source, source_url=result.url)
            groups.setdefault((result.source, result.url), []).append(row)
    entries = [
        entry for rows in groups.values() for entry in eval_results_to_model_index(card.title, rows)[0]["results"]
    ]
    if entries:
        data["model-index"] = [{"name": card.title, "results": entries}]
    return data


def _eval_result(result: Result | Published, value: float, **source: str) -> EvalResult:
    return EvalResult(
        task_type=result.task,
        dataset_type=result.dataset,
        dataset_name=result.dataset,
        dataset_split=result.split,
        metric_type=result.metric,
        metric_name=f"{result.metric.replace('_', ' ')} ({result.protocol})",
        metric_value=value,
        **source,
    )


def _entries(results: list[Result] | list[Published]) -> list[EvalResultEntry]:
    entries = []
    for result in results:
        measured = isinstance(result, Result)
        if "/" in result.dataset:
            entries.append(
                EvalResultEntry(
                    dataset_id=result.dataset,
                    task_id=result.metric,
                    value=result.value if measured else _share(result),
                    date=result.date if measured else None,
                    source_url=None if measured else result.url,
                    source_name=None if measured else result.source,
                    notes=f"{'measured with these weights' if measured else 'published'}: {result.protocol}",
                )
            )
    return entries


def _share(result: Published) -> float:
    return round(result.percent / 100, 6)


def _shown(result: Result) -> str:
    """The value of a result; in percent where it is a share."""
    return f"{100 * result.value:.2f} %" if _is_share(result.metric) else f"{result.value:.4g}"


def _versions(versions: dict[str, str] | None) -> str | None:
    if versions is None:
        return None
    return ", ".join(f"{name} {versions[name]}" for name in ("locatvit-hf", "torch") if name in versions) or None


def _inner_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of our family: of the backbone where it is one of a UPerNet."""
    inner = getattr(config, "backbone_config", None) or config
    if inner.model_type not in FAMILIES:
        raise CardError(f"A card describes one of {', '.join(FAMILIES)}, not a {inner.model_type}.")
    return inner


def _architecture(config: PreTrainedConfig) -> str:
    if not config.architectures:
        raise CardError("config.json does not name the class of the model: its field architectures is empty.")
    return config.architectures[0]


def _pipeline(architecture: str) -> str:
    for ending, pipeline in PIPELINES.items():
        if architecture.endswith(ending):
            return pipeline
    raise CardError(f"There is no card for a {architecture}.")


def _middle_and_last(config: PreTrainedConfig) -> list[int]:
    """Two stages that show what a backbone gives."""
    last = len(config.stage_names) - 1
    return [max(last // 2, 1), last]


def _read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise CardError(f"{folder} is no checkpoint: it has no config.json.")
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CardError(f"Cannot read the card {path}: {one_line(error)}.") from None
    if not isinstance(content, dict):
        raise CardError(f"{path} is no card: it holds no fields.")
    return content


def _build_card(content: dict[str, Any], where: str) -> Card:
    parts = {"training": Training, "conversion": Conversion}
    rows = {"results": Result, "published": Published}
    built = dict(content)
    for name, part in parts.items():
        if built.get(name) is not None:
            built[name] = _build(part, built[name], f"{where}: {name}")
    for name, row in rows.items():
        listed = built.get(name) or []
        if not isinstance(listed, list):
            raise CardError(f"{where}: {name} must be a list, one entry a number.")
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
        _check_type(fields[name].type, value, f"{where}: the field {name}")
    return cls(**said)


def _check_type(kind: Any, value: Any, where: str) -> None:
    """Raises CardError, with the expected type and what to do, for a value that YAML reads as another one."""
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


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


__all__ = [
    "CARD_FILE",
    "MINIMUM_TRANSFORMERS",
    "UNKNOWN",
    "Card",
    "CardError",
    "Conversion",
    "Published",
    "Result",
    "Training",
    "check_card",
    "count_parameters",
    "dump_card",
    "family_of",
    "load_card",
    "public_name",
    "read_card",
    "read_source",
    "render_card",
    "render_results",
    "results_from",
    "update_card",
    "write_card",
]
