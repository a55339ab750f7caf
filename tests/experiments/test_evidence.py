"""The experiment of docs/evidence.md: equal recipes, an analysis checked by hand, a page from stored runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments.locality.analysis import (
    NUM_RESAMPLES,
    accuracy,
    class_iou,
    compare,
    draw_blocks,
    mean_iou,
    seed_interval,
)
from experiments.locality.compare_curves import app as compare_curves_app
from experiments.locality.compare_curves import curve_spread
from experiments.locality.cost import app as cost_app
from experiments.locality.export_examples import PUBLISHED
from experiments.locality.export_examples import app as export_examples_app
from experiments.locality.report import app, write_document
from experiments.locality.run import run
from experiments.locality.runs import MODELS, PLAN, RECIPES, ROOT, Run
from locatvit_hf import LocAtViTForImageClassification
from tests.training.conftest import SMALL_MODEL, squares  # noqa: F401  a fixture
from training.engine.arguments import build_arguments, load_recipe
from training.pretrain import PretrainArguments, build_model


def made_run(model: str, seed: int, correct: list[int], pixels: list[list[tuple[int, int]]]) -> Run:
    curve = [{"step": 1, "epoch": 1.0, "loss": 4.0 - seed, "accuracy": 0.1}]
    layers = [[0.1, 0.2, 0.3]] * 3
    gaussian = {"rows": [0.9, 1.0, 1.1], "columns": [0.9, 1.0, 1.1], "amplitude": [0.6, 0.7, 0.8]}
    content = {
        "num_images": len(correct),
        "correct": np.packbits(correct).tobytes().hex(),
        "pixels": [" ".join(f"{both}/{either}" for both, either in image) for image in pixels],
        "pretrain": {"parameters": 10, "train_curve": curve, "validation_curve": curve},
        "probe": {
            "metrics": {"per_category_iou": {"sky": 0.0, "road": 0.0, "never": None}},
            "train_curve": curve,
            "validation_curve": [{"step": 1, "epoch": 1.0, "mean_iou": 0.2}],
        },
        "knn": {"metrics": {"accuracy": 0.25}, "model_hash": "ab" * 32},
        "hummingbird": {"metrics": {"mean_iou": 0.5}},
        "gaussians": [gaussian] * 3 if model == "locatvit" else [],
        "features": {"patches": layers, "class_token": layers, "map": [["0.10 0.20", "0.30 0.40"]] * 3},
        "commits": {"pretrain": ["abcdef0", "abcdef1+"], "segment": ["abcdef2"]},
        "environment": {"cpu": "a processor", "torch": "2.15.0"},
    }
    return Run(model, seed, content)


VIT = made_run("vit", 0, [1, 0, 0, 1, 0], [[(2, 10), (5, 5), (0, 0)], [(0, 10), (0, 0), (0, 0)]])
LOCATVIT = made_run("locatvit", 0, [1, 1, 0, 1, 0], [[(4, 10), (5, 5), (0, 0)], [(6, 10), (0, 0), (0, 0)]])


def test_only_the_model_differs():
    shared = load_recipe(RECIPES / "pretrain" / "shared.yaml")
    assert {path.stem for path in (RECIPES / "pretrain").glob("*.yaml")} == {"shared", *MODELS}
    for name in MODELS:
        recipe = load_recipe(RECIPES / "pretrain" / f"{name}.yaml")
        assert {key for key in recipe if recipe[key] != shared.get(key)} <= {"model", "family"}
        assert recipe["model"].items() >= shared["model"].items()


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "vit": 705_796,
        "gaussian": 705_796 + 6 * 99,
        "refinement": 705_796,
        "locatvit": 706_390,
        "regvit": 705_796 + 8 * 96,
        "locat_regvit": 706_390 + 8 * 96,
        "mean_pooling": 705_796 - 2 * 96,
        "no_position": 705_796 - 65 * 96,
        "locat_no_position": 706_390 - 65 * 96,
        "pacavit": 1_429_412,
    }.items(),
)
def test_models_have_the_parameters_that_the_page_gives(name, parameters):
    arguments = build_arguments(PretrainArguments, load_recipe(RECIPES / "pretrain" / f"{name}.yaml"))
    with torch.device("meta"):
        model = build_model(arguments, arguments.label_names)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.num_labels == 100


def test_the_claim_has_three_seeds():
    assert {seed for model, seed in PLAN if model == "vit"} == {seed for model, seed in PLAN if model == "locatvit"}
    assert {(model, seed) for model in ("vit", "locatvit") for seed in range(3)} <= set(PLAN)
    assert {model for model, _ in PLAN} == set(MODELS) and len(set(PLAN)) == len(PLAN)


def test_measures_by_hand():
    assert accuracy(VIT) == pytest.approx(0.4) and accuracy(LOCATVIT) == pytest.approx(0.6)
    np.testing.assert_allclose(class_iou(VIT), [2 / 20, 1, np.nan])
    assert mean_iou(VIT) == pytest.approx((0.1 + 1) / 2) and mean_iou(LOCATVIT) == pytest.approx((0.5 + 1) / 2)
    draws = np.array([[2.0, 0.0], [1.0, 1.0]])  # the first image twice; both once
    np.testing.assert_allclose(mean_iou(VIT, draws), [(0.2 + 1) / 2, (0.1 + 1) / 2])
    np.testing.assert_allclose(accuracy(VIT, np.array([[5.0, 0, 0, 0, 0]])), [1.0])


def test_differences_are_paired_by_seed_and_image():
    other_seed = [made_run(run.model, 1, [1, 0, 0, 1, 0], [[(3, 10), (5, 5), (0, 0)]] * 2) for run in (VIT, LOCATVIT)]
    unpaired = made_run("vit", 2, [0] * 5, [[(0, 10), (0, 5), (0, 0)]] * 2)
    difference = compare([VIT, LOCATVIT, *other_seed, unpaired], "locatvit", "vit", "frozen mIoU")
    assert difference.by_seed == pytest.approx([0.2, 0.0]) and difference.mean == pytest.approx(0.1)
    assert difference.runs == ["locatvit-0", "vit-0", "locatvit-1", "vit-1"]
    # One draw in four is the first image twice, one in four the second: 0.1 and 0.6 in seed 0, nothing in seed 1.
    assert difference.over_images == pytest.approx((0.05, 0.3))
    # Two images are one block: both are drawn, always.
    assert difference.over_blocks == pytest.approx((0.1, 0.1))
    assert compare([VIT], "locatvit", "vit", "accuracy") is None
    assert compare([VIT, LOCATVIT], "locatvit", "vit", "k-NN accuracy").over_images is None
    assert compare([VIT, LOCATVIT], "locatvit", "vit", "accuracy").over_blocks is None


def test_blocks_are_neighbours():
    """Whole blocks, all weights alike often, and an interval that is wider where neighbours err alike."""
    weights = draw_blocks(40)
    assert weights.shape == (NUM_RESAMPLES, 40) and (weights.sum(axis=1) == 40).all()
    assert np.abs(weights.mean(axis=0) - 1).max() < 0.15
    assert np.corrcoef(weights[:, 5], weights[:, 6])[0, 1] > 0.8 > np.corrcoef(weights[:, 5], weights[:, 20])[0, 1]
    plain, better = ([[(5 + 4 * ours * (frame // 10 % 2), 10)] for frame in range(40)] for ours in (0, 1))
    runs = [made_run(name, 0, [0] * 5, pixels) for name, pixels in (("vit", plain), ("locatvit", better))]
    found = compare(runs, "locatvit", "vit", "frozen mIoU")
    assert np.ptp(found.over_blocks) > 1.5 * np.ptp(found.over_images)


def test_verdicts_need_both_intervals():
    assert seed_interval([0.2]) is None
    reach = 4.30265 * 0.1 / np.sqrt(3)
    np.testing.assert_allclose(seed_interval([0.1, 0.2, 0.3]), [0.2 - reach, 0.2 + reach], rtol=1e-4)
    pixels = [[(step, 10), (5, 5), (0, 0)] for step in (1, 2, 3)]
    better = [[(step + 4, 10), (5, 5), (0, 0)] for step in (1, 2, 3)]
    runs = [made_run("vit", seed, [0] * 5, pixels) for seed in range(3)]
    one_seed = made_run("locatvit", 0, [1] * 5, better)
    assert compare([*runs, one_seed], "locatvit", "vit", "frozen mIoU").verdict == "not tested"
    ours = [made_run("locatvit", seed, [1] * 5, better) for seed in range(3)]
    assert compare([*runs, *ours], "locatvit", "vit", "frozen mIoU").verdict == "better"
    assert compare([*runs, *ours], "vit", "locatvit", "frozen mIoU").verdict == "worse"
    mixed = [made_run("locatvit", seed, [1] * 5, better if seed else pixels) for seed in range(3)]
    assert compare([*runs, *mixed], "locatvit", "vit", "frozen mIoU").verdict == "open"
    assert NUM_RESAMPLES >= 1000


def test_the_page_tells_what_is_stored_and_what_is_missing(tmp_path: Path):
    cost = {"ratios": {"locatvit": [1.1, 1.25, 1.3]}, "seconds": {"vit": [0.5] * 7}, "environment": {"cpu": "a chip"}}
    (tmp_path / "runs" / "cost.json").parent.mkdir()
    (tmp_path / "runs" / "cost.json").write_text(json.dumps(cost))
    for made in (VIT, LOCATVIT):
        (tmp_path / "runs" / f"{made.name}.json").write_text(json.dumps(made.content))
    outcome = CliRunner().invoke(app, ["--results", str(tmp_path / "runs"), "--output", str(tmp_path / "docs")])
    assert outcome.exit_code == 0, outcome.output
    page = (tmp_path / "docs" / "evidence.md").read_text()
    assert "| LocAtViT (`locatvit`) | 0 | 75.00 | 60.00 | 25.00 | 50.00 | 10 | 23.47 | 73.94 |" in page
    assert "| LocAtViT – ViT | frozen mIoU | +20.00 | – | +" in page and "not tested | locatvit-0, vit-0 |" in page
    assert "| vit-0 | abcdef0, abcdef1+; abcdef2 |" in page
    assert "| LocAtViT | 1.25 | 1.10 to 1.30 |" in page and "medians of 7 interleaved rounds" in page
    assert "vit-1, locatvit-1" in page.split("Not finished yet")[1].splitlines()[0]
    for name in ("scores", "curves", "features", "gaussians", "maps"):
        assert (tmp_path / "docs" / "assets" / "evidence" / f"{name}.png").stat().st_size > 5000
    write_document([], None, tmp_path / "before")
    before = (tmp_path / "before" / "evidence.md").read_text()
    write_document([VIT], None, tmp_path / "plain")
    assert "gaussians.png" not in (tmp_path / "plain" / "evidence.md").read_text()
    assert not (tmp_path / "plain" / "assets" / "evidence" / "gaussians.png").exists()
    assert "The comparison that counts" in before and "## Differences" not in before


def test_the_page_in_the_documentation_is_that_of_the_stored_runs(tmp_path: Path):
    outcome = CliRunner().invoke(app, ["--output", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "evidence.md").read_text() == (ROOT / "docs" / "evidence.md").read_text()


@pytest.mark.slow
def test_a_run_is_the_programs_and_what_is_measured_of_them(squares, tmp_path, monkeypatch):  # noqa: F811
    length = {"length": "2 steps", "warmup": "1 steps", "batch_size": 8, "evaluate_every": "2 steps", "export": "last"}
    classes = {"label_column": "segmentation", "label_names": ["ground", "red", "green"]}
    recipes = {
        "pretrain/shared": {"model": SMALL_MODEL, **length, "log_every": 1},
        "pretrain/locatvit": {"extends": "shared.yaml"},
        "segment/probe": {**classes, **length, "resize": 16, "crop_size": 16},
        "evaluation/knn": {"k": [3]},
        "evaluation/hummingbird": {**classes, "k": 3},
    }
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    for module in ("experiments.locality.run", "experiments.locality.measure"):
        monkeypatch.setattr(f"{module}.RECIPES", tmp_path)
    monkeypatch.setattr("experiments.locality.measure.SHOWN_IMAGE", 3)
    work = tmp_path / "work" / "locatvit-2"
    content = run("locatvit", 2, work, str(squares), str(squares))
    found = Run("locatvit", 2, json.loads(json.dumps(content)))
    assert content["pretrain"]["arguments"]["seed"] == 2 and set(content["commits"]) >= {"pretrain", "segment"}
    assert accuracy(found) == pytest.approx(content["pretrain"]["metrics"]["accuracy"])
    assert mean_iou(found) == pytest.approx(content["probe"]["metrics"]["mean_iou"])
    assert len(content["gaussians"]) == 2 and len(content["features"]["class_token"]) == 2
    assert [len(row.split()) for row in content["features"]["map"][1]] == [4] * 4
    before = (work / "pretrain" / "all_results.json").stat().st_mtime_ns
    assert run("locatvit", 2, work, str(squares), str(squares))["correct"] == content["correct"]
    assert (work / "pretrain" / "all_results.json").stat().st_mtime_ns == before

    # The best run becomes two folders.
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "locatvit-2.json").write_text(json.dumps(content))
    monkeypatch.setattr(
        "experiments.locality.export_examples.PUBLISHED", {n: v for n, v in PUBLISHED.items() if v[0] == "locatvit"}
    )
    options = ["--results", tmp_path / "results", "--work", tmp_path / "work", "--output", tmp_path / "examples"]
    outcome = CliRunner().invoke(export_examples_app, [str(option) for option in options])
    assert outcome.exit_code == 0, outcome.output
    folder = tmp_path / "examples" / "locatvit-classification"
    assert "The run locatvit-2 of docs/evidence.md" in (folder / "README.md").read_text()
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    halved, trained = (LocAtViTForImageClassification.from_pretrained(f) for f in (folder, work / "pretrain" / "model"))
    assert halved.dtype == torch.float32
    for ours, theirs in zip(halved.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_a_repeated_run_is_compared_with_the_stored_curves(tmp_path):
    runs = [made_run("vit", seed, [0] * 5, [[(1, 10), (5, 5), (0, 0)]]) for seed in (0, 2)]  # losses 4 and 2
    for made in runs:
        (tmp_path / f"{made.name}.json").write_text(json.dumps(made.content))

    def compare_with(loss: float, program: str = "pretrain", name: str = "vit-0"):
        curve = [{"step": 1, "epoch": 1.0, "loss": loss, "accuracy": 0.1, "mean_iou": 0.2}]
        record = {"program": program, "train_curve": curve, "validation_curve": curve}
        (tmp_path / "all_results.json").write_text(json.dumps(record))
        return CliRunner().invoke(compare_curves_app, [name, str(tmp_path), "--results", str(tmp_path)])

    same = compare_with(4.0)
    assert same.exit_code == 0 and same.output.count("identical") == 2
    near, far = compare_with(4.0 + 1.9 * np.sqrt(2)), compare_with(4.0 + 2.1 * np.sqrt(2))
    assert (
        near.exit_code == 0
        and "1.90 times the spread" in near.output
        and "accuracy at 1 points: identical" in near.output
    )
    assert far.exit_code == 1 and "2.10 times the spread" in far.output
    assert "vit-0 probe, validation_curve, mean_iou" in compare_with(4.0, "segment").output
    unknown = compare_with(4.0, name="vit-1")
    assert unknown.exit_code == 1 and "No run 'vit-1' is stored; there are vit-0, vit-2." in unknown.stderr
    (tmp_path / "vit-2.json").unlink()
    alone = compare_with(4.5)
    assert alone.exit_code == 1 and "nobody can say" in alone.output
    assert curve_spread(runs, "pretrain", "train_curve", "loss") == pytest.approx(np.sqrt(2))


def test_the_cost_of_a_training_step_is_relative_to_the_vit(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.locality.cost.MODELS", {name: MODELS[name] for name in ("vit", "locatvit")})
    outcome = CliRunner().invoke(cost_app, ["--budget", "0", "--output", str(tmp_path / "cost.json")])
    assert outcome.exit_code == 0, outcome.output
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["ratios"]["vit"] == [1, 1, 1] and "LocAtViT" in outcome.output
    ratios = [ours / plain for ours, plain in zip(found["seconds"]["locatvit"], found["seconds"]["vit"], strict=True)]
    assert found["ratios"]["locatvit"][1] == pytest.approx(np.median(ratios), abs=1e-3)
