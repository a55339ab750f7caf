import contextlib
import json
import resource
import shutil
import threading

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation, pipeline

from tests.remote.loopback_hub import HubServer
from tests.training.conftest import SMALL_MODEL
from tests.training.programs import run
from training.data import StepSampler, TrainingSamples, load_splits
from training.engine.arguments import build_arguments, run_program
from training.engine.checkpoints import list_checkpoints
from training.engine.run_folder import open_run_folder
from training.pretrain import PretrainArguments
from training.pretrain import main as pretrain
from training.segment import SegmentArguments
from training.segment import main as segment
from training.tasks.classification import ClassificationTransform
from training.tasks.distillation import Distillation


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
    best = max(stored["validation_curve"], key=lambda point: point["accuracy"])  # the first of equals
    steps = {int(path.name.removeprefix("step_")) for path in list_checkpoints(output / "checkpoints")}
    assert steps == {23, 24, best["step"]}
    assert not list(output.glob("**/.partial-*"))

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
    whole = list(StepSampler(50, 8, seed=1, start=0, stop=15))
    assert all(len(set(batch)) == 8 for batch in whole)
    shares = [
        list(StepSampler(50, 8, 1, start=4, stop=15, accumulation_steps=2, process_index=rank, num_processes=2))
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
        ({"dataset": "./nowhere"}, "There is no dataset"),
        ({"dataset": None}, "Name a dataset"),
        ({"max_train_samples": 0}, "is empty"),
        ({"batch_size": 64}, "A batch of 64 needs more images"),
        ({"batch_size": 10, "gradient_accumulation_steps": 4}, "must be a multiple"),
        ({"model": {"hidden_sizes": 3}}, "no field 'hidden_sizes'"),
        ({"model": {**SMALL_MODEL, "num_labels": 7}}, "the data has 2 classes"),
        ({"model": {**SMALL_MODEL, "hidden_size": 15}}, "divisible"),
        ({"label_names": ["cat", "dog", "elk"]}, "The data has 2 classes, but label_names gives 3 names"),
        ({"output_dir": None}, "Name a folder"),
        ({"output_dir": "/proc/here"}, "Cannot write"),
        ({"length": "2 steps", "warmup": "3 steps"}, "cannot warm up"),
        ({"batch_size": 7}, "must be even"),
        ({"trackers": ["paper"]}, "no tracker 'paper'"),
        ({"family": "resnext"}, "There is no family 'resnext'; choose one of locatvit"),
        ({"auto_augment": "strong"}, "auto_augment is in timm's notation, .* not 'strong'"),
        ({"label_column": "image"}, "cannot both be in the column 'image'"),
        ({"optimizer": "magic"}, "Cannot build the optimizer 'magic'"),
        ({"learning_rate_factors": {"gausian": 10}}, "no parameter of the model is called so"),
        ({"teacher": "./nowhere"}, "Cannot load the teacher"),
        ({"repeated_augmentation": 3}, "must be a multiple of the 3 repeats"),
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


def test_an_option_that_an_older_run_does_not_name_had_its_default(pretrained, pretrain_settings, tmp_path):
    stored = yaml.safe_load((pretrained[0] / "arguments.yaml").read_text(encoding="utf-8"))
    del stored["repeated_augmentation"]
    (tmp_path / "all_results.json").touch()
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    settings = {**pretrain_settings, "output_dir": str(tmp_path)}
    with contextlib.ExitStack() as held:
        other = build_arguments(PretrainArguments, {**settings, "repeated_augmentation": 2})
        with pytest.raises(ValueError, match=r"other settings \(repeated_augmentation\)"):
            open_run_folder(Accelerator(), other, held)
        assert open_run_folder(Accelerator(), build_arguments(PretrainArguments, settings), held) == tmp_path


def test_a_checkpoint_of_another_recipe_is_refused(pretrained, pretrain_settings, tmp_path):
    """Copied into an empty folder, without the settings that stood beside it."""
    output = tmp_path / "run"
    shutil.copytree(pretrained[0] / "checkpoints", output / "checkpoints")
    settings = {**pretrain_settings, "output_dir": str(output), "ema_decay": None}
    with pytest.raises(ValueError, match=r"other settings \(ema_decay\)"):
        pretrain(build_arguments(PretrainArguments, settings))


def test_a_full_disk_leaves_the_checkpoint_intact(pretrain_settings, tmp_path, monkeypatch):
    """The disk fills up after two checkpoints; with room again the run goes on from the second."""
    output = tmp_path / "run"
    settings = {**pretrain_settings, "length": "5 steps", "warmup": "0 steps", "output_dir": str(output)}
    save, saved = Accelerator.save_state, []

    def save_state(accelerator, folder):
        if len(saved) < 2:
            saved.append(folder)
            return save(accelerator, folder)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file may grow beyond this
        try:
            return save(accelerator, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", save_state)
        with pytest.raises(OSError, match="Cannot write the checkpoint"):
            pretrain(build_arguments(PretrainArguments, settings))
    folders = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert folders == ["step_00000001", "step_00000002"]
    assert pretrain(build_arguments(PretrainArguments, settings))["updates"] == 5


def test_the_best_checkpoint_is_kept(pretrain_settings, tmp_path, monkeypatch):
    """That of update 8, where no checkpoint was due, beside the last one."""
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4, 0.5])
    monkeypatch.setattr("training.tasks.classification.evaluate", lambda *_: {"accuracy": next(scores)})
    settings = {**pretrain_settings, "evaluate_every": "4 steps", "checkpoint_every": "5 steps", "keep_checkpoints": 1}
    results = pretrain(build_arguments(PretrainArguments, {**settings, "output_dir": str(tmp_path)}))
    steps = {int(path.name.removeprefix("step_")) for path in list_checkpoints(tmp_path / "checkpoints")}
    assert results["exported"]["step"] == 8 and steps == {8, 24}


