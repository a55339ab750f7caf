import json
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from safetensors.torch import load_file
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoModel

from locatvit_hf.detection import load_detector
from locatvit_hf.detection.detector import normalize_pixels
from locatvit_hf.hub.card import read_card
from locatvit_hf.hub.push import assemble
from tests.detection.detectors import CATEGORIES, ENCODERS, assert_same_objects, small_detector
from tests.training.programs import ROOT
from tests.training.programs import train as launch
from training.data import sample_randomness
from training.data.images import decode_image
from training.detect import DetectArguments, build_model
from training.detect import main as detect
from training.engine.arguments import build_arguments, load_recipe
from training.engine.checkpoints import list_checkpoints
from training.engine.optimization import create_optimizer
from training.engine.schedule import Schedule
from training.tasks.detection import (
    DetectionAugmentation,
    DetectionTransform,
    load_detection_splits,
    read_coco,
    read_objects,
)

RECIPES = ROOT / "training" / "recipes" / "detect"


def write_coco(folder, counts: dict[str, int]) -> None:
    """A data set in COCO's layout: boxes and discs on noise, with polygons, both kinds of run lengths and a crowd."""
    for seed, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng(seed)
        content = {"images": [], "annotations": [], "categories": CATEGORIES}
        (folder / split).mkdir(parents=True)
        for number in range(count):
            width, height = (int(side) for side in rng.integers(48, 80, 2))
            image = Image.fromarray(rng.integers(0, 60, (height, width, 3), dtype=np.uint8))
            name, image_id = f"{number:04d}.png", 500 - 7 * number
            for kind in range(2):
                side = int(rng.integers(14, 22))
                left, top = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
                shape = Image.new("L", image.size)
                corners = [left, top, left + side - 1, top + side - 1]
                (ImageDraw.Draw(shape).ellipse if kind else ImageDraw.Draw(shape).rectangle)(corners, fill=1)
                pixels = np.asfortranarray(shape)
                color = (250, 250 * kind, 0)
                image.paste(color, mask=Image.fromarray(255 * np.asarray(shape)))
                rle = coco_mask.encode(pixels)
                if kind:
                    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], pixels.flatten("F"), [2]]))))
                    if pixels.flat[0]:
                        runs = np.concatenate([[0], runs])
                    segmentation = {"size": [height, width], "counts": [int(run) for run in runs]}
                elif number % 2:
                    segmentation = {"size": [height, width], "counts": rle["counts"].decode()}
                else:
                    right, bottom = left + side, top + side
                    segmentation = [[left, top, right, top, right, bottom, left, bottom]]
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": CATEGORIES[kind]["id"],
                        "bbox": [left, top, side, side],
                        "area": float(pixels.sum()),
                        "iscrowd": int(number == 1 and kind),
                        "segmentation": segmentation,
                    }
                )
            image.save(folder / split / name)
            content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "shapes"
    write_coco(folder, {"train": 12, "val": 5})
    return folder


@pytest.fixture(scope="module")
def settings(coco) -> dict:
    return {
        "dataset": str(coco),
        "train_split": "train",
        "validation_split": "val",
        "model": {**ENCODERS["pacavit"], "drop_path_rate": 0.2},
        "pyramid_channels": 8,
        "anchor_scale": 4,
        "shortest_sides": [48, 56, 64],
        "test_shortest_side": 64,
        "longest_side": 96,
        "crop": 0.5,
        "crop_shortest_sides": [64],
        "crop_size": [40, 60],
        "score_threshold": 0.0,
        "max_detections": 10,
        "length": "6 steps",
        "warmup": "1 steps",
        "milestones": ["4 steps"],
        "batch_size": 4,
        "evaluate_every": "6 steps",
        "checkpoint_every": "2 steps",
        "keep_checkpoints": 3,
        "ema_decay": 0.9,
        "log_every": 1,
        "seed": 1,
    }


def train(settings: dict, output) -> dict:
    return detect(build_arguments(DetectArguments, {**settings, "output_dir": str(output)}))


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """(output folder, results) of one uninterrupted run."""
    output = tmp_path_factory.mktemp("detect") / "run"
    return output, train(settings, output)


