"""Fine-tuning: new classes on our checkpoints and on plain ViTs, freezing, adapters, and the options of the Trainer."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from datasets import load_from_disk
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from transformers import DeiTConfig, DeiTForImageClassification, UperNetConfig, pipeline

from locatvit_hf import (
    LocAtViTConfig,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
    LocAtViTImageProcessor,
    LocAtViTModel,
)
from locatvit_hf.layers_locat import resample_position_embeddings
from tests.tolerances import assert_same_but_for_rounding
from tests.training.conftest import SMALL_MODEL
from tests.training.programs import ROOT, run
from training.engine.arguments import build_arguments, load_recipe, parse_arguments
from training.engine.optimization import create_optimizer
from training.engine.schedule import Schedule
from training.engine.trainer_names import translate
from training.finetune import FinetuneArguments, build_model, main
from training.tasks.classification import ClassificationTransform

NAMES = ["red", "green"]
PROGRAMS = ["pretrain", "segment", "finetune", "dino", "detect"] + [
    f"evaluation.{name}" for name in ("classification", "linear_probe", "knn", "hummingbird", "segmentation")
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Hub folder of a classifier of five other classes."""
    folder = tmp_path_factory.mktemp("sources") / "five"
    torch.manual_seed(11)  # not that of the tests, or new classifiers would look like this one
    config = LocAtViTConfig(**SMALL_MODEL, num_labels=5, image_mean=[0.4] * 3)
    LocAtViTForImageClassification(config).save_pretrained(folder)
    LocAtViTImageProcessor.from_model_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(squares, source, tmp_path) -> dict:
    return {
        "dataset": str(squares),
        "pretrained": str(source),
        "output_dir": str(tmp_path / "run"),
        "length": "20 epochs",
        "learning_rate": 5e-3,
        "layer_decay": None,
        "batch_size": 16,
        "auto_augment": None,
        "crop_scale": [0.7, 1.0],
        "random_erasing": 0.0,
        "evaluate_every": "10 epochs",
        "checkpoint_every": "20 epochs",
        "log_every": 10,
    }


def arguments_for(source: Path, **settings) -> FinetuneArguments:
    return build_arguments(FinetuneArguments, {"pretrained": str(source), **settings})


def answers(folder: str | Path, squares: Path) -> tuple[list[str], list[str]]:
    """What the pipeline says about the validation images, and what they show."""
    rows = load_from_disk(squares)["validation"]
    classifier = pipeline("image-classification", str(folder))
    return [classifier(row["image"])[0]["label"] for row in rows], [NAMES[row["label"]] for row in rows]


def save_deit(folder: Path) -> None:
    config = DeiTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=7,
    )
    DeiTForImageClassification(config).save_pretrained(folder)


def save_timm(folder: Path) -> None:
    sizes = {"depth": 2, "img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "num_classes": 7}
    model = timm.create_model("deit_tiny_patch16_224", **sizes)
    save_for_hf(model, folder, model_args=sizes)


def test_other_classes_on_our_checkpoint(settings, squares):
    """The Done-when of the project: the folder answers in the pipeline with the names of the new data."""
    results = main(build_arguments(FinetuneArguments, settings))
    assert results["metrics"]["accuracy"] >= 0.9
    folder = Path(settings["output_dir"]) / "model"
    said, shown = answers(folder, squares)
    assert sum(a == b for a, b in zip(said, shown, strict=True)) == round(results["metrics"]["accuracy"] * 10)
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "red", "1": "green"}
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_mean"] == [0.4] * 3
    assert "finetune" in (folder / "README.md").read_text()


@pytest.mark.parametrize("save", [save_deit, save_timm])
def test_other_classes_on_a_plain_vit(settings, squares, tmp_path, save):
    torch.manual_seed(0)
    save(tmp_path / "vit")
    settings |= {"pretrained": str(tmp_path / "vit"), "length": "3 epochs"}
    results = main(build_arguments(FinetuneArguments, settings))
    assert results["arguments"]["learning_rate_factors"] == {"gaussian": 10.0}
    said, _ = answers(Path(settings["output_dir"]) / "model", squares)
    assert len(said) == 10 and set(said) <= set(NAMES)
    exported = LocAtViTForImageClassification.from_pretrained(f"{settings['output_dir']}/model")
    assert exported.config.use_gaussian and exported.config.num_labels == 2