def test_a_truncated_photo_is_replaced_and_counted(pretrain_settings, tmp_path):
    """Class folders of JPEG files, whose pixels are decoded where they are cropped."""
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.jpg")
    broken = tmp_path / "photos" / "a" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:-400])
    settings = {**pretrain_settings, "dataset": str(tmp_path / "photos"), "validation_share": 0.2, "length": "8 steps"}
    settings |= {"output_dir": str(tmp_path / "run"), "warmup": "1 steps", "max_corrupt_share": 0.5}
    results = pretrain(build_arguments(PretrainArguments, settings))
    assert results["num_corrupt_images"] >= 2 and results["updates"] == 8
    with pytest.raises(ValueError, match=r"cannot be decoded, .* the last is .*3\.jpg"):
        pretrain(build_arguments(PretrainArguments, {**settings, "max_corrupt_share": 0.0, "overwrite": True}))


def test_a_loss_that_is_not_finite_leaves_its_batch(pretrain_settings, tmp_path):
    settings = {**pretrain_settings, "learning_rate": 1e30, "warmup": "0 steps", "max_gradient_norm": None}
    output = tmp_path / "run"
    with pytest.raises(ValueError, match="its batch is in"):
        pretrain(build_arguments(PretrainArguments, {**settings, "output_dir": str(output)}))
    (file,) = (output / "not_finite").iterdir()
    content = torch.load(file, weights_only=False)
    assert not content["losses"]["loss"].isfinite()
    (images, labels), *rest = content["batches"]
    assert images.shape == (8, 3, 16, 16) and labels.shape == (8,) and not rest


def test_a_dry_run_tells_what_a_run_would_be(pretrain_settings, tmp_path, capsys):
    output = tmp_path / "run"
    settings = {**pretrain_settings, "batch_size": 48, "output_dir": str(output), "dry_run": True}
    report = pretrain(build_arguments(PretrainArguments, settings))["dry_run"]
    parameters = report["parameters"]
    assert report["steps"] == 4 and report["learning_rates"][1] == 1e-3
    memory = report["memory"]
    assert memory["weights"] == memory["gradients"] == memory["averaged weights"] == 4 * parameters
    assert 8 * parameters <= memory["optimizer"] < 9 * parameters  # two moments, and a few counters
    assert memory["activations"] > 48 * 17 * 16 * 4  # at least one hidden state of every image
    printed = capsys.readouterr().out
    assert f"{parameters:,}" in printed and "4 steps" in printed
    with Image.open(output / "dry_run.png") as image:
        assert image.width > 200 and image.height > 200
    assert [path.name for path in output.iterdir()] == ["dry_run.png"]


def test_activations_shrink_with_gradient_checkpointing(pretrain_settings, tmp_path):
    model = {**SMALL_MODEL, "num_hidden_layers": 6}
    reports = []
    for checkpointing in (False, True):
        settings = {**pretrain_settings, "model": model, "gradient_checkpointing": checkpointing, "dry_run": True}
        arguments = build_arguments(PretrainArguments, {**settings, "output_dir": str(tmp_path / "run")})
        reports.append(pretrain(arguments)["dry_run"])
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], abs=1e-5)
    assert reports[1]["memory"]["activations"] < reports[0]["memory"]["activations"] / 2


def test_the_card_is_filled_from_the_results(pretrained):
    card = ModelCard.load(pretrained[0] / "model" / "README.md")
    (result,) = card.data.eval_results
    exported = pretrained[1]["exported"]
    assert (result.metric_type, result.metric_value) == ("accuracy", round(exported["metrics"]["accuracy"], 5))
    assert exported["metrics"]["accuracy"] == pretrained[1]["best_accuracy"]
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert result.dataset_name == "squares" and str(pretrained[0].parent) not in card.content
    assert "ema_decay: 0.9" in card.text and "Gaussian-augmented attention" in card.text
    assert (pretrained[0] / "model" / "LICENSE").is_file()


