"""`from_vit`: a LocAtViT that starts as the plain ViT it was given."""

import json
import logging
import sys

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
    ViTModel,
)

from locatvit_hf import (
    LocAtViTBackbone,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
    LocAtViTImageProcessor,
    LocAtViTModel,
)
from locatvit_hf.conversion import timm_vit
from locatvit_hf.conversion.transformers_vit import normalize_key

SIZES = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
TIMM_SIZES = {"depth": 3, "img_size": 64, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
# Class, configuration and whether our classifier can be the source's.
SOURCES = {
    "vit": (ViTForImageClassification, ViTConfig(intermediate_size=96, num_labels=5, **SIZES), True),
    "vit_encoder": (ViTModel, ViTConfig(intermediate_size=96, layer_norm_eps=1e-3, hidden_act="relu", **SIZES), False),
    "vit_masked": (ViTForMaskedImageModeling, ViTConfig(intermediate_size=96, qkv_bias=False, **SIZES), False),
    "deit": (DeiTForImageClassification, DeiTConfig(intermediate_size=96, num_labels=5, **SIZES), True),
    "deit_encoder": (DeiTModel, DeiTConfig(intermediate_size=96, **SIZES), False),
    "deit_teacher": (DeiTForImageClassificationWithTeacher, DeiTConfig(intermediate_size=96, **SIZES), False),
    "dinov2": (Dinov2Model, Dinov2Config(mlp_ratio=2, **SIZES), False),
    "dinov2_classifier": (Dinov2ForImageClassification, Dinov2Config(num_labels=5, **SIZES), False),
    "dinov2_registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(num_register_tokens=3, **SIZES), False),
}
TIMM_SOURCES = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "registers_apart": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "mean": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "mean_of_normed": ("vit_base_patch16_gap_224", {}),
    "mean_of_normed_with_class_token": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "refined": ("vit_tiny_patch16_224", {"global_pool": "prr", "reg_tokens": 2}),
    "mean_of_refined": ("vit_tiny_patch16_224", {"global_pool": "prr", "class_token": False}),
    "layer_scale": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "rope": ("vit_small_patch16_rope_mixed_224", {}),
}


def with_trained_like_weights(model: nn.Module, scale: float = 1.5) -> nn.Module:
    """Weights far from their initialization: large projections, norms and scales around one, biases away from zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and not name.endswith("bias"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(scale * noise / max(parameter[0].numel(), 1) ** 0.5)
    return model.eval()


def encoder_of(model: nn.Module) -> nn.Module:
    return getattr(model, model.base_model_prefix, model)


@pytest.fixture
def warnings_of_from_vit(caplog, monkeypatch):
    """The sentences that from_vit logged; the library's logger does not propagate by itself."""
    monkeypatch.setattr(logging.getLogger("locatvit_hf"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("locatvit_hf")]


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_transformers_source(tmp_path, warnings_of_from_vit, name, where):
    model_class, config, has_our_head = SOURCES[name]
    source = with_trained_like_weights(model_class(config))
    if where == "folder":
        source.save_pretrained(tmp_path)
    started = LocAtViTForImageClassification.from_vit(tmp_path if where == "folder" else source)
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = encoder_of(source)(pixel_values).last_hidden_state
    actual = started.locatvit(pixel_values).last_hidden_state
    assert expected.abs().max() > 1
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
    assert started.config.use_gaussian and not started.config.use_refinement
    sentences = warnings_of_from_vit()
    if has_our_head:
        torch.testing.assert_close(started(pixel_values).logits, source(pixel_values).logits, atol=1e-3, rtol=0)
        assert sentences == []
    else:
        assert len(sentences) == 1 and "is new" in sentences[0]


@pytest.mark.parametrize("name", SOURCES)
def test_files_and_models_are_spelled_alike(tmp_path, name):
    """transformers writes the names of its first versions into files, and has other ones in memory."""
    model_class, config, _ = SOURCES[name]
    model = model_class(config)
    model.save_pretrained(tmp_path)
    in_memory = {normalize_key(name) for name in model.state_dict()}
    assert {normalize_key(name) for name in load_file(tmp_path / "model.safetensors")} == in_memory


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("name", TIMM_SOURCES)
@torch.no_grad()
def test_timm_source(tmp_path, warnings_of_from_vit, name, where):
    architecture, arguments = TIMM_SOURCES[name]
    arguments = {**TIMM_SIZES, **arguments}
    source = with_trained_like_weights(timm.create_model(architecture, **arguments))
    if where == "folder":
        save_for_hf(source, tmp_path, model_args=arguments, safe_serialization=True)
    started = LocAtViTForImageClassification.from_vit(tmp_path if where == "folder" else source)
    pixel_values = torch.randn(2, 3, arguments["img_size"], arguments["img_size"])
    tokens = source.forward_features(pixel_values)
    torch.testing.assert_close(started.locatvit(pixel_values).last_hidden_state, tokens, atol=1e-3, rtol=0)
    torch.testing.assert_close(started(pixel_values).logits, source(pixel_values), atol=1e-3, rtol=0)
    assert list(started.config.image_mean) == list(source.pretrained_cfg["mean"])
    assert warnings_of_from_vit() == []


# Neither sizes of ours nor, some of them, with the bias or the MLP of ours: what these names mean only timm knows.
LOOKED_UP = ("vit_wee_patch16_reg1_gap_256", "vit_little_patch16_reg4_gap_256", "vit_base_patch16_224_miil")


@pytest.mark.parametrize("architecture", LOOKED_UP)
@torch.no_grad()
def test_architecture_that_only_timm_knows(tmp_path, warnings_of_from_vit, architecture):
    arguments = {"depth": 2, "img_size": 64, "num_classes": 5}
    source = with_trained_like_weights(timm.create_model(architecture, **arguments))
    save_for_hf(source, tmp_path, model_args=arguments, safe_serialization=True)
    started = LocAtViTForImageClassification.from_vit(tmp_path)
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(started(pixel_values).logits, source(pixel_values), atol=1e-3, rtol=0)
    assert started.config.hidden_size == source.embed_dim and warnings_of_from_vit() == []
    assert list(started.config.image_mean) == list(source.pretrained_cfg["mean"])


@pytest.mark.parametrize("where", ["folder", "file"])
@torch.no_grad()
def test_training_run(tmp_path, warnings_of_from_vit, where):
    arguments = {"depth": 2, "img_size": 64}
    source = with_trained_like_weights(timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments))
    file = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": {f"module._orig_mod.{k}": v for k, v in source.state_dict().items()}}, file)
    settings = {"model": "vit_tiny_patch16_224", "num_classes": 5, "model_kwargs": arguments, "mean": [0.1, 0.2, 0.3]}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(settings))
    started = LocAtViTForImageClassification.from_vit(tmp_path if where == "folder" else file)
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(started(pixel_values).logits, source(pixel_values), atol=1e-3, rtol=0)
    assert list(started.config.image_mean) == [0.1, 0.2, 0.3] and warnings_of_from_vit() == []


