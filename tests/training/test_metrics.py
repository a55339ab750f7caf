import evaluate
import numpy as np
import pytest

from training.metrics import load_metric


def straightforward_iou(predictions, references, num_labels, ignore_index):
    """Per-class IoU by sets of pixels, written without a confusion matrix."""
    predicted = [{(i, *p) for i, m in enumerate(predictions) for p in np.argwhere(m == c)} for c in range(num_labels)]
    true = [{(i, *p) for i, m in enumerate(references) for p in np.argwhere(m == c)} for c in range(num_labels)]
    ignored = {(i, *p) for i, m in enumerate(references) for p in np.argwhere(m == ignore_index)}
    return [
        len(p & t) / len((p | t) - ignored) if (p | t) - ignored else float("nan")
        for p, t in zip(predicted, true, strict=True)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_mean_iou_equals_an_independent_computation(seed):
    rng = np.random.default_rng(seed)
    present = [0, 1, 3, 4]  # class 2 and class 5 never occur
    references = [rng.choice([*present, 255], size=size) for size in ((7, 9), (12, 4), (5, 5))]
    predictions = [rng.choice(present, size=reference.shape) for reference in references]
    expected = straightforward_iou(predictions, references, num_labels=6, ignore_index=255)

    metric = load_metric("mean_iou", num_labels=6)
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])
    result = metric.compute()

    np.testing.assert_allclose(result["per_category_iou"], expected, atol=1e-12)
    assert np.isnan(result["per_category_iou"][2]) and np.isnan(result["per_category_iou"][5])
    assert result["mean_iou"] == pytest.approx(np.nanmean(expected), abs=1e-12)
    counted = [reference != 255 for reference in references]
    right = sum((p == r)[c].sum() for p, r, c in zip(predictions, references, counted, strict=True))
    assert result["overall_accuracy"] == pytest.approx(right / sum(c.sum() for c in counted))


def test_mean_iou_by_hand():
    reference = np.array([[0, 0], [1, 255]])
    prediction = np.array([[0, 1], [1, 1]])
    result = load_metric("mean_iou", num_labels=3).compute(predictions=[prediction], references=[reference])
    assert result["per_category_iou"][:2] == [0.5, 0.5]
    assert result["mean_iou"] == 0.5
    assert result["per_category_accuracy"][:2] == [0.5, 1.0]


def hosted_mean_iou(prediction, reference, num_labels, ignore_index):
    """The hosted module's rule, in our words: three histograms of the pixels that are not ignored."""
    prediction, reference = prediction[reference != ignore_index], reference[reference != ignore_index]
    count = [np.histogram(ids, bins=num_labels, range=(0, num_labels - 1))[0] for ids in (prediction, reference)]
    right = np.histogram(prediction[prediction == reference], bins=num_labels, range=(0, num_labels - 1))[0]
    with np.errstate(invalid="ignore"):
        return right / (count[0] + count[1] - right), right.sum() / count[1].sum()


def test_mean_iou_equals_the_hosted_module_on_its_own_example():
    """Maps and values of the documentation of `evaluate-metric/mean_iou`."""
    predictions = [[[1, 2], [3, 4], [5, 255]], [[2, 7], [9, 2], [3, 6]], [[2, 2, 3], [8, 2, 4], [3, 255, 2]]]
    references = [[[0, 3], [5, 4], [6, 255]], [[1, 7], [9, 2], [3, 6]], [[1, 2, 2], [8, 2, 1], [3, 255, 1]]]
    result = load_metric("mean_iou", num_labels=10).compute(predictions=predictions, references=references)
    assert result["mean_iou"] == pytest.approx(0.4775)
    assert result["mean_accuracy"] == pytest.approx(0.5916666666666666)
    assert result["overall_accuracy"] == pytest.approx(0.5263157894736842)
    assert result["per_category_iou"] == pytest.approx([0, 0, 0.375, 0.4, 0.5, 0, 0.5, 1, 1, 1])
    assert result["per_category_accuracy"] == pytest.approx([0, 0, 0.75, 2 / 3, 1, 0, 0.5, 1, 1, 1])


def test_where_mean_iou_differs_from_the_hosted_module():
    """An ignored class that is predicted elsewhere, and a reference outside the classes."""
    prediction, reference = np.array([[0, 1, 1, 0]]), np.array([[0, 1, 1, 1]])
    result = load_metric("mean_iou", num_labels=2, ignore_index=0).compute(
        predictions=[prediction], references=[reference]
    )
    hosted, _ = hosted_mean_iou(prediction, reference, 2, 0)
    assert hosted.tolist() == [0.0, 2 / 3] and np.mean(hosted) == pytest.approx(1 / 3)
    assert np.isnan(result["per_category_iou"][0]) and result["mean_iou"] == pytest.approx(2 / 3)

    outside = np.array([[0, 1, 1, 2]])
    assert hosted_mean_iou(prediction, outside, 2, 255)[1] == 1.0  # three of four pixels are right
    with pytest.raises(ValueError, match="outside the 2 classes"):
        load_metric("mean_iou", num_labels=2).compute(predictions=[prediction], references=[outside])

    # Absent classes: nan in both, and so is not counted; predicted alone: 0 in both.
    prediction, reference = np.array([[0, 0, 2, 255]]), np.array([[0, 0, 0, 255]])
    hosted, _ = hosted_mean_iou(prediction, reference, 4, 255)
    result = load_metric("mean_iou", num_labels=4).compute(predictions=[prediction], references=[reference])
    np.testing.assert_array_equal(result["per_category_iou"], hosted)
    np.testing.assert_array_equal(hosted, [2 / 3, np.nan, 0, np.nan])
    assert np.isnan(result["per_category_accuracy"][2])


def test_counts_are_bounded_and_start_anew():
    metric = load_metric("mean_iou", num_labels=3)
    for _ in range(50):
        metric.add_batch(predictions=[np.zeros((8, 8), int)], references=[np.zeros((8, 8), int)])
    assert metric.counts.shape == (3, 3) and metric.counts.dtype == np.int64
    assert metric.compute()["mean_iou"] == 1.0
    assert np.isnan(metric.compute()["mean_iou"])


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (np.zeros((2, 2)), np.zeros((2, 3)), "does not fit"),
        (np.full((2, 2), 9), np.zeros((2, 2)), "outside the 3 classes"),
        (np.zeros((2, 2)), np.full((2, 2), 3), "outside the 3 classes"),
    ],
)
def test_impossible_maps_are_refused(prediction, reference, message):
    with pytest.raises(ValueError, match=message):
        load_metric("mean_iou", num_labels=3).add_batch(predictions=[prediction], references=[reference])


def test_accuracy():
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, 4, 100), rng.integers(0, 4, 100)
    assert load_metric("accuracy").compute(predictions=predictions, references=references) == {
        "accuracy": float(np.mean(predictions == references))
    }
    metric = load_metric("accuracy", ignore_index=3)
    metric.add(prediction=1, reference=1)
    metric.add(prediction=1, reference=3)
    assert metric.compute() == {"accuracy": 1.0}


def test_metrics_combine():
    combined = evaluate.combine([load_metric("accuracy"), load_metric("accuracy", ignore_index=0)])
    result = combined.compute(predictions=[0, 1, 1], references=[0, 1, 0])
    assert result == {"accuracy_0_accuracy": 2 / 3, "accuracy_1_accuracy": 1.0}
