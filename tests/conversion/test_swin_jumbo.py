"""Swin and Jumbo checkpoints in the layouts of the reference and of timm, and what is refused in them."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from locatvit_hf import LocAtJumboForImageClassification
from locatvit_hf.conversion import locatjumbo, locatswin
from locatvit_hf.conversion.errors import ConversionError
from tests import golden
from tests.conversion.layouts import remote_outputs, write_run, write_timm


def write_timm_of_family(case, folder):
    """The stored config.json is a ViT's: another pooling, another mean."""
    pool = "avg" if case.name == "locatswin" else "token"
    return write_timm(case, folder, global_pool=pool, pretrained_cfg=None)


WRITERS = {"timm": write_timm_of_family, "run": write_run}
FAMILY_FILES = {
    "attention_locat.py",
    "configuration_utils_locat.py",
    "image_processing_locatvit.py",
    "layers_locat.py",
    "locat.py",
    "modeling_utils_locat.py",
}


def write_rule_case(folder, architecture):
    """timm's layout of a whole model with weights by the rule of the golden values."""
    folder.mkdir()
    config = {"architecture": architecture, "num_classes": 1000}
    (folder / "config.json").write_text(json.dumps(config))
    converter = golden.converter_of(architecture)
    ours = converter.build_config(architecture, {})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in converter.classifier(ours).state_dict().items()}
    weights = golden.rule_weights(converter.key_table(ours), shapes)
    save_file({name: tensor.float() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory, locatvit):
    """The folder of the converted models, and their logits from a process where this package cannot be imported."""
    sources, root = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("converted")
    inputs = {}
    for name in golden.OTHER_CHECKPOINTS:
        case = golden.load_case(name)
        for layout, write in WRITERS.items():
            out = root / f"{name}-{layout}"
            inputs[out] = {str(index): case.input(index) for index in range(case.num_inputs)}
            result = locatvit("convert", write(case, sources / out.name), out)
            assert result.exit_code == 0, result.output
    for model in golden.load_models(("locatswin", "locatjumbo")):
        out = root / model["model"]
        inputs[out] = {"0": golden.model_input(model["input"]).float()}
        result = locatvit("convert", write_rule_case(sources / out.name, model["model"]), out)
        assert result.exit_code == 0, result.output
    return root, remote_outputs(inputs)


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("name", golden.OTHER_CHECKPOINTS)
def test_golden_logits_in_a_process_without_the_package(converted, name, layout):
    case = golden.load_case(name)
    for index in range(case.num_inputs):
        assert case.error(f"{index}.logits", converted[1][f"{name}-{layout}"][str(index)]) < 1e-5


@pytest.mark.parametrize("model", golden.load_models(("locatswin", "locatjumbo")), ids=lambda model: model["model"])
def test_whole_models_in_timms_layout(converted, model):
    logits = converted[1][model["model"]]["0"]
    np.testing.assert_allclose(logits[0, : len(model["logits_0"])], model["logits_0"], atol=5e-5)


@pytest.mark.parametrize("name", golden.OTHER_CHECKPOINTS)
def test_a_folder_carries_only_the_code_of_its_family(converted, name):
    files = {file.name for file in (converted[0] / f"{name}-timm").glob("*.py")} - {"__init__.py"}
    assert files - {"blockwise_locat.py", "triton_locat.py"} == FAMILY_FILES | {
        f"configuration_{name}.py",
        f"modeling_{name}.py",
    }
    config = json.loads((converted[0] / f"{name}-timm" / "config.json").read_text())
    mean = {"locatswin": [0.485, 0.456, 0.406], "locatjumbo": [0.5, 0.5, 0.5]}[name]
    assert config["image_mean"] == mean


def test_the_shared_mlp_is_stored_once(converted):
    names = load_file(converted[0] / "locatjumbo-run" / "model.safetensors")
    assert sorted(name for name in names if "jumbo_mlp" in name) == [
        f"locatjumbo.jumbo_mlp.{part}.{kind}" for part in ("down_proj", "up_proj") for kind in ("bias", "weight")
    ]
    model = LocAtJumboForImageClassification.from_pretrained(converted[0] / "locatjumbo-run")
    assert not model.all_tied_weights_keys


def test_an_alias_that_is_alone_is_the_mlp_and_one_that_differs_is_refused():
    state = golden.load_case("locatjumbo").state
    expected = locatjumbo.prepare_state(state)
    alone = {name: tensor for name, tensor in state.items() if not name.startswith(("jumbo_mlp", "blocks.1.jumbo"))}
    prepared = locatjumbo.prepare_state(alone)
    assert prepared.keys() == expected.keys()
    assert all(torch.equal(prepared[name], tensor) for name, tensor in expected.items())
    state["blocks.2.jumbo_mlp.fc2.bias"] = state["blocks.2.jumbo_mlp.fc2.bias"] + 1e-3
    with pytest.raises(ConversionError, match=r"blocks\.2\.jumbo_mlp\.fc2\.bias differ"):
        locatjumbo.prepare_state(state)


def test_a_jumbo_without_both_ideas_keeps_the_norm_of_its_patches(tmp_path, locatvit):
    """The reference's `locatjumbo_*` normalizes its patches whatever is switched off, its `jumbo_*` never."""
    case = golden.load_case("locatjumbo")
    case.arguments.update(gaug=False, prr=False)
    state = {name: tensor for name, tensor in case.state.items() if ".gaug." not in name}
    source = write_timm_of_family(case, tmp_path / "source")
    save_file(state, source / "model.safetensors")
    result = locatvit("convert", source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    model = LocAtJumboForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        outputs = model.base_model(case.input(0), output_hidden_states=True)
    num_jumbo = model.config.num_jumbo_tokens
    patches = outputs.hidden_states[-1][:, num_jumbo:]
    expected = (patches - patches.mean(dim=-1, keepdim=True)) / (
        patches.var(dim=-1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    expected = expected * state["norm_patches.weight"] + state["norm_patches.bias"]
    torch.testing.assert_close(outputs.last_hidden_state[:, num_jumbo:], expected)
    plain = locatjumbo.build_config("jumbo_tiny", {})
    assert not plain.normalizes_patches and "norm_patches.weight" not in locatjumbo.key_table(plain)


def test_names_become_configurations():
    plain = locatswin.build_config("swin_base_patch4_window12_384", {"num_classes": 21})
    assert (plain.embed_dim, plain.depths, plain.window_size, plain.image_size) == (128, [2, 2, 18, 2], 12, 384)
    assert plain.num_labels == 21 and not plain.use_gaussian and not plain.use_refinement
    assert locatswin.build_config("locatswin_tiny", {"prr": False}).use_refinement is False
    jumbo = locatjumbo.build_config("jumbo_base", {"J": 4})
    assert jumbo.num_jumbo_tokens == 4 and not jumbo.use_gaussian and not jumbo.normalizes_patches
    assert locatjumbo.build_config("locatjumbo_tiny", {"img_size": 512}).coarse_training
    for module, architecture in ((locatswin, "swin_s3_tiny_224"), (locatswin, "swinv2_tiny_window8_256")):
        assert not module.recognize(architecture, {})
    with pytest.raises(ConversionError, match="unknown size 'huge'"):
        locatswin.build_config("locatswin_huge", {})
    with pytest.raises(ConversionError, match="global_pool='max', which LocAt-Swin does not have"):
        locatswin.build_config("locatswin_tiny", {"global_pool": "max"})
    with pytest.raises(ConversionError, match="depths=2, which is not a list of whole numbers"):
        locatswin.build_config("locatswin_tiny", {"depths": 2})
    with pytest.raises(ConversionError, match="unknown argument color='red'"):
        locatjumbo.build_config("jumbo_tiny", {"color": "red"})


@pytest.mark.parametrize("size", [(64, 64), (56, 96), (120, 72)])
def test_plain_swin_is_timms(size):
    """Weights of timm's own model, other image sizes included: shift, padding of windows and odd merging agree."""
    import timm

    arguments = {"img_size": 64, "embed_dim": 32, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 4}
    torch.manual_seed(0)
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, strict_img_size=False, **arguments).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    config = locatswin.build_config("swin_tiny_patch4_window7_224", {**arguments, "num_classes": 5})
    ours = golden.converter_of("swin_tiny_patch4_window7_224").classifier(config).eval()
    buffers = {"layers.0.blocks.1.attn_mask": torch.zeros(1)}  # as older versions of timm stored
    state = locatswin.prepare_state({**theirs.state_dict(), **buffers})
    golden.load_weights(ours, locatswin.key_table(config), state)
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, features = theirs.forward_features(pixel_values), ours.base_model(pixel_values).last_hidden_state
        torch.testing.assert_close(features, expected.flatten(1, 2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(pixel_values).logits, theirs(pixel_values), rtol=1e-4, atol=1e-4)
