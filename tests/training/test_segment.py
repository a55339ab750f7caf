"""Heads, freezing and fine-tuning of `segment`, and what it says about mistakes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locatvit_hf import (
    LocAtJumboConfig,
    LocAtJumboForImageClassification,
    LocAtSwinConfig,
    LocAtSwinForImageClassification,
    LocAtViTConfig,
    LocAtViTForImageClassification,
    LocAtViTModel,
    PaCaViTConfig,
    PaCaViTForImageClassification,
)
from training.arguments import build_arguments
from training.optimization import create_optimizer
from training.segment import SegmentArguments, build_model

NAMES = ["background", "red", "green"]
VIT = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2}
SOURCES = {
    "locatvit": (LocAtViTForImageClassification, LocAtViTConfig, {**VIT, "hidden_size": 16}),
    "locatjumbo": (LocAtJumboForImageClassification, LocAtJumboConfig, {**VIT, "hidden_size": 12}),
    "locatswin": (
        LocAtSwinForImageClassification,
        LocAtSwinConfig,
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1] * 4,
            "num_heads": [1, 2, 2, 2],
            "window_size": 4,
        },
    ),
    "pacavit": (
        PaCaViTForImageClassification,
        PaCaViTConfig,
        {
            "image_size": 32,
            "hidden_sizes": [8] * 4,
            "num_attention_heads": [2] * 4,
            "depths": [1] * 4,
            "num_clusters": [4, 4, 4, 0],
        },
    ),
}
HEADS = [(family, head) for family in SOURCES for head in ("probe", "upernet")] + [("pacavit", "paca")]
SMALL_HEAD = {
    "model": {"segmentation_hidden_size": 8},
    "upernet": {"hidden_size": 8, "auxiliary_channels": 8},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A saved classifier of each family, with two classes and random weights."""
    folder = tmp_path_factory.mktemp("sources")
    for family, (model_class, config_class, fields) in SOURCES.items():
        torch.manual_seed(0)
        model_class(config_class(**fields, drop_path_rate=0.3, num_labels=2)).save_pretrained(folder / family)
    return {family: folder / family for family in SOURCES}


def arguments_for(source: Path, head: str = "probe", **settings) -> SegmentArguments:
    fixed = {"pretrained": str(source), "head": head, **SMALL_HEAD}
    return build_arguments(SegmentArguments, {**fixed, **settings})


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "labels": torch.randint(0, 3, (2, 32, 32), generator=generator),
    }


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_a_frozen_model_builds_no_graph_below_its_head(sources, family, head):
    model = build_model(arguments_for(sources[family], head), NAMES).train()
    encoder, saved = model.base_model, []
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}

    def forget(tensor):
        saved.append(tensor)
        return tensor

    contexts = []
    encoder.register_forward_pre_hook(
        lambda *_: (
            contexts.append(torch.autograd.graph.saved_tensors_hooks(forget, lambda t: t)) or contexts[0].__enter__()
        )
    )
    encoder.register_forward_hook(lambda *_: contexts.pop().__exit__())
    loss = model(**batch()).loss
    assert not saved, "the encoder kept tensors for a backward pass"
    assert not any(module.training for module in encoder.modules())
    loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert [model.config.id2label[index] for index in range(3)] == NAMES


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_fine_tuning_gives_every_parameter_a_gradient_and_a_layer(sources, family, head):
    """A parameter without a gradient would stop several processes; one without a layer would ignore layer decay."""
    arguments = arguments_for(sources[family], head, freeze=False, layer_decay=0.5)
    model = build_model(arguments, NAMES).train()
    model(**batch()).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []

    rates = {}
    for group in create_optimizer(model, arguments).param_groups:
        rates.update({id(parameter): group.get("lr_scale", 1.0) for parameter in group["params"]})
    rates = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    head_rates = {rate for name, rate in rates.items() if "head" in name}
    stem_rates = {rate for name, rate in rates.items() if ".embeddings." in name}
    assert head_rates == {1.0} and len(stem_rates) == 1
    layers = 4 if family in ("locatswin", "pacavit") else 3
    assert 0 < stem_rates.pop() <= 0.5**layers


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_pretrained_weights_are_those_of_the_checkpoint(sources, family, head, capsys):
    model = build_model(arguments_for(sources[family], head), NAMES)
    stored = load_file(sources[family] / "model.safetensors")
    loaded = {f"{family}.{name}": tensor for name, tensor in model.base_model.state_dict().items()}
    assert loaded.keys() == {name for name in stored if name.startswith(f"{family}.")}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.items())
    assert capsys.readouterr().out == ""


def test_changed_fields_start_anew_and_are_named(sources, capsys):
    """The recipe of PaCa-ViT gives 200 clusters to the segmentor where the classifier had 100."""
    settings = {"model": {"num_clusters": [6, 6, 6, 0], "segmentation_hidden_size": 8, "drop_path_rate": 0.0}}
    model = build_model(arguments_for(sources["pacavit"], "paca", **settings), NAMES)
    assert model.config.num_clusters == [6, 6, 6, 0] and model.config.drop_path_rate == 0.0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Starts anew" in printed and printed.count("clusters.weight") == 3


def test_an_encoder_alone_is_a_source_too(tmp_path):
    """As `AutoModel` saves it: without the prefix of a head."""
    encoder = LocAtViTModel(LocAtViTConfig(**VIT, hidden_size=16))
    encoder.save_pretrained(tmp_path / "encoder")
    model = build_model(arguments_for(tmp_path / "encoder"), NAMES)
    assert all(
        torch.equal(tensor, model.base_model.state_dict()[name]) for name, tensor in encoder.state_dict().items()
    )


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("locatvit", {"head": "paca"}, "reads four stages of a pacavit; for a locatvit choose probe or upernet"),
        ("locatvit", {"head": "segformer"}, "head"),
        ("locatvit", {"pretrained": None}, "Name the model to start from"),
        ("locatvit", {"pretrained": "./nowhere"}, "There is no model at ./nowhere"),
        ("locatvit", {"model": {"num_labels": 7}}, "model.num_labels is 7, but the data has 3 classes"),
        ("locatvit", {"model": {"hidden_sizes": 8}}, "A locatvit configuration has no field 'hidden_sizes'"),
        ("pacavit", {"model": {"num_clusters": [5, 5]}}, "num_clusters must have 4 entries"),
        ("locatvit", {"head": "upernet", "upernet": {"width": 8}}, "A UPerNet configuration has no field 'width'"),
    ],
)
def test_impossible_models_are_one_sentence(sources, family, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_model(arguments_for(sources[family], **settings), NAMES)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_something_else_is_refused(sources, tmp_path):
    """Weights of which none fits must not become a silent start from random ones."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text((sources["locatvit"] / "config.json").read_text())
    (folder / "model.safetensors").write_bytes((sources["pacavit"] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds no weights of a locatvit"):
        build_model(arguments_for(folder), NAMES)


def test_a_batch_without_classes_costs_nothing(sources):
    for family, head in HEADS:
        model = build_model(arguments_for(sources[family], head), NAMES).train()
        inputs = batch()
        loss = model(inputs["pixel_values"], labels=torch.full_like(inputs["labels"], 255)).loss
        loss.backward()
        assert loss.item() == 0.0
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
