"""Numbers that programs measured, as the results of a card."""

import math
import re
from pathlib import Path
from typing import Any

from ...utils.console import hide_credentials
from .fields import CardError, Result

# Program of `training/`, or task of an evaluation -> what the Hub calls it.
HUB_TASKS = {
    "pretrain": "image-classification",
    "finetune": "image-classification",
    "classification": "image-classification",
    "linear_probe": "image-classification",
    "knn": "image-classification",
    "dino": "image-feature-extraction",
    "segment": "image-segmentation",
    "segmentation": "image-segmentation",
    "hummingbird": "image-segmentation",
    "detect": "object-detection",
}
# Words in the names of what programs report beside their metrics: losses, times and speeds.
NOT_METRICS = re.compile(r"(?:^|_)(?:loss|runtime|per_second|time)(?:_|$)")


def results_from(record: dict[str, Any]) -> list[Result]:
    """The numbers of a result file: what a program of `training/evaluation/` wrote, or `all_results.json` of a run.

    Every metric is a result, whatever its name; see `metrics_of`.

    Raises:
        CardError: The record is neither.
    """
    try:
        if "task" in record:
            settings, kind, metrics, split = record, record["task"], record["metrics"], record["split"]
            protocol = kind.replace("_", " ").replace("knn", "k-NN")
            if record.get("num_images"):
                protocol += f", {record['num_images']:,} images"
        else:
            settings, kind, metrics = record["arguments"], record["program"], record["exported"]["metrics"]
            protocol = f"while training, at step {record['exported']['step']:,}"
            split = settings["train_split"] if kind == "dino" else settings.get("validation_split") or "validation"
        return [
            Result(
                task=HUB_TASKS.get(kind, kind),
                dataset=public_name(settings["dataset"]),
                split=split,
                metric=metric,
                value=value,
                protocol=protocol,
                date=record.get("date"),
                code=_versions(record.get("versions")),
            )
            for metric, value in metrics_of(metrics).items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise CardError(f"The record is not a result of a program in training/: {error!r}.") from None


def metrics_of(values: dict[str, Any]) -> dict[str, float]:
    """The metrics among what a program reports of an evaluation: finite numbers but losses, times and speeds."""
    numbers = {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    return {name: round(value, 5) for name, value in numbers.items() if not NOT_METRICS.search(name)}


def is_fraction(metric: str) -> bool:
    """Whether a metric of this name is between 0 and 1 and shown in percent."""
    return any(part in metric for part in ("accuracy", "iou", "_ap", "_ar"))


def public_name(name: str) -> str:
    """A dataset or model as a reader may see it: a path by its last part, an address without credentials."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else hide_credentials(name)


def _versions(versions: dict[str, str] | None) -> str | None:
    if versions is None:
        return None
    return ", ".join(f"{name} {versions[name]}" for name in ("locatvit-hf", "torch") if name in versions) or None


__all__ = ["is_fraction", "metrics_of", "public_name", "results_from"]
