"""PaCa-ViT checkpoints as they were released: weights alone, under every wrapper and prefix, for every task."""

import json

import pytest
import torch
import yaml
from torch import nn
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from locatvit_hf import (
    PaCaViTBackbone,
    PaCaViTConfig,
    PaCaViTForImageClassification,
    PaCaViTForSemanticSegmentation,
    PaCaViTModel,
)
from locatvit_hf.conversion import pacavit
from tests.conversion.layouts import remote_outputs
from tests.golden import GOLDEN

VARIANTS = {
    "conv": {},
    "mlp": {"clustering_type": "mlp"},
    "blockwise": {"blockwise_clustering": True, "num_clusters": [3, 4, 5, 6]},
    "teacher": {"clustering_type": "teacher", "num_clusters": [3, 4, 5, 6], "teacher_depths": [1, 2, 1, 1]},
    "teacher_with_a_gap": {"clustering_type": "teacher", "num_clusters": [0, 4, 0, 6], "teacher_depths": [1, 1, 1, 1]},
    "layer_scale": {"layer_scale_init_value": 1.0},
}
BLUR = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])) / 16


def config(**fields):
    small = {"hidden_sizes": [16, 16, 32, 32], "depths": [2, 1, 1, 1], "num_clusters": [3, 4, 5, 0], "num_labels": 7}
    return PaCaViTConfig(**{**small, **fields})


