"""Annotated images as people have them: nothing vanishes, nothing is misread, and what is left out is named."""

import io
import json
import math
import os
import unicodedata

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image
from pycocotools import mask as coco_mask

from training.data import sample_randomness
from training.data.images import decode_image
from training.engine.arguments import build_arguments
from training.tasks.detection import (
    DetectionAugmentation,
    DetectionDataArguments,
    DetectionTransform,
    EvaluationCollator,
    load_detection_splits,
    read_coco,
    read_objects,
)
from training.tasks.detection.segmentations import check_segmentation, run_lengths, turn_points

ZERO, ONE = [0.0] * 3, [1.0] * 3
SQUARE = [[10, 10, 50, 10, 50, 40, 10, 40]]
ANNOTATION = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 30], "segmentation": SQUARE}


def write(folder, annotations, images=None, categories=None, files=None, **content):
    """A COCO dataset of two splits that are alike; a.png is 96 wide and 80 high. Returns the annotation file."""
    files = files or {"a.png": Image.new("RGB", (96, 80))}
    images = images or [{"id": 1, "file_name": "a.png", "width": 96, "height": 80}]
    content = {
        "images": images,
        "annotations": [ANNOTATION | entry for entry in annotations],
        "categories": categories or [{"id": 1, "name": "cup"}],
        **content,
    }
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        for name, image in files.items():
            if isinstance(image, bytes):
                (folder / split / name).write_bytes(image)
            else:
                image.save(folder / split / name)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder / "annotations" / "instances_train2017.json"


def load(folder, masks=True, **settings):
    return load_detection_splits(build_arguments(DetectionDataArguments, {"dataset": str(folder), **settings}), masks)


def transformed(image, objects, masks=False, seed=0, **augmentation):
    """Pixels and target after augmentation without mean and standard deviation."""
    with sample_randomness(seed):
        return DetectionTransform(DetectionAugmentation(**augmentation), masks, ZERO, ONE)(image, objects)


def boxes_of(split, row=0):
    return read_objects(split[row]["image"], split[row]["objects"], masks=False)["boxes"].tolist()


@pytest.mark.parametrize(
    ("size", "box", "sides", "expected"),
    [
        ((500, 375), (3, 4, 497, 371), {}, [6.396, 8.533, 1066, 800]),  # 375 px become 800.00006
        ((100, 80), (90, 10, 10.5, 20), {"shortest_sides": [64], "longest_side": 107}, [72, 8, 80, 24]),
        ((100, 80), (-3, 10, 20, 20), {"shortest_sides": [64], "longest_side": 107}, [0, 8, 13.6, 24]),
        ((100, 80), (90, 10, 20, 20), {"shortest_sides": [64], "longest_side": 107}, [72, 8, 80, 24]),
        ((100, 80), (-9, -9, 300, 300), {"shortest_sides": [64], "longest_side": 107}, [0, 0, 80, 64]),
    ],
)
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_at_the_edge_are_cut_there(size, box, sides, expected, flip):
    x, y, width, height = box
    entry = {"box": [x, y, x + width, y + height], "label": 0, "iscrowd": 0, "area": width * height}
    objects = json.dumps({"image_id": 1, "size": size, "annotations": [entry]})
    pixels, target = transformed(Image.new("RGB", size), objects, horizontal_flip=flip, **sides)
    if flip:
        expected = [pixels.shape[2] - expected[2], expected[1], pixels.shape[2] - expected[0], expected[3]]
    torch.testing.assert_close(target["boxes"], torch.tensor([expected]).float(), rtol=0, atol=1e-2)
    assert target["labels"].tolist() == [0]


