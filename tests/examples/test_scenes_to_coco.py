import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from examples.digits.scenes import make_scenes
from examples.digits.scenes_to_coco import find_pieces, write_coco


def test_pieces_are_those_that_hang_together():
    labels = np.zeros((20, 30), np.uint8)
    labels[2:10, 2:10], labels[2:10, 12:20], labels[15:17, 2:4] = 4, 4, 7
    pieces = find_pieces(Image.fromarray(labels))
    assert [(label, mask.sum()) for label, mask in pieces] == [(4, 64), (4, 64)]  # the last one is too small
    assert (pieces[0][1][2:10, 2:10]).all() and (pieces[1][1][2:10, 12:20]).all()


def test_annotations_cover_the_digits(tmp_path):
    scenes = make_scenes(train_size=6, validation_size=3)
    write_coco(scenes, tmp_path / "coco")
    content = json.loads((tmp_path / "coco" / "annotations" / "instances_train.json").read_text())
    assert [category["name"] for category in content["categories"]] == [str(digit) for digit in range(10)]
    for image, row in zip(content["images"], scenes["train"], strict=True):
        stored = Image.open(tmp_path / "coco" / "train" / image["file_name"])
        assert np.array_equal(np.asarray(stored), np.asarray(row["image"]))
        objects = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        masks = [coco_mask.decode(entry["segmentation"]) for entry in objects]
        digits = np.asarray(row["segmentation"])
        assert np.sum(masks, axis=0)[digits > 0].mean() > 0.95 and np.sum(masks, axis=0).max() == 1
        assert {entry["category_id"] for entry in objects} == {row["label"] + 1}
        for entry, mask in zip(objects, masks, strict=True):
            rows, columns = mask.nonzero()
            left, top, width, height = entry["bbox"]
            assert (columns.min(), rows.min()) == (left, top)
            assert (columns.max() + 1, rows.max() + 1) == (left + width, top + height)
