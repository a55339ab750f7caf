"""COCO average precision of boxes and masks, by pycocotools, as an `evaluate` module that works offline.

`evaluate.load("training/metrics/coco_average_precision", iou_types=["bbox", "segm"])`
"""

import contextlib
import io
import itertools
from typing import Any

import datasets
import evaluate
import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# In the order of `COCOeval.stats`.
STATISTICS: tuple[str, ...] = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
STATISTICS += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")


class COCOAveragePrecision(evaluate.Metric):
    """The twelve numbers of COCO for every kind of overlap.

    `records` holds one entry an image, masks run-length encoded: entries of several processes can be put in one list.

    Args:
        iou_types: "bbox", "segm" or both.
    """

    def __init__(self, *args, iou_types: list[str] | tuple[str, ...] = ("bbox",), **kwargs):
        super().__init__(*args, **kwargs)
        if not iou_types or set(iou_types) - {"bbox", "segm"}:
            raise ValueError(f"iou_types must be 'bbox', 'segm' or both, got {list(iou_types)}.")
        self.iou_types, self.records = tuple(iou_types), list[Any]()

    def _info(self) -> evaluate.MetricInfo:
        objects = {
            "boxes": datasets.Sequence(datasets.Sequence(datasets.Value("float64"))),
            "labels": datasets.Sequence(datasets.Value("int64")),
        }
        scores = {"scores": datasets.Sequence(datasets.Value("float64"))}
        return evaluate.MetricInfo(
            description="Average precision as in COCO: the mean over overlaps from 0.5 to 0.95, and its companions.",
            citation="",
            inputs_description=(
                "predictions: one dict an image: boxes (n, 4) as [left, top, right, bottom] in pixels, labels (n,), "
                "scores (n,), and for segm masks: (n, height, width) of bool, or run-length encodings of pycocotools. "
                "references: one dict an image: boxes, labels, masks likewise, and where known iscrowd (n,), area (n,) "
                "and image_id."
            ),
            features=datasets.Features({"predictions": {**objects, **scores}, "references": objects}),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Note the objects that were found in each image, and those that are there.

        Raises:
            ValueError: Where the lists, or the fields of one image, differ in length.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions do not fit {len(references)} references.")
        for prediction, reference in zip(predictions, references, strict=True):
            found, there = self._objects(prediction, ("scores",)), self._objects(reference, ("iscrowd", "area"))
            if len(found["scores"]) != len(found["labels"]):
                raise ValueError(f"A prediction has {len(found['labels'])} boxes, but {len(found['scores'])} scores.")
            self.records.append((reference.get("image_id"), found, there))

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """One prediction with its reference."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict:
        """`bbox_ap`, `bbox_ap50`, … `segm_ar_large`, and `bbox_ap_per_category`, a dict from label to AP; in 0 to 1.

        nan where there is no such object. Areas are those that references name, else those of masks or boxes. Starts
        anew afterwards. Raises ValueError where an image occurs twice.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        records, self.records = self.records, []
        # Equal scores are ranked by the order of images, which must not depend on who saw which image.
        records = [(number if key is None else key, *rest) for number, (key, *rest) in enumerate(records)]
        records.sort(key=lambda record: record[0])
        for (earlier, *_), (later, *_) in itertools.pairwise(records):
            if earlier == later:
                raise ValueError(f"The image {later!r} was added twice.")
        results: dict[str, Any] = {}
        for iou_type in self.iou_types:
            results |= _evaluate(records, iou_type)
        return results

    def _objects(self, image: dict, optional: tuple[str, ...]) -> dict[str, list]:
        labels = np.asarray(image["labels"], np.int64).reshape(-1).tolist()
        boxes = np.asarray(image["boxes"], np.float64).reshape(-1, 4)
        objects = {"labels": labels, "boxes": np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()}
        if "segm" in self.iou_types:
            objects["masks"] = [_encode(mask) for mask in image["masks"]]
        objects |= {name: np.asarray(image[name]).reshape(-1).tolist() for name in optional if name in image}
        for name, values in objects.items():
            if len(values) != len(labels):
                raise ValueError(f"An image has {len(labels)} labels, but {len(values)} {name}.")
        return objects


def _encode(mask) -> dict:
    """A mask (height, width), or its run-length encoding, as such an encoding."""
    if isinstance(mask, dict):
        return mask
    return coco_mask.encode(np.asfortranarray(np.asarray(mask), np.uint8))


def _evaluate(records: list[tuple[int, dict, dict]], iou_type: str) -> dict:
    truth, results, images = list[dict](), list[dict](), list[dict]()
    for number, (_, found, there) in enumerate(records):
        masks = found.get("masks", []) + there.get("masks", [])
        height, width = masks[0]["size"] if masks else (0, 0)  # read for masks alone
        images.append({"id": number, "height": height, "width": width})
        for index, label in enumerate(there["labels"]):
            annotation = {"id": len(truth) + 1, "image_id": number, "category_id": label}
            annotation["bbox"] = there["boxes"][index]
            annotation["iscrowd"] = int(there["iscrowd"][index]) if "iscrowd" in there else 0
            if "masks" in there:
                annotation["segmentation"] = there["masks"][index]
                annotation["area"] = float(coco_mask.area(there["masks"][index]))
            else:
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
            if "area" in there:
                annotation["area"] = there["area"][index]
            truth.append(annotation)
        for index, label in enumerate(found["labels"]):
            result = {"image_id": number, "category_id": label, "score": found["scores"][index]}
            # One of the two: pycocotools takes the area of a result from what it finds.
            shape = {"bbox": found["boxes"][index]} if iou_type == "bbox" else {"segmentation": found["masks"][index]}
            results.append(result | shape)
    labels = sorted({entry["category_id"] for entry in (*truth, *results)})
    with contextlib.redirect_stdout(io.StringIO()):
        references, predictions = COCO(), COCO()
        references.dataset = {"images": images, "annotations": truth, "categories": [{"id": label} for label in labels]}
        references.createIndex()
        if results:
            predictions = references.loadRes(results)
        evaluation = COCOeval(references, predictions, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # (overlaps, recalls, categories, areas, numbers of detections): all areas, and as many detections as allowed.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_category = {label: _mean(precision[:, :, index]) for index, label in enumerate(labels)}
    values: dict[str, Any] = {name: _mean(value) for name, value in zip(STATISTICS, evaluation.stats, strict=True)}
    values["ap_per_category"] = per_category
    return {f"{iou_type}_{name}": value for name, value in values.items()}


def _mean(values: np.ndarray) -> float:
    """Mean without the places where nothing could be found, which pycocotools marks -1."""
    values = np.atleast_1d(values)
    values = values[values > -1]
    return float(values.mean()) if values.size else float("nan")
