"""Accuracy with its best five, weighted k-nearest neighbors, and both where `evaluate` uses them."""

import math

import evaluate
import numpy as np
import pytest
import torch
import transformers
from datasets import load_from_disk
from transformers import pipeline

from locatvit_hf import LocAtViTConfig, LocAtViTForImageClassification, LocAtViTImageProcessor
from tests.training.conftest import SMALL_MODEL
from training.metrics import load_metric


def vote(features, labels, query, k, temperature, num_labels):
    """The vote for one sample, neighbor by neighbor."""
    cosine = [float(f @ query / (np.linalg.norm(f) * np.linalg.norm(query))) for f in features]
    votes = [0.0] * num_labels
    for index in sorted(range(len(features)), key=lambda index: -cosine[index])[:k]:
        votes[labels[index]] += math.exp(cosine[index] / temperature)
    return sorted(range(num_labels), key=lambda label: -votes[label])


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (60, 0.07)])
def test_knn_equals_brute_force(monkeypatch, k, temperature):
    rng = np.random.default_rng(k)
    labels = rng.integers(0, 8, 60)
    features = rng.normal(size=(60, 6)) + 0.5 * np.eye(8, 6)[labels]
    queries, references = rng.normal(size=(33, 6)), rng.integers(0, 8, 33)
    expected = [vote(features, labels, query, k, temperature, 8) for query in queries]

    settings = {"train_features": features, "train_labels": labels, "k": k, "temperature": temperature}
    metric = load_metric("knn", **settings, num_labels=8)
    found = metric.classify(queries).tolist()
    voted = 1 if k == 1 else 2  # behind the classes with votes all are equal
    assert [ranked[:voted] for ranked in found] == [ranked[:voted] for ranked in expected] or k == 5
    assert [ranked[0] for ranked in found] == [ranked[0] for ranked in expected]
    for part in np.array_split(np.arange(33), 4):
        metric.add_batch(predictions=torch.from_numpy(queries[part]), references=references[part])
    top = [np.mean([r in e[:n] for r, e in zip(references, expected, strict=True)]) for n in (1, 5)]
    assert metric.compute() == {"accuracy": pytest.approx(top[0]), "top_5_accuracy": pytest.approx(top[1])}
    assert np.isnan(metric.compute()["accuracy"])

    monkeypatch.setitem(metric.classify.__globals__, "MAX_SIMILARITIES", 100)  # one sample at a time
    assert metric.classify(queries).tolist() == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 9}, "only 4 training features for k=9"),
        ({"k": 0}, "k must be at least 1"),
        ({"train_labels": [0, 1]}, "do not fit 4 features"),
        ({"train_features": np.zeros(4)}, r"must be \(samples, channels\)"),
    ],
)
def test_impossible_neighbours_are_refused(settings, message):
    fixed = {"train_features": np.eye(4), "train_labels": [0, 1, 0, 1], "k": 2}
    with pytest.raises(ValueError, match=message):
        load_metric("knn", **{**fixed, **settings})


def test_top_five():
    rng = np.random.default_rng(0)
    scores, references = rng.normal(size=(200, 9)), rng.integers(0, 9, 200)
    ranked = (-scores).argsort(axis=1)[:, :5]
    metric = load_metric("accuracy", top_k=5)
    for part in np.array_split(np.arange(200), 3):
        metric.add_batch(predictions=ranked[part], references=references[part])
    assert metric.compute() == {
        "accuracy": pytest.approx(np.mean(ranked[:, 0] == references)),
        "top_5_accuracy": pytest.approx(np.mean([r in row for r, row in zip(references, ranked, strict=True)])),
    }
    with pytest.raises(ValueError, match="do not fit"):
        metric.add_batch(predictions=references, references=references)


def test_metrics_of_one_kind_combine():
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(30, 4)), rng.permutation([0] * 14 + [1] * 9 + [2] * 7)
    bank = {"train_features": features, "train_labels": labels}
    combined = evaluate.combine([load_metric("knn", k=1, **bank), load_metric("knn", k=30, temperature=1e6, **bank)])
    result = combined.compute(predictions=features, references=labels)
    assert result["weighted_knn_0_accuracy"] == 1.0  # every sample is its own nearest neighbor
    assert result["weighted_knn_1_accuracy"] == pytest.approx(14 / 30)  # all vote alike for the most common class

    ranked = rng.permuted(np.tile(np.arange(6), (30, 1)), axis=1)[:, :5]
    combined = evaluate.combine([load_metric("accuracy", top_k=5), load_metric("accuracy", top_k=5, ignore_index=0)])
    result = combined.compute(predictions=ranked, references=labels)
    assert len(result) == 4 and result["accuracy_0_accuracy"] == pytest.approx(np.mean(ranked[:, 0] == labels))


def test_accuracy_serves_the_evaluator_of_pipelines(squares, tmp_path, monkeypatch):
    """`evaluate.evaluator` on our folder and on our pipeline, against the pipeline itself."""
    config = LocAtViTConfig(**SMALL_MODEL, initializer_range=0.5, id2label={0: "red", 1: "green"})
    LocAtViTForImageClassification(config).save_pretrained(tmp_path)
    LocAtViTImageProcessor.from_model_config(config).save_pretrained(tmp_path)
    rows = load_from_disk(squares)["validation"].select_columns(["image", "label"])
    classifier = pipeline("image-classification", str(tmp_path))
    right = [classifier(row["image"])[0]["label"] == ["red", "green"][row["label"]] for row in rows]
    assert 0 < np.mean(right) < 1

    # evaluate 0.4.6 asks whether a pipeline is a TFPreTrainedModel, which transformers 5 no longer has; it does not ask
    # for a folder or a model.
    settings = {"data": rows, "metric": load_metric("accuracy"), "label_mapping": {"red": 0, "green": 1}}
    evaluator = evaluate.evaluator("image-classification")
    assert evaluator.compute(model_or_pipeline=str(tmp_path), **settings)["accuracy"] == pytest.approx(np.mean(right))
    monkeypatch.setattr(transformers, "TFPreTrainedModel", (), raising=False)
    assert evaluator.compute(model_or_pipeline=classifier, **settings)["accuracy"] == pytest.approx(np.mean(right))