def test_new_gaussians_learn_faster(source, tmp_path):
    save_deit(tmp_path / "vit")
    save_plain = LocAtViTForImageClassification(LocAtViTConfig(**SMALL_MODEL, use_gaussian=False))
    save_plain.save_pretrained(tmp_path / "plain")
    for folder, settings, new in (
        (tmp_path / "vit", {}, True),
        (tmp_path / "plain", {"model": {"use_gaussian": True}}, True),
        (tmp_path / "plain", {}, False),
        (source, {}, False),
    ):
        assert build_model(arguments_for(folder, **settings), NAMES)[1] == new
    arguments = arguments_for(tmp_path / "vit", learning_rate_factors={"gaussian": 10}, layer_decay=None)
    model, _ = build_model(arguments, NAMES)
    scales = {
        id(parameter): group["lr_scale"]
        for group in create_optimizer(model, arguments).param_groups
        for parameter in group["params"]
    }
    assert {scales[id(p)] for name, p in model.named_parameters() if ".gaussian." in name} == {10}
    assert {scales[id(p)] for name, p in model.named_parameters() if ".gaussian." not in name} == {1}


def test_the_classifier_stays_only_for_the_same_classes(source, tmp_path):
    stored = load_file(source / "model.safetensors")
    kept, _ = build_model(arguments_for(source), [f"LABEL_{index}" for index in range(5)])
    assert torch.equal(kept.classifier.weight, stored["classifier.weight"])
    for names in (["a", "b", "c", "d", "e"], NAMES):
        fresh, _ = build_model(arguments_for(source), names)
        assert fresh.classifier.out_features == len(names) and list(fresh.config.label2id) == names
        assert len(names) != 5 or not torch.equal(fresh.classifier.weight, stored["classifier.weight"])
        encoder = {name: tensor for name, tensor in fresh.state_dict().items() if not name.startswith("classifier.")}
        assert all(torch.equal(tensor, stored[name]) for name, tensor in encoder.items())


def test_any_head_and_image_size(source, tmp_path):
    """Encoders alone and segmentation models are sources too; position embeddings follow the image size."""
    config = LocAtViTConfig(**SMALL_MODEL)
    for name, model_class in (("encoder", LocAtViTModel), ("segmentation", LocAtViTForSemanticSegmentation)):
        saved = model_class(config)
        saved.save_pretrained(tmp_path / name)
        model, _ = build_model(arguments_for(tmp_path / name), NAMES)
        assert torch.equal(model.locatvit.layers[1].mlp.up_proj.weight, saved.base_model.layers[1].mlp.up_proj.weight)
    larger, _ = build_model(arguments_for(source, model={"image_size": 24}), NAMES)
    positions = load_file(source / "model.safetensors")["locatvit.embeddings.position_embeddings"]
    expected = resample_position_embeddings(positions, (4, 4), (6, 6), 1)
    assert_same_but_for_rounding(larger.locatvit.embeddings.position_embeddings, expected)
    assert larger.config.image_size == 24


def test_freezing(source):
    model, _ = build_model(
        arguments_for(source, freeze=True, unfreeze=["gaussian"], model={"drop_path_rate": 0.5}), NAMES
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, _ in model.named_parameters() if ".gaussian." in name or name.startswith("classifier.")
    }
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.train()
    first = model(pixels).logits
    assert torch.equal(first, model(pixels).logits)  # no drop path below a frozen encoder
    first.sum().backward()
    assert all((p.grad is not None) == (name in trained) for name, p in model.named_parameters())


def test_adapters_are_merged_and_kept(settings, squares, source, tmp_path):
    settings |= {"lora": {"r": 2, "lora_alpha": 8}, "length": "2 epochs", "ema_decay": 0.5, "seed": 5}
    main(build_arguments(FinetuneArguments, settings))
    folder = Path(settings["output_dir"]) / "model"
    merged = LocAtViTForImageClassification.from_pretrained(folder).eval()
    said, _ = answers(folder, squares)
    assert set(said) <= set(NAMES)
    assert (folder / "README.md").is_file()

    # Only queries, values and the classifier have moved.
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in after if before[name].shape != after[name].shape or not before[name].equal(after[name])}
    adapted = {f"locatvit.layers.{layer}.attention.{name}_proj.weight" for layer in (0, 1) for name in "qv"}
    assert moved == adapted | {"classifier.weight", "classifier.bias"}

    # The adapter beside the model turns the source into it.
    model, _ = build_model(arguments_for(source), NAMES)
    restored = PeftModel.from_pretrained(model, folder / "adapter").eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_same_but_for_rounding(restored(pixel_values=pixels).logits, merged(pixels).logits)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        source
    )


