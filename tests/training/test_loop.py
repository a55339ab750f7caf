import json
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation, pipeline

from tests.training.conftest import SMALL_MODEL
from tests.training.programs import run, start
from training.arguments import build_arguments
from training.checkpointing import atomic_folder, list_checkpoints
from training.data import UpdateSampler, load_splits
from training.pretrain import PretrainArguments
from training.pretrain import main as pretrain
from training.segment import SegmentArguments
from training.segment import main as segment


@pytest.fixture(scope="module")
def pretrained(pretrain_settings, tmp_path_factory):
    """(output folder, results) of one uninterrupted run."""
    output = tmp_path_factory.mktemp("pretrain") / "run"
    return output, pretrain(build_arguments(PretrainArguments, {**pretrain_settings, "output_dir": str(output)}))


@pytest.fixture
def segment_settings(squares, pretrained, tmp_path):
    return {
        "dataset": str(squares),
        "label_column": "segmentation",
        "label_names": ["background", "red", "green"],
        "pretrained": str(pretrained[0] / "model"),
        "output_dir": str(tmp_path / "segment"),
        "length": "12 steps",
        "batch_size": 8,
        "evaluate_every": "6 steps",
        "resize": 16,
        "crop_size": 16,
        "log_every": 4,
    }


def test_pretraining_leaves_a_model_and_results(pretrained):
    output, results = pretrained
    stored = json.loads((output / "all_results.json").read_text())
    assert stored["metrics"] == results["metrics"] and 0 <= results["metrics"]["accuracy"] <= 1
    assert len(stored["train_curve"]) == results["updates"] == 24
    assert [point["epoch"] for point in stored["validation_curve"]] == [2.0, 4.0]
    assert stored["seed"] == 3 and stored["images_per_second"] > 0
    assert stored["arguments"]["model"]["drop_path_rate"] == 0.2
    assert len(list_checkpoints(output / "checkpoints")) == 2
    assert not list(output.glob("**/*.part"))

    model = AutoModelForImageClassification.from_pretrained(output / "model")
    assert model.config.id2label == {0: "red", 1: "green"}
    assert {"modeling_locatvit.py", "preprocessor_config.json"} <= {path.name for path in (output / "model").iterdir()}


def test_segmentation_moves_only_the_head(segment_settings, pretrained):
    results = segment(build_arguments(SegmentArguments, segment_settings))
    folder = f"{segment_settings['output_dir']}/model"
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)
    before = load_file(pretrained[0] / "model" / "model.safetensors")
    body = {name: weight for name, weight in model.state_dict().items() if name.startswith("locatvit.")}
    assert body and all(torch.equal(weight, before[name]) for name, weight in body.items())
    assert model.config.id2label == {0: "background", 1: "red", 2: "green"}
    assert len(results["metrics"]["per_category_iou"]) == 3

    image = load_splits(build_arguments(SegmentArguments, segment_settings), segmentation=True).validation[0]["image"]
    masks = pipeline("image-segmentation", folder)(image)
    assert sum(np.asarray(entry["mask"]).astype(bool) for entry in masks).all()


def test_full_fine_tuning_moves_the_body(segment_settings, pretrained):
    segment(build_arguments(SegmentArguments, {**segment_settings, "freeze": False, "layer_decay": 0.7}))
    after = load_file(f"{segment_settings['output_dir']}/model/model.safetensors")
    before = load_file(pretrained[0] / "model" / "model.safetensors")
    name = "locatvit.layers.0.attention.q_proj.weight"
    assert not torch.equal(before[name], after[name])


def test_update_holds_the_same_images_however_it_is_split():
    whole = list(UpdateSampler(50, 8, seed=1, start=0, stop=15))
    assert all(len(set(batch)) == 8 for batch in whole)
    shares = [
        list(UpdateSampler(50, 8, 1, start=4, stop=15, accumulation_steps=2, process_index=rank, num_processes=2))
        for rank in range(2)
    ]
    for update, batch in enumerate(whole[4:]):
        parts = [part for share in shares for part in share[2 * update : 2 * update + 2]]
        assert sorted(key for part in parts for key in part) == sorted(batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "species"}, "no column 'species'"),
        ({"train_split": "training"}, "no split 'training'"),
        ({"dataset": "./nowhere"}, "There is no data set"),
        ({"dataset": None}, "Name a data set"),
        ({"max_train_samples": 0}, "is empty"),
        ({"batch_size": 64}, "A batch of 64 needs more images"),
        ({"batch_size": 9, "gradient_accumulation_steps": 2}, "must be a multiple"),
        ({"model": {"hidden_sizes": 3}}, "no field 'hidden_sizes'"),
        ({"model": {**SMALL_MODEL, "num_labels": 7}}, "the data has 2 classes"),
        ({"model": {**SMALL_MODEL, "hidden_size": 15}}, "divisible"),
        ({"label_names": ["red"]}, "outside the 1 classes"),
        ({"output_dir": None}, "Name a folder"),
        ({"output_dir": "/proc/here"}, "Cannot write"),
        ({"length": "2 steps", "warmup": "3 steps"}, "cannot warm up"),
        ({"learning_rate": 1e30, "warmup": "0 steps", "max_gradient_norm": None}, "The loss became"),
    ],
)
def test_bad_input_is_one_sentence(pretrain_settings, tmp_path, changes, message):
    settings = {**pretrain_settings, "output_dir": str(tmp_path / "run"), **changes}
    with pytest.raises(ValueError, match=message) as caught:
        pretrain(build_arguments(PretrainArguments, settings))
    assert "\n" not in str(caught.value)


def test_another_recipe_is_not_continued(pretrained, pretrain_settings):
    settings = {**pretrain_settings, "output_dir": str(pretrained[0]), "learning_rate": 0.5}
    with pytest.raises(ValueError, match=r"other settings \(learning_rate\)"):
        pretrain(build_arguments(PretrainArguments, settings))


def test_mistakes_end_the_program_without_traceback(pretrain_settings, tmp_path):
    finished = run("pretrain", {**pretrain_settings, "output_dir": str(tmp_path / "run")}, "--batch_sizes", "3")
    assert finished.returncode == 1
    assert finished.stderr.strip() == "Unknown option 'batch_sizes'; did you mean 'batch_size'."


def test_folders_are_complete_or_absent(tmp_path):
    folder = tmp_path / "result"
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "half").write_text("")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for content in ("first", "second"):
        with atomic_folder(folder) as temporary:
            (temporary / "file").write_text(content)
    assert (folder / "file").read_text() == "second" and list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_continues_bit_identically(pretrain_settings, pretrained, tmp_path, number, workers):
    """With averaged weights, mixing, drop path, dropout and augmentation, stopped in the middle of an epoch."""
    output = tmp_path / "run"
    settings = {**pretrain_settings, "output_dir": str(output), "num_workers": workers}
    process = start("pretrain", settings)
    while process.poll() is None and len(list_checkpoints(output / "checkpoints")) < 2:
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
    assert not (output / "all_results.json").exists()

    finished = run("pretrain", settings, as_file=True)
    assert finished.returncode == 0, finished.stderr
    assert "Continuing at update" in finished.stdout
    results, expected = json.loads((output / "all_results.json").read_text()), pretrained[1]
    losses = [[point["loss"] for point in run["train_curve"]] for run in (results, expected)]
    assert losses[0] == losses[1]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (output, pretrained[0])]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
