"""Top-1 accuracy as an `evaluate` module that works offline: `evaluate.load("training/metrics/accuracy")`."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Share of right classes. Two 64-bit counts are kept, never the predictions.

    ignore_index: references with this id are not counted; None counts all.
    """

    def __init__(self, *args, ignore_index: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.ignore_index = ignore_index
        self.counts = np.zeros(2, np.int64)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions, references: class ids.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """predictions, references: (samples,) class ids. Raises ValueError where their numbers differ."""
        predictions, references = np.asarray(predictions), np.asarray(references)
        if predictions.shape != references.shape:
            raise ValueError(f"{predictions.shape} predictions do not fit {references.shape} references.")
        counted = references != self.ignore_index if self.ignore_index is not None else np.ones_like(references, bool)
        self.counts += [(counted & (predictions == references)).sum(), counted.sum()]

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """One prediction with its reference."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict[str, float]:
        """The accuracy in 0 to 1 of all that was added, nan where nothing was; starts anew afterwards."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        (right, total), self.counts = self.counts, np.zeros(2, np.int64)
        return {"accuracy": float(right / total) if total else float("nan")}