def test_options_of_the_trainer(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = """--model_name_or_path me/model --dataset_name beans --image_column_name photo --num_train_epochs 3
        --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --per_device_eval_batch_size 16
        --warmup_ratio 0.1 --lr_scheduler_type cosine --optim adamw_torch --adam_beta2 0.95 --max_grad_norm 0
        --bf16 --dataloader_num_workers 2 --report_to none --logging_steps 10 --eval_strategy steps --eval_steps 20
        --save_strategy epoch --save_total_limit 3 --load_best_model_at_end false --do_train --do_eval
        --learning_rate 1e-4 --weight_decay 0.1 --seed 7 --push_to_hub --hub_model_id me/other"""
    arguments = parse_arguments(FinetuneArguments, words.split())
    expected = {
        "pretrained": "me/model",
        "dataset": "beans",
        "image_column": "photo",
        "length": "3 epochs",
        "batch_size": 64,
        "eval_batch_size": 16,
        "warmup": "10 %",
        "schedule": "cosine",
        "optimizer": "adamw",
        "optimizer_options": {"betas": [0.9, 0.95]},
        "max_gradient_norm": None,
        "mixed_precision": "bf16",
        "num_workers": 2,
        "trackers": [],
        "log_every": 10,
        "evaluate_every": "20 steps",
        "checkpoint_every": "1 epochs",
        "keep_checkpoints": 3,
        "export": "last",
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "seed": 7,
        "push_to_hub": "me/other",
    }
    assert {name: getattr(arguments, name) for name in expected} == expected
    pasted = """--max_train_steps 50 --num_warmup_steps 5 --checkpointing_steps epoch --with_tracking --eval_strategy no
        --remove_unused_columns False --run_name beans --logging_strategy steps"""
    arguments = parse_arguments(FinetuneArguments, pasted.split())
    assert (arguments.length, arguments.warmup, arguments.checkpoint_every) == ("50 steps", "5 steps", "1 epochs")
    assert arguments.evaluate_every == "100 %" and arguments.optimizer_options == {}
    arguments = parse_arguments(FinetuneArguments, ["--evaluation_strategy", "epoch", "--push_to_hub", "false"])
    assert arguments.evaluate_every == "1 epochs" and arguments.push_to_hub is None
    recipe = {"optimizer_options": {"betas": [0.9, 0.95], "eps": 1e-6}, "adam_beta1": 0.9, "adam_beta2": 0.999}
    assert translate(recipe) == {"optimizer_options": {"betas": [0.9, 0.999], "eps": 1e-6}}
    both = ["--num_train_epochs", "3", "--max_steps", "100", "--warmup_ratio", "0.1", "--warmup_steps", "5"]
    arguments = parse_arguments(FinetuneArguments, both)
    assert (arguments.length, arguments.warmup) == ("100 steps", "5 steps")


def test_the_command_line_overrules_a_recipe_under_any_name(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("length: 9 epochs\nper_device_train_batch_size: 4\nmodel: {drop_path_rate: 0.1}\n")
    words = ["--config", str(recipe), "--num_train_epochs", "2", "--batch_size", "32", "--model.image_size", "32"]
    arguments = parse_arguments(FinetuneArguments, words)
    assert (arguments.length, arguments.batch_size) == ("2 epochs", 32)
    assert arguments.model == {"drop_path_rate": 0.1, "image_size": 32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained": None}, "Name the model to start from"),
        ({"pretrained": "./nowhere"}, "nowhere"),
        ({"model": {"num_labels": 5}}, "model.num_labels is 5, but the data has 2 classes"),
        ({"model": {"hidden_sizes": 5}}, "A locatvit configuration has no field 'hidden_sizes'"),
        ({"freeze": True, "unfreeze": ["gausian"]}, "no parameter of the model is called so"),
        ({"unfreeze": ["gaussian"]}, "exceptions to --freeze"),
        ({"freeze": True, "lora": {"r": 2}}, "drop --freeze"),
        ({"lora": {"rank": 2}}, "LoraConfig has no field 'rank'"),
        ({"lora": {"target_modules": ["query"]}}, "PEFT cannot adapt the model"),
        ({"label_column": "species"}, "has no column 'species'"),
    ],
)
def test_mistakes_are_one_sentence(settings, message, squares, source, tmp_path):
    fixed = {"pretrained": str(source), "dataset": str(squares), "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=message) as caught:
        main(build_arguments(FinetuneArguments, {**fixed, **settings}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": "1 epochs", "max_steps": 3}, "Give length or max_steps, not both"),
        ({"push_to_hub": True}, "Name the repository"),
        ({"max_steps": 3, "max_train_steps": 2}, "Give max_steps or max_train_steps, not both"),
        ({"max_steps": "many"}, "max_steps must be a number, got 'many'"),
        ({"metric_for_best_model": "f1"}, "There is no option 'metric_for_best_model': each program has one metric"),
        ({"eval_strategy": "never"}, "eval_strategy must be one of no, epoch, steps"),
    ],
)
def test_ambiguous_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        build_arguments(FinetuneArguments, given)


def test_checkpoints_of_something_else_are_refused(source, tmp_path):
    foreign = tmp_path / "resnet"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ValueError, match="has the model_type 'resnet'"):
        build_model(arguments_for(foreign), NAMES)
    wrapped = UperNetConfig(backbone_config=LocAtViTConfig(**{**SMALL_MODEL, "num_hidden_layers": 4}))
    wrapped.save_pretrained(tmp_path / "upernet")
    with pytest.raises(ValueError, match="a upernet around a locatvit"):
        build_model(arguments_for(tmp_path / "upernet"), NAMES)


@pytest.mark.parametrize(
    ("recipe", "preset", "classes", "parameters", "rates"),
    [
        # LocAtViT-tiny, whose position embeddings grow from 14 x 14 to 24 x 24.
        ("imagenet1k_384", {}, 1000, 5_719_756 + (24**2 - 14**2) * 192, {0: 5e-6, 75_060: 1e-6}),
        ("tiny_imagenet", {"image_size": 64}, 100, None, {0: 1e-7, 97: 1e-3, 975: 1e-6}),
    ],
)
def test_recipe(tmp_path, recipe, preset, classes, parameters, rates):
    names = [str(index) for index in range(classes)]
    source = LocAtViTConfig.from_preset("tiny", id2label=dict(enumerate(names)), **preset)
    LocAtViTForImageClassification(source).save_pretrained(tmp_path)
    values = load_recipe(ROOT / "training" / "recipes" / "finetune" / f"{recipe}.yaml")
    arguments = build_arguments(FinetuneArguments, {**values, "pretrained": str(tmp_path)})
    model, _ = build_model(arguments, names)
    if parameters is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    create_optimizer(model, arguments)
    schedule = Schedule.resolve(arguments, 1_281_167 if classes == 1000 else 25_000)
    assert {step: schedule.learning_rate_at(step) for step in rates} == pytest.approx(rates, rel=2e-2)
    config = model.config
    transform = ClassificationTransform(arguments, config.image_size, config.image_mean, config.image_std)
    pixels, _ = transform(Image.new("RGB", (80, 60)), 0)
    assert pixels.shape == (3, config.image_size, config.image_size)


def test_all_recipes_are_known():
    found = {path.stem for path in (ROOT / "training" / "recipes" / "finetune").glob("*.yaml")}
    assert found == {"imagenet1k_384", "tiny_imagenet"}


def test_runs_as_a_program(settings):
    settings |= {"length": "1 epochs", "model": {"use_refinement": False}, "freeze": True}
    finished = run("finetune", settings)
    assert finished.returncode == 0, finished.stderr
    assert "Model in" in finished.stdout
    assert (Path(settings["output_dir"]) / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_shows_its_options(program, monkeypatch, capsys):
    """As `python -m` runs it, in this process."""
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.delitem(sys.modules, f"training.{program}", raising=False)
    runpy.run_module(f"training.{program}", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.count("--output_dir") >= 1
