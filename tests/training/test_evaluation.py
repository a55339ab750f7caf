"""The programs of `training/evaluation`, against straightforward computations on the same images."""

import json
import math
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import load_from_disk
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from locatvit_hf import (
    LocAtViTConfig,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
    LocAtViTImageProcessor,
    LocAtViTModel,
)
from locatvit_hf.hub.card import results_from
from tests.factories import SMALLEST, model_class, tiny_config
from tests.processes import start_program, wait_for
from tests.training.conftest import SMALL_MODEL
from tests.training.programs import ROOT, run
from training.engine.arguments import build_arguments, load_recipe
from training.engine.optimization import create_optimizer
from training.engine.schedule import Schedule
from training.evaluation import classification, hummingbird, knn, linear_probe, segmentation
from training.evaluation.results import model_hash
from training.finetune import freeze_encoder
from training.tasks.classification import ClassificationTransform

CLASSES = ["background", "red", "green"]
RECIPES = sorted((ROOT / "training" / "recipes" / "evaluation").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A classifier with random weights strong enough to tell images apart."""
    folder = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(1)
    config = LocAtViTConfig(**SMALL_MODEL, initializer_range=0.3, id2label={0: "green", 1: "red", 2: "blue"})
    LocAtViTForImageClassification(config).save_pretrained(folder)
    LocAtViTImageProcessor.from_model_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "segmenter"
    torch.manual_seed(2)
    config = LocAtViTConfig(**SMALL_MODEL, initializer_range=0.5, id2label=dict(enumerate(CLASSES)))
    LocAtViTForSemanticSegmentation(config).save_pretrained(folder)
    LocAtViTImageProcessor.from_model_config(config, segmentation=True).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(squares, model, tmp_path) -> dict:
    return {
        "dataset": str(squares),
        "pretrained": str(model),
        "output_dir": str(tmp_path / "results"),
        "eval_batch_size": 4,
    }


@pytest.fixture
def dense(settings) -> dict:
    return settings | {"label_column": "segmentation", "label_names": CLASSES}


def arguments_of(program) -> type:
    own = [value for value in vars(program).values() if getattr(value, "__module__", None) == program.__name__]
    return next(value for value in own if value.__name__.endswith("Arguments"))


def evaluate(program, settings: dict) -> dict:
    """The result as it is written."""
    returned = program.main(build_arguments(arguments_of(program), settings))
    path = Path(settings["output_dir"]) / f"{program.__name__.rsplit('.', 1)[-1]}.json"
    assert [entry.name for entry in path.parent.glob(".partial-*")] == []
    written = json.loads(path.read_text())
    assert written["metrics"].keys() == returned["metrics"].keys()
    return written


def split(squares: Path, name: str):
    return load_from_disk(squares)[name]


def features(model: Path, rows) -> torch.Tensor:
    processor = LocAtViTImageProcessor.from_pretrained(model)
    encoder = LocAtViTModel.from_pretrained(model).eval()
    with torch.no_grad():
        return torch.cat([encoder(**processor(row["image"], return_tensors="pt")).pooler_output for row in rows])


def test_classification_is_what_the_pipeline_says(settings, squares, model):
    """Also where the model has its classes in another order than the data, and one more."""
    result = evaluate(classification, settings | {"max_validation_samples": 9})
    rows = split(squares, "validation").select(range(9))
    classifier = pipeline("image-classification", str(model))
    right = [classifier(row["image"])[0]["label"] == ["red", "green"][row["label"]] for row in rows]
    assert result["metrics"] == {"accuracy": pytest.approx(np.mean(right)), "top_3_accuracy": 1.0}
    assert result["task"] == "classification" and result["split"] == "validation" and result["num_images"] == 9
    assert result["images_per_second"] > 0 and result["peak_memory_bytes"] > 2**20
    loaded = LocAtViTForImageClassification.from_pretrained(model)
    assert result["model_hash"] == model_hash(loaded) and len(result["model_hash"]) == 64
    with torch.no_grad():
        loaded.classifier.weight[-1, -1] += 1e-3
    assert result["model_hash"] != model_hash(loaded)
    assert {"python", "torch", "transformers", "locatvit-hf"} <= result["versions"].keys()
    assert result["settings"]["eval_batch_size"] == 4 and result["date"].endswith("+00:00")


def test_a_plain_vit_is_evaluated_as_it_is(settings, squares, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    names = {"id2label": {0: "red", 1: "green"}, "label2id": {"red": 0, "green": 1}}
    torch.manual_seed(3)
    vit = ViTForImageClassification(
        ViTConfig(**sizes, **names, image_size=16, patch_size=4, initializer_range=0.5)
    ).eval()
    vit.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    result = evaluate(classification, settings | {"pretrained": str(tmp_path / "vit")})
    rows = split(squares, "validation")
    pixels = torch.stack([torch.tensor(np.asarray(row["image"])).permute(2, 0, 1) / 127.5 - 1 for row in rows])
    with torch.no_grad():
        right = vit(pixels).logits.argmax(dim=1) == torch.tensor(rows["label"])
    assert result["metrics"]["accuracy"] == pytest.approx(right.float().mean().item())


def test_knn_equals_brute_force(settings, squares, model):
    result = evaluate(knn, settings | {"k": [3, 7]})
    train, validation = split(squares, "train"), split(squares, "validation")
    bank, queries = (F.normalize(features(model, rows), dim=1) for rows in (train, validation))
    for k in (3, 7):
        right = 0
        for query, label in zip(queries, validation["label"], strict=True):
            cosine = (bank @ query).tolist()
            votes = [0.0, 0.0]
            for index in sorted(range(len(cosine)), key=lambda index: -cosine[index])[:k]:
                votes[train["label"][index]] += math.exp(cosine[index] / 0.07)
            right += votes[label] > votes[1 - label]
        assert result["metrics"][f"accuracy_k{k}"] == pytest.approx(right / 10)
    assert result["metrics"]["accuracy"] == max(result["metrics"][f"accuracy_k{k}"] for k in (3, 7))
    assert result["num_train_images"] == 48


def test_linear_probe(settings, model):
    probe = {"length": "4 epochs", "batch_size": 16, "learning_rate": 0.1, "checkpoint_every": "4 epochs"}
    del settings["eval_batch_size"]
    result = evaluate(linear_probe, settings | probe)
    assert 0 <= result["metrics"]["accuracy"] <= 1 and result["updates"] == 12
    trained = LocAtViTForImageClassification.from_pretrained(f"{settings['output_dir']}/model")
    before = LocAtViTForImageClassification.from_pretrained(model)
    assert model_hash(trained.base_model) == model_hash(before.base_model)
    assert result["model_hash"] == model_hash(trained)
    with pytest.raises(ValueError, match="freeze"):
        evaluate(linear_probe, settings | probe | {"freeze": False})


def brute_force_hummingbird(model: Path, squares: Path, k: int, temperature: float) -> float:
    """Mean IoU by loops over patches; images are as large as the model wants them."""
    encoder = LocAtViTModel.from_pretrained(model).eval()

    def patches(row) -> torch.Tensor:
        pixels = torch.tensor(np.asarray(row["image"])).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            return encoder(pixels, output_hidden_states=True).hidden_states[-1][0, 1:]

    bank = []
    for row in split(squares, "train"):
        classes = np.asarray(row["segmentation"])
        for index, feature in enumerate(patches(row)):
            y, x = 4 * (index // 4), 4 * (index % 4)
            share = [float((classes[y : y + 4, x : x + 4] == label).mean()) for label in range(3)]
            bank.append((feature / feature.norm(), torch.tensor(share)))
    keys, shares = (torch.stack(entries) for entries in zip(*bank, strict=True))
    predicted, true = [], []
    for row in split(squares, "validation"):
        answers = []
        for feature in patches(row):
            cosine = keys @ (feature / feature.norm())
            nearest = cosine.argsort(descending=True)[:k]
            weights = torch.tensor([math.exp((cosine[index] - 1) / temperature) for index in nearest])
            answers.append((weights[:, None] * shares[nearest]).sum(dim=0) / weights.sum())
        grid = torch.stack(answers).T.reshape(1, 3, 4, 4)
        predicted.append(F.interpolate(grid, (16, 16), mode="bilinear").argmax(dim=1)[0].numpy())
        true.append(np.asarray(row["segmentation"]))
    predicted, true = np.stack(predicted), np.stack(true)
    ious = [((predicted == c) & (true == c)).sum() / ((predicted == c) | (true == c)).sum() for c in range(3)]
    return float(np.mean(ious))


def test_hummingbird_equals_brute_force(dense, squares, model):
    result = evaluate(hummingbird, dense | {"augment": False, "k": 5, "temperature": 0.1})
    assert result["memory_entries"] == 48 * 16
    assert result["metrics"]["mean_iou"] == pytest.approx(brute_force_hummingbird(model, squares, 5, 0.1), abs=1e-3)
    assert list(result["metrics"]["per_category_iou"]) == CLASSES and result["metrics"]["mean_iou"] > 0.1


def test_the_bank_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    keys, queries = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (500, 40))
    shares = torch.rand(500, 6, generator=generator)
    bank = hummingbird.MemoryBank(keys, shares, k=30, temperature=0.02)
    for query, found in zip(queries, bank.classify(3 * queries), strict=True):
        cosine, nearest = (keys @ query).topk(30)
        weights = torch.exp(cosine / 0.02) / torch.exp(cosine / 0.02).sum()
        torch.testing.assert_close(found, weights @ shares[nearest], atol=1e-4, rtol=0)


@pytest.mark.parametrize("memory_size", [1, 30, 100, 48 * 16 + 5])
def test_the_memory_is_bounded_and_the_same_each_time(dense, memory_size):
    settings = dense | {"memory_size": memory_size, "k": 3, "seed": 4}
    first = evaluate(hummingbird, settings)
    assert first["memory_entries"] == min(memory_size, 48 * 16)
    assert evaluate(hummingbird, settings)["metrics"] == first["metrics"]


def test_rare_classes_are_remembered_first():
    counts = torch.zeros(64, 3, dtype=torch.int64)
    counts[:50, 0], counts[50:52, 1], counts[52:56, 2] = 16, 16, 16  # the last eight patches have no label
    drawn = torch.stack([hummingbird.sample_patches(counts, 6, (0, 0, image)) for image in range(200)])
    assert drawn.shape == (200, 6) and drawn.max() < 56
    assert all(len(row.unique()) == 6 for row in drawn)
    share = (drawn >= 50).float().sum() / (drawn < 50).float().sum()
    assert share > 1.5  # without preference 6 / 50
    assert torch.equal(hummingbird.sample_patches(counts, 6, (0, 0, 7)), drawn[7])
    assert len(hummingbird.sample_patches(counts, 100, (0,))) == 56
    assert len(hummingbird.sample_patches(counts, 0, (0,))) == 0


def test_labels_become_shares():
    labels = torch.tensor([[0, 0, 255, 255], [1, 0, 255, 255], [2, 2, 1, 255], [2, 2, 2, 2]])[None]
    counts = hummingbird.count_classes(labels, (2, 2), 3)
    assert counts.tolist() == [[[3, 1, 0], [0, 0, 0], [0, 0, 4], [0, 1, 2]]]
    with pytest.raises(ValueError, match="not divided evenly"):
        hummingbird.count_classes(labels, (3, 3), 3)


@pytest.mark.parametrize(
    ("family", "fields", "shape"),
    [
        ("locatjumbo", {}, (12, 4, 4)),
        ("locatswin", {"image_size": 64, "patch_size": 4, "window_size": 2}, (32, 4, 4)),
        ("pacavit", {"image_size": 64}, (8, 4, 4)),
    ],
)
def test_features_of_every_family(tmp_path, family, fields, shape):
    """Patches of the last layer, of pyramids in the third stage: at a sixteenth of the image, or the patch size."""
    config = tiny_config(family, **SMALLEST[family] | fields)
    model_class(family, "Model")(config).save_pretrained(tmp_path)
    backbone = hummingbird.load_backbone(str(tmp_path), None)
    side = config.image_size
    with torch.no_grad():
        (found,) = backbone(torch.zeros(1, 3, side, side)).feature_maps
    assert found.shape[1:] == shape
    with pytest.raises(ValueError, match="no stage 'stage9'"):
        hummingbird.load_backbone(str(tmp_path), "stage9")


def test_segmentation_is_what_the_pipeline_says(dense, squares, segmenter, capsys):
    result = evaluate(segmentation, dense | {"pretrained": str(segmenter)})
    answer = pipeline("image-segmentation", str(segmenter))
    predicted, true = np.zeros((10, 16, 16), int), np.zeros((10, 16, 16), int)
    for index, row in enumerate(split(squares, "validation")):
        true[index] = np.asarray(row["segmentation"])
        for entry in answer(row["image"]):
            predicted[index][np.asarray(entry["mask"]) > 0] = CLASSES.index(entry["label"])
    ious = [((predicted == c) & (true == c)).sum() / ((predicted == c) | (true == c)).sum() for c in range(3)]
    assert list(result["metrics"]["per_category_iou"].values()) == pytest.approx(ious)
    assert result["num_images"] == 10 and result["images_per_second"] > 0
    assert "classes differently" not in capsys.readouterr().out
    renamed = {"pretrained": str(segmenter), "label_names": [CLASSES[0], *CLASSES[:0:-1]]}
    assert evaluate(segmentation, dense | renamed)["metrics"] == result["metrics"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"name 2 of 3 classes differently, the first {CLASSES[2]!r} and {CLASSES[1]!r}: label maps are read" in said


@pytest.mark.parametrize("program", [segmentation, hummingbird])
def test_classes_that_no_label_map_holds_are_named(dense, segmenter, program, capsys):
    """An evaluation of labels without any class ends; where one class is missing it is named."""
    dense |= {"pretrained": str(segmenter)} if program is segmentation else {}
    with pytest.raises(ValueError, match=r"No pixel of the .* label maps is of a class: all .* leaves out"):
        evaluate(program, dense | {"label_mapping": {77: 0, 78: 1, 79: 2}})
    evaluate(program, dense | {"label_mapping": {0: 0, 1: 1}})
    printed = capsys.readouterr().out.replace("\n", " ")
    assert re.search(rf"No pixel of the 10 validation label maps is {CLASSES[2]!r}: .* of 2,560 are of values", printed)
    assert ("48 training label maps" in printed) == (program is hummingbird)


def test_results_become_rows_of_a_card(settings):
    result = evaluate(classification, settings)
    rows = results_from(result)
    assert {(row.task, row.dataset) for row in rows} == {("image-classification", "squares")}
    assert {row.metric: row.value for row in rows} == {name: round(v, 5) for name, v in result["metrics"].items()}


@pytest.mark.parametrize(
    ("program", "changed", "message"),
    [
        (classification, {"pretrained": None}, "Name the model"),
        (classification, {"output_dir": None}, "Name a folder for the results"),
        (classification, {"pretrained": "./nowhere"}, "nowhere"),
        (classification, {"pretrained": "SEGMENTER"}, "has no classifier"),
        (classification, {"label_column": "species"}, "has no column 'species'"),
        (classification, {"label_names": ["red", "violet"]}, "'violet' is none of the 3 of"),
        (classification, {"validation_split": "test"}, "has no split 'test'"),
        (knn, {"k": [500]}, "only 48 training features for k=500"),
        (knn, {"k": []}, "at least one number of neighbors"),
        (segmentation, {"label_column": "segmentation"}, "which does not segment"),
        (
            segmentation,
            {"pretrained": "SEGMENTER", "label_column": "segmentation", "label_names": ["a", "b"]},
            "has 3 classes, but the data has 2",
        ),
        (hummingbird, {"label_column": "segmentation"}, "does not name its classes"),
        (hummingbird, {"label_column": "segmentation", "label_names": ["a", "b"]}, "outside the 2 classes"),
        (hummingbird, {"memory_size": 0}, "memory_size must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(settings, segmenter, program, changed, message):
    if changed.get("pretrained") == "SEGMENTER":
        changed = changed | {"pretrained": str(segmenter)}
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(program, settings | changed)
    assert "\n" not in str(caught.value)
    assert not list(Path(settings["output_dir"] or "/nonexistent").glob("*.json"))


def test_an_unwritable_folder_is_one_sentence(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write to the output folder"):
        evaluate(classification, settings | {"output_dir": str(tmp_path / "file" / "results")})


def launch_two(program: str, settings: dict) -> dict:
    """The result of two processes on CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = [word for name, value in settings.items() for word in (f"--{name}", json.dumps(value).strip('"'))]
    errors = f"{settings['output_dir']}.errors"
    processes = []
    for rank in ("0", "1"):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        words = "-m", f"training.evaluation.{program}", *options
        processes.append(
            start_program(*words, folder=ROOT, environment={**os.environ, **environment}, output=(os.devnull, errors))
        )
    assert list(map(wait_for, processes)) == [0, 0], Path(errors).read_text()
    return json.loads((Path(settings["output_dir"]) / f"{program}.json").read_text())


def test_two_processes_measure_the_same(dense):
    """Of an odd number of images; the memory is sampled, so that its order and its draws count too."""
    dense |= {"max_validation_samples": 9, "max_train_samples": 37, "memory_size": 200, "k": 7, "augment": True}
    alone = evaluate(hummingbird, dense)
    together = launch_two("hummingbird", dense)
    assert together["num_processes"] == 2 and alone["num_processes"] == 1
    assert together["metrics"] == alone["metrics"] and together["memory_entries"] == alone["memory_entries"] == 200


@pytest.mark.slow
@pytest.mark.parametrize("program", [classification, knn, segmentation])
def test_two_processes_measure_the_same_with_each_program(settings, dense, segmenter, program):
    settings = dense | {"pretrained": str(segmenter)} if program is segmentation else settings
    settings |= {"max_validation_samples": 9, "max_train_samples": 37} | ({"k": [5]} if program is knn else {})
    alone = evaluate(program, settings)
    assert launch_two(program.__name__.rsplit(".", 1)[-1], settings)["metrics"] == alone["metrics"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe):
    """Named after its program; the published protocols have the values of the specification."""
    program = next(p for p in (knn, linear_probe, hummingbird) if recipe.stem.startswith(p.__name__.split(".")[-1]))
    arguments = build_arguments(arguments_of(program), load_recipe(recipe))
    if program is knn:
        assert arguments.temperature == 0.07 and set(arguments.k) <= {10, 20, 100, 200}
    elif program is hummingbird:
        assert (arguments.k, arguments.temperature, arguments.epochs, arguments.augment) == (30, 0.02, 1, True)
        config = LocAtViTConfig(**SMALL_MODEL)
        read = hummingbird.LabelReader(arguments, 3)
        transform = hummingbird.JointTransform(config, read, arguments.seed, 0, arguments.augment)
        blank = Image.new("RGB", (40, 30)), Image.new("L", (40, 30), 1)
        pixels, labels = transform(*blank, 0)
        assert pixels.shape[1:] == labels.shape == (16, 16) and set(labels.unique().tolist()) <= {0, 1}
    else:
        assert (arguments.optimizer, arguments.weight_decay, arguments.schedule) == ("momentum", 0.0, "cosine")
        transform = ClassificationTransform(arguments, 16, [0.5] * 3, [0.5] * 3)
        assert transform(Image.new("RGB", (40, 30)), 1)[0].shape == (3, 16, 16)
        assert [mode.value for mode in transform.interpolations] == ["bilinear"]
        model = LocAtViTForImageClassification(LocAtViTConfig(**SMALL_MODEL))
        freeze_encoder(model, [])
        groups = create_optimizer(model, arguments).param_groups
        assert all(group["momentum"] == 0.9 and not group["nesterov"] for group in groups)
        assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.classifier.parameters()}
        if "imagenet1k" in recipe.stem:
            assert Schedule.resolve(arguments, 1_281_167).learning_rate_at(0) == pytest.approx(1e-3 * 1024 / 256)


def test_runs_as_a_program(settings):
    finished = run("evaluation.knn", settings | {"k": [5]})
    assert finished.returncode == 0, finished.stderr
    assert "accuracy" in finished.stdout and "images a second" in finished.stdout
