"""Every recipe of `pretrain` builds what it names, without a download; other programs test their own recipes."""

import importlib
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.programs import ROOT
from training.engine.arguments import build_arguments, load_recipe
from training.engine.optimization import create_optimizer
from training.engine.schedule import Schedule
from training.pretrain import PretrainArguments, build_model
from training.tasks.classification import ClassificationTransform, classification_objective

RECIPES = ROOT / "training" / "recipes"
EXPERIMENT = ROOT / "experiments" / "locality" / "recipes"

# Parameters as counted in the authors' code (specifications of both papers).
PARAMETERS = {
    "imagenet1k/locatvit_tiny": 5_719_756,
    "imagenet1k/vit_tiny": 5_717_416,
    "imagenet1k/locatvit_small": 22_053_004,
    "imagenet1k/vit_small": 22_050_664,
    "imagenet1k/locatvit_base": 86_569_996,
    "imagenet1k/vit_base": 86_567_656,
    "imagenet1k/locatregvit_tiny": 5_721_292,
    "imagenet1k/regvit_tiny": 5_718_952,
    "imagenet1k/locatregvit_base": 86_569_996 + 4 * 2 * 768,  # four tokens and their position embeddings
    "imagenet1k/regvit_base": 86_567_656 + 4 * 2 * 768,
    "imagenet1k/locatrope_tiny": 5_688_844,
    "imagenet1k/rope_tiny": 5_686_504,
    "imagenet1k/locatrope_base": 86_446_348,
    "imagenet1k/rope_base": 86_444_008,
    "imagenet1k/locatswin_tiny": 28_289_542,
    "imagenet1k/swin_tiny": 28_288_354,
    "imagenet1k/locatswin_base": 87_770_600,
    "imagenet1k/swin_base": 87_768_224,
    "imagenet1k/locatjumbo_tiny": 17_351_500,
    "imagenet1k/jumbo_tiny": 17_348_776,
    "imagenet1k/locatjumbo_base": 260_498_956,
    "imagenet1k/jumbo_base": 260_495_080,
    "imagenet1k/ablation_gaussian_tiny": 5_719_756,
    "imagenet1k/ablation_gaussian_base": 86_569_996,
    "imagenet1k/ablation_refinement_tiny": 5_717_416,  # the refinement has no parameters
    "imagenet1k/ablation_refinement_base": 86_567_656,
    "imagenet1k/ablation_mean_pooling_tiny": 5_717_416 - 2 * 192,  # no class token, nor its position embedding
    "imagenet1k/ablation_mean_pooling_base": 86_567_656 - 2 * 768,
    "imagenet1k/ablation_no_position_tiny": 5_717_416 - 197 * 192,
    "imagenet1k/ablation_no_position_base": 86_567_656 - 197 * 768,
    "imagenet1k/ablation_locat_no_position_tiny": 5_719_756 - 197 * 192,
    "imagenet1k/ablation_locat_no_position_base": 86_569_996 - 197 * 768,
    "imagenet1k/pacavit_tiny": 12_200_680,
    "imagenet1k/pacavit_small": 22_037_704,
    "imagenet1k/pacavit_base": 46_911_304,
    "imagenet1k/pacavit_small_mlp": 22_637_268,
    "imagenet1k/pacavit_small_clusters_2": 21_978_120,
    "imagenet1k/pacavit_small_clusters_49": 22_006_696,
    "imagenet1k/pacavit_small_clusters_49_to_100": 22_227_560,
    "imagenet1k/pacavit_small_clusters_100_to_49": 22_210_696,
    "imagenet1k/pacavit_small_clusters_100": 22_245_448,
    "imagenet1k/pacavit_small_blockwise": 24_191_944,
    "imagenet1k/pacavit_small_teacher": 21_075_064,
    "imagenet1k/pacavit_base_teacher": 47_659_192,
    "mini_imagenet/locatvit_tiny": 5_719_756 - 900 * 193,  # 900 classes less
    "mini_imagenet/vit_tiny": 5_717_416 - 900 * 193,
    # Also patches of 4 instead of 16 pixels, and 65 instead of 197 position embeddings.
    "cifar100/locatvit_tiny": 5_719_756 - 900 * 193 - 3 * (16**2 - 4**2) * 192 - 132 * 192,
    "cifar100/vit_tiny": 5_717_416 - 900 * 193 - 3 * (16**2 - 4**2) * 192 - 132 * 192,
    # Small ones of our own.
    "digits": None,
    "tiny_imagenet": 1_236_534,
}
NUM_IMAGES = {"imagenet1k": 1_281_167, "mini_imagenet": 50_000, "cifar100": 50_000, "tiny_imagenet": 25_000}
NUM_CLASSES = {"imagenet1k": 1000, "digits": 10}
DROP_PATH = {"tiny": 0.1, "small": 0.2, "base": 0.4}


