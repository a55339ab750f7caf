"""README.md and `.eval_results/` of a checkpoint: its card and its configuration, rendered."""

from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index
from transformers import PreTrainedConfig

from ...utils.papers import DINO
from ...utils.registry import FAMILIES
from ..config import count_parameters, family_config
from .description import describe_family, limits_of_data
from .fields import UNKNOWN, Card, CardError, Published, Result, check_card
from .results import is_fraction

MINIMUM_TRANSFORMERS = "5.14"
# Ending of a model's class -> its pipeline.
PIPELINES = {
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "Model": "image-feature-extraction",
    "Backbone": "image-feature-extraction",
}


def render_card(config: PreTrainedConfig, card: Card) -> str:
    """README.md: the metadata in YAML with its `model-index`, and the text.

    Args:
        config: Of the checkpoint; its `architectures` name the class of the model.
        card: What config.json does not say.

    Raises:
        CardError: A field is unfilled, or the model is of a class that has no card.
    """
    check_card(card)
    inner = family_config(config)
    architecture = architecture_of(config)
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
        "Normalization": f"mean {list(inner.image_mean)}, std {list(inner.image_std)}",
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
    """File name in `.eval_results/` -> its content: results on datasets of the Hub, as its leaderboards read them."""
    rows = {"measured": _entries(card.results), "published": []}
    if card.conversion is not None:
        rows["published"] = _entries(card.published)
    return {
        f"{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        for name, entries in rows.items()
        if entries
    }


def _metadata(config: PreTrainedConfig, card: Card) -> dict[str, Any]:
    """The YAML at the top of README.md.

    Results of one source are one entry of the `model-index`; published ones stand there only for the weights of their
    authors, not for weights trained anew.
    """
    inner = family_config(config)
    metrics = list(dict.fromkeys(result.metric for result in card.results))
    on_hub = [name for name in card.datasets if "/" in name]
    data = ModelCardData(
        license=card.weights_license,
        library_name="transformers",
        pipeline_tag=_pipeline(architecture_of(config)),
        tags=[*(["custom_code"] if config is inner else []), "vision", inner.model_type],
        datasets=on_hub or None,
        metrics=metrics or None,
        base_model=card.base_model,
    ).to_dict()
    groups: dict[Any, list[EvalResult]] = {}
    measured = {}
    if "/" in (card.repository or ""):
        measured = {
            "source_name": "measured with these weights",
            "source_url": f"https://huggingface.co/{card.repository}",
        }
    for result in card.results:
        groups.setdefault(None, []).append(_eval_result(result, result.value, **measured))
    if card.conversion is not None:
        for published in card.published:
            source = {"source_name": published.source, "source_url": published.url}
            row = _eval_result(published, _fraction(published), **source)
            groups.setdefault(tuple(source.values()), []).append(row)
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
        if "/" not in result.dataset:
            continue
        if isinstance(result, Result):
            said: dict[str, Any] = {"value": result.value, "date": result.date, "notes": "measured with these weights"}
        else:
            said = {"value": _fraction(result), "source_url": result.url, "source_name": result.source}
            said["notes"] = "published"
        said["notes"] += f": {result.protocol}"
        entries.append(EvalResultEntry(dataset_id=result.dataset, task_id=result.metric, **said))
    return entries


def _fraction(result: Published) -> float:
    return round(result.percent / 100, 6)


def _shown(result: Result) -> str:
    """The value of a result; in percent where it is a fraction."""
    return f"{100 * result.value:.2f} %" if is_fraction(result.metric) else f"{result.value:.4g}"


def architecture_of(config: PreTrainedConfig) -> str:
    """The class of a model.

    Raises:
        CardError: config.json does not name it.
    """
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


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


__all__ = ["MINIMUM_TRANSFORMERS", "PIPELINES", "architecture_of", "render_card", "render_results"]