def test_what_is_left_out_is_counted_and_named(tmp_path):
    """And what is kept is trained on, however small the image becomes."""
    boxes = {
        1: [20, 20, 40, 30],
        2: [20, 20, 0, 30],
        3: [20, 20, 40, 0],
        4: [96, 20, 40, 30],
        5: [20, -50, 40, 30],
        6: [20, 20, 0.5, 30],
        7: [95.5, 20, 40, 30],
        8: [80, 20, 40, 30],
        9: [20, 20, 1, 1],
    }
    entries = [{"id": number, "bbox": box} for number, box in boxes.items()]
    entries += [{"id": 10, "iscrowd": 1}, {"id": 11, "area": -4}, {"id": 12, "image_id": 2, "bbox": [0, 0, 0, 0]}]
    write(
        tmp_path,
        entries,
        images=[{"id": n, "file_name": "a.png", "width": 96, "height": 80} for n in (1, 2)],
        categories=[{"id": 1, "name": "cup"}, {"id": 2, "name": "unseen"}],
    )
    splits = load(tmp_path, masks=False)
    both = [
        "areas that are not positive, replaced by those of the boxes (1): annotation 11.",
        "boxes without area, left out (3): annotation 2, annotation 3, annotation 12.",
        "boxes outside of their image, left out (2): annotation 4, annotation 5.",
        "boxes that reach over the edge of their image, cut there in training (2): annotation 7, annotation 8.",
    ]
    training = [
        "boxes of less than a pixel, left out of training (2): annotation 6, annotation 7.",
        "crowds, left out of training (1): annotation 10.",
        "images without an object, left out of training (1): a.png.",
        "categories without an object to learn from (1): unseen.",
    ]
    expected = [f"instances_train2017.json: {text}" for text in (*both, *training)]
    assert sorted(splits.notes) == sorted(expected + [f"instances_val2017.json: {text}" for text in both])
    kept = [1, 8, 9, 11]
    assert boxes_of(splits.train) == [
        [x, y, x + width, y + height] for x, y, width, height in ((boxes | {11: [10, 10, 40, 30]})[n] for n in kept)
    ]
    assert len(boxes_of(splits.validation)) == len(kept) + 3  # evaluation has the small ones and the crowd
    row = splits.train[0]
    _, target = transformed(row["image"], row["objects"], shortest_sides=[8], longest_side=10)
    assert len(target["boxes"]) == len(kept)


@pytest.mark.parametrize("side", [37, 64, 137])
def test_masks_keep_their_place_when_resized(side):
    """On average over places, masks lie where their boxes lie: neither is shifted by a part of a pixel."""
    shifts = []
    for left in range(5, 65):
        polygon = [[left, left, left + 31, left, left + 31, left + 31, left, left + 31]]
        entry = {
            "box": [left, left, left + 31, left + 31],
            "label": 0,
            "iscrowd": 0,
            "area": 961,
            "segmentation": polygon,
        }
        objects = json.dumps({"image_id": 1, "size": [100, 100], "annotations": [entry]})
        sides = {"shortest_sides": [side], "longest_side": side, "horizontal_flip": 0.0}
        _, target = transformed(Image.new("RGB", (100, 100)), objects, masks=True, **sides)
        rows, columns = target["masks"][0].nonzero().float().T + 0.5
        box = target["boxes"][0]
        shifts.append([columns.mean() - (box[0] + box[2]) / 2, rows.mean() - (box[1] + box[3]) / 2])
    assert torch.tensor(shifts).mean(dim=0).abs().max() < 0.1


def test_an_image_of_one_line_is_resized(tmp_path):
    write(
        tmp_path,
        [{"bbox": [10, 0, 40, 1]}],
        images=[{"id": 1, "file_name": "a.png", "width": 4000, "height": 1}],
        files={"a.png": Image.new("RGB", (4000, 1))},
    )
    row = load(tmp_path, masks=False).train[0]
    pixels, target = transformed(row["image"], row["objects"])
    assert pixels.shape == (3, 1, 1333) and len(target["boxes"]) == 1


def test_names_that_are_many_are_cut(tmp_path):
    write(tmp_path, [{}, *({"id": 20 + n, "bbox": [1, 1, 0, 0]} for n in range(5))])
    assert load(tmp_path).notes[0].endswith("left out (5): annotation 20, annotation 21, annotation 22, …")