def gradient_norm(name: str) -> float | None:
    """Of the specifications: 5 for LocAt, none for PaCa-ViT but 1 for its base sizes."""
    if "pacavit" not in name:
        return 5.0
    return 1.0 if "base" in name else None


def undecayed(model, groups) -> set[str]:
    """The parameters of several dimensions in an optimizer's groups that are not decayed."""
    left = {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in left and parameter.ndim > 1}


def listed(model) -> set[str]:
    """Of the specifications: class tokens and position embeddings, Swin's position tables, frequencies of RoPE."""
    endings = ("cls_token", "jumbo_tokens", "position_embeddings", "relative_position_bias_table", "rope.frequencies")
    return {name for name, _ in model.named_parameters() if name.endswith(endings)}


def test_every_recipe_belongs_to_a_program():
    for recipe in (*RECIPES.rglob("*.yaml"), *EXPERIMENT.rglob("*.yaml")):
        if recipe.parent == RECIPES / "data":  # what others extend
            continue
        build_arguments(arguments_of(recipe), load_recipe(recipe))
    folder = RECIPES / "pretrain"
    names = {str(recipe.relative_to(folder).with_suffix("")) for recipe in folder.rglob("*.yaml")}
    assert names == set(PARAMETERS)


def arguments_of(recipe):
    """The settings of the program that a recipe is for: its folder names it, in `evaluation` its first words do."""
    program = recipe.relative_to(RECIPES if recipe.is_relative_to(RECIPES) else EXPERIMENT).parts[0]
    if program == "evaluation":
        names = [path.stem for path in (RECIPES.parent / program).glob("*.py")]
        program = f"evaluation.{next(name for name in names if recipe.stem.startswith(name))}"
    module = importlib.import_module(f"training.{program}")
    return next(
        value
        for name, value in vars(module).items()
        if name.endswith("Arguments") and value.__module__ == module.__name__
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipe_builds_model_data_optimizer_and_schedule(name):
    recipe = RECIPES / "pretrain" / f"{name}.yaml"
    arguments = build_arguments(PretrainArguments, load_recipe(recipe))
    data = name.split("/")[0]
    names = [str(label) for label in range(NUM_CLASSES.get(data, 100))]
    with torch.device("meta"):
        model = build_model(arguments, names)
    config = model.config
    if PARAMETERS[name] is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert model.num_labels == len(names)
    if data == "imagenet1k" and config.model_type != "pacavit":
        assert config.drop_path_rate == DROP_PATH[name.rsplit("_", 1)[1]]

    transform = ClassificationTransform(arguments, config.image_size, config.image_mean, config.image_std)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pixels, label = transform(image, 3)
    assert pixels.shape == (3, config.image_size, config.image_size) and label == 3
    mix, criterion = classification_objective(arguments, len(names))
    images, targets = mix(pixels.expand(4, -1, -1, -1).clone(), torch.arange(4))
    assert images.shape[0] == 4 and criterion(torch.zeros(4, len(names)), targets).isfinite()

    optimizer = create_optimizer(model, arguments)
    groups = optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    assert {group["weight_decay"] for group in groups} == {0.0, arguments.weight_decay}

    schedule = Schedule.resolve(arguments, NUM_IMAGES.get(data, 3000))
    total, warmup = schedule.total, schedule.warmup
    rates = [schedule.learning_rate_at(step) for step in (0, warmup, (warmup + total) // 2, total)]
    assert rates[0] < rates[1] > rates[2] > rates[3] > 0
    if config.model_type == "pacavit":  # timm's cosine is counted from the start
        fall = [(1 + math.cos(math.pi * update / 300)) / 2 for update in (5, 152.5, 300)]
        assert rates == pytest.approx([1e-6, *(1e-5 + (1e-3 - 1e-5) * part for part in fall)], rel=1e-4)
    elif data == "imagenet1k":
        assert rates == pytest.approx([1e-7, 1e-3, (1e-3 + 1e-7) / 2, 1e-7], rel=1e-4)
    if data == "imagenet1k":
        assert total == 300 * 1251 and warmup == (5 if config.model_type == "pacavit" else 20) * 1251
        assert arguments.max_gradient_norm == gradient_norm(name)
        assert undecayed(model, groups) == listed(model)
    if data == "mini_imagenet":
        assert (total, warmup, rates[1]) == (600 * 48, 120 * 48, 5e-4)
