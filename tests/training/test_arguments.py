import math

import pytest

from locatvit_hf import LocAtViTConfig, LocAtViTForImageClassification
from tests.training.conftest import SMALL_MODEL
from training.engine.arguments import load_recipe, parse_arguments
from training.engine.optimization import create_optimizer, set_learning_rate, set_weight_decay
from training.engine.schedule import Schedule, parse_duration
from training.evaluation.knn import KNNArguments
from training.finetune import FinetuneArguments
from training.pretrain import PretrainArguments
from training.segment import SegmentArguments


def test_command_line_wins_over_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-3\nbatch_size: 8\nmodel: {hidden_size: 32, patch_size: 4}\n")
    options = ["--config", str(recipe), "--batch_size=16", "--model.use_gaussian", "false", "--model.patch_size", "8"]
    arguments = parse_arguments(PretrainArguments, [*options, "--overwrite", "--length", "2 epochs"])
    assert (arguments.learning_rate, arguments.batch_size, arguments.overwrite) == (1e-3, 16, True)
    assert arguments.model == {"hidden_size": 32, "patch_size": 8, "use_gaussian": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rat", "1"], "Unknown option 'learning_rat'; did you mean 'learning_rate'"),
        (["--batch_size", "many"], "batch_size"),
        (["--schedule", "zigzag"], "schedule"),
        (["8"], "starts with '--'"),
        (["--config", "nowhere.yaml"], "Cannot read the recipe nowhere.yaml"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--log_every", "0"], "log_every must be at least 1"),
        (["--keep_checkpoints", "0"], "keep_checkpoints must be at least 1"),
        (["--label_smoothing", "2"], "label_smoothing must be between 0 and 1, got 2"),
        (["--max_gradient_norm", "-1"], "max_gradient_norm must be at least"),
        (["--crop_scale", "[1]"], "crop_scale must be two numbers, the smaller one first"),
        (["--crop_scale", "[1, 0.5]"], "crop_scale must be two numbers, the smaller one first"),
        (["--image_sizes", "[64, 0]"], "image_sizes must be at least 1, got 0"),
        (["--freeze", "no"], "Unknown option 'freeze'"),
        (["--streaming", "no"], "streaming"),
        (["--batch_size", "010"], "batch_size"),
        (["--seed", "12:30"], "seed"),
        (
            ["--model", "vit", "--model.patch_size", "4"],
            "--model.patch_size is an entry of model, which was given as 'vit'",
        ),
        (["--output_dir"], "output_dir takes text: give it a value"),
        # Names of other tools, which spelling alone would take for something else.
        (["--train_dir", "photos"], "no option 'train_dir': name the folder with train/ and validation/ in it"),
        (["--resume_from_checkpoint", "x"], "a run that stopped continues with the same command"),
        (["--evaluation_strategy", "epoch"], "'evaluation_strategy'; here it is 'evaluate_every'"),
        (["--metric_for_best_model", "f1"], "each program has one metric for the best model"),
        (["--torch_dtype", "float16"], "'torch_dtype'; here it is 'dtype'"),
        (["--img_size", "64"], "'img_size'; here it is 'model.image_size'"),
        (["--do_train"], "no option 'do_train': leave it out"),
        (["--trainer", "8"], r"Unknown option 'trainer'\.$"),
    ],
)
def test_mistakes_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments(PretrainArguments, options)
    assert "\n" not in str(caught.value)


