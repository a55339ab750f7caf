import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.training.programs import ROOT
from training.metrics import load_metric

HEIGHT, WIDTH = 160, 200


def made_data_set(seed: int):
    """COCO annotations and results of 12 images, written in COCO's own format: crowds, misses, doubles, equal scores.

    Objects are of all three sizes of COCO; one image has none, one has no detection, one category is never annotated.
    """
    rng = np.random.default_rng(seed)

    def polygon(left, top, width, height):
        return [[left, top, left + width, top, left + width, top + height, left, top + 0.7 * height]]

    images = [{"id": 40 - index, "height": HEIGHT, "width": WIDTH} for index in range(12)]
    annotations, results = [], []
    for index, image in enumerate(images):
        for _ in range(rng.integers(1, 6) if index else 0):
            width, height = rng.uniform(6, 150), rng.uniform(6, 150)
            left, top = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)
            crowd, category = int(rng.random() < 0.15), int(rng.choice([3, 7, 90]))
            shape = coco_mask.merge(coco_mask.frPyObjects(polygon(left, top, width, height), HEIGHT, WIDTH))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [left, top, width, height],
                    "segmentation": shape,
                    "area": float(rng.uniform(0.5, 1.0) * width * height),  # as in COCO: not that of the box
                    "iscrowd": crowd,
                }
            )
            for _ in range(rng.integers(0, 3) if index != 5 else 0):
                near = np.array([left, top, width, height]) + rng.normal(0, 3, 4)
                near[2:] = near[2:].clip(2)
                found = coco_mask.merge(coco_mask.frPyObjects(polygon(*near), HEIGHT, WIDTH))
                guess = category if rng.random() < 0.8 else int(rng.choice([3, 7, 90, 91]))
                results.append(
                    {
                        "image_id": image["id"],
                        "category_id": guess,
                        "score": float(rng.choice([0.2, 0.5, 0.9])),
                        "bbox": near.tolist(),
                        "segmentation": found,
                    }
                )
    results.append({**results[0], "category_id": 91})
    categories = [{"id": category, "name": str(category)} for category in (3, 7, 90, 91)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def pycocotools_alone(data: dict, results: list[dict], iou_type: str) -> np.ndarray:
    keep = {"bbox": "segmentation", "segm": "bbox"}[iou_type]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(data)
        truth.createIndex()
        found = truth.loadRes([{k: v for k, v in result.items() if k != keep} for result in results])
        evaluation = COCOeval(truth, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def as_batches(data: dict, results: list[dict]):
    """The same in the form of the metric: (predictions, references), one entry an image."""

    def objects(entries):
        boxes = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        labels = [entry["category_id"] for entry in entries]
        # Predictions as arrays, references run-length encoded: both forms are taken.
        return {"boxes": boxes, "labels": labels, "masks": [entry["segmentation"] for entry in entries]}

    for image in data["images"]:
        mine = [[e for e in entries if e["image_id"] == image["id"]] for entries in (results, data["annotations"])]
        found, there = (objects(entries) for entries in mine)
        found["masks"] = [coco_mask.decode(mask).astype(bool) for mask in found["masks"]]
        found["scores"] = [entry["score"] for entry in mine[0]]
        there |= {name: [entry[name] for entry in mine[1]] for name in ("iscrowd", "area")}
        yield found, {**there, "image_id": image["id"]}


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools_however_images_are_split(seed):
    data, results = made_data_set(seed)
    pairs = list(as_batches(data, results))
    shares = [load_metric("coco_average_precision", iou_types=["bbox", "segm"]) for _ in range(2)]
    for index, (found, there) in enumerate(pairs):
        shares[index % 2].add_batch(predictions=[found], references=[there])
    shares[0].records += shares[1].records  # what the processes of a run do
    split = shares[0].compute()
    whole = load_metric("coco_average_precision", iou_types=["bbox", "segm"]).compute(
        predictions=[found for found, _ in pairs], references=[there for _, there in pairs]
    )
    np.testing.assert_equal(split, whole)
    for iou_type in ("bbox", "segm"):
        expected = pycocotools_alone(data, results, iou_type)
        assert 0.05 < expected[0] < 0.95
        observed = [value for name, value in whole.items() if name.startswith(iou_type)][:12]
        np.testing.assert_array_equal(observed, expected)
        per_category = whole[f"{iou_type}_ap_per_category"]
        assert np.isnan(per_category[91]) and np.nanmean(list(per_category.values())) == pytest.approx(expected[0])


def test_by_hand():
    """One object found exactly, one missed, one detection of nothing that is trusted less: half of the recall."""
    truth = {"boxes": [[10, 10, 60, 60], [80, 80, 100, 100]], "labels": [4, 4]}
    found = {"boxes": [[10, 10, 60, 60], [0, 90, 30, 119]], "labels": [4, 4], "scores": [0.9, 0.3]}
    metric = load_metric("coco_average_precision")
    result = metric.compute(predictions=[found], references=[truth])
    assert result["bbox_ap"] == pytest.approx(51 / 101)  # precision 1 at the recalls 0.00 to 0.50
    assert result["bbox_ar100"] == 0.5
    assert result["bbox_ap_small"] == 0.0 and result["bbox_ap_medium"] == pytest.approx(1.0)
    assert np.isnan(result["bbox_ap_large"])
    nothing = {"boxes": [], "labels": [], "scores": []}
    assert metric.compute(predictions=[nothing], references=[truth])["bbox_ap"] == 0.0
    assert np.isnan(metric.compute(predictions=[nothing], references=[nothing])["bbox_ap"])


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ({"boxes": [[0, 0, 1, 1]], "labels": [1], "scores": []}, {}, "but 0 scores"),
        ({"boxes": [[0, 0, 1, 1]], "labels": [], "scores": []}, {}, "0 labels, but 1 boxes"),
        ({}, {"boxes": [], "labels": [2]}, "1 labels, but 0 boxes"),
    ],
)
def test_impossible_objects_are_refused(prediction, reference, message):
    empty = {"boxes": [], "labels": []}
    with pytest.raises(ValueError, match=message):
        load_metric("coco_average_precision").add_batch(
            predictions=[{**empty, "scores": [], **prediction}], references=[{**empty, **reference}]
        )


def test_an_image_counts_once():
    metric, empty = load_metric("coco_average_precision"), {"boxes": [], "labels": [], "scores": []}
    metric.add_batch(predictions=[empty] * 2, references=[{**empty, "image_id": 5}] * 2)
    with pytest.raises(ValueError, match="image 5 was added twice"):
        metric.compute()
    with pytest.raises(ValueError, match="iou_types must be"):
        load_metric("coco_average_precision", iou_types=["keypoints"])


def test_the_module_stands_alone():
    """It can be pushed as it is: it needs nothing of this repository."""
    source = (ROOT / "training/metrics/coco_average_precision/coco_average_precision.py").read_text()
    assert "from training" not in source and "import training" not in source