def test_training_leaves_a_detector_and_its_encoder(trained, coco, tmp_path, monkeypatch, capsys):
    output, results = trained
    stored = json.loads((output / "all_results.json").read_text())
    assert 0 <= results["metrics"]["segm_ap"] <= 1 and 0 <= results["metrics"]["bbox_ap50"] <= 1
    assert set(stored["metrics"]["bbox_ap_per_category"]) == {"box", "disc"}
    assert stored["num_train_images"] == 12 and stored["num_validation_images"] == 5
    rates = [point["learning_rate"] for point in stored["train_curve"]]
    assert rates[3] == pytest.approx(1e-4) and rates[4] == pytest.approx(1e-5)

    assert stored["notes"] == ["instances_train.json: crowds, left out of training (1): annotation 4."]
    detector = load_detector(output / "model")
    assert detector.categories == CATEGORIES and not detector.training
    found = detector.detect(Image.open(coco / "val" / "0000.png"))
    width, height = Image.open(coco / "val" / "0000.png").size
    assert 0 < len(found["boxes"]) <= 10 and set(found["names"]) <= {"box", "disc"}
    assert found["masks"].shape[1:] == (height, width) and found["masks"].dtype == torch.bool
    assert AutoModel.from_pretrained(output / "model").config.model_type == "pacavit"

    published = tmp_path / "published"
    published.mkdir()
    assemble(output / "model", published, "tester/detector")
    again = load_detector(published).detect(Image.open(coco / "val" / "0000.png"))
    assert_same_objects(again, found)
    (average_precision,) = [result for result in read_card(published).results if result.metric == "segm_ap"]
    assert average_precision.value == pytest.approx(stored["metrics"]["segm_ap"])
    (snippet,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)
        if "load_detector" in code
    ]
    shutil.copy(coco / "val" / "0000.png", tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(snippet.replace("tester/detector", "published"))
    assert len(capsys.readouterr().out.splitlines()) == len(again["boxes"])


def test_as_many_proposals_as_the_framework_of_the_paper_keeps():
    settings = load_recipe(RECIPES / "coco_pacavit.yaml")
    arguments = build_arguments(DetectArguments, settings)
    with torch.device("meta"):
        regions = build_model(arguments, CATEGORIES).model.rpn
    assert (regions.train().pre_nms_top_n(), regions.post_nms_top_n()) == (2000, 1000)
    assert (regions.eval().pre_nms_top_n(), regions.post_nms_top_n()) == (1000, 1000)
    regions = small_detector(train_proposals=7, test_proposals=5).model.rpn
    assert (regions.train().post_nms_top_n(), regions.eval().post_nms_top_n()) == (7, 5)
    with pytest.raises(ValueError, match="train_proposals"):
        build_arguments(DetectArguments, {**settings, "train_proposals": 0})


@pytest.mark.parametrize("size", [(200, 160), (40, 30), (333, 100)])
def test_evaluation_resizes_as_training_does(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    augmentation = DetectionAugmentation(shortest_sides=[64], longest_side=96, horizontal_flip=0.0)
    objects = json.dumps({"image_id": 0, "size": list(size), "annotations": []})
    trained, _ = DetectionTransform(augmentation, False, [0.5] * 3, [0.25] * 3)(Image.fromarray(pixels), objects)
    whole = normalize_pixels(pil_to_tensor(Image.fromarray(pixels)), [0.5] * 3, [0.25] * 3)
    evaluated, _ = small_detector().model.transform.eval().resize(whole)
    # Training rounds to 8 bits after each of the two directions.
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=1.1 / 255 / 0.25)


def test_detect_reads_any_image_as_training_does(tmp_path):
    """16-bit, with EXIF's turn: pixels as in training, upright."""
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint16) * 1024, (48, 1)))
    exif = ramp.getexif()
    exif[0x0112] = 6
    ramp.save(tmp_path / "a.png", exif=exif)
    detector, seen = small_detector(score_threshold=0.0), []
    detector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    found = detector.detect(Image.open(tmp_path / "a.png"))
    config = detector.encoder.config
    decoded = pil_to_tensor(decode_image(str(tmp_path / "a.png"), rgb=True))
    expected = normalize_pixels(decoded, config.image_mean, config.image_std)
    assert expected.shape == (3, 64, 48) and torch.equal(seen[0], expected)
    assert found["masks"].shape[1:] == (64, 48)
    Image.effect_noise((64, 48), 50).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-300])
    with pytest.raises(ValueError, match="truncated"):
        detector.detect(Image.open(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("name", "preset", "parameters"),
    [
        # In millions, of the paper; torchvision's heads also predict the background's box and mask.
        ("coco_pacavit", "tiny", 31.97),
        ("coco_pacavit", "small", 41.81),
        ("coco_pacavit", "base", 66.61),
        ("digits", None, None),
    ],
)
def test_recipe(name, preset, parameters):
    arguments = build_arguments(DetectArguments, {**load_recipe(RECIPES / f"{name}.yaml"), "preset": preset})
    categories = [{"id": number, "name": str(number)} for number in range(80)]
    with torch.device("meta"):
        detector = build_model(arguments, categories)
    groups = create_optimizer(detector, arguments).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(detector.parameters()))
    transform = DetectionTransform(arguments, True, [0.5] * 3, [0.5] * 3)
    polygon = [[20, 30, 300, 30, 300, 200]]
    entry = {"box": [20, 30, 300, 200], "label": 7, "iscrowd": 0, "area": 9000, "segmentation": polygon}
    objects = json.dumps({"image_id": 1, "size": [640, 426], "annotations": [entry]})
    for seed in range(4):
        with sample_randomness(seed):
            pixels, _ = transform(Image.new("RGB", (640, 426)), objects)
        assert min(pixels.shape[1:]) <= max(arguments.shortest_sides)
        assert max(pixels.shape[1:]) <= arguments.longest_side
    if parameters is None:
        return
    assert sum(p.numel() for p in detector.parameters()) == pytest.approx(parameters * 1e6, rel=5e-4)
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.05), name
    schedule = Schedule.resolve(arguments, 7330 * arguments.batch_size)
    rates = {0: 1e-7, 500: 1e-4, 8 * 7330 - 1: 1e-4, 8 * 7330: 1e-5, 11 * 7330: 1e-6}
    assert {step: schedule.learning_rate_at(step) for step in rates} == pytest.approx(rates)
    assert schedule.warmup == 500