def test_words_are_words_and_one_value_is_a_list_of_one(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mixed_precision: no\nlabel_names: [yes, no, on, off]\nimage_sizes: 64\nstreaming: true\n")
    arguments = parse_arguments(PretrainArguments, ["--config", str(recipe), "--trackers", "tensorboard"])
    assert (arguments.mixed_precision, arguments.streaming) == ("no", True)
    assert arguments.label_names == ["yes", "no", "on", "off"]
    assert (arguments.image_sizes, arguments.trackers) == ([64], ["tensorboard"])
    assert parse_arguments(PretrainArguments, ["--mixed_precision", "no"]).mixed_precision == "no"
    assert parse_arguments(PretrainArguments, ["--label_names", "names.json"]).label_names == "names.json"
    assert parse_arguments(PretrainArguments, ["--crop_scale", "[2e-1, 1]"]).crop_scale == [0.2, 1]


WORDS = ["001", "010", "0x10", "1_000", "12:30", "1.10", "+7", "1e3", "2024-11-27", ".5", "yes"]


@pytest.mark.parametrize("word", [*WORDS, "runs #2", "#2", "a: b", "- x", "{x}", "[x]", "true", "'quoted'", "*x"])
def test_options_of_text_are_taken_as_typed(word):
    for program, option in (
        (FinetuneArguments, "output_dir"),
        (SegmentArguments, "dataset"),
        (KNNArguments, "pretrained"),
    ):
        assert getattr(parse_arguments(program, [f"--{option}", word]), option) == word
        assert getattr(parse_arguments(program, [f"--{option}={word}"]), option) == word
    assert parse_arguments(PretrainArguments, ["--train_split", word]).train_split == word
    assert parse_arguments(FinetuneArguments, ["--model_name_or_path", word]).pretrained == word
    with pytest.raises(ValueError, match="Cannot read the recipe") as caught:
        parse_arguments(PretrainArguments, ["--config", word])
    assert f"recipe {word}: " in str(caught.value)
    assert parse_arguments(FinetuneArguments, ["--unfreeze", word]).unfreeze == ["x" if word == "[x]" else word]


@pytest.mark.parametrize("word", WORDS)
def test_options_of_text_are_what_stands_in_a_recipe(tmp_path, word):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {word}\nlabel_names: [a, {word}]\nunfreeze: {word}\n")
    arguments = parse_arguments(FinetuneArguments, ["--config", str(recipe)])
    assert arguments.output_dir == word and arguments.unfreeze == [word]
    assert arguments.label_names == ["a", word]


def test_null_is_none_and_a_list_keeps_its_words():
    arguments = parse_arguments(FinetuneArguments, ["--dataset_hash", "null", "--auto_augment", "null"])
    assert arguments.dataset_hash is None and arguments.auto_augment is None
    words = ["true", "null", "1.10", "010"]
    assert parse_arguments(FinetuneArguments, ["--label_names", f"[{', '.join(words)}]"]).label_names == words


def test_booleans_where_text_is_meant_are_a_sentence(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("label_names: [true, false]\n")
    with pytest.raises(ValueError, match=r"label_names takes text: .* write true in quotes"):
        parse_arguments(PretrainArguments, ["--config", str(recipe)])


def test_options_of_numbers_read_every_notation(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "learning_rate: 1.0e-3\nweight_decay: 0.050\nmax_gradient_norm: .inf\nbatch_size: 1_024\nmixup: 1\n"
        "crop_scale: [.5, 1.]\noptimizer_options: {betas: [0.90, 9.5e-1], eps: 1e-8, name: '10', fused: true}\n"
    )
    arguments = parse_arguments(PretrainArguments, ["--config", str(recipe), "--seed", "+7", "--cutmix", "-0.0"])
    found = arguments.learning_rate, arguments.weight_decay, arguments.max_gradient_norm, arguments.batch_size
    assert found == (1e-3, 0.05, float("inf"), 1024)
    assert (arguments.mixup, arguments.seed, arguments.cutmix) == (1, 7, 0)
    assert arguments.crop_scale == [0.5, 1.0]
    assert arguments.optimizer_options == {"betas": [0.9, 0.95], "eps": 1e-8, "name": "10", "fused": True}


def test_recipes_extend_each_other(tmp_path):
    (tmp_path / "parent.yaml").write_text("learning_rate: 1e-3\nmodel: {hidden_size: 32, patch_size: 4}\n")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\nmodel: {patch_size: 8}\nseed: 1\n")
    expected = {"learning_rate": "1e-3", "model": {"hidden_size": 32, "patch_size": 8}, "seed": 1}
    assert load_recipe(tmp_path / "child.yaml") == expected
    broken = tmp_path / "broken.yaml"
    for text, message in (
        ("a: [1", "not valid YAML"),
        ("- a", "must be a mapping"),
        ("extends: x.yaml", "Cannot read"),
    ):
        broken.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(broken)


def test_durations():
    assert parse_duration("3 epochs", 10) == 30
    assert parse_duration("0.5 epochs", 10) == 5
    assert parse_duration("7 steps", 10) == 7
    assert parse_duration("25 %", 10, total=80) == 20
    for text in ("3", "three epochs", "10 %"):
        with pytest.raises(ValueError, match="A duration reads"):
            parse_duration(text, 10)


def test_one_cycle_of_the_probe():
    """The paper: 1e-7 to 1e-3 over 5,000 iterations, then to 1e-11 at 20,000."""
    schedule = Schedule.resolve(SegmentArguments(), num_images=0)
    rates = {step: schedule.learning_rate_at(step) for step in (0, 2500, 5000, 12500, 20000)}
    assert schedule.warmup == 5000
    assert rates == pytest.approx({0: 1e-7, 2500: (1e-7 + 1e-3) / 2, 5000: 1e-3, 12500: 5e-4, 20000: 1e-11}, rel=1e-6)


def schedule_of(length: int, warmup: int, **options) -> Schedule:
    durations = {"length": f"{length} steps", "warmup": f"{warmup} steps"}
    return Schedule.resolve(PretrainArguments(**durations, **options), num_images=1024)


def test_a_schedule_is_resolved_once_for_images_and_processes():
    options = {"batch_size": 32, "gradient_accumulation_steps": 2, "milestones": ["1 epochs", "50 %"]}
    arguments = PretrainArguments(**options, length="2 epochs", warmup="25 %", evaluate_every="0.01 epochs")
    schedule = Schedule.resolve(arguments, num_images=350, num_processes=4)
    assert (schedule.steps_per_epoch, schedule.total, schedule.warmup) == (10, 20, 5)
    assert (schedule.milestones, schedule.evaluate_every, schedule.checkpoint_every) == ((10, 10), 1, 10)
    assert (schedule.images_per_pass, schedule.steps("50 %"), schedule.epochs(15)) == (4, 10, 1.5)
    assert Schedule.resolve(arguments, num_images=20).steps_per_epoch == 1


def test_cosine_schedule_ends_at_the_final_rate():
    schedule = schedule_of(20, 10, schedule="cosine", learning_rate=1.0, final_learning_rate=0.1)
    assert schedule.learning_rate_at(10) == 1.0
    assert schedule.learning_rate_at(15) == pytest.approx(0.55)
    assert schedule.learning_rate_at(20) == pytest.approx(0.1)


def test_step_schedule_and_batch_size():
    """Detection: a tenth at every milestone; twice the batch, twice the rates."""
    rates = {"learning_rate": 1.0, "start_learning_rate": 0.1, "batch_size": 32, "learning_rate_batch_size": 16}
    schedule = schedule_of(12, 2, schedule="step", milestones=["8 steps", "11 steps"], **rates)
    rates = [schedule.learning_rate_at(step) for step in (0, 2, 7, 8, 10, 11)]
    assert rates == pytest.approx([0.2, 2.0, 2.0, 0.2, 0.2, 0.02])


def test_weight_decay_follows_its_cosine():
    model = LocAtViTForImageClassification(LocAtViTConfig(**SMALL_MODEL))
    arguments = PretrainArguments(weight_decay=0.04, final_weight_decay=0.4)
    optimizer = create_optimizer(model, arguments)
    schedule = schedule_of(10, 0, weight_decay=0.04, final_weight_decay=0.4)
    for step, expected in ((0, 0.04), (5, 0.22), (10, 0.4)):
        set_weight_decay(optimizer, schedule.weight_decay_at(step))
        assert [group["weight_decay"] for group in optimizer.param_groups if group["decayed"]] == pytest.approx(
            [expected]
        )
        assert {group["weight_decay"] for group in optimizer.param_groups if not group["decayed"]} == {0.0}


def test_learning_rates_and_decay_by_name_and_layer():
    """The longest name that fits counts; a layer's factor and a name's multiply."""
    model = LocAtViTForImageClassification(LocAtViTConfig(**SMALL_MODEL))
    arguments = PretrainArguments(
        layer_decay=0.5,
        learning_rate_factors={"gaussian": 10, "gaussian.amplitude": 4, "classifier": 3},
        no_weight_decay=["norm"],
    )
    optimizer = create_optimizer(model, arguments)
    set_learning_rate(optimizer, 1.0)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    rates = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    last, first = "locatvit.layers.1.", "locatvit.layers.0."
    assert rates["classifier.weight"] == (3.0, 0.05) and rates["classifier.bias"] == (3.0, 0.05)
    assert rates[f"{last}attention.q_proj.weight"][0] == 2 * rates[f"{first}attention.q_proj.weight"][0] < 1
    for layer in (first, last):
        plain = rates[f"{layer}attention.q_proj.weight"][0]
        assert rates[f"{layer}attention.gaussian.variance.weight"][0] == pytest.approx(10 * plain)
        assert rates[f"{layer}attention.gaussian.amplitude.bias"][0] == pytest.approx(4 * plain)
    assert rates["locatvit.layernorm.weight"][1] == 0.0


def decayed_names(model, **options) -> set[str]:
    groups = create_optimizer(model, PretrainArguments(**options)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}


def test_what_is_decayed():
    model = LocAtViTForImageClassification(LocAtViTConfig(**SMALL_MODEL, num_register_tokens=2))
    every = {name for name, _ in model.named_parameters()}
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    listed = {"locatvit.embeddings.cls_token", "locatvit.embeddings.position_embeddings"}
    # As timm for the reference: registers and the two-dimensional weights of the Gaussians are decayed.
    assert decayed_names(model) == every - vectors - listed
    assert decayed_names(model, no_weight_decay=[]) == every
    assert decayed_names(model, no_weight_decay=["vectors"]) == every - vectors
    layers = {name for name in every if "layers." in name and "norm" in name}
    assert layers and decayed_names(model, no_weight_decay=[r"layers\..*norm"]) == every - layers
    for option, message in (
        ({"no_weight_decay": ["batch_norm"]}, "no_weight_decay names 'batch_norm', but no parameter"),
        ({"no_weight_decay": ["(norm"]}, "no_weight_decay names '\\(norm', which is not a regular expression"),
        ({"learning_rate_factors": {"vectors": 2}}, "learning_rate_factors names 'vectors', but no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            create_optimizer(model, PretrainArguments(**option))


def test_a_schedule_that_starts_with_the_run_lies_below_the_peak_after_the_warm_up():
    options = {"learning_rate": 1.0, "start_learning_rate": 0.2, "final_learning_rate": 0.1, "schedule": "cosine"}
    schedule = schedule_of(20, 5, **options, schedule_from="start")
    rates = [schedule.learning_rate_at(step) for step in (0, 4, 5, 10, 20)]
    after_warmup = 0.1 + 0.9 * (1 + math.cos(math.pi * 5 / 20)) / 2
    assert rates == pytest.approx([0.2, 0.84, after_warmup, 0.55, 0.1])
    assert schedule_of(20, 5, **options).learning_rate_at(5) == 1.0
