"""What the converter decides: which file, which weights, which configuration and which processor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from locatvit_hf import LocAtViTForImageClassification, LocAtViTImageProcessor, LocAtViTModel
from locatvit_hf.conversion import locatvit as family
from locatvit_hf.conversion.families import FAMILIES
from locatvit_hf.conversion.sources import load_tensors
from tests.conversion.layouts import write_mixin, write_run, write_timm
from tests.golden import load_case


@pytest.mark.parametrize(
    ("architecture", "arguments", "num_keys"),
    [
        ("locatvit_tiny", {}, 200),
        ("locatvit_base", {"reg_tokens": 4}, 201),
        ("locatvit_tiny", {"class_token": False, "global_pool": "avg"}, 199),
        ("locatvit_tiny_rope_mixed", {}, 224),
        ("nopos_vit_tiny_patch16_224", {}, 151),
        ("vit_small_patch14_reg4_dinov2", {"depth": 2, "num_classes": 0}, 35),
    ],
)
def test_table_names_every_tensor_once(architecture, arguments, num_keys):
    config = family.build_config(architecture, arguments)
    table = family.key_table(config)
    ours = [name for row in table.values() for name in row]
    with torch.device("meta"):
        expected = LocAtViTForImageClassification(config).state_dict()
    assert sorted(ours) == sorted(expected)
    assert len(table) == num_keys


def test_families_do_not_overlap():
    for architecture in ("locatvit_tiny", "vit_base_patch16_224", "vit_base_patch16_rope_mixed_224"):
        assert sum(row.recognise(architecture, {}) for row in FAMILIES) == 1


def test_coarse_training_follows_the_native_grid():
    assert family.build_config("locatvit_tiny", {"img_size": 512}).coarse_training
    assert family.build_config("locatvit_tiny", {"img_size": (640, 496)}).coarse_training
    assert not family.build_config("locatvit_tiny", {"img_size": (496, 640)}).coarse_training
    assert not family.build_config("vit_tiny_patch16_224", {"img_size": 512}).coarse_training


def test_best_checkpoint_is_taken_before_the_last(tmp_path, locatvit):
    best, last = load_case("locatvit"), load_case("locatvit_grid32")
    write_run(best, tmp_path / "run", "last.pth.tar")
    result = locatvit("convert", tmp_path / "run", tmp_path / "from_last")
    assert result.exit_code == 0 and "last.pth.tar" in result.output
    write_run(last, tmp_path / "run", "last.pth.tar")
    write_run(best, tmp_path / "run", "model_best.pth.tar")
    result = locatvit("convert", tmp_path / "run", tmp_path / "from_best")
    assert result.exit_code == 0 and "model_best.pth.tar" in result.output


def test_moving_average_is_taken_only_on_request(tmp_path, locatvit):
    case = load_case("locatvit")
    source = write_run(case, tmp_path / "run")
    for arguments, printed, offset in (((), "Took state_dict of", 0.0), (("--ema",), "Took state_dict_ema of", 0.01)):
        out = tmp_path / f"out{len(arguments)}"
        result = locatvit("convert", source, out, *arguments)
        assert result.exit_code == 0 and printed in result.output
        weight = load_file(out / "model.safetensors")["classifier.weight"]
        torch.testing.assert_close(weight, case.state["head.weight"] + offset)


def test_refinement_is_an_argument_and_never_guessed(tmp_path, locatvit):
    case = load_case("locatvit")
    source = write_timm(case, tmp_path / "source", model_args={**case.arguments, "prr": False})
    assert locatvit("convert", source, tmp_path / "out").exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["use_gaussian"] and not config["use_refinement"]


def test_processor_has_the_checkpoints_own_numbers(tmp_path, locatvit):
    case = load_case("locatrope")
    source = write_timm(
        case,
        tmp_path / "source",
        label_names=[f"class {index}" for index in range(7)],
        pretrained_cfg={
            "input_size": [3, 96, 96],
            "interpolation": "bilinear",
            "crop_pct": 0.75,
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
        },
    )
    assert locatvit("convert", source, tmp_path / "out").exit_code == 0
    processor = LocAtViTImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and list(processor.image_std) == [0.4, 0.5, 0.6]
    assert processor.size.shortest_edge == 128 and processor.crop_size.height == 96
    assert processor.resample == 2  # bilinear
    model = LocAtViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.image_size == 64  # model_args: the native grid is another thing than the evaluation size
    assert model.config.id2label[3] == "class 3"


@pytest.mark.parametrize(("name", "mean"), [("locatvit", 0.5), ("locatrope", 0.485)])
def test_runs_without_statistics_get_those_of_their_variant(tmp_path, locatvit, name, mean):
    source = write_run(load_case(name), tmp_path / "run")
    assert locatvit("convert", source, tmp_path / "out").exit_code == 0
    processor = LocAtViTImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_mean[0] == mean and processor.size.shortest_edge == 71  # 64 / 0.9, rounded down


def test_checkpoint_without_head_becomes_an_encoder(tmp_path, locatvit):
    case = load_case("locatvit_reg4")
    source = write_timm(case, tmp_path / "source", num_classes=0)
    save_file({k: v for k, v in case.state.items() if not k.startswith("head.")}, source / "model.safetensors")
    assert locatvit("convert", source, tmp_path / "out").exit_code == 0
    model = LocAtViTModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert case.error("0.tokens", model(case.input(0)).last_hidden_state) < 1e-5


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compiled_and_distributed_training(tmp_path, locatvit, prefix):
    case = load_case("locatvit")
    source = write_run(case, tmp_path / "run")
    state = {f"{prefix}{name}": tensor for name, tensor in case.state.items()}
    torch.save({"state_dict": state}, source / "model_best.pth.tar")
    result = locatvit("convert", source, tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_regvit_of_a_size_that_only_timm_knows(tmp_path, locatvit):
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    arguments = {"depth": 2, "img_size": 64, "num_classes": 5}
    source = timm.create_model("vit_wee_patch16_reg1_gap_256", **arguments).eval()
    save_for_hf(source, tmp_path / "source", model_args=arguments, safe_serialization=True)
    result = locatvit("convert", tmp_path / "source", tmp_path / "out")
    assert result.exit_code == 0, result.output
    model = LocAtViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert not model.config.use_gaussian and model.config.intermediate_size == 5 * 256
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, source(pixel_values), atol=1e-5, rtol=1e-4)


def test_pytorch_bin_beside_timms_config(tmp_path, locatvit):
    case = load_case("vit_baseline")
    source = write_timm(case, tmp_path / "source")
    (source / "model.safetensors").unlink()
    torch.save(case.state, source / "pytorch_model.bin")
    assert locatvit("convert", source, tmp_path / "out").exit_code == 0


def test_overwrite_replaces_the_whole_folder(tmp_path, locatvit):
    source = write_mixin(load_case("locatvit"), tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("old")
    assert locatvit("convert", source, tmp_path / "out", "--overwrite").exit_code == 0
    assert not (tmp_path / "out" / "mine.txt").exists() and (tmp_path / "out" / "model.safetensors").exists()
    assert list(tmp_path.glob(".*")) == []


def test_histories_of_training_runs_are_read_without_their_library(tmp_path, monkeypatch):
    """mmengine keeps a history of numpy arrays and bound functions in its checkpoints."""
    import sys
    import types

    import numpy as np

    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self._log_history = np.array([1.0, 2.0])
            self._count_history = np.array([1, 1])
            self._statistics_methods = {"mean": HistoryBuffer.mean}

        @staticmethod
        def mean():
            raise AssertionError("code of a checkpoint was run")

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"state_dict": {"a": torch.ones(2)}, "message_hub": {"loss": HistoryBuffer()}}, tmp_path / "iter.pth")
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)

    content = load_tensors(tmp_path / "iter.pth")
    assert torch.equal(content["state_dict"]["a"], torch.ones(2))
    assert "mmengine" not in sys.modules
    assert type(content["message_hub"]["loss"]).__name__ == "Inert"
    assert not vars(content["message_hub"]["loss"])