def test_all_recipes_are_known():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"coco_pacavit", "digits"}


def test_dry_run_draws_boxes(settings, tmp_path):
    results = train({**settings, "dry_run": True}, tmp_path / "run")["dry_run"]
    assert results["steps"] == 6 and results["loss"] > 0
    assert min(Image.open(tmp_path / "run" / "dry_run.png").size) > 100
    assert not (tmp_path / "run" / "model").exists()


def test_predictions_are_drawn(settings, tmp_path, monkeypatch):
    """The first boxes of each image, on pictures as large as the images."""
    shown = []
    monkeypatch.setattr(
        "training.engine.tracking.Trackers.log_image", lambda self, name, image, step: shown.append(image)
    )
    monkeypatch.setattr(
        "training.detect.draw_bounding_boxes", lambda pixels, *boxes, **_: shown.append(boxes) or pixels
    )
    one = {**settings, "output_dir": str(tmp_path), "length": "1 steps", "warmup": "0 steps", "milestones": []}
    detect(build_arguments(DetectArguments, {**one, "trackers": ["tensorboard"], "score_threshold": 0.0}))
    *drawn, sheet = shown
    assert sheet.width > 40 and drawn
    for boxes, names, colors in drawn:
        assert len(boxes) == len(names) == len(colors) <= 10 and set(names) <= {c["name"] for c in CATEGORIES}


