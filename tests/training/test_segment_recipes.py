"""Every recipe of `segment`: its model, transform, optimizer and schedule, against the numbers of the papers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers.image_utils import PILImageResampling

from locatvit_hf import LocAtViTConfig, LocAtViTForImageClassification, PaCaViTConfig, PaCaViTForImageClassification
from training.engine.arguments import build_arguments, load_recipe
from training.engine.optimization import create_optimizer
from training.engine.schedule import Schedule
from training.segment import LabelReader, SegmentArguments, build_model, build_processor
from training.tasks.segmentation.augmentation import SegmentationTransform

RECIPES = Path(__file__).resolve().parents[2] / "training" / "recipes" / "segment"
# Classes; all parameters (a probe's: encoder, 512 x 192 + 2 x 512, classes x 513); learning rates at updates.
PROBE_RATES = {0: 1e-7, 5_000: 1e-3, 12_500: 5e-4, 20_000: 1e-11}
PACA_RATES = {0: 6e-11, 1_500: 6e-5, 80_750: 3e-5, 160_000: 0}
PUBLISHED = {
    "ade20k_probe": (150, 5_526_756 + 99_328 + 150 * 513, 32, PROBE_RATES),
    "pascal_context_probe": (59, 5_526_756 + 99_328 + 59 * 513, 32, PROBE_RATES),
    "coco_stuff_probe": (171, 5_526_756 + 99_328 + 171 * 513, 32, PROBE_RATES),
    "ade20k_pacavit": (150, 13_327_000, 16, PACA_RATES),
    "ade20k_pacavit_upernet": (150, 41_562_000, 16, PACA_RATES),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    LocAtViTForImageClassification(LocAtViTConfig.from_preset("tiny")).save_pretrained(folder / "locatvit")
    PaCaViTForImageClassification(PaCaViTConfig.from_preset("tiny")).save_pretrained(folder / "pacavit")
    return {name: folder / name for name in ("locatvit", "pacavit")}


def test_all_recipes_are_known():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*PUBLISHED, "camvid", "digits"}


@pytest.mark.parametrize("name", [*PUBLISHED, "camvid", "digits"])
def test_recipe(name, sources, tmp_path):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    source = sources["pacavit" if "pacavit" in name else "locatvit"]
    if name == "camvid":  # its data brings the names
        recipe["label_names"] = [str(index) for index in range(11)]
    arguments = build_arguments(SegmentArguments, {**recipe, "pretrained": str(source)})
    classes = len(arguments.label_names)
    model = build_model(arguments, arguments.label_names)
    processor = build_processor(arguments, model.config)
    assert model.config.num_labels == classes
    trained = {id(p) for group in create_optimizer(model, arguments).param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}

    transform = SegmentationTransform(arguments, classes, processor.image_mean, processor.image_std)
    raw = list(arguments.label_mapping)[-1] if arguments.label_mapping else classes - 1 + arguments.reduce_labels
    label_map = np.full((64, 96), raw, np.uint8)
    label_map[:32] = 255
    pixels, labels = transform(Image.new("RGB", (96, 64)), Image.fromarray(label_map))
    assert pixels.shape == (3, arguments.crop_size, arguments.crop_size)
    assert {classes - 1} <= set(labels.unique().tolist()) <= {classes - 1, 255}

    schedule = Schedule.resolve(arguments, 10 * arguments.batch_size)
    if name not in PUBLISHED:
        assert schedule.warmup < schedule.total
        return
    expected_classes, parameters, batch_size, rates = PUBLISHED[name]
    assert (classes, arguments.batch_size) == (expected_classes, batch_size)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == (pytest.approx(parameters, abs=500) if "pacavit" in name else parameters)
    assert {step: schedule.learning_rate_at(step) for step in rates} == pytest.approx(rates, rel=1e-4)
    if "probe" in name:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 99_328 + classes * 513
        assert list(processor.image_mean) == [0.485, 0.456, 0.406] and arguments.weight_decay == 0.01
    short, long = (520, 520) if name == "pascal_context_probe" else (512, 2048)
    assert (processor.size.shortest_edge, processor.size.longest_edge) == (short, long)
    assert arguments.inference == "whole" and not arguments.test_flip and arguments.test_scales == [1.0]
    # As mmsegmentation, in which the papers were measured.
    assert arguments.augmentation_style == arguments.head_initialization == "mmsegmentation"
    assert arguments.label_interpolation == "nearest" and processor.resample == PILImageResampling.BILINEAR
    assert arguments.max_class_share == 0.75 and arguments.scale == [0.5, 2.0] and arguments.horizontal_flip == 0.5
    assert arguments.crop_size == (480 if name == "pascal_context_probe" else 512)
    groups = create_optimizer(model, arguments).param_groups
    names = {id(p): parameter for parameter, p in model.named_parameters()}
    left = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    if "probe" in name:
        assert not left  # biases and norms are decayed too
    else:
        # What the reference calls norm: norms of the encoder, and neither biases nor the batch norms of heads.
        assert left == {n for n in names.values() if "norm" in n and "head" not in n}


def build_small(recipe, tmp_path, **fields):
    """The model of a recipe around a small PaCa-ViT, and its settings."""
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "teacher_depths": [1] * 4}
    PaCaViTForImageClassification(PaCaViTConfig(**sizes, **fields)).save_pretrained(tmp_path)
    arguments = build_arguments(SegmentArguments, {**load_recipe(RECIPES / recipe), "pretrained": str(tmp_path)})
    return build_model(arguments, arguments.label_names), arguments


@pytest.mark.parametrize("kind", ["conv", "mlp", "teacher"])
def test_groups_of_the_paca_recipe(kind, tmp_path):
    """The head and the fresh clusters learn ten times faster; norms are not decayed, but for batch norms."""
    model, arguments = build_small("ade20k_pacavit.yaml", tmp_path, clustering_type=kind)
    assert model.config.num_clusters == [200, 200, 200, 0] and model.config.drop_path_rate == 0.1
    names = {id(p): name for name, p in model.named_parameters()}
    for group in create_optimizer(model, arguments).param_groups:
        for name in (names[id(p)] for p in group["params"]):
            fast = name.startswith("segmentation_head.") or "attention.clustering.clusters." in name
            assert group["lr_scale"] == (10.0 if fast else 1.0), name
            batch_norm = name.startswith(("segmentation_head.", "pacavit.teacher."))
            assert group["weight_decay"] == (0.0 if "norm" in name and not batch_norm else 0.01), name


def test_stored_experiments_keep_the_values_of_their_day():
    """They were made before the probe followed mmsegmentation; the recipe says so, and repeats them."""
    folder = RECIPES.parents[2] / "experiments" / "locality" / "recipes"
    arguments = build_arguments(SegmentArguments, load_recipe(folder / "segment" / "probe.yaml"))
    assert (arguments.augmentation_style, arguments.label_interpolation) == ("torchvision", "nearest")
    assert (arguments.head_initialization, arguments.test_interpolation) == ("default", "bicubic")
    assert arguments.no_weight_decay is None
    assert load_recipe(folder / "evaluation" / "hummingbird.yaml")["label_interpolation"] == "nearest"
    for recipe in ("segment/probe", "evaluation/hummingbird"):
        assert "runs in experiments/locality/results" in (folder / f"{recipe}.yaml").read_text()


def test_coco_stuff_leaves_out_the_ids_that_coco_never_used():
    """Ids 0 to 181 of the masks, 171 of them in use: 80 things and 91 kinds of stuff."""
    recipe = load_recipe(RECIPES / "coco_stuff_probe.yaml")
    arguments = build_arguments(SegmentArguments, recipe)
    ids = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    labels = LabelReader(arguments, 171)(Image.new("RGB", (16, 16)), Image.fromarray(ids.numpy())).flatten().tolist()
    unused = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90, *range(182, 256)]
    assert [raw for raw, label in enumerate(labels) if label == 255] == unused
    assert [label for label in labels if label != 255] == list(range(171))
    assert [arguments.label_names[index] for index in (0, 79, 80, 170)] == ["person", "toothbrush", "banner", "wood"]
    # A mapping survives the file that a continued run is compared with.
    assert yaml.safe_load(yaml.safe_dump(arguments.label_mapping)) == arguments.label_mapping