def in_mode(mode):
    """An encoded image of this mode whose values need care."""
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 1024, (64, 1))
    gray, options = Image.fromarray((ramp >> 8).astype(np.uint8)), {}
    if mode in ("RGBA", "LA"):
        image = gray.convert(mode)
        image.putalpha(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None] * 4, (1, 64))))
    elif mode == "P":
        image, options = gray.convert("P"), {"transparency": 0}
    elif mode == "I;16":
        image = Image.fromarray(ramp)
    elif mode == "F":
        image = Image.fromarray((ramp / 65535).astype(np.float32))
    elif mode == "I":
        image = Image.fromarray(ramp.astype(np.int32))
    else:
        image = gray.convert(mode)
    file = io.BytesIO()
    image.save(file, {"CMYK": "JPEG", "F": "TIFF", "I": "TIFF"}.get(mode, "PNG"), **options)
    assert Image.open(file).mode == mode
    return file.getvalue()


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "LA", "RGBA", "P", "CMYK", "L", "RGB"])
def test_evaluation_sees_the_pixels_of_training(mode):
    content = in_mode(mode)
    objects = json.dumps({"image_id": 1, "size": [64, 64], "annotations": []})
    sides = {"shortest_sides": [64], "longest_side": 64, "horizontal_flip": 0.0}
    training, _ = transformed(decode_image(content, rgb=True), objects, **sides)
    (evaluation,), _ = EvaluationCollator(False, ZERO, ONE)([(decode_image(content), objects)])
    assert torch.equal(training, evaluation) and 0.05 < training.std()


