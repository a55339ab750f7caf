"""What the converter decides: which file, which weights, which configuration and which processor."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from locatvit_hf import LocAtViTForImageClassification, LocAtViTImageProcessor, LocAtViTModel
from locatvit_hf.conversion import locatvit as family
from locatvit_hf.conversion.convert import configure
from locatvit_hf.conversion.converters import CONVERTERS, converter_of
from locatvit_hf.conversion.readers import load_tensors, read_checkpoint
from tests.conversion.layouts import run_settings, write_mixin, write_run, write_timm
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
        assert sum(row.recognize(architecture, {}) for row in CONVERTERS) == 1


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


SMALL_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 5}


@pytest.fixture(scope="module")
def small_vit():
    """A small ViT of timm in evaluation mode."""
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL_VIT).eval()


def assert_same_logits(source, folder, size=32):
    pixel_values = torch.randn(1, 3, size, size)
    model = LocAtViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, source(pixel_values), atol=1e-5, rtol=1e-4)
    return model.config


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"drop_path_rate": 0.0}, (0.0, 0.0, 0.0)),
        ({"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.2}, (0.3, 0.1, 0.2)),
        ({"drop_rate": 0.1}, (None, 0.1, 0.0)),
        ({"drop_rate": 0.1, "proj_drop_rate": 0.0, "attn_drop_rate": None}, (None, 0.0, 0.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "default"), [("locatvit", 0.0), ("locatswin", 0.1), ("locatjumbo", 0.0)])
def test_dropout_rates_of_the_source_are_kept(name, default, rates, expected, tmp_path):
    """In every layout; a rate that the source does not name is the default of its architecture."""
    case = load_case(name)
    arguments = {key: value for key, value in case.arguments.items() if key not in ("num_classes", "drop_path_rate")}
    settings = {"drop_path": None, "model_kwargs": {**arguments, **rates}}
    pool = {"global_pool": "avg" if name == "locatswin" else "token"}
    sources = [
        write_timm(case, tmp_path / "timm", model_args={**arguments, **rates}, pretrained_cfg=None, **pool),
        write_run(case, tmp_path / "run", **settings),
    ]
    if rates.keys() <= {"drop_rate", "drop_path_rate"}:  # those that the training program has options for
        options = {name.removesuffix("_rate"): rate for name, rate in rates.items()}
        sources.append(write_run(case, tmp_path / "options", **{**settings, "model_kwargs": arguments, **options}))
    for source in sources:
        reference = read_checkpoint(source)
        config = configure(converter_of(reference), reference)
        found = config.drop_path_rate, config.hidden_dropout_prob, config.attention_probs_dropout_prob
        assert found == tuple(default if rate is None else rate for rate in expected), source


def test_rates_that_ours_does_not_have_are_named(tmp_path, locatvit):
    case = load_case("locatvit")
    arguments = {**run_settings(case)["model_kwargs"], "patch_drop_rate": 0.25, "drop_path_rate": 0.2}
    source = write_run(case, tmp_path / "run", drop=0.3, drop_path=0.1, model_kwargs=arguments)
    result = locatvit("convert", source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    printed = result.output
    assert "Left out patch_drop_rate=0.25: our models have no such dropout" in printed
    assert "Took drop_rate=0.3 for hidden_dropout_prob" in printed
    assert "args.yaml gives drop_path=0.1 but drop_path_rate=0.2 in model_kwargs" in printed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["drop_path_rate"], config["hidden_dropout_prob"]) == (0.2, 0.3)


@pytest.mark.parametrize("file", ["weights.pth", "model.safetensors"])
def test_two_lines_are_enough_beside_weights_alone(tmp_path, locatvit, refuses, file):
    """The sentence that asks for them says which, and they are."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    (tmp_path / "run").mkdir()
    write = save_file if file.endswith("safetensors") else torch.save
    write(model.state_dict(), tmp_path / "run" / file)
    sentence = refuses("convert", tmp_path / "run", tmp_path / "out")
    assert f"There is no args.yaml beside {file}" in sentence and "Two lines in it are enough" in sentence
    lines = re.findall("`(.*?)`", sentence)
    assert lines == ["model: vit_tiny_patch16_224", "num_classes: 3"]
    (tmp_path / "run" / "args.yaml").write_text("\n".join(lines))
    for source in ("run", f"run/{file}"):
        assert locatvit("convert", tmp_path / source, tmp_path / "out", "--overwrite").exit_code == 0
        assert_same_logits(model, tmp_path / "out", size=224)


def test_settings_inside_the_checkpoint_stand_for_args_yaml(tmp_path, locatvit, small_vit):
    """As the program of timm, which the reference's is made of, stores them."""
    from timm.utils import CheckpointSaver

    settings = argparse.Namespace(
        model="vit_tiny_patch16_224",
        num_classes=None,
        model_kwargs=SMALL_VIT,
        drop_path=0.2,
        crop_pct=0.875,
        mean=(0.1, 0.2, 0.3),
        output=Path("output"),
    )
    optimizer = torch.optim.SGD(small_vit.parameters(), lr=0.1)
    saver = CheckpointSaver(small_vit, optimizer, args=settings, checkpoint_dir=str(_made(tmp_path / "run")))
    saver.save_checkpoint(epoch=3, metric=71.5)
    for name in ("model_best.pth.tar", "last.pth.tar"):
        source = tmp_path / "run" / name
        result = locatvit("convert", source, tmp_path / "out", "--overwrite")
        assert result.exit_code == 0, result.output
        config = assert_same_logits(small_vit, tmp_path / "out")
        assert (config.drop_path_rate, config.crop_pct, config.image_mean) == (0.2, 0.875, [0.1, 0.2, 0.3])


