"""Every stored value of the official PaCa-ViT: names, shapes, parameter counts, arithmetic, logits, maps and clusters.

`paca_state_dict.json` holds names and shapes of the official state dicts; `paca_golden.json` float64 outputs of models
whose weights follow a rule (`rule_weight`): classifiers, segmentors, and tiny models with one option each.
"""

import json
import math
import zlib

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from locatvit_hf import PaCaViTConfig, PaCaViTForImageClassification, PaCaViTForSemanticSegmentation
from locatvit_hf.conversion import pacavit
from tests.golden import GOLDEN, load_weights

TOLERANCE = 1e-5

# Official name without "pacavit_" -> preset, parameters, billions of multiply-adds (convolutions and matrix products)
# of one image of 224 pixels.
CLASSIFIERS = {
    "tiny_p2cconv_100_0": ("tiny", 12_200_680, 3.219),
    "small_p2cconv_100_0": ("small", 22_037_704, 5.501),
    "base_p2cconv_100_0": ("base", 46_911_304, 9.537),
    "small_p2cmlp_100_0": ("small_mlp", 22_637_268, 5.864),
    "small_p2cconv_2_0": ("small_clusters_2", 21_978_120, 4.640),
    "small_p2cconv_49_0": ("small_clusters_49", 22_006_696, 5.053),
    "small_p2cconv_49_100": ("small_clusters_49_to_100", 22_227_560, 5.273),
    "small_p2cconv_100_49": ("small_clusters_100_to_49", 22_210_696, 5.336),
    "small_p2cconv_100": ("small_clusters_100", 22_245_448, 5.568),
    "small_p2cconv_100_blockwise": ("small_blockwise", 24_191_944, 6.103),
    "convmixer_tiny_100": ("tiny_teacher", 12_483_672, 3.424),
    "convmixer_small_100": ("small_teacher", 21_075_064, 5.482),
    "convmixer_base_100": ("base_teacher", 47_659_192, 9.771),
}
# Preset -> millions of parameters and billions of multiply-adds at 512 pixels, with the PaCa head on 150 classes.
# ADE20K models have 200 clusters wherever their classifier has any.
PACA_SEGMENTORS = {
    "tiny": (13.327, 34.1),
    "small": (23.164, 47.0),
    "base": (47.965, 68.2),
    "small_mlp": (23.946, 49.7),
    "small_teacher": (22.240, 46.5),
    "base_teacher": (48.764, 68.9),
    "small_clusters_2": (23.164, 47.0),
    "small_clusters_49_to_100": (23.410, 47.0),
    "small_clusters_100": (23.410, 47.0),
    "small_blockwise": (25.779, 50.6),
}
# Likewise with UPerNet: with its auxiliary head, without it, and the arithmetic without it.
UPERNETS = {
    "tiny": (41.562, 40.785, 229.5),
    "small": (51.399, 50.622, 242.4),
    "base": (77.183, 76.259, 263.8),
}
# Around one backbone of 800 x 1280 pixels.
DETECTION_BACKBONES = {
    "tiny": 65.2,
    "small": 109.9,
    "base": 186.7,
    "small_mlp": 117.3,
    "small_teacher": 106.8,
    "small_clusters_2": 96.8,
    "small_clusters_49": 103.1,
}
# In every run of `make test`; the others are slow.
FAST = ("tiny_p2cconv_100_0-97x130", "convmixer_tiny_100-97x130", "small_p2cconv_100_blockwise-97x130")

VALUES = json.loads((GOLDEN / "paca_golden.json").read_text())
SHAPES = json.loads((GOLDEN / "paca_state_dict.json").read_text())


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class._from_config(config, attn_implementation="eager").eval()


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model, height, width):
    """Billions of multiply-adds of convolutions and matrix products for one image."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() / 2e9


def reference_shapes(model):
    """Shapes of our tensors by the names of the reference."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: shapes[ours] for name, (ours,) in pacavit.key_table(model.config, shapes).items()}


def rule_weight(name, shape):
    """The weight that the rule of the golden values gives to the reference's tensor `name`, as stored: of float32."""
    numbers = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name.endswith("running_mean"):
        numbers = 0.1 * numbers
    elif name.endswith("running_var"):
        numbers = 1 + 0.1 * np.abs(numbers)
    elif len(shape) >= 2:
        numbers = numbers / math.sqrt(math.prod(shape[1:]))
    else:
        numbers = 0.1 * numbers + (1 if name.endswith("weight") else 0)
    return torch.from_numpy(np.asarray(numbers))


