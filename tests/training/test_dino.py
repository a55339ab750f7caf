import json
import math
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

from tests.tolerances import rounding
from tests.training.conftest import PLAIN_DESCENT, SMALL_MODEL
from tests.training.programs import ROOT
from tests.training.programs import train as launch
from training.data import sample_randomness
from training.dino import DinoArguments
from training.dino import main as dino
from training.engine.arguments import build_arguments, load_recipe
from training.engine.checkpoints import list_checkpoints
from training.engine.optimization import create_optimizer
from training.engine.schedule import Schedule
from training.tasks.checkpoint_loading import build_config
from training.tasks.dino import (
    DinoHead,
    DinoLoss,
    DinoNetwork,
    MultiCropTransform,
    SelfDistillationArguments,
    create_teacher,
    teacher_momentum_at,
    teacher_temperature_at,
    update_teacher,
)

RECIPES = ROOT / "training" / "recipes" / "dino"
SMALL_HEAD = {"num_prototypes": 24, "head_hidden_size": 16, "head_bottleneck_size": 8}
# Of losses that add up in another order: an answer is a sum of 8 products, divided by the teacher's first temperature.
TOLERANCE = rounding(8, 1 / 0.02)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """Twenty images and no other column, in one split."""
    folder = tmp_path_factory.mktemp("images") / "noise"
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(20)]
    DatasetDict({"train": Dataset.from_dict({"image": images})}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def settings(unlabelled) -> dict:
    """Everything random is on: views, drop path, dropout. Every schedule moves."""
    return {
        "dataset": str(unlabelled),
        "model": {**SMALL_MODEL, "drop_path_rate": 0.2, "hidden_dropout_prob": 0.1},
        **SMALL_HEAD,
        "local_crop_size": 8,
        "num_local_crops": 2,
        "teacher_momentum": 0.9,
        "start_teacher_temperature": 0.02,
        "teacher_temperature_warmup": "4 steps",
        "freeze_last_layer": "2 steps",
        "length": "8 steps",
        "warmup": "2 steps",
        "batch_size": 8,
        "evaluate_every": "4 steps",
        "checkpoint_every": "3 steps",
        "keep_checkpoints": 5,
        "log_every": 1,
        "seed": 5,
    }


def train(settings: dict, output) -> dict:
    return dino(build_arguments(DinoArguments, {**settings, "output_dir": str(output)}))


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """(output folder, results) of one uninterrupted run."""
    output = tmp_path_factory.mktemp("dino") / "run"
    return output, train(settings, output)


def test_the_teacher_is_exported(trained, unlabelled):
    output, results = trained
    stored = json.loads((output / "all_results.json").read_text())
    assert 0 < stored["metrics"]["teacher_entropy"] <= math.log(24) + 1e-6
    assert 0 < stored["metrics"]["feature_variance"] < 1
    assert [point["step"] for point in stored["validation_curve"]] == [4, 8] and len(stored["train_curve"]) == 8
    assert {"teacher_entropy", "feature_variance"} <= stored["validation_curve"][0].keys()
    assert results["num_train_images"] == 20

    teacher = load_file(output / "checkpoints" / "step_00000008" / "teacher.safetensors")
    model = AutoModel.from_pretrained(output / "model")
    assert all(torch.equal(weight, teacher[f"backbone.{name}"]) for name, weight in model.state_dict().items())
    assert model(torch.zeros(1, 3, 16, 16)).pooler_output.shape == (1, 16)
    classifier = AutoModelForImageClassification.from_pretrained(output / "model", num_labels=3)
    weights = classifier.locatvit.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "model", "pooled"),
    [
        ("locatswin", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}, 16),
        ("locatjumbo", {"patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, 16),
        (
            "pacavit",
            {
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "num_attention_heads": [1, 2],
                "num_clusters": [4, 0],
                "teacher_depths": [1, 1],
            },
            16,
        ),
    ],
)
def test_every_family_of_images_learns(settings, tmp_path, family, model, pooled):
    changes = {"family": family, "model": {"image_size": 32, **model}, "local_crop_size": 16, "length": "3 steps"}
    results = train(
        {**settings, **changes, "freeze_last_layer": "0 steps", "evaluate_every": "3 steps"}, tmp_path / "run"
    )
    assert 0 < results["metrics"]["feature_variance"] < 1
    exported = AutoModel.from_pretrained(tmp_path / "run" / "model")
    pooled *= getattr(exported.config, "num_jumbo_tokens", 1)
    assert exported.config.model_type == family
    assert exported(torch.zeros(1, 3, 32, 32)).pooler_output.shape == (1, pooled)