@torch.no_grad()
def test_distilled_deit_of_timm(tmp_path, warnings_of_from_vit):
    arguments = {"depth": 2, "img_size": 64}
    source = with_trained_like_weights(timm.create_model("deit_tiny_distilled_patch16_224", **arguments))
    save_for_hf(source, tmp_path, model_args=arguments, safe_serialization=True)
    started = LocAtViTForImageClassification.from_vit(tmp_path)
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = source.forward_features(pixel_values)
    torch.testing.assert_close(started.locatvit(pixel_values).last_hidden_state, expected, atol=1e-3, rtol=0)
    assert started.config.num_register_tokens == 1 and len(warnings_of_from_vit()) == 1


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2_registers"])
@torch.no_grad()
def test_another_image_size_is_resampled_as_the_source_does(name):
    model_class, config, _ = SOURCES[name]
    source = encoder_of(with_trained_like_weights(model_class(config)))
    started = LocAtViTModel.from_vit(source, image_size=48)
    pixel_values = torch.randn(1, 3, 48, 48)
    arguments = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    expected = source(pixel_values, **arguments).last_hidden_state
    assert started.config.native_grid == (6, 6)
    torch.testing.assert_close(started(pixel_values).last_hidden_state, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["vit", "dinov2_registers"])
@torch.no_grad()
def test_rectangular_source_is_resampled_at_another_image_size(name):
    """The source itself takes its native size only: its own resampling assumes a square."""
    model_class, config, _ = SOURCES[name]
    config = type(config)(**{**config.to_dict(), "image_size": [32, 48]})
    source = encoder_of(with_trained_like_weights(model_class(config)))
    native = LocAtViTModel.from_vit(source)
    started = LocAtViTModel.from_vit(source, image_size=[64, 48])
    assert native.config.native_grid == (4, 6) and started.config.native_grid == (8, 6)
    pixel_values = torch.randn(1, 3, 64, 48)
    expected = native(pixel_values).last_hidden_state  # ours takes any size, and resamples on the way
    torch.testing.assert_close(started(pixel_values).last_hidden_state, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("model_class", [LocAtViTModel, LocAtViTForSemanticSegmentation, LocAtViTBackbone])
@torch.no_grad()
def test_every_class_starts_from_the_same_encoder(model_class):
    source = with_trained_like_weights(SOURCES["vit"][0](SOURCES["vit"][1]))
    pixel_values = torch.randn(1, 3, 32, 32)
    expected = source(pixel_values, output_hidden_states=True).hidden_states[-1]
    started = model_class.from_vit(source)
    encoder = started.base_model
    torch.testing.assert_close(
        encoder(pixel_values, output_hidden_states=True).hidden_states[-1], expected, atol=1e-3, rtol=0
    )
    started(pixel_values)


def test_gaussian_is_switched_down_and_can_learn():
    started = LocAtViTForImageClassification.from_vit(SOURCES["vit"][0](SOURCES["vit"][1]))
    gaussians = []
    for layer in started.locatvit.layers:
        layer.attention.gaussian.register_forward_hook(lambda module, inputs, output: gaussians.append(output))
    started.train()(torch.randn(2, 3, 32, 32)).logits.square().sum().backward()
    assert all(torch.allclose(gaussian.amplitude, torch.tensor(5e-5)) for gaussian in gaussians)
    assert started.locatvit.layers[0].attention.gaussian.amplitude.bias.grad.abs() > 0


def test_labels_statistics_and_overrides(tmp_path, warnings_of_from_vit):
    source = ViTForImageClassification(SOURCES["vit"][1])
    source.config.id2label = {index: f"class {index}" for index in range(5)}
    source.save_pretrained(tmp_path)
    ViTImageProcessor(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    started = LocAtViTForImageClassification.from_vit(tmp_path, attn_implementation="eager", drop_path_rate=0.1)
    assert started.config.id2label[3] == "class 3" and started.config.drop_path_rate == 0.1
    assert started.config._attn_implementation == "eager"
    assert list(started.config.image_mean) == [0.1, 0.2, 0.3] and started.config.crop_pct == 1.0
    assert LocAtViTImageProcessor.from_model_config(started.config).size.shortest_edge == 32
    refined = LocAtViTForImageClassification.from_vit(tmp_path, use_refinement=True)
    assert refined.config.use_refinement and warnings_of_from_vit() == []
    other = LocAtViTForImageClassification.from_vit(tmp_path, num_labels=9)
    assert other.classifier.out_features == 9 and other.config.id2label[3] == "LABEL_3"
    assert len(warnings_of_from_vit()) == 1 and "classifier of 9 classes is new" in warnings_of_from_vit()[0]


@torch.no_grad()
def test_mean_pooling_keeps_the_encoder_and_needs_a_new_head(warnings_of_from_vit):
    source = with_trained_like_weights(ViTForImageClassification(SOURCES["vit"][1])).eval()
    pixel_values = torch.randn(1, 3, 32, 32)
    started = LocAtViTForImageClassification.from_vit(source, pooling="mean")
    expected = source.vit(pixel_values).last_hidden_state
    torch.testing.assert_close(started.locatvit(pixel_values).last_hidden_state, expected, atol=1e-3, rtol=0)
    assert not started.classifier.weight.equal(source.classifier.weight)
    assert len(warnings_of_from_vit()) == 1 and "classifier of another pooling" in warnings_of_from_vit()[0]


def test_started_model_is_saved_and_loaded_like_any_other(tmp_path):
    source = with_trained_like_weights(SOURCES["dinov2_registers"][0](SOURCES["dinov2_registers"][1]))
    LocAtViTModel.from_vit(source).save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 32, 32)
    actual = LocAtViTModel.from_pretrained(tmp_path)(pixel_values).last_hidden_state
    torch.testing.assert_close(actual, source(pixel_values).last_hidden_state, atol=1e-3, rtol=0)


class TestRefusals:
    def refused(self, checkpoint, match, **overrides):
        with pytest.raises(ValueError, match=match) as error:
            LocAtViTForImageClassification.from_vit(checkpoint, **overrides)
        assert "\n" not in str(error.value)

    def test_swiglu(self, tmp_path):
        model = Dinov2Model(Dinov2Config(use_swiglu_ffn=True, **SIZES))
        self.refused(model, "SwiGLU")
        model.save_pretrained(tmp_path)
        self.refused(tmp_path, "SwiGLU")

    def test_other_architectures(self, tmp_path):
        model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
        self.refused(model, "ResNetModel is not a plain ViT")
        model.save_pretrained(tmp_path)
        self.refused(tmp_path, "model_type 'resnet'")
        self.refused(timm.create_model("resnet18"), "not a plain ViT")
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "locatvit_tiny"}))
        (tmp_path / "pytorch_model.bin").touch()
        self.refused(tmp_path, "locatvit convert")
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50"}))
        self.refused(tmp_path, "The architecture resnet50 is not a plain ViT")
        (tmp_path / "config.json").write_text(json.dumps({"embed_dim": 64, "depth": 2, "num_heads": 2}))
        self.refused(tmp_path, "locatvit convert")

    def test_timms_refinement_that_takes_the_mean_of_registers_too(self, tmp_path):
        arguments = {**TIMM_SIZES, "global_pool": "prr", "class_token": False, "reg_tokens": 2}
        self.refused(timm.create_model("vit_tiny_patch16_224", **arguments), "takes the mean of the registers too")

    @pytest.mark.parametrize(
        ("architecture", "reason"),
        [
            ("vit_small_patch16_rope_224", "rotary embeddings that are not learned"),
            ("vit_tiny_r_s16_p8_224", "not a plain ViT"),
            ("vit_relpos_small_patch16_224", "blocks hold other layers"),
            ("vit_base_patch16_clip_224", "norm_pre.weight"),
            ("vit_giant_patch14_dinov2", "blocks hold other layers"),
            ("vit_frobnicate_patch16_224", "is unknown, to timm"),
        ],
    )
    def test_other_models_of_timm(self, tmp_path, architecture, reason):
        arguments = {"depth": 1, "num_classes": 5, "embed_dim": 96, "num_heads": 2}
        save_file({"norm_pre.weight": torch.ones(96)}, tmp_path / "model.safetensors")
        if timm.is_model(architecture) and "_r_" not in architecture:
            source = timm.create_model(architecture, **arguments)
            self.refused(source, reason)
            save_file(source.state_dict(), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "model_args": arguments}))
        self.refused(tmp_path, reason)

    def test_without_timm(self, tmp_path, monkeypatch):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_little_patch16_reg4_gap_256"}))
        save_file({"cls_token": torch.ones(1)}, tmp_path / "model.safetensors")
        timm_vit._default_arguments.cache_clear()
        monkeypatch.setitem(sys.modules, "timm", None)
        self.refused(tmp_path, "only timm knows, and it is not installed")

    def test_weights_alone_and_nothing(self, tmp_path):
        torch.save({"state_dict": {"cls_token": torch.ones(1)}}, tmp_path / "last.pth.tar")
        self.refused(tmp_path / "last.pth.tar", "no args.yaml beside last.pth.tar")
        (tmp_path / "last.pth.tar").unlink()
        self.refused(tmp_path, "neither config.json")

    def test_tensor_that_is_not_finite(self):
        source = ViTModel(SOURCES["vit"][1])
        source.layernorm.bias.data[1] = float("nan")
        self.refused(source, "The tensor layernorm.bias holds numbers that are not finite")

    def test_missing_tensor(self, tmp_path):
        ViTModel(SOURCES["vit"][1]).save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        name = next(name for name in state if "layernorm_after.bias" in name or "norm2.bias" in name)
        del state[name]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        self.refused(tmp_path, "lacks .*0.*bias")

    def test_unknown_field_and_missing_folder(self, tmp_path):
        model = ViTModel(SOURCES["vit"][1])
        self.refused(model, "no field 'gausian'", gausian=True)
        self.refused(tmp_path / "nowhere", "There is no file or folder")
        self.refused(model, "must be divisible", num_attention_heads=7)
        self.refused(model, "trained with hidden_act='gelu' and cannot start with 'relu'", hidden_act="relu")
        self.refused(model, "trained with num_attention_heads", num_attention_heads=1)
        self.refused(model, "trained with num_register_tokens=0 and cannot start with 2", num_register_tokens=2)
        self.refused(model, "embeddings.patch_embeddings.projection.weight", patch_size=4)


def test_dropout_rates_of_the_source_are_kept(warnings_of_from_vit):
    rates = {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.2}
    source = timm.create_model("vit_tiny_patch16_224", **TIMM_SIZES, **rates, drop_rate=0.4, patch_drop_rate=0.25)
    config = LocAtViTForImageClassification.from_vit(source).config
    assert config.drop_path_rate == pytest.approx(0.3)  # read from a list of float32
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.2)
    assert any("Left out drop_rate=0.4, patch_drop_rate=0.25" in sentence for sentence in warnings_of_from_vit())
    theirs = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    source = Dinov2Model(Dinov2Config(**SIZES, **theirs, drop_path_rate=0.3))
    config = LocAtViTModel.from_vit(source).config
    found = config.drop_path_rate, config.hidden_dropout_prob, config.attention_probs_dropout_prob
    assert found == (0.3, 0.1, 0.2)