def test_tags_of_python_in_args_yaml_are_read_and_not_run(tmp_path, locatvit, small_vit):
    """What `yaml.dump` makes of settings that hold more than YAML knows."""
    torch.save({"state_dict": small_vit.state_dict()}, _made(tmp_path / "run") / "model_best.pth.tar")
    settings = {
        "model": "vit_tiny_patch16_224",
        "model_kwargs": {**SMALL_VIT, "img_size": (32, 32)},
        "mean": (0.1, 0.2, 0.3),
        "output": Path("output"),
        "kinds": {1, 2},
        "loss": torch.nn.CrossEntropyLoss,
    }
    for content in (settings, argparse.Namespace(**settings)):
        text = yaml.dump(content)
        assert "!!python/tuple" in text and "!!python/name:torch.nn" in text
        mark = tmp_path / "mark"
        text += f"hook: !!python/object/apply:os.system ['touch {mark}']\n"
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            (tmp_path / "run" / "args.yaml").write_text(text, encoding=encoding)
            result = locatvit("convert", tmp_path / "run", tmp_path / "out", "--overwrite")
            assert result.exit_code == 0, result.output
            config = assert_same_logits(small_vit, tmp_path / "out")
            assert config.image_mean == [0.1, 0.2, 0.3] and config.image_size == [32, 32]
            assert not mark.exists()


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


NAMES = ["ant", "bee", "crab", "dog", "eel"]
PREPROCESSING = {"crop_pct": 0.8, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}


@pytest.mark.parametrize("form", ["nested", "flat", "labels_by_id", "in_the_middle", "transformers"])
def test_every_form_of_timms_config_json(tmp_path, locatvit, small_vit, form):
    folder, model_args = _made(tmp_path / "source"), {k: v for k, v in SMALL_VIT.items() if k != "num_classes"}
    cfg = {"input_size": [3, 32, 32], "first_conv": "patch_embed.proj", "classifier": "head", **PREPROCESSING}
    top = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "num_features": 48, "global_pool": "token"}
    config, prefix = {**top, "model_args": model_args}, ""
    if form == "nested":
        config |= {"pretrained_cfg": cfg, "label_names": NAMES}
    elif form == "flat":  # as the first repositories of timm
        config |= {**cfg, "labels": NAMES}
    elif form == "labels_by_id":
        config |= {"pretrained_cfg": {**cfg, "label_names": {str(i): NAMES[i] for i in (4, 0, 1, 2, 3)}}}
    elif form == "in_the_middle":
        moved = {name: config.pop(name) for name in ("architecture", "num_classes")}
        config |= {"pretrained_cfg": {**cfg, **moved, "label_names": NAMES}, "label_names": None}
    else:
        config |= {"model_type": "timm_wrapper", "pretrained_cfg": cfg, "label_names": NAMES}
        prefix = "timm_model."
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8-sig" if form == "flat" else "utf-8")
    save_file({prefix + name: tensor for name, tensor in small_vit.state_dict().items()}, folder / "model.safetensors")
    result = locatvit("convert", folder, tmp_path / "out")
    assert result.exit_code == 0, result.output
    converted = assert_same_logits(small_vit, tmp_path / "out")
    assert [converted.id2label[index] for index in range(5)] == NAMES
    processor = LocAtViTImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size.shortest_edge == 40 and processor.crop_size.height == 32 and processor.resample == 2
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and list(processor.image_std) == [0.4, 0.5, 0.6]
    started = LocAtViTForImageClassification.from_vit(folder)
    assert [started.config.id2label[index] for index in range(5)] == NAMES


def test_a_model_of_timm_that_transformers_saved(tmp_path, locatvit, small_vit):
    """With all that its own `save_pretrained` writes."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    fields = {"architecture": "vit_tiny_patch16_224", "num_labels": 5, "id2label": dict(enumerate(NAMES))}
    arguments = {name: value for name, value in SMALL_VIT.items() if name != "num_classes"}
    wrapped = TimmWrapperForImageClassification(TimmWrapperConfig(**fields, model_args=arguments)).eval()
    wrapped.timm_model.load_state_dict(small_vit.state_dict())
    wrapped.save_pretrained(tmp_path / "source")
    result = locatvit("convert", tmp_path / "source", tmp_path / "out")
    assert result.exit_code == 0, result.output
    config = assert_same_logits(small_vit, tmp_path / "out")
    assert [config.id2label[index] for index in range(5)] == NAMES


def test_crop_modes_and_names_that_do_not_fit(tmp_path, locatvit):
    case = load_case("locatvit")
    cfg = {"input_size": [3, 64, 64], "crop_pct": 0.8}
    for mode, size in (("squash", {"height": 80, "width": 80}), ("border", {"shortest_edge": 80})):
        names = {"label_names": ["one", "two"]}
        source = write_timm(case, tmp_path / mode, pretrained_cfg={**cfg, "crop_mode": mode}, **names)
        result = locatvit("convert", source, tmp_path / f"{mode}_out")
        assert result.exit_code == 0, result.output
        processor = json.loads((tmp_path / f"{mode}_out" / "preprocessor_config.json").read_text())
        assert {side: pixels for side, pixels in processor["size"].items() if pixels} == size
        assert ("Left out crop_mode='border'" in result.output) == (mode == "border")
        assert "Left out the names of 2 classes: the model has 7." in result.output