def test_image_boxes_and_masks_move_together():
    """One white rectangle: its box and its mask stay on it through resizing, cropping and mirroring."""
    augmentation = DetectionAugmentation(
        shortest_sides=[50, 100, 140], longest_side=200, crop=0.7, crop_shortest_sides=[90, 110], crop_size=[60, 120]
    )
    transform, cut = DetectionTransform(augmentation, True, [0.0] * 3, [1.0] * 3), 0
    for seed in range(40):
        left, top = np.random.default_rng(seed).integers(10, 50, 2).tolist()
        pixels = np.zeros((80, 100, 3), np.uint8)
        pixels[top : top + 20, left : left + 30] = 255
        polygon = [[left, top, left + 30, top, left + 30, top + 20, left, top + 20]]
        box = [left, top, left + 30, top + 20]
        entry = {"box": box, "label": 1, "iscrowd": 0, "area": 600, "segmentation": polygon}
        objects = json.dumps({"image_id": 0, "size": [100, 80], "annotations": [entry]})
        with sample_randomness(seed):
            moved, target = transform(Image.fromarray(pixels), objects)
        white = moved.mean(dim=0) > 0.5
        if not len(target["boxes"]):
            cut += 1
            assert white.float().mean() < 0.02
            continue
        rows, columns = white.nonzero().unbind(1)
        seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        torch.testing.assert_close(target["boxes"][0], seen.float(), rtol=0, atol=1.5)
        assert (target["masks"][0].bool() == white).float().mean() > 0.97
        assert target["labels"].tolist() == [1] and 0 <= moved.min() <= moved.max() <= 1
    assert cut < 10


def test_every_form_of_segmentation_is_read(coco):
    images, rows, categories, _ = read_coco(coco / "train", coco / "annotations" / "instances_train.json", masks=True)
    assert categories == CATEGORIES and len(images) == len(rows) == 12
    for index, row in enumerate(rows):
        image = images[index]["image"]
        pixels, read = np.asarray(image), read_objects(image, json.dumps(row), masks=True)
        assert read["labels"].tolist() == [0, 1]
        disc = coco_mask.decode(read["masks"][1]).astype(bool)
        assert (pixels[disc] == (250, 250, 0)).all() and disc.sum() == read["area"][1]


def test_limits_are_spread_over_the_split(settings):
    limits = {"max_train_samples": 3, "max_validation_samples": 2}
    splits = splits_of(build_arguments(DetectArguments, {**settings, **limits}))
    ids = [[json.loads(objects)["image_id"] for objects in split["objects"]] for split in splits[:2]]
    assert ids == [[500, 472, 444], [500, 486]]


def test_crowds_and_empty_images_only_evaluate(settings, coco, tmp_path):
    def change(content):
        content["annotations"][0]["bbox"][2] = 0
        content["images"].append({"id": 9000, "file_name": "0000.png", "width": 1, "height": 1})

    changed = altered(coco, tmp_path, change)
    arguments = build_arguments(DetectArguments, {**settings, "dataset": str(changed)})
    splits = splits_of(arguments)
    assert "instances_train.json: boxes without area, left out (1): annotation 1." in splits.notes
    assert len(splits.train) == 12  # the image without an object is not learned from
    labels = [entry["label"] for row in splits.train["objects"] for entry in json.loads(row)["annotations"]]
    assert len(labels) == 24 - 1 - 1
    crowds = [e["iscrowd"] for row in splits.validation["objects"] for e in json.loads(row)["annotations"]]
    assert sum(crowds) == 1


def splits_of(arguments):
    return load_detection_splits(arguments, arguments.masks)


