"""Our own `evaluate` modules, one folder each, loaded by path so they work offline and can be pushed as they are."""

from pathlib import Path

import evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


def load_metric(name: str, **settings) -> evaluate.Metric:
    """The module `name` of this folder, for example `load_metric("mean_iou", num_labels=11)`."""
    return evaluate.load(str(Path(__file__).parent / name), **settings)


def compute_over_processes(accelerator: Accelerator, metric: evaluate.Metric) -> dict:
    """Add up the counts that every process holds in `metric.counts`, then compute, in all of them.

    A metric that is not a sum over images holds a list of them in `metric.records` instead, and these are put together.
    """
    if hasattr(metric, "records"):
        metric.records = gather_object(metric.records)
        return metric.compute()
    counts = torch.from_numpy(metric.counts).to(accelerator.device)
    metric.counts = accelerator.reduce(counts, reduction="sum").cpu().numpy()
    return metric.compute()