def randomized(model):
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            nn.init.normal_(tensor, mean=1.0 if name.endswith(("norm.weight", "running_var")) else 0.0, std=0.1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_var.abs_().add_(0.5)
    return model.eval()


def reference_state(model, prefix=""):
    """The model's weights as the reference stores them, with the blur kernels of its teacher."""
    ours = model.state_dict()
    model_config = getattr(model.config, "backbone_config", None) or model.config
    state = {name: ours[row[0]].clone() for name, row in pacavit.key_table(model_config, ours).items()}
    for name in [name for name in state if name.endswith(".0.conv.weight") and "paca_teacher.transition" in name]:
        channels = state[name].shape[1]
        state[name.replace("conv.weight", "blur_filter")] = BLUR.expand(channels, 1, 3, 3).clone()
    heads = ("decode_head.", "auxiliary_head.")
    return {name if name.startswith(heads) else prefix + name: tensor for name, tensor in state.items()}


@pytest.fixture
def convert(tmp_path, locatvit):
    """Writes a checkpoint alone into a folder, converts it, and returns the folder."""

    def run(content, *options, name="IMNET_224_pacavit.pth"):
        (tmp_path / "source").mkdir()
        torch.save(content, tmp_path / "source" / name)
        result = locatvit("convert", tmp_path / "source" / name, tmp_path / "out", *options)
        assert result.exit_code == 0, result.output
        return tmp_path / "out"

    return run


def test_weights_alone_are_read_once(convert, monkeypatch):
    read = []
    monkeypatch.setattr(torch, "load", lambda *args, load=torch.load, **kwargs: read.append(1) or load(*args, **kwargs))
    convert(reference_state(PaCaViTForImageClassification(config())))
    assert len(read) == 1


def assert_equal_outputs(expected, observed, size=(64, 50)):
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(observed.eval()(pixel_values)[0], expected(pixel_values)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_classifiers_of_every_variant(convert, variant):
    model = randomized(PaCaViTForImageClassification(config(**VARIANTS[variant])))
    folder = convert(reference_state(model))
    converted = PaCaViTForImageClassification.from_pretrained(folder)
    assert_equal_outputs(model, converted)
    for name in ("hidden_sizes", "depths", "num_clusters", "clustering_type", "blockwise_clustering", "num_labels"):
        assert getattr(converted.config, name) == getattr(model.config, name)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"]["shortest_edge"] == 248
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
    card = (folder / "README.md").read_text()
    assert "PaCa-ViT" in card and 'pipeline("image-classification"' in card and "- pacavit" in card
    assert "arXiv 2203.11987" in card and "LocAt" not in card and "Gaussian" not in card


@pytest.mark.parametrize(
    ("wrapper", "prefix"), [(None, ""), ("state_dict", ""), ("model", "module."), ("state_dict_ema", "module.")]
)
def test_wrappers_and_prefixes(convert, wrapper, prefix):
    model = randomized(PaCaViTForImageClassification(config(**VARIANTS["teacher"])))
    state = {prefix + name: tensor for name, tensor in reference_state(model).items()}
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        del state[name]  # a converted file may lack them
    content = state if wrapper is None else {wrapper: state, "epoch": 3}
    options = ["--ema"] if wrapper == "state_dict_ema" else []
    assert_equal_outputs(model, PaCaViTForImageClassification.from_pretrained(convert(content, *options)))


def test_a_training_run_with_its_settings(tmp_path, locatvit, refuses):
    """Tensors say what the model is; args.yaml adds its dropout and its images."""
    model = randomized(PaCaViTForImageClassification(config(**VARIANTS["teacher"])))
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"state_dict": reference_state(model), "epoch": 3}, folder / "model_best.pth.tar")
    settings = {"model": "pacavit_convmixer_tiny_100", "num_classes": 7, "drop": 0.0, "drop_path": 0.2, "img_size": 96}
    settings |= {"crop_pct": 0.75, "mean": (0.1, 0.2, 0.3), "interpolation": "bilinear", "gp": None, "model_kwargs": {}}
    (folder / "args.yaml").write_text(yaml.dump(settings))
    result = locatvit("convert", folder, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Found pacavit_convmixer_tiny_100 (training run, model_best.pth.tar)" in result.output
    converted = PaCaViTForImageClassification.from_pretrained(tmp_path / "out")
    assert_equal_outputs(model, converted)
    assert (converted.config.drop_path_rate, converted.config.hidden_dropout_prob) == (0.2, 0.0)
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["size"]["shortest_edge"] == 128 and processor["crop_size"] == {"height": 96, "width": 96}
    assert processor["image_mean"] == [0.1, 0.2, 0.3] and processor["resample"] == 2
    (folder / "args.yaml").write_text(yaml.dump({**settings, "num_classes": 8}))
    sentence = refuses("convert", folder, tmp_path / "other")
    assert sentence == "The tensors of the checkpoint are for 7 classes, but its run says 8."


def test_paca_head(convert):
    model = randomized(PaCaViTForSemanticSegmentation(config(segmentation_hidden_size=16)))
    folder = convert({"state_dict": reference_state(model, "backbone."), "meta": {"epoch": 1}}, name="pacahead.pth")
    assert_equal_outputs(model, PaCaViTForSemanticSegmentation.from_pretrained(folder))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size_divisor"] == 32 and processor["size"]["shortest_edge"] == 512
    assert processor["resample"] == 2  # bilinear, as in mmsegmentation


@pytest.mark.parametrize("auxiliary", [True, False])
def test_upernet(convert, auxiliary):
    backbone = config(out_indices=[1, 2, 3, 4])
    fields = {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 8, "num_labels": 7}
    upernet = UperNetConfig(backbone_config=backbone, use_auxiliary_head=auxiliary, **fields)
    model = randomized(UperNetForSemanticSegmentation(upernet))
    folder = convert({"state_dict": reference_state(model, "backbone.")}, name="upernet.pth")
    assert_equal_outputs(model, UperNetForSemanticSegmentation.from_pretrained(folder))


def test_names_of_upernet_are_those_of_the_reference():
    shapes = json.loads((GOLDEN / "paca_state_dict.json").read_text())
    backbone = PaCaViTConfig.from_preset("tiny", out_indices=[1, 2, 3, 4])
    with torch.device("meta"):
        model = UperNetForSemanticSegmentation(
            UperNetConfig(backbone_config=backbone, auxiliary_in_channels=320, num_labels=150)
        )
    ours = {name: list(tensor.shape) for name, tensor in reference_state(model).items()}
    heads = {name: shape for name, shape in ours.items() if name.startswith(("decode_head.", "auxiliary_head."))}
    assert heads == shapes["upernet_tiny_non_backbone"]


def test_backbone_of_a_detector(convert):
    model = randomized(PaCaViTBackbone(config(out_indices=[1, 2, 3, 4])))
    detector = json.loads((GOLDEN / "paca_state_dict.json").read_text())["mask_rcnn_tiny_non_backbone"]
    state = reference_state(model, "backbone.") | {name: torch.zeros(1) for name in detector}
    folder = convert({"state_dict": state}, name="mask_rcnn.pth")
    converted = PaCaViTBackbone.from_pretrained(folder, out_indices=[1, 2, 3, 4])
    pixel_values = torch.randn(1, 3, 97, 130)
    with torch.no_grad():
        for ours, theirs in zip(converted.eval()(pixel_values)[0], model(pixel_values)[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_remote_user_loads_them_by_their_auto_classes(tmp_path, locatvit):
    pixel_values = torch.randn(1, 3, 40, 70)
    expected = {}
    for model_class in (PaCaViTModel, PaCaViTForImageClassification, PaCaViTForSemanticSegmentation):
        model = randomized(model_class(config()))
        prefix = "" if model_class is PaCaViTForImageClassification else "backbone."
        folder = tmp_path / model_class.__name__
        torch.save(reference_state(model, prefix), f"{folder}.pth")
        result = locatvit("convert", f"{folder}.pth", folder)
        assert result.exit_code == 0, result.output
        with torch.no_grad():
            expected[folder] = model(pixel_values)[0]
    observed = remote_outputs({folder: {"x": pixel_values} for folder in expected})
    for folder, output in expected.items():
        torch.testing.assert_close(observed[folder.name]["x"], output, rtol=0, atol=1e-5)
        assert not {"attention_locat.py", "locat.py", "triton_locat.py"} & {path.name for path in folder.glob("*.py")}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("norm3.weight"), "it lacks norm3.weight"),
        (lambda state: state.pop("stage2.0.attn.q.bias"), "lacks stage2.0.attn.q.bias"),
        (lambda state: state.update({"stage1.0.norm1_after.weight": torch.ones(16)}), "stage1.0.norm1_after.weight"),
        (lambda state: state.update({"stage1.0.attn.cluster_pos_enc": torch.ones(1, 3, 16)}), "cluster_pos_enc"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(tmp_path, refuses, change, sentence):
    state = reference_state(PaCaViTForImageClassification(config()))
    change(state)
    torch.save(state, tmp_path / "source.pth")
    assert sentence in refuses("convert", tmp_path / "source.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