def altered(coco, tmp_path, change):
    """A copy of the data set whose training annotations are changed."""
    folder = tmp_path / "changed"
    shutil.copytree(coco, folder)
    file = folder / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].update(file_name="nowhere.png"), "1 of the 12 images .* nowhere.png"),
        (lambda c: c["images"][0].update(width=30), r"annotations are for an image of \[30"),
        (lambda c: c["annotations"][3].update(image_id=77), "belongs to image 77, which the file does not list"),
        (lambda c: c["annotations"][3].update(category_id=5), "has category 5, which the file does not list"),
        (lambda c: c["annotations"][3].update(bbox=[1, 2, -3, 4]), r"has the box \[1, 2, -3, 4\]"),
        (lambda c: c["annotations"][3].update(bbox=[1, 2, 3]), r"has the box \[1, 2, 3\]"),
        (lambda c: c["annotations"][3].pop("segmentation"), "has no segmentation: give --masks false"),
        (lambda c: [a.update(bbox=[1, 1, 0, 0]) for a in c["annotations"]], "has an object to learn from"),
        (lambda c: c["annotations"].clear(), "has an object to learn from"),
        (lambda c: c.update(images=[], annotations=[]), "has an object to learn from"),
        (lambda c: c["images"].append(c["images"][0]), "gives one id to several images"),
        (lambda c: c["categories"].append({"id": 9, "name": "cup"}), "list different categories"),
        (lambda c: c.pop("categories"), "is not a COCO annotation file"),
    ],
)
def test_annotations_that_do_not_fit_are_one_sentence(settings, coco, tmp_path, change, message):
    dataset = str(altered(coco, tmp_path, change))
    with pytest.raises(ValueError, match=message) as caught:
        train({**settings, "dataset": dataset}, tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_annotations": "nowhere.json"}, "Cannot read the annotations nowhere.json"),
        ({"dataset": None}, "Name a dataset"),
        ({"dataset": None, "train_annotations": "some.json"}, "Name the folder with the images"),
        ({"train_split": "test"}, "no COCO annotations of the split 'test'"),
        ({"family": "locatvit", "model": {**ENCODERS["locatvit"], "num_hidden_layers": 3}}, "reads four layers"),
        ({"model": {"hidden_sizess": 3}}, "no field 'hidden_sizess'"),
    ],
)
def test_bad_settings_are_one_sentence(settings, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        train({**settings, **changes}, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_data_set_with_objects_is_read(settings, tmp_path):
    """The layout of detection data sets on the Hub: boxes in one column, categories named by its feature."""
    names = ["box", "disc"]
    features = Features(
        {
            "image": ImageFeature(),
            "objects": {
                "bbox": Sequence(Sequence(Value("float32"), length=4)),
                "category": Sequence(ClassLabel(names=names)),
            },
        }
    )
    image = Image.new("RGB", (64, 48))
    objects = [{"bbox": [[4, 4, 20, 10]], "category": [1]}, {"bbox": [], "category": []}] * 4
    rows = [{"image": image, "objects": entry} for entry in objects]
    split = Dataset.from_list(rows, features=features)
    DatasetDict({"train": split, "val": split}).save_to_disk(tmp_path / "data")
    changes = {"dataset": str(tmp_path / "data"), "masks": False}
    splits = splits_of(build_arguments(DetectArguments, {**settings, **changes}))
    assert [category["name"] for category in splits.categories] == names
    assert len(splits.train) == 4 and len(splits.validation) == 8
    read = read_objects(splits.train[0]["image"], splits.train[0]["objects"], masks=False)
    assert read["boxes"].tolist() == [[4, 4, 24, 14]] and read["labels"].tolist() == [1]
    with pytest.raises(ValueError, match="needs --masks false"):
        splits_of(build_arguments(DetectArguments, {**settings, "dataset": changes["dataset"]}))


def assert_same_run(output, expected):
    folder, results = expected
    stored = json.loads((output / "all_results.json").read_text())
    assert [p["loss"] for p in stored["train_curve"]] == [p["loss"] for p in results["train_curve"]]
    assert stored["metrics"] == json.loads((folder / "all_results.json").read_text())["metrics"]
    for file in ("model.safetensors", "detector.safetensors"):
        weights = [load_file(path / "model" / file) for path in (output, folder)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_checkpoint_continues_bit_identically(settings, trained, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained[0], output)
    for later in list_checkpoints(output / "checkpoints")[1:]:
        shutil.rmtree(later)
    shutil.rmtree(output / "model")
    (output / "all_results.json").unlink()
    train(settings, output)
    assert_same_run(output, trained)


@pytest.mark.slow
def test_average_precision_does_not_depend_on_the_number_of_processes(settings, tmp_path):
    """Weights that stand still, whose detections are shared out: five images over two processes."""
    still = {"learning_rate": 0.0, "start_learning_rate": 0.0, "length": "1 steps", "warmup": "0 steps"}
    results = []
    for number in (1, 2):
        changes = {**still, "max_detections": 100, "output_dir": str(tmp_path / str(number))}
        assert launch({**settings, **changes}, number, program="detect").wait() == [0] * number
        results.append(json.loads((tmp_path / str(number) / "all_results.json").read_text()))
    assert [result["num_processes"] for result in results] == [1, 2]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["metrics"]["bbox_ar100"] > 0