def test_an_epoch_is_trained_at_its_image_size(pretrain_settings, squares):
    arguments = build_arguments(PretrainArguments, {**pretrain_settings, "image_sizes": [8, 12, 16]})
    transform = ClassificationTransform(arguments, 16, [0.5] * 3, [0.5] * 3, num_epochs=6)
    samples = TrainingSamples(load_splits(arguments).train, ["image", "label"], transform, seed=0)
    assert [samples[epoch, 0][0].shape[-1] for epoch in range(7)] == [8, 8, 12, 12, 16, 16, 16]


def test_repeats_stand_in_the_same_batch():
    (batch, *_), (other, *_) = (
        list(StepSampler(60, 12, seed=1, start=0, stop=10, process_index=rank, num_processes=2, repeats=3))
        for rank in range(2)
    )
    assert len(batch) == len(other) == 6 and not set(batch) & set(other)
    images = {}
    for epoch, index, repeat in [*batch, *other]:
        images.setdefault((epoch, index), set()).add(repeat)
    assert len(images) == 4 and all(repeats == {0, 1, 2} for repeats in images.values())
    with pytest.raises(ValueError, match="multiple of the 5 repeats"):
        StepSampler(60, 12, seed=1, start=0, stop=10, repeats=5)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_learns_from_its_teacher(pretrained, pretrain_settings, tmp_path, kind):
    """From the teacher alone, with progressive sizes, repeats and the binary loss for the labels."""
    settings = {
        "teacher": str(pretrained[0] / "model"),
        "distillation": kind,
        "distillation_weight": 1.0,
        "repeated_augmentation": 2,
        "image_sizes": [8, 16],
        "loss": "binary_cross_entropy",
        "channels_last": True,
        "mixup": 0.0,
        "length": "6 steps",
        "warmup": "0 steps",
    }
    arguments = build_arguments(PretrainArguments, {**pretrain_settings, **settings, "output_dir": str(tmp_path / "r")})
    curve = pretrain(arguments)["train_curve"]
    assert curve[0]["loss"] == curve[0]["teacher"] != curve[0]["labels"]
    with torch.no_grad():
        teacher = AutoModelForImageClassification.from_pretrained(pretrained[0] / "model").eval()
        distill = Distillation(arguments, 2, [0.3] * 3, [0.2] * 3, Accelerator(cpu=True))
        images = torch.rand(4, 3, 16, 16)
        logits = teacher(pixel_values=images * 2 - 1).logits  # the mean and the deviation of the teacher are 0.5
        terms = distill(torch.tensor(9.0), logits, (images - 0.3) / 0.2)
    if kind == "soft":
        assert terms["loss"].item() == pytest.approx(0, abs=1e-6)  # the student answers as the teacher
    else:
        expected = torch.nn.functional.cross_entropy(logits, logits.argmax(dim=-1))
        assert terms["loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    with pytest.raises(ValueError, match="knows 2 classes, but the data has 3"):
        Distillation(arguments, 3, [0.5] * 3, [0.5] * 3, Accelerator(cpu=True))


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(pretrain_settings, tmp_path):
    plain = {"mixup": 0.0, "cutmix": 0.0, "model": SMALL_MODEL, "length": "6 steps", "warmup": "0 steps"}
    curves = []
    for compiled in (False, True):
        settings = {**pretrain_settings, **plain, "compile": compiled, "output_dir": str(tmp_path / str(compiled))}
        finished = run("pretrain", settings)
        assert finished.returncode == 0, finished.stderr
        results = json.loads((tmp_path / str(compiled) / "all_results.json").read_text())
        curves.append([point["loss"] for point in results["train_curve"]])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


@pytest.mark.slow
def test_the_exported_model_is_pushed(pretrain_settings, tmp_path, monkeypatch):
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        for name, value in {**environment, "HF_HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)
        settings = {**pretrain_settings, "output_dir": str(tmp_path / "run"), "push_to_hub": "tester/squares"}
        finished = run("pretrain", settings)
        assert finished.returncode == 0, finished.stderr
        files = server.hub.commit_at("tester/squares", "main").files
        server.shutdown()
    assert {"README.md", "LICENSE", "model.safetensors", "config.json", "modeling_locatvit.py"} <= set(files)


def test_mistakes_end_the_program_without_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain", "--batch_sizes", "3"])
    with pytest.raises(SystemExit) as ended:
        run_program(pretrain, PretrainArguments)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "Unknown option 'batch_sizes'; did you mean 'batch_size'.\n"
