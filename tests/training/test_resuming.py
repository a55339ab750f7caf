"""Continuing a run: with other classes, images, labels or another way to compute it is refused, and why is said."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from locatvit_hf import LocAtViTConfig, LocAtViTForImageClassification, LocAtViTImageProcessor
from tests.training.conftest import SMALL_MODEL
from training.data import describe_data, load_splits
from training.data.description import changed_times, compare_data
from training.dino import DinoArguments
from training.dino import main as dino
from training.engine.arguments import build_arguments
from training.engine.checkpoints import list_checkpoints, write_manifest
from training.finetune import FinetuneArguments
from training.finetune import main as finetune
from training.pretrain import PretrainArguments
from training.pretrain import main as pretrain
from training.segment import SegmentArguments
from training.segment import main as segment

CLASSES = ["ant", "bee", "cat"]


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Class folders of 8 images each, which tests may change."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for label, name in enumerate(CLASSES):
        for number in range(8):
            write_image(folder / name / f"p{number}.png", 100 * label + number)
    return folder


@pytest.fixture
def photos(folder, tmp_path) -> Iterator[Path]:
    """The folder, as it was before each test."""
    shutil.copytree(folder, tmp_path / "before")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "before", folder)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> tuple[dict, dict]:
    """The settings and the results of a run that was killed after its first step of two."""
    settings = {
        "dataset": str(folder),
        "validation_share": 0.25,
        "model": SMALL_MODEL,
        "length": "2 steps",
        "warmup": "0 steps",
        "batch_size": 4,
        "auto_augment": None,
        "output_dir": str(tmp_path_factory.mktemp("trained") / "run"),
        "evaluate_every": "2 steps",
        "checkpoint_every": "1 steps",
    }
    results = train(settings)
    interrupt(settings)
    return settings, results


@pytest.fixture
def settings(trained, tmp_path) -> dict:
    """Of a copy of the run."""
    shutil.copytree(trained[0]["output_dir"], tmp_path / "run")
    return {**trained[0], "output_dir": str(tmp_path / "run")}


def interrupt(settings: dict) -> None:
    """As if the run had been killed after its first step."""
    output = Path(settings["output_dir"])
    shutil.rmtree(list_checkpoints(output / "checkpoints")[-1])
    (output / "all_results.json").unlink()


def train(settings: dict, **changes) -> dict:
    return pretrain(build_arguments(PretrainArguments, {**settings, **changes}))


def refused(run: Callable[[], dict]) -> str:
    with pytest.raises(ValueError, match="was written by another run: ") as caught:
        run()
    assert "\n" not in str(caught.value) and str(caught.value).endswith("or --overwrite the run.")
    return str(caught.value)


def test_the_same_data_is_continued(settings, trained, photos, capsys):
    results = train(settings)
    assert "Continuing at step 1 of 2" in capsys.readouterr().out
    losses = [[point["loss"] for point in run["train_curve"]] for run in (results, trained[1])]
    assert losses[0] == losses[1]


def rename_class(photos: Path) -> None:
    (photos / "ant").rename(photos / "zebra")


def swap_classes(photos: Path) -> None:
    (photos / "ant").rename(photos / "x")
    (photos / "bee").rename(photos / "ant")
    (photos / "x").rename(photos / "bee")


def remove_image(photos: Path) -> None:
    (photos / "cat" / "p3.png").unlink()


def replace_image(photos: Path) -> None:
    write_image(photos / "bee" / "p1.png", 999)


def rename_image(photos: Path) -> None:
    (photos / "bee" / "p1.png").rename(photos / "bee" / "p9.png")


def move_image(photos: Path) -> None:
    (photos / "bee" / "p1.png").rename(photos / "cat" / "p9.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_class, "of the classes 'ant' is gone and 'zebra' is new"),
        (swap_classes, "has other rows: number "),
        (remove_image, "the training split had 18 images and has 17"),
        (replace_image, "split has other rows: number "),
        (rename_image, "split has other rows: number "),
        (move_image, "split has other rows: number "),
    ],
)
def test_other_folders_of_classes_are_refused(settings, photos, change, message):
    checkpoints = list_checkpoints(Path(settings["output_dir"]) / "checkpoints")
    change(photos)
    said = refused(lambda: train(settings))
    assert message in said and str(checkpoints[-1]) in said
    assert list_checkpoints(Path(settings["output_dir"]) / "checkpoints") == checkpoints


def test_other_data_start_anew_where_asked(settings, photos):
    rename_class(photos)
    assert train(settings, overwrite=True)["updates"] == 2
    assert train(settings)["updates"] == 2


def test_other_surroundings_are_said(settings, photos, capsys):
    file = list_checkpoints(Path(settings["output_dir"]) / "checkpoints")[-1] / "run.json"
    content = json.loads(file.read_text())
    content["surroundings"] |= {"processes": 4, "torch": "1.0"}
    file.write_text(json.dumps(content))
    write_manifest(file.parent)
    assert train(settings)["updates"] == 2
    printed = capsys.readouterr().out
    assert "The checkpoint was written with processes 4 (now 1), torch 1.0 (now " in printed


def test_another_way_to_compute_is_refused(trained, photos, tmp_path):
    """The folder to start from and the teacher keep their names, and what is in them changes."""

    def save(name: str, seed: int, **changes) -> str:
        names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
        config = LocAtViTConfig(**{**SMALL_MODEL, **names, "initializer_range": 0.01 * seed, **changes})
        LocAtViTForImageClassification(config).save_pretrained(tmp_path / name)
        LocAtViTImageProcessor.from_model_config(config).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    settings = trained[0]
    tuning = {**settings, "model": {}, "pretrained": save("source", 1), "output_dir": str(tmp_path / "tuned")}
    finetune(build_arguments(FinetuneArguments, tuning))
    interrupt(tuning)
    save("source", 1, drop_path_rate=0.3)
    said = refused(lambda: finetune(build_arguments(FinetuneArguments, tuning)))
    assert "configuration.drop_path_rate was 0.0 and is 0.3" in said

    distilling = {**settings, "teacher": save("teacher", 1), "output_dir": str(tmp_path / "distilled")}
    train(distilling)
    interrupt(distilling)
    save("teacher", 2)
    assert "teacher was " in refused(lambda: train(distilling))


def test_segmentation_and_self_supervision_compare_their_data(squares, photos, tmp_path):
    shutil.copytree(squares, tmp_path / "squares")
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"0": "background", "1": "red", "2": "green"}))
    LocAtViTForImageClassification(LocAtViTConfig(**SMALL_MODEL)).save_pretrained(tmp_path / "source")
    settings = {
        "dataset": str(tmp_path / "squares"),
        "label_column": "segmentation",
        "label_names": str(names),
        "pretrained": str(tmp_path / "source"),
        "output_dir": str(tmp_path / "segment"),
        "length": "1 steps",
        "warmup": "0 steps",
        "batch_size": 4,
        "resize": 16,
        "crop_size": 16,
    }
    segment(build_arguments(SegmentArguments, settings))
    names.write_text(json.dumps({"0": "background", "1": "green", "2": "red"}))
    said = refused(lambda: segment(build_arguments(SegmentArguments, settings)))
    assert "class 1 was 'red' and is 'green'" in said

    settings = {"dataset": str(photos), "model": SMALL_MODEL, "output_dir": str(tmp_path / "dino"), "length": "1 steps"}
    settings |= {"warmup": "0 steps", "batch_size": 4, "local_crop_size": 8, "num_local_crops": 1, "num_prototypes": 8}
    settings |= {"head_hidden_size": 8, "head_bottleneck_size": 8, "freeze_last_layer": "0 steps"}
    dino(build_arguments(DinoArguments, settings))
    remove_image(photos)
    said = refused(lambda: dino(build_arguments(DinoArguments, settings)))
    assert "the training split had 24 images and has 23" in said


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_and_shards_are_compared(tmp_path, streaming):
    """One label in the middle of many, and one row less in a shard."""

    def describe(labels: list[int], names: list[str]) -> dict:
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
        rows = [{"image": Image.new("RGB", (4, 4), (n, 0, 0)), "label": label} for n, label in enumerate(labels)]
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        for split in ("train", "validation"):
            (tmp_path / "data").mkdir(exist_ok=True)
            Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / f"{split}-0.parquet")
        settings = {"dataset": str(tmp_path / "data"), "streaming": streaming}
        splits = load_splits(build_arguments(PretrainArguments, settings))
        return json.loads(json.dumps(describe_data(["image", "label"], splits.label_names, training=splits.train)))

    labels, names = [n % 3 for n in range(90)], ["a", "b", "c"]
    before = describe(labels, names)
    assert compare_data(before, describe(labels, names)) == []
    if streaming:
        assert compare_data(before, describe(labels[:-1], names)) == ["the training split had 90 images and has 89"]
    else:
        changed = [*labels[:44], (labels[44] + 1) % 3, *labels[45:]]  # of a row whose image is not compared
        assert compare_data(before, describe(changed, names)) == ["the training split has other labels"]
    gone = compare_data(before, describe(labels, ["a", "b", "d"]))
    assert gone[0] == "of the classes 'c' is gone and 'd' is new"
    assert compare_data(before, describe(labels, ["b", "a", "c"]))[0] == "class 0 was 'a' and is 'b'"


def test_one_class_in_two_unicode_forms_is_one():
    assert compare_data({"classes": ["cafe\u0301"], "splits": {}}, {"classes": ["caf\u00e9"], "splits": {}}) == []


def test_the_names_of_all_files_are_compared(tmp_path):
    def describe(names: list[str]) -> dict:
        images = Dataset.from_dict(
            {"image": [str(tmp_path / name) for name in names]}, Features({"image": ImageFeature()})
        )
        return describe_data(["image"], training=images)

    names = [f"{number}.png" for number in range(100)]
    for name in (*names, "new.png"):
        write_image(tmp_path / name, 0)
    before = describe(names)
    assert compare_data(before, describe(names)) == []
    names[50] = "new.png"
    assert compare_data(before, describe(names)) == ["the training split has other files"]


def test_sizes_and_times_of_all_files_are_compared(tmp_path, monkeypatch):
    """Also of those whose content is not."""
    for number in range(80):
        write_image(tmp_path / "data" / "train" / CLASSES[number % 3] / f"{number:02d}.png", number)
    shutil.copytree(tmp_path / "data" / "train", tmp_path / "data" / "validation")

    def describe() -> dict:
        splits = load_splits(build_arguments(PretrainArguments, {"dataset": str(tmp_path / "data")}))
        return describe_data(["image", "label"], splits.label_names, training=splits.train)

    before = describe()
    images = sorted((tmp_path / "data" / "train").glob("*/*.png"))
    compared = {int(number) for number in before["splits"]["training"]["rows"]}
    other = images[next(number for number in range(80) if number not in compared)]
    os.utime(other, (1, 1))
    after = describe()
    assert compare_data(before, after) == [] and changed_times(before, after) == ["training"]
    other.write_bytes(other.read_bytes() + b" ")
    assert compare_data(before, describe()) == ["the training split has files of other sizes"]


def test_a_run_says_that_files_have_other_times(settings, photos, capsys):
    os.utime(photos / "bee" / "p1.png", (1, 1))
    assert train(settings)["updates"] == 2
    assert "have other times than when" in capsys.readouterr().out