REFUSED = {
    "a list of points": ([[[10, 10], [50, 10], [50, 40]]], "a polygon that is not a flat list of numbers"),
    "one flat list": (SQUARE[0], "a polygon that is not in a list of polygons"),
    "points as dicts": ([{"x": 1, "y": 2}], "a polygon that is not a flat list of numbers"),
    "text": (["10, 10, 50, 10, 50, 40"], "a polygon that is not a flat list of numbers"),
    "numbers as text": ([["10", "10", "50", "10", "50", "40"]], "a polygon that is not a flat list of numbers"),
    "an odd number": ([SQUARE[0][:-1]], "a polygon of 7 numbers"),
    "nan": ([[math.nan, 10, 50, 10, 50, 40]], "a coordinate that is not finite"),
    "beyond a float": ([[10**400, 10, 50, 10, 50, 40]], "a coordinate that is not finite"),
    "far outside": ([[10, 10, 1e9, 10, 50, 40]], "reaches from x = 10 to 1000000000.0"),
    "a number": (5, "a segmentation of type int"),
    "run lengths without size": ({"counts": "abc"}, "run lengths without size"),
    "run lengths without counts": ({"size": [80, 96]}, "run lengths without counts"),
    "another size": ({"size": [80, 90], "counts": [0, 7200]}, r"run lengths of size \[80, 90\], but .* \[80, 96\]"),
    "width before height": ({"size": [96, 80], "counts": [0, 7680]}, r"run lengths of size \[96, 80\]"),
    "an early end": ({"size": [80, 96], "counts": [5, 10]}, "sum to 15, but its image has 7680 pixels"),
    "a late end": ({"size": [80, 96], "counts": [0, 7681]}, "sum to 7681"),
    "a negative count": ({"size": [80, 96], "counts": [7690, -10]}, "a negative count"),
    "fractions": ({"size": [80, 96], "counts": [7680.0]}, "no list of whole numbers"),
    "counts of None": ({"size": [80, 96], "counts": None}, "counts of type NoneType"),
    "text that ends early": ({"size": [80, 96], "counts": "5:"}, "sum to 15"),
    "text within a number": ({"size": [80, 96], "counts": "5P"}, "no text of COCO's encoding"),
    "text of others": ({"size": [80, 96], "counts": "5 10 ü"}, "no text of COCO's encoding"),
    "text that goes on": ({"size": [80, 96], "counts": "o" * 40 + "0"}, "no text of COCO's encoding"),
    "no text": ({"size": [80, 96], "counts": ""}, "no text of COCO's encoding"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_segmentations_that_cannot_be_decoded_are_refused(name, tmp_path):
    segmentation, message = REFUSED[name]
    file = write(tmp_path, [{"segmentation": segmentation}])
    with pytest.raises(ValueError, match=f"^The annotation 7 of {file} has .*{message}") as caught:
        read_coco(tmp_path / "train2017", file, masks=True)
    assert "\n" not in str(caught.value)
    assert len(read_coco(tmp_path / "train2017", file, masks=False).objects[0]["annotations"]) == 1


@pytest.mark.parametrize(
    "segmentation",
    [
        [[10, 10, 50, 40]],
        [[10, 10]],
        [[10, 10, 10, 20, 10, 30]],
        [[100, 10, 120, 10, 110, 40]],
        {"size": [80, 96], "counts": [7680]},
        {"size": [80, 96], "counts": coco_mask.encode(np.zeros((80, 96), np.uint8, order="F"))["counts"].decode()},
    ],
)
def test_segmentations_that_cover_nothing_are_left_out(segmentation, tmp_path):
    write(tmp_path, [{}, {"id": 8, "segmentation": segmentation}])
    splits = load(tmp_path)
    assert len(boxes_of(splits.train)) == len(boxes_of(splits.validation)) == 1
    assert splits.notes[0].endswith("segmentations that cover nothing of their image, left out (1): annotation 8.")


def test_polygons_that_cover_nothing_are_left_out_alone(tmp_path):
    write(tmp_path, [{"segmentation": [*SQUARE, [], [10, 10], [5, 5, 9, 9]]}])
    splits = load(tmp_path)
    assert splits.notes[0].endswith("polygons that cover nothing, used without these (1): annotation 7.")
    row = splits.train[0]
    _, target = transformed(row["image"], row["objects"], masks=True, shortest_sides=[80], horizontal_flip=0.0)
    assert target["masks"].sum() == 40 * 30 and target["masks"][0, 10:40, 10:50].all()


@pytest.mark.parametrize("empty", [None, [], {}, [[]], ""])
def test_objects_without_segmentation_are_refused_for_masks(empty, tmp_path):
    file = write(tmp_path, [{"segmentation": empty}])
    with pytest.raises(ValueError, match=r"annotation 7 .* has no segmentation: give --masks false"):
        read_coco(tmp_path / "train2017", file, masks=True)


def test_run_lengths_of_every_mask_are_taken():
    """Text as pycocotools writes it, whole: without its last character it is none."""
    rng = np.random.default_rng(0)
    for number in range(60):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        height *= 1 + 200 * (number % 2)  # long runs take several characters
        mask = np.asfortranarray(rng.random((height, width)) < rng.choice([0.01, 0.5, 0.99]), np.uint8)
        mask[0, 0] = 1
        runs = coco_mask.encode(mask)
        for counts in (runs["counts"], runs["counts"].decode()):
            kept, _ = check_segmentation({"size": [height, width], "counts": counts}, (width, height))
            assert np.array_equal(coco_mask.decode(run_lengths(kept, (width, height))), mask)
        with pytest.raises(ValueError, match="run lengths"):
            check_segmentation({"size": [height, width], "counts": runs["counts"][:-1]}, (width, height))


def changed(**values):
    return lambda content: content["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(bbox=[1, 2, math.nan, 4]), r"annotation 7 .* has the box \[1, 2, nan, 4\]"),
        (changed(bbox=["1", "2", "3", "4"]), "has the box"),
        (changed(bbox=[1, 2, 3, True]), "has the box"),
        (changed(bbox=[[1, 2], [3, 4]]), "has the box"),
        (changed(bbox={"x": 1}), "has the box"),
        (changed(bbox=None), "has the box None"),
        (changed(iscrowd="no"), "has iscrowd 'no', which is neither 0 nor 1"),
        (changed(area="large"), "has the area 'large', which is no number"),
        (changed(image_id=[1]), r"belongs to image \[1\]"),
        (changed(image_id="1"), "belongs to image '1'"),
        (changed(category_id=None), "has category None"),
        (
            lambda c: c["annotations"][0].pop("id") and c["annotations"][0].pop("bbox"),
            "annotation at place 0 .* box None",
        ),
        (lambda c: c["annotations"].append("x"), "does not hold objects in 'annotations'"),
        (lambda c: c.pop("images"), "has no 'images'"),
        (lambda c: c["images"][0].pop("file_name"), "image 1 .* has no file_name"),
        (lambda c: c["images"][0].pop("id"), "an image with the id None"),
        (lambda c: c["images"].append({"id": "b", "file_name": "a.png"}), "an image with the id 'b'"),
        (lambda c: c["images"][0].update(width=80, height=96), r"for an image of \[80, 96\] .* a.png .* \[96, 80\]"),
        (lambda c: c.update(categories=[]), "lists no categories with 'id'"),
        (lambda c: c["categories"][0].pop("name"), "lists no categories with 'name'"),
        (lambda c: c["categories"].append({"id": 1, "name": "b"}), "several categories with the id 1"),
        (lambda c: c["categories"].append({"id": 2, "name": "cup"}), "several categories with the name 'cup'"),
        (lambda c: c["categories"].append({"id": "2", "name": "b"}), "with numbers and with text as ids"),
    ],
)
def test_files_of_other_kinds_are_one_sentence(change, message, tmp_path):
    file = write(tmp_path, [{}])
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        read_coco(tmp_path / "train2017", file, masks=False)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "is not a COCO annotation file .*: it holds a list"),
        ("{", "is not JSON"),
        ("[" * 99999, "is not JSON that can be read: it is nested too deeply"),
    ],
)
def test_files_without_annotations_are_one_sentence(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_coco(tmp_path, tmp_path / "a.json", masks=False)


def test_annotations_of_one_id_are_not_lost(tmp_path):
    entries = [{}, {"bbox": [1, 1, 9, 9]}, {}, {"id": 8}, {"image_id": 2}]
    images = [{"id": n, "file_name": "a.png", "width": 96, "height": 80} for n in (1, 2)]
    splits = load_notes(write(tmp_path, entries, images=images))
    assert [len(image["annotations"]) for image in splits.objects] == [3, 1]
    assert splits.notes.found == {
        "annotations that have the id of another, kept": ["annotation 7"] * 2,
        "annotations that repeat another, left out": ["annotation 7"],
    }


def load_notes(file):
    return read_coco(file.parents[1] / "train2017", file, masks=True)


def test_files_of_windows_are_read(tmp_path):
    """A byte order mark, and folders separated by backslashes; UTF-16 is named."""
    file = write(tmp_path, [{}], images=[{"id": 1, "file_name": "in\\a.png", "width": 96, "height": 80}])
    (tmp_path / "train2017" / "in").mkdir()
    (tmp_path / "train2017" / "a.png").rename(tmp_path / "train2017" / "in" / "a.png")
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert load_notes(file).images[0]["image"].size == (96, 80)
    file.write_text(file.read_text(encoding="utf-8-sig"), encoding="utf-16")
    with pytest.raises(ValueError, match="is in UTF-16"):
        load_notes(file)


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_form_are_found(listed, stored, tmp_path):
    """As after a detour over macOS."""
    names = [unicodedata.normalize(form, "Caf\u00e9.png") for form in (listed, stored)]
    file = write(
        tmp_path,
        [{}],
        images=[{"id": 1, "file_name": names[0], "width": 96, "height": 80}],
        files={names[1]: Image.new("RGB", (96, 80))},
    )
    assert load_notes(file).images[0]["image"].size == (96, 80)


def test_names_in_latin_1_are_one_sentence(tmp_path):
    file = write(tmp_path, [{}], images=[{"id": 1, "file_name": "Caf\u00e9.png"}])
    folder = os.fsencode(tmp_path / "train2017")
    os.rename(folder + b"/a.png", folder + b"/Caf\xe9.png")
    with pytest.raises(ValueError, match=r"The name of the file Caf\u00e9.png in .* is not in UTF-8: rename it"):
        load_notes(file)


@pytest.mark.parametrize("size", [{}, {"width": None, "height": None}, {"width": 0, "height": 0}])
def test_sizes_that_the_file_lacks_are_those_of_the_images(size, tmp_path):
    file = write(tmp_path, [{}], images=[{"id": 1, "file_name": "a.png", **size}])
    read = load_notes(file)
    assert read.objects[0]["size"] == [96, 80]
    assert read.notes.found == {"images without width and height, whose size is taken from their file": ["a.png"]}
    file.write_text(file.read_text().replace("[[10, 10, 50", "[[10, 10, 500"))
    with pytest.raises(ValueError, match=r"annotation 7 .* reaches from x = 10 to 500"):
        load_notes(file)


def test_damaged_images_are_left_to_the_reader_of_images(tmp_path):
    """Who skips them, and counts them; without a size in the file, their objects are left out at once."""
    images = [{"id": n, "file_name": f"{n}.png", "width": 96, "height": 80} for n in (1, 2)]
    images.append({"id": 3, "file_name": "2.png"})
    files = {"1.png": Image.new("RGB", (96, 80)), "2.png": b"damaged"}
    read = load_notes(write(tmp_path, [{"id": n, "image_id": n} for n in (1, 2, 3)], images=images, files=files))
    assert [len(image["annotations"]) for image in read.objects] == [1, 1, 0]
    assert read.notes.found["images that cannot be read, without their objects"] == ["2.png"]


def photo(orientation, size=(60, 40)):
    """A file of these stored pixels, of which some, at `BLOCK`, are white, that says how to turn them."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    left, top, width, height = BLOCK
    pixels[top : top + height, left : left + width] = 255
    image, file = Image.fromarray(pixels), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


BLOCK = (7, 5, 20, 8)
"""Left, top, width and height in the stored pixels."""


def block_of(row):
    """The white pixels of an image, as a box."""
    rows, columns = (np.asarray(row["image"])[..., 0] > 127).nonzero()
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def stored_segmentation(kind, size):
    mask = np.zeros(size[::-1], np.uint8, order="F")
    left, top, width, height = BLOCK
    mask[top : top + height, left : left + width] = 1
    right, bottom = left + width, top + height
    if kind == "polygon":
        return [[left, top, right, top, right, bottom, left, bottom]]
    return {"size": list(size[::-1]), "counts": coco_mask.encode(mask)["counts"].decode()}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["polygon", "run lengths"])
@pytest.mark.parametrize("with_size", [True, False])
def test_annotations_of_the_stored_pixels_turn_with_them(orientation, kind, with_size, tmp_path):
    """As tools that ignore EXIF make them. Without sizes, run lengths tell."""
    size = (60, 40)
    image = {"id": 1, "file_name": "a.png"} | ({"width": 60, "height": 40} if with_size else {})
    write(
        tmp_path,
        [{"bbox": BLOCK, "segmentation": stored_segmentation(kind, size)}],
        images=[image],
        files={"a.png": photo(orientation)},
    )
    splits = load(tmp_path)
    row, known = splits.train[0], with_size or kind == "run lengths"
    if orientation in (1, 5, 6, 7, 8) and known:
        assert boxes_of(splits.train)[0] == block_of(row)
        _, target = transformed(row["image"], row["objects"], masks=True, shortest_sides=[40], horizontal_flip=0.0)
        assert np.array_equal(target["masks"][0], np.asarray(row["image"])[..., 0] > 127)
    notes = " ".join(splits.notes)
    assert ("are for the stored pixels, turned with them (1): a.png" in notes) == (orientation > 4 and known)
    assert ("taken as for the turned image; give --label_orientation stored" in notes) == (
        orientation > 1 and not (orientation > 4 and known)
    )


@pytest.mark.parametrize("orientation", range(2, 9))
def test_points_turn_as_pixels_do(orientation):
    turned = decode_image(photo(orientation))
    left, top, width, height = BLOCK
    x1, y1, x2, y2 = turn_points([left, top, left + width, top + height], (60, 40), orientation)
    assert [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)] == block_of({"image": turned})


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_of_the_upright_image_stay(orientation, tmp_path):
    image = decode_image(photo(orientation))
    left, top, right, bottom = block_of({"image": image})
    box = [int(side) for side in (left, top, right - left, bottom - top)]
    images = [{"id": 1, "file_name": "a.png", "width": image.width, "height": image.height}]
    write(tmp_path, [{"bbox": box}], images=images, files={"a.png": photo(orientation)})
    splits = load(tmp_path, masks=False)
    assert boxes_of(splits.train)[0] == [left, top, right, bottom] and splits.notes == []


def test_a_square_image_that_exif_turns_is_named(tmp_path):
    images = [{"id": 1, "file_name": "a.png", "width": 60, "height": 60}]
    write(tmp_path, [{"bbox": BLOCK}], images=images, files={"a.png": photo(6, (60, 60))})
    splits = load(tmp_path, masks=False)
    assert "EXIF" in splits.notes[0] and "--label_orientation" in splits.notes[0] and "a.png" in splits.notes[0]
    left, top, width, height = BLOCK
    assert boxes_of(splits.train)[0] == [left, top, left + width, top + height]
    splits = load(tmp_path, masks=False, label_orientation="stored")
    assert boxes_of(splits.train)[0] == block_of(splits.train[0]) and "turned with them" in splits.notes[0]
    assert load(tmp_path, masks=False, label_orientation="turned").notes == []


def test_another_size_names_both_sizes_of_a_turned_image(tmp_path):
    images = [{"id": 1, "file_name": "a.png", "width": 50, "height": 30}]
    write(tmp_path, [{"bbox": BLOCK}], images=images, files={"a.png": photo(6)})
    with pytest.raises(
        ValueError, match=r"of \[50, 30\] pixels, but a.png .* \[40, 60\], \[60, 40\] before EXIF turns"
    ):
        load(tmp_path, masks=False)


def save_objects(folder, objects, feature, images=None):
    """A dataset with the column `objects`, its two splits alike."""
    images = images or [Image.new("RGB", (32, 32))] * len(objects)
    features = Features({"image": datasets.Image(), "objects": feature})
    rows = Dataset.from_dict({"image": images, "objects": objects}, features=features)
    DatasetDict(train=rows, validation=rows).save_to_disk(folder)


BOXES = List(List(Value("float32")))
LABELS = List(ClassLabel(names=["cup", "dog"]))
HUB = {"train_split": "train", "validation_split": "validation", "masks": False}


@pytest.mark.parametrize("field", ["category", "category_id", "label", "categories", "labels"])
@pytest.mark.parametrize("box_field", ["bbox", "boxes"])
def test_objects_have_their_category_under_several_names(field, box_field, tmp_path):
    save_objects(tmp_path / "a", [{box_field: [[1, 2, 3, 4]], field: [1]}] * 2, {box_field: BOXES, field: LABELS})
    splits = load(tmp_path / "a", **HUB)
    assert boxes_of(splits.train) == [[1, 2, 4, 6]]
    assert [category["name"] for category in splits.categories] == ["cup", "dog"]
    assert json.loads(splits.train[0]["objects"])["annotations"][0]["label"] == 1


@pytest.mark.parametrize("names", [["cup", "dog"], "file", None])
def test_categories_as_text_are_looked_up(names, tmp_path):
    if names == "file":
        (tmp_path / "names.json").write_text('{"0": "cup", "1": "dog"}')
        names = str(tmp_path / "names.json")
    objects = [{"bbox": [[1, 2, 3, 4]], "category": ["dog"]}, {"bbox": [[1, 2, 3, 4]], "category": ["cup"]}]
    save_objects(tmp_path / "a", objects, {"bbox": BOXES, "category": List(Value("string"))})
    splits = load(tmp_path / "a", **HUB, label_names=names)
    assert [json.loads(row)["annotations"][0]["label"] for row in splits.train["objects"]] == [1, 0]
    assert [category["name"] for category in splits.categories] == ["cup", "dog"]


def test_objects_of_a_list_of_dicts_and_of_none(tmp_path):
    feature = List(
        {"bbox": List(Value("float32")), "category": ClassLabel(names=["cup", "dog"]), "iscrowd": Value("bool")}
    )
    objects = [[{"bbox": [1, 2, 3, 4], "category": 1, "iscrowd": False}], None, []]
    save_objects(tmp_path / "a", objects, feature)
    splits = load(tmp_path / "a", **HUB)
    assert (len(splits.train), len(splits.validation)) == (1, 3) and boxes_of(splits.validation) == [[1, 2, 4, 6]]
    assert "images without an object, left out of training (2): row 1, row 2." in splits.notes[0]
    as_lists = {"bbox": BOXES, "category": LABELS}
    save_objects(tmp_path / "b", [{"bbox": [[1, 2, 3, 4]], "category": [1]}, None], as_lists)
    assert len(load(tmp_path / "b", **HUB).train) == 1


def test_objects_of_a_folder_stand_in_its_metadata(tmp_path):
    """As `datasets` describes folders of images for detection."""
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        rows = []
        for number in range(3):
            Image.new("RGB", (64, 48)).save(tmp_path / split / f"{number}.png")
            objects = {"bbox": [[1, 2, 30, 40]] * number, "category": ["cup"] * number}
            rows.append({"file_name": f"{number}.png", "objects": objects})
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = load(tmp_path, **HUB)
    assert (len(splits.train), len(splits.validation)) == (2, 3) and boxes_of(splits.train) == [[1, 2, 31, 42]]
    assert splits.categories == [{"id": 0, "name": "cup"}]
    assert splits.notes == [
        f"The split 'train' of {tmp_path}: images without an object, left out of training (1): row 0."
    ]


ONE_BOX = [[1, 2, 3, 4]]
LABELED, TEXTS, NUMBERS = (
    {"bbox": BOXES, "label": kind} for kind in (LABELS, List(Value("string")), List(Value("int64")))
)


@pytest.mark.parametrize(
    ("objects", "feature", "names", "message"),
    [
        ({"bbox": ONE_BOX, "kind": [0]}, {"bbox": BOXES, "kind": LABELS}, None, "has no 'category', only bbox, kind"),
        ({"quad": ONE_BOX, "label": [0]}, {"quad": BOXES, "label": LABELS}, None, "has no 'bbox', only quad, label"),
        ({"bbox": ONE_BOX, "label": []}, LABELED, None, "1 boxes, but 0 categories"),
        ({"bbox": [[1, 2, 3]], "label": [0]}, LABELED, None, "Object 0 of row 0 .* has the box"),
        ({"bbox": [None], "label": [0]}, LABELED, None, "has the box None"),
        ({"bbox": ONE_BOX, "label": [None]}, LABELED, None, "category None, outside the 2"),
        ({"bbox": ONE_BOX, "label": [2]}, NUMBERS, ["a", "b"], "category 2, out"),
        ({"bbox": ONE_BOX, "label": [0]}, NUMBERS, None, "give --label_names"),
        ({"bbox": ONE_BOX, "label": ["c"]}, TEXTS, ["a", "b"], "'c', which is none of the 2"),
        ({"bbox": ONE_BOX, "label": [0]}, LABELED, ["a"], "gives 1 names"),
        ({"bbox": ONE_BOX, "label": ["a"]}, TEXTS, ["a", "a"], "the name 'a'"),
        ("[]", Value("string"), ["a"], "must hold a bbox and a category"),
    ],
)
def test_objects_of_other_kinds_are_one_sentence(objects, feature, names, message, tmp_path):
    save_objects(tmp_path / "a", [objects], feature)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "a", **HUB, label_names=names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[2, 3, 30, 31], [10, 12, 28, 20]], "seem to be .left, top, right, bottom"),
        ([[0.1, 0.2, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]], "seem to be fractions of the image"),
    ],
)
def test_boxes_of_other_formats_are_refused(boxes, message, tmp_path):
    save_objects(tmp_path / "a", [{"bbox": boxes, "label": [0, 1]}], {"bbox": BOXES, "label": LABELS})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a", **HUB)


def test_images_of_a_table_are_looked_at_too(tmp_path):
    """What EXIF turns, and which way boxes fit; images lie in the table as the bytes of their files."""
    sideways, damaged = {"bytes": photo(6), "path": None}, {"bytes": b"damaged", "path": None}
    objects = [{"bbox": [[45, 5, 12, 8]], "label": [0]}] * 2
    save_objects(tmp_path / "a", objects, {"bbox": BOXES, "label": LABELS}, images=[sideways, damaged])
    splits = load(tmp_path / "a", **HUB)
    assert len(splits.train) == 1 and boxes_of(splits.train) == [[27, 45, 35, 57]]
    assert any("for the stored pixels, turned with them (1): row 0." in note for note in splits.notes)
    assert any("images that cannot be read, without their objects (1): row 1." in note for note in splits.notes)
