"""Mean intersection over union as an `evaluate` module for use offline: `evaluate.load("training/metrics/mean_iou")`.

It differs from the hosted module of that name, which agrees on maps without these peculiarities:

- Memory is one matrix of classes by classes however many images are added; the hosted module keeps every map.
- An ignored id that is one of the classes is no class any more: its values are nan and not counted. The hosted module
  gives it an IoU of 0, counted in the mean, as soon as it is predicted anywhere.
- Ids outside the classes are errors. The hosted module drops them without a word, references among them, which raises
  the accuracy.
- Maps are of class ids already: shifting or mapping of labels happens where they are read, not here.

In both, a class that occurs neither in references nor in predictions is nan and not counted in the means, and a class
that is predicted but never referenced has an IoU of 0 and no accuracy.
"""

import datasets
import evaluate
import numpy as np


class MeanIoU(evaluate.Metric):
    """Dataset-level mean IoU, mean accuracy and overall accuracy.

    Args:
        num_labels: Number of classes.
        ignore_index: Pixels whose reference has this id are not counted.
    """

    def __init__(self, *args, num_labels: int, ignore_index: int = 255, **kwargs):
        super().__init__(*args, **kwargs)
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}.")
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.counts = np.zeros((num_labels, num_labels), np.int64)

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Mean over the classes of intersection / union, taken over all pixels of all images.",
            citation="",
            inputs_description="predictions, references: lists of (height, width) maps of class ids, of any sizes.",
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Count pairs of maps (height, width) into `counts[reference, prediction]`.

        Raises:
            ValueError: Where maps differ in number or size, or hold ids outside the classes.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions do not fit {len(references)} references.")
        for prediction, reference in zip(predictions, references, strict=True):
            prediction, reference = np.asarray(prediction, np.int64), np.asarray(reference, np.int64)
            if prediction.shape != reference.shape:
                raise ValueError(f"A prediction of {prediction.shape} pixels does not fit one of {reference.shape}.")
            counted = reference != self.ignore_index
            prediction, reference = prediction[counted], reference[counted]
            for name, ids in (("reference", reference), ("prediction", prediction)):
                if ids.size and not 0 <= ids.min() <= ids.max() < self.num_labels:
                    found = f"{ids.min()} to {ids.max()}"
                    raise ValueError(f"A {name} holds ids from {found}, outside the {self.num_labels} classes.")
            pairs = np.bincount(reference * self.num_labels + prediction, minlength=self.num_labels**2)
            self.counts += pairs.reshape(self.counts.shape)

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """One prediction with its reference."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict:
        """All values in 0 to 1 over what was added, nan where nothing was counted; starts anew afterwards."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        counts, self.counts = self.counts, np.zeros_like(self.counts)
        right, referenced, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
        iou = _ratio(right, referenced + predicted - right)
        if 0 <= self.ignore_index < self.num_labels:
            iou[self.ignore_index] = np.nan
        accuracy = _ratio(right, referenced)
        return {
            "mean_iou": _mean(iou),
            "mean_accuracy": _mean(accuracy),
            "overall_accuracy": float(_ratio(right.sum(), counts.sum())),
            "per_category_iou": iou.tolist(),
            "per_category_accuracy": accuracy.tolist(),
        }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values: np.ndarray) -> float:
    """Mean of the classes that occur."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
