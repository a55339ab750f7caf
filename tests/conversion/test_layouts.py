"""Every layout of the reference, converted by the command and loaded where this package cannot be imported."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from locatvit_hf import LocAtViTConfig, LocAtViTForImageClassification
from locatvit_hf.conversion import locatvit as family
from tests.conversion.layouts import remote_outputs, write_mixin, write_run, write_timm
from tests.golden import GOLDEN, VIT_CHECKPOINTS, load_case, load_models, model_input, rule_weights
from tests.processes import run_program

WRITERS = {"mixin": write_mixin, "timm": write_timm, "run": write_run}
# The reference's own `save_pretrained` knows no RoPE: its layout names no architecture.
CASES = [(name, layout) for name in VIT_CHECKPOINTS for layout in WRITERS if (name, layout) != ("locatrope", "mixin")]
# Rows of locat_golden.json in timm's layout: (position, architecture, model_args, global_pool). timm's own refinement
# is the reference's without Gaussians.
RULE_CASES = {
    "tiny": (0, "locatvit_tiny", {}, "token"),
    "prr": (2, "vit_tiny_patch16_224", {}, "prr"),
    "mean": (6, "locatvit_tiny", {"class_token": False}, "avg"),
    "plain": (10, "vit_tiny_patch16_224", {}, "token"),
    "rope": (12, "locatvit_tiny_rope_mixed", {}, "token"),
}


@pytest.fixture(scope="module")
def remote_logits(tmp_path_factory, locatvit) -> dict[str, dict[str, torch.Tensor]]:
    """Logits of every converted checkpoint by one process that has only transformers: folder -> input -> logits."""
    sources, root = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("converted")
    inputs = {}
    for name, layout in CASES:
        case = load_case(name)
        source = WRITERS[layout](case, sources / f"{name}-{layout}")
        if layout == "run" and name == "locatvit_reg4":
            source = source / "model_best.pth.tar"
        inputs[f"{name}-{layout}"] = (source, {str(i): case.input(i) for i in range(case.num_inputs)})
    for name, (row, architecture, arguments, pool) in RULE_CASES.items():
        source = write_rule_case(sources / name, architecture, arguments, pool)
        inputs[name] = (source, {"0": model_input(load_models()[row]["input"]).float()})
    for name, (source, _) in inputs.items():
        result = locatvit("convert", source, root / name)
        assert result.exit_code == 0, result.output
    return remote_outputs({root / name: tensors for name, (_, tensors) in inputs.items()})


def write_rule_case(folder: Path, architecture: str, arguments: dict, pool: str) -> Path:
    """timm's layout with weights by the rule of the golden values."""
    folder.mkdir()
    config = json.loads((GOLDEN / "hub_layouts" / "timm" / "config.json").read_text())
    config.update(architecture=architecture, global_pool=pool)
    if arguments:
        config["model_args"] = arguments
    (folder / "config.json").write_text(json.dumps(config))
    ours = family.build_config(architecture, {**arguments, "global_pool": pool})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LocAtViTForImageClassification(ours).state_dict().items()}
    weights = rule_weights(family.key_table(ours), shapes)
    save_file({name: tensor.float() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_golden_logits_in_a_process_without_the_package(remote_logits, name, layout):
    case = load_case(name)
    for index in range(case.num_inputs):
        assert case.error(f"{index}.logits", remote_logits[f"{name}-{layout}"][str(index)]) < 1e-5


@pytest.mark.parametrize("name", RULE_CASES)
def test_whole_models_in_timms_layout(remote_logits, name):
    golden = load_models()[RULE_CASES[name][0]]
    logits = remote_logits[name]["0"].double()
    # Weights and arithmetic are in float32 here, the golden values in float64.
    np.testing.assert_allclose(logits[0, : len(golden["logits_0"])], golden["logits_0"], atol=5e-5)
    assert abs(logits.sum().item() - golden["logits_sum"]) < 5e-3


def test_fixed_layout_files_convert_as_they_are(tmp_path, locatvit):
    """The files of `hub_layouts/mixin`, unchanged."""
    case = load_case("locatvit")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes((GOLDEN / "hub_layouts" / "mixin" / "config.json").read_bytes())
    save_file(case.state, tmp_path / "source" / "model.safetensors")
    assert locatvit("convert", tmp_path / "source", tmp_path / "out").exit_code == 0
    model = LocAtViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert case.error("0.logits", model(case.input(0)).logits) < 1e-5


def test_folder_is_complete(tmp_path, locatvit):
    source = write_timm(load_case("locatvit"), tmp_path / "source")
    assert locatvit("convert", source, tmp_path / "out").exit_code == 0
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "LICENSE"} <= files
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config["auto_map"]) >= {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageClassification",
        "AutoModelForSemanticSegmentation",
        "AutoBackbone",
    }
    for reference in config["auto_map"].values():
        assert f"{reference.split('.')[0]}.py" in files
    assert (tmp_path / "out" / "LICENSE").read_text() == (Path(__file__).parents[2] / "LICENSE").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "locatvit_tiny" in card and "SHA-256" in card and str(tmp_path) not in card
    assert list(tmp_path.glob(".*")) == []


def test_command_runs_as_a_module(tmp_path):
    source = write_mixin(load_case("vit_baseline"), tmp_path / "source")
    command = "-m", "locatvit_hf.cli", "convert", source, tmp_path / "out"
    process = run_program(*command, folder=Path(__file__).resolve().parents[2])
    assert process.returncode == 0, process.stderr
    assert "reloaded" in process.stdout
    # torch comments on how torchao, where it is installed, calls it; the command itself has nothing to complain of.
    assert all("torch/utils" in line for line in process.stderr.splitlines())


def test_names_stand_for_what_timm_builds_and_expects():
    names = [name for name in timm.list_models() if family.BASELINE_NAME.fullmatch(name)]
    names = [name for name in names if family.BASELINE_NAME.fullmatch(name)["size"] in LocAtViTConfig.presets]
    assert len(names) > 30
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        fields, preprocessing = family.config_fields(name, {}), family.default_preprocessing(name)
        assert fields["num_attention_heads"] == model.blocks[0].attn.num_heads, name
        assert (fields["hidden_size"], fields["num_hidden_layers"]) == (model.embed_dim, len(model.blocks)), name
        assert fields.get("use_class_token", True) is (model.cls_token is not None), name
        for key, value in preprocessing.items():
            assert tuple(np.atleast_1d(value)) == tuple(np.atleast_1d(model.pretrained_cfg[key])), (name, key)