def assert_same_run(output, expected):
    folder, results = expected
    stored = json.loads((output / "all_results.json").read_text())
    for curve in ("train_curve", "validation_curve"):
        values = [
            [
                {k: v for k, v in point.items() if k not in ("images_per_second", "data_wait_share")}
                for point in r[curve]
            ]
            for r in (stored, results)
        ]
        assert values[0] == values[1]
    for file in ("model/model.safetensors", "checkpoints/step_00000008/model.safetensors"):
        weights = [load_file(path / file) for path in (output, folder)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    states = [
        load_file(path / "checkpoints" / "step_00000008" / f"{name}.safetensors")
        for path in (output, folder)
        for name in ("teacher", "criterion")
    ]
    for mine, theirs in zip(states[:2], states[2:], strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_continues_bit_identically(settings, trained, tmp_path):
    """Teacher, centre and all schedules go on where they were."""
    output = tmp_path / "run"
    shutil.copytree(trained[0], output)
    for later in list_checkpoints(output / "checkpoints")[1:]:
        shutil.rmtree(later)
    shutil.rmtree(output / "model")
    (output / "all_results.json").unlink()
    train(settings, output)
    assert_same_run(output, trained)


def test_accumulation_changes_nothing(settings, tmp_path):
    """The centre, too, belongs to the batch of a step, however it is cut."""
    plain = {"model": SMALL_MODEL, **PLAIN_DESCENT, "length": "5 steps"}
    results = [
        train({**settings, **plain, "gradient_accumulation_steps": steps}, tmp_path / str(steps)) for steps in (1, 4)
    ]
    losses = [[point["loss"] for point in result["train_curve"]] for result in results]
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
    for name in ("teacher_entropy", "feature_variance"):
        assert results[0]["metrics"][name] == pytest.approx(results[1]["metrics"][name], abs=TOLERANCE)


def test_the_last_layer_is_frozen_at_first(settings, tmp_path):
    train({**settings, "length": "4 steps", "checkpoint_every": "1 steps"}, tmp_path / "run")
    prototypes = [
        load_file(folder / "model.safetensors")["head.prototypes.weight"]
        for folder in list_checkpoints(tmp_path / "run" / "checkpoints")
    ]
    assert torch.equal(prototypes[0], prototypes[1])
    assert not torch.equal(prototypes[1], prototypes[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_split": "training"}, "no split 'training'"),
        ({"image_column": "picture"}, "no column 'picture'"),
        ({"blur": [1.0]}, "blur needs three probabilities"),
        ({"model": {"hidden_sizes": 3}}, "no field 'hidden_sizes'"),
        ({"family": "bert", "model": {"num_hidden_layers": 1}}, "images, which bert does not take"),
        ({"family": "pacavit", "model": {"clustering_type": "teacher"}}, "batch norms, whose statistics"),
        ({"batch_size": 32}, "needs more images"),
        ({"ema_decay": 0.9}, "ema_decay"),
        ({"export": "best"}, "export"),
    ],
)
def test_bad_settings_are_one_sentence(settings, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        train({**settings, **changes}, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_views_depend_on_their_image_alone():
    arguments = DinoArguments(local_crop_size=8, num_local_crops=3, solarize=0.5)
    transform = MultiCropTransform(arguments, 16, [0.5] * 3, [0.5] * 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))

    def views(*key):
        with sample_randomness(*key):
            return transform(image)

    first = views(0, 1, 2)
    assert [tuple(view.shape) for view in first] == [(3, 16, 16)] * 2 + [(3, 8, 8)] * 3
    assert all(torch.equal(a, b) for a, b in zip(first, views(0, 1, 2), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, views(0, 1, 3), strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[2], first[3])


def test_views_of_one_size_go_through_the_encoder_together():
    """The answer to a view does not depend on which views it is given with."""
    torch.manual_seed(0)
    arguments = build_arguments(DinoArguments, {"model": SMALL_MODEL, **SMALL_HEAD})
    network = DinoNetwork(AutoModel.from_config(build_config("locatvit", None, SMALL_MODEL)), arguments).eval()
    crops = [torch.randn(3, 3, 16, 16)] * 2 + [torch.randn(3, 3, 8, 8), torch.randn(3, 3, 16, 16)]
    features, answers = network(crops)
    assert features.shape == (4, 3, 16) and answers.shape == (4, 3, 24)
    for index, crop in enumerate(crops):
        torch.testing.assert_close(network([crop])[1][0], answers[index], rtol=0, atol=1e-5)
    assert answers.abs().max() <= 1 + 1e-5


def reference_loss(student, teacher, centre, student_temperature, teacher_temperature):
    """View by view and image by image, as the paper's algorithm 1 extended to many crops."""
    total, pairs = 0.0, 0
    for t in range(len(teacher)):
        for s in range(len(student)):
            if s == t:
                continue
            for image in range(student.shape[1]):
                target = ((teacher[t, image] - centre) / teacher_temperature).softmax(dim=0)
                total -= (target * (student[s, image] / student_temperature).log_softmax(dim=0)).sum()
                pairs += 1
    return total / pairs


def test_loss_centre_and_what_is_watched():
    torch.manual_seed(0)
    arguments = SelfDistillationArguments(**SMALL_HEAD, centre_momentum=0.7)
    criterion = DinoLoss(6, arguments)
    criterion.centre.uniform_(-0.1, 0.1)
    centre = criterion.centre.clone()
    student, teacher, features = torch.randn(5, 4, 24), torch.randn(2, 4, 24), torch.randn(2, 4, 6)
    loss = criterion(student, teacher, features, temperature=0.5)
    assert loss.item() == pytest.approx(reference_loss(student, teacher, centre, 0.1, 0.5).item(), rel=1e-5)
    watched = criterion.update_center(Accelerator())
    torch.testing.assert_close(criterion.centre, 0.7 * centre + 0.3 * teacher.mean(dim=(0, 1)))
    targets = ((teacher - centre) / 0.5).softmax(dim=-1)
    assert watched["teacher_entropy"] == pytest.approx(-(targets * targets.log()).sum(-1).mean().item(), rel=1e-4)
    unit = features.flatten(0, 1) / features.flatten(0, 1).norm(dim=1, keepdim=True)
    assert watched["feature_variance"] == pytest.approx(unit.var(dim=0, correction=0).sum().item(), rel=1e-4)


def test_collapse_shows():
    criterion = DinoLoss(6, SelfDistillationArguments(**SMALL_HEAD))
    same, answers = torch.ones(2, 4, 6), torch.zeros(2, 4, 24)
    criterion(answers, answers, same, temperature=0.04)
    watched = criterion.update_center(Accelerator())
    assert watched["feature_variance"] == pytest.approx(0, abs=1e-6)
    assert watched["teacher_entropy"] == pytest.approx(math.log(24), rel=1e-5)  # the same for all: uniform
    answers[..., 3] = 1
    criterion(answers, answers, same, temperature=0.04)
    assert criterion.update_center(Accelerator())["teacher_entropy"] < 1e-3  # the same for all: one prototype


def test_batch_norm_of_the_head_tells_alike_features_apart():
    features = torch.ones(16, 8) + 1e-3 * torch.randn(16, 8)
    spread = {}
    for batch_norm in (False, True):
        torch.manual_seed(0)
        head = DinoHead(8, SelfDistillationArguments(**SMALL_HEAD, head_batch_norm=batch_norm))
        spread[batch_norm] = head(features).std(dim=0).mean()
        torch.testing.assert_close(head.eval()(features), head.train()(features))  # the teacher evaluates
        torch.testing.assert_close(head(features.unflatten(0, (2, 8))).flatten(0, 1), head(features))  # views, samples
        assert not list(head.buffers())  # and follows the student by its parameters alone
    assert spread[True] > 50 * spread[False]


def test_the_teacher_follows_and_never_learns():
    arguments = build_arguments(DinoArguments, SMALL_HEAD)
    student = torch.nn.Sequential(DinoHead(4, arguments))
    teacher = create_teacher(student)
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training
    before = teacher[0].prototypes.weight.clone()
    with torch.no_grad():
        student[0].prototypes.weight += 1
    update_teacher(teacher, student, momentum=0.9)
    torch.testing.assert_close(teacher[0].prototypes.weight, before + 0.1)


def test_schedules_of_the_teacher():
    """The reference: momentum 0.996 to 1 along a cosine; a temperature that rises linearly where a warmup is set."""
    arguments = DinoArguments(start_teacher_temperature=0.04, teacher_temperature=0.07)
    momenta = [teacher_momentum_at(update, 100, arguments) for update in (0, 50, 100)]
    assert momenta == pytest.approx([0.996, 0.998, 1.0])
    temperatures = [teacher_temperature_at(update, 30, arguments) for update in (0, 10, 30, 90)]
    assert temperatures == pytest.approx([0.04, 0.05, 0.07, 0.07])
    assert teacher_temperature_at(0, 0, DinoArguments()) == 0.04


def test_dry_run_shows_the_views(settings, tmp_path):
    results = train({**settings, "dry_run": True}, tmp_path / "run")["dry_run"]
    assert results["steps"] == 8 and results["memory"]["activations"] > 0
    picture = Image.open(tmp_path / "run" / "dry_run.png")
    assert min(picture.size) > 200
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("name", "encoder", "rates"),
    [
        # 5e-4 for every 256 images, from 0 over ten epochs, to 1e-6. Parameters without a classifier.
        ("locatvit_small", 22_053_004 - 385_000, {0: 0.0, 50: 5e-4, 100: 1e-3, 1000: 1e-6}),
        ("vit_small", 22_050_664 - 385_000, {0: 0.0, 50: 5e-4, 100: 1e-3, 1000: 1e-6}),
        ("digits", None, {}),
        ("tiny_imagenet", None, {}),
    ],
)
def test_recipe(name, encoder, rates):
    arguments = build_arguments(DinoArguments, load_recipe(RECIPES / f"{name}.yaml"))
    with torch.device("meta"):
        config = build_config("locatvit", arguments.preset, arguments.model)
        network = DinoNetwork(AutoModel.from_config(config), arguments)
    trained = {id(p) for group in create_optimizer(network, arguments).param_groups for p in group["params"]}
    assert trained == {id(p) for p in network.parameters()}
    groups = create_optimizer(network, arguments).param_groups
    left = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    tokens = {"backbone.embeddings.cls_token", "backbone.embeddings.position_embeddings"}
    found = {name for name, p in network.named_parameters() if id(p) in left and p.ndim > 1}
    # The reference decays them; the small recipes, whose results are stored, do not.
    assert found == (tokens if encoder is None else set())
    assert all(id(p) in left for p in network.parameters() if p.ndim == 1)
    transform = MultiCropTransform(arguments, config.image_size, config.image_mean, config.image_std)
    views = transform(Image.new("RGB", (300, 200)))
    assert [view.shape[-1] for view in views] == [config.image_size] * 2 + [
        arguments.local_crop_size
    ] * arguments.num_local_crops
    schedule = Schedule.resolve(arguments, 10 * arguments.batch_size)
    assert {step: schedule.learning_rate_at(step) for step in rates} == pytest.approx(rates)
    if encoder is None:
        return
    assert sum(p.numel() for p in network.backbone.parameters()) == encoder
    assert sum(p.numel() for p in network.head.parameters()) == (
        (384 + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * 256 + 256 * 65536
    )
    # What the recipe writes out is what the defaults are.
    defaults = DinoArguments()
    for option in ("num_prototypes", "teacher_momentum", "weight_decay", "no_weight_decay", "num_local_crops"):
        assert getattr(arguments, option) == getattr(defaults, option)
    weight_decays = [schedule.weight_decay_at(step) for step in (0, schedule.total // 2, schedule.total)]
    assert weight_decays == pytest.approx([0.04, 0.22, 0.4])


def test_all_recipes_are_known():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"locatvit_small", "vit_small", "digits", "tiny_imagenet"}


@pytest.mark.slow
def test_two_processes_learn_what_one_does(settings, tmp_path):
    """The centre and what is watched are those of the whole batch."""
    results = []
    for number in (1, 2):
        changes = {"model": SMALL_MODEL, **PLAIN_DESCENT, "output_dir": str(tmp_path / str(number))}
        assert launch({**settings, **changes}, number, program="dino").wait() == [0] * number
        results.append(json.loads((tmp_path / str(number) / "all_results.json").read_text()))
    assert [result["num_processes"] for result in results] == [1, 2]
    losses = [[point["loss"] for point in result["train_curve"]] for result in results]
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], abs=TOLERANCE)
