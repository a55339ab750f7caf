"""Top-1 and top-k accuracy as an `evaluate` module for use offline: `evaluate.load("training/metrics/accuracy")`."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Fraction of right classes. Three 64-bit counts are kept, never the predictions.

    Args:
        top_k: Above 1, predictions are the `top_k` best class ids of each sample, best first, and `top_{k}_accuracy` is
            the fraction of samples whose class is among them.
        ignore_index: References with this id are not counted; None counts all.
    """

    def __init__(self, *args, top_k: int = 1, ignore_index: int | None = None, **kwargs):
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        self.top_k, self.ignore_index = top_k, ignore_index  # read by `_info`
        super().__init__(*args, **kwargs)
        self.counts = np.zeros(3, np.int64)

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Fraction of samples whose prediction, or one of the best k, is their class.",
            citation="",
            inputs_description="predictions: class ids, or with top_k above 1 lists of them; references: class ids.",
            features=datasets.Features(
                {"predictions": label if self.top_k == 1 else datasets.Sequence(label), "references": label}
            ),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """predictions: (samples,) or (samples, top_k) class ids; references: (samples,). Raises ValueError else."""
        predictions, references = np.asarray(predictions), np.asarray(references)
        expected = references.shape if self.top_k == 1 else (*references.shape, self.top_k)
        if references.ndim != 1 or predictions.shape != expected:
            raise ValueError(
                f"{predictions.shape} predictions do not fit {references.shape} references with top_k={self.top_k}."
            )
        counted = references != self.ignore_index if self.ignore_index is not None else np.ones_like(references, bool)
        hits = predictions.reshape(len(references), self.top_k)[counted] == references[counted, None]
        self.counts += [hits[:, 0].sum(), hits.any(axis=1).sum(), counted.sum()]

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """One prediction with its reference."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict[str, float]:
        """The accuracies in 0 to 1 of all that was added, nan where nothing was; starts anew afterwards."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        (right, among, total), self.counts = self.counts, np.zeros(3, np.int64)
        counts = {"accuracy": right, f"top_{self.top_k}_accuracy": among}
        return {
            name: float(count / total) if total else float("nan")
            for name, count in counts.items()
            if name != "top_1_accuracy"
        }
