"""Weighted k-nearest-neighbor accuracy of features, as an `evaluate` module: `evaluate.load("training/metrics/knn")`.

The protocol of Wu et al. (2018) and DINO: the k training features of highest cosine similarity s vote for their classes
with the weight exp(s / temperature).
"""

import datasets
import evaluate
import numpy as np
import torch

# Similarities held at once, as a number of (sample, training feature) pairs.
MAX_SIMILARITIES = 2**25


class WeightedKNN(evaluate.Metric):
    """Fraction of samples whose class wins the vote (top-1), or is among its five best (top-5).

    Three 64-bit counts are kept, never the predictions. Of classes with equal votes the lowest id wins.

    Args:
        train_features: (training samples, channels), on any device, where the votes are counted.
        train_labels: (training samples,) class ids, which vote.
        k: Voters, at most all training samples.
        num_labels: By default the largest label + 1.

    Raises:
        ValueError: For numbers that do not fit.
    """

    def __init__(
        self,
        *args,
        train_features=None,
        train_labels=None,
        k: int = 20,
        temperature: float = 0.07,
        num_labels: int | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if train_features is None or train_labels is None:
            raise ValueError("The k-NN metric needs those who vote: load it with train_features and train_labels.")
        self.train_features = _normalised(train_features)
        self.train_labels = torch.as_tensor(train_labels, device=self.train_features.device).long()
        if self.train_labels.shape != self.train_features.shape[:1] or not len(self.train_labels):
            raise ValueError(f"{tuple(self.train_labels.shape)} labels do not fit {len(self.train_features)} features.")
        if not 1 <= k or not temperature > 0:
            raise ValueError(f"k must be at least 1 and the temperature above 0, got {k} and {temperature}.")
        if k > len(self.train_labels):
            raise ValueError(f"There are only {len(self.train_labels)} training features for k={k} neighbors.")
        self.k, self.temperature = k, temperature
        self.num_labels = num_labels or int(self.train_labels.max()) + 1
        self.counts = np.zeros(3, np.int64)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy of a vote of the nearest training features, weighted by their cosine similarity.",
            citation="",
            inputs_description="predictions: features (samples, channels); references: class ids.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def classify(self, features) -> torch.Tensor:
        """Class ids (samples, number of classes), most votes first, of features (samples, channels)."""
        features = _normalised(features).to(self.train_features)
        if features.shape[1] != self.train_features.shape[1]:
            raise ValueError(f"Features of {features.shape[1]} channels do not fit {self.train_features.shape[1]}.")
        ranked = []
        for part in features.split(max(MAX_SIMILARITIES // len(self.train_features), 1)):
            similarity, nearest = (part @ self.train_features.T).topk(self.k)
            weights = ((similarity - 1) / self.temperature).double().exp()
            votes = weights.new_zeros(len(part), self.num_labels)
            votes.scatter_add_(1, self.train_labels[nearest], weights)
            ranked.append(votes.argsort(dim=1, descending=True, stable=True))
        return torch.cat(ranked) if ranked else self.train_labels.new_zeros(0, self.num_labels)

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """predictions: features (samples, channels); references: (samples,) class ids."""
        ranked = self.classify(predictions)
        references = torch.as_tensor(np.asarray(references), device=ranked.device)
        if references.shape != ranked.shape[:1]:
            raise ValueError(f"{len(ranked)} features do not fit {tuple(references.shape)} references.")
        hits = ranked[:, :5] == references[:, None]
        self.counts += [int(hits[:, 0].sum()), int(hits.any(dim=1).sum()), len(ranked)]

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """One feature (channels,) with its class."""
        self.add_batch(predictions=np.asarray(prediction)[None], references=[reference])

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict[str, float]:
        """The accuracies in 0 to 1 of all that was added, nan where nothing was; starts anew afterwards."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        (right, among, total), self.counts = self.counts, np.zeros(3, np.int64)
        counts = {"accuracy": right, "top_5_accuracy": among}
        return {name: float(count / total) if total else float("nan") for name, count in counts.items()}


def _normalised(features) -> torch.Tensor:
    features = torch.as_tensor(np.asarray(features) if isinstance(features, list) else features).float()
    if features.ndim != 2:
        raise ValueError(f"Features must be (samples, channels), got {tuple(features.shape)}.")
    return torch.nn.functional.normalize(features, dim=1)