def is_sharpened(name, names):
    """Whether the rule multiplies the weight by 20: of the last layer before a softmax over the patches."""
    if name.endswith("clustering.clustering.2.weight"):
        return name.replace(".2.weight", ".4.weight") not in names
    last = ("clustering.clustering.4.weight", "decode_head.clustering.1.weight")
    return name.endswith(last) or ("to_clusters" in name and name.endswith(".weight"))


def build(model_class, config, prefix=""):
    """A float64 model with the weights of the rule. `prefix` stands before the encoder's names in the reference."""
    with torch.device("meta"):
        model = model_class(config)
    model = model.to_empty(device="cpu").double().eval()
    table = pacavit.key_table(config, model.state_dict())
    shapes = reference_shapes(model)
    state = {}
    for name, shape in shapes.items():
        full_name = name if name.startswith("decode_head.") else f"{prefix}{name}"
        gain = 20 if is_sharpened(name, shapes) else 1
        state[name] = (gain * rule_weight(full_name, shape)).float().double()
    load_weights(model, table, state)
    return model


def golden_input(size):
    height, width = map(int, size.split("x"))
    return torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, height, width))).float().double()


def assert_close(computed, stored, tolerance=TOLERANCE):
    stored = torch.tensor(stored, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(computed, dtype=torch.float64), stored, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_have_the_names_shapes_and_arithmetic_of_the_reference(name):
    preset, parameters, giga = CLASSIFIERS[name]
    expected = {key: shape for key, shape in SHAPES["classification"][f"pacavit_{name}"].items() if "blur" not in key}
    model = on_meta(PaCaViTForImageClassification, PaCaViTConfig.from_preset(preset, num_labels=1000))
    assert reference_shapes(model) == expected
    assert num_parameters(model) == parameters
    assert multiply_adds(model, 224, 224) == pytest.approx(giga, abs=5e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_variants_are_inferred_from_names_and_shapes(name):
    shapes = SHAPES["classification"][f"pacavit_{name}"]
    shapes = {f"module.{key}": shape for key, shape in shapes.items()}
    assert pacavit.recognize_shapes(shapes)
    config = pacavit.build_config(None, pacavit.infer_arguments(shapes, {}))
    assert config.to_dict() == PaCaViTConfig.from_preset(CLASSIFIERS[name][0], num_labels=1000).to_dict()


def segmentation_config(preset, **fields):
    clusters = [200 if clusters else 0 for clusters in PaCaViTConfig.from_preset(preset).num_clusters]
    return PaCaViTConfig.from_preset(preset, num_clusters=clusters, num_labels=150, **fields)


@pytest.mark.parametrize("preset", PACA_SEGMENTORS)
def test_paca_segmentors_have_the_size_of_the_reference(preset):
    parameters, giga = PACA_SEGMENTORS[preset]
    model = on_meta(PaCaViTForSemanticSegmentation, segmentation_config(preset))
    assert num_parameters(model) / 1e6 == pytest.approx(parameters, abs=5.1e-4)
    assert multiply_adds(model, 512, 512) == pytest.approx(giga, abs=0.0501)


@pytest.mark.parametrize("name", SHAPES["paca_seg_head"])
def test_paca_heads_have_the_names_and_shapes_of_the_reference(name):
    preset = CLASSIFIERS[name.removeprefix("pacahead_pacavit_")][0]
    model = on_meta(PaCaViTForSemanticSegmentation, segmentation_config(preset))
    shapes = {key: shape for key, shape in reference_shapes(model).items() if key.startswith("decode_head.")}
    assert shapes == SHAPES["paca_seg_head"][name]


@pytest.mark.parametrize("preset", UPERNETS)
def test_upernets_have_the_size_of_the_reference(preset):
    whole, without_auxiliary, giga = UPERNETS[preset]
    backbone = segmentation_config(preset, out_indices=[1, 2, 3, 4])
    fields = {"backbone_config": backbone, "num_labels": 150, "auxiliary_in_channels": backbone.hidden_sizes[2]}
    model = on_meta(UperNetForSemanticSegmentation, UperNetConfig(**fields))
    assert num_parameters(model) / 1e6 == pytest.approx(whole, abs=5.1e-4)
    model = on_meta(UperNetForSemanticSegmentation, UperNetConfig(use_auxiliary_head=False, **fields))
    assert num_parameters(model) / 1e6 == pytest.approx(without_auxiliary, abs=5.1e-4)
    assert multiply_adds(model, 512, 512) == pytest.approx(giga, abs=0.0501)


@pytest.mark.parametrize("preset", DETECTION_BACKBONES)
def test_backbones_have_the_arithmetic_of_the_reference_in_detection(preset):
    model = on_meta(PaCaViTForImageClassification, PaCaViTConfig.from_preset(preset))
    assert multiply_adds(model.pacavit, 800, 1280) == pytest.approx(DETECTION_BACKBONES[preset], abs=0.0501)


CASES = [
    pytest.param(name, size, id=f"{name}-{size}", marks=[] if f"{name}-{size}" in FAST else pytest.mark.slow)
    for name, sizes in ((name.removeprefix("pacavit_"), sizes) for name, sizes in VALUES["classification"].items())
    for size in sizes
]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_classifiers_in_float64(name, size):
    stored = VALUES["classification"][f"pacavit_{name}"][size]
    model = build(PaCaViTForImageClassification, PaCaViTConfig.from_preset(CLASSIFIERS[name][0], num_labels=1000))
    with torch.no_grad():
        outputs = model(golden_input(size), output_hidden_states=True, output_cluster_assignments=True)
    assert_close(outputs.logits[0, :5], stored["logits_first5"])
    assert_close(outputs.logits.mean(), stored["logits_mean"])
    assert_close(outputs.logits.std(), stored["logits_std"])
    assert outputs.logits.argmax(dim=-1).tolist() == stored["argmax"]
    for feature_map, stage in zip(outputs.hidden_states[1:], stored["stages"], strict=True):
        assert list(feature_map.shape) == stage["shape"]
        assert_close(feature_map.mean(), stage["mean"])
        assert_close(feature_map.std(), stage["std"])
        assert_close(feature_map[0, :3, 0, 0], stage["first3"])
        assert_close(feature_map[1, -3:, -1, -1], stage["last3"])
    # Stored is the last assignment of each stage.
    config = model.config
    every = [depth if config.blockwise_clustering else 1 for depth in config.depths]
    computed = iter(outputs.cluster_assignments)
    for stage, clusters in enumerate(config.num_clusters):
        if clusters == 0:
            continue
        *_, assignment = [next(computed) for _ in range(every[stage])]
        expected = stored["assign"][stage]
        assert list(assignment.shape) == expected["shape"]
        assert_close(assignment.max(), expected["max"])
        assert assignment[0, 0].argmax().item() == expected["row0_argmax"]
        assert_close(assignment.sum(dim=-1), np.ones(assignment.shape[:2]), 1e-12)
    assert next(computed, None) is None


@pytest.mark.parametrize("name", VALUES["small_option_models"])
def test_small_models_in_float64(name):
    """All four stored tiny models: none of them uses a switch that was dropped."""
    stored = VALUES["small_option_models"][name]
    options = stored["config"]
    teacher = options["teacher"]
    config = PaCaViTConfig(
        num_labels=options["num_labels"],
        image_size=options["image_size"],
        hidden_sizes=options["hidden_sizes"],
        depths=options["depths"],
        num_attention_heads=options["num_attention_heads"],
        num_clusters=options["num_clusters"],
        clustering_type="teacher" if teacher else options["clustering"],
        blockwise_clustering=bool(any(options["cluster_every"])),
        teacher_depths=teacher["depths"] if teacher else [2, 2, 2, 2],
    )
    model = build(PaCaViTForImageClassification, config)
    assert num_parameters(model) == stored["num_parameters"]
    for size, logits in stored["logits"].items():
        with torch.no_grad():
            assert_close(model(golden_input(size)).logits, logits)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "base" in name else []) for name in VALUES["segmentation"]]
)
def test_segmentors_in_float64(name):
    ((size, stored),) = VALUES["segmentation"][name].items()
    preset = CLASSIFIERS[name.removeprefix("pacahead_pacavit_")][0]
    model = build(PaCaViTForSemanticSegmentation, segmentation_config(preset), prefix="backbone.")
    with torch.no_grad():
        outputs = model(golden_input(size))
    logits, auxiliary = outputs.logits, outputs.auxiliary_logits
    assert list(logits.shape) == stored["shape"]
    assert_close(logits[0, :5, 0, 0], stored["logits_first5"])
    assert_close(logits[-1, -5:, -1, -1], stored["logits_last5"])
    assert_close(logits.mean(), stored["mean"])
    assert_close(logits.std(), stored["std"])
    assert_close(auxiliary[0, :5, 0, 0], stored["raw_first5"])
    assert_close(auxiliary.mean(), stored["raw_mean"])
    assert_close(auxiliary.std(), stored["raw_std"])
