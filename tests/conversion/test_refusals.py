"""Bad input: one clear sentence, a non-zero exit code, and no folder."""

import json
import os
import pickle
import signal
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from locatvit_hf.conversion import convert as conversion
from tests.conversion.layouts import run_settings, write_mixin, write_run, write_timm
from tests.golden import load_case
from tests.processes import run_program

CASE = load_case("locatvit")


@pytest.fixture
def out(tmp_path) -> Path:
    """A destination; after the test neither it nor a leftover beside it may exist."""
    destination = tmp_path / "out"
    yield destination
    assert not destination.exists()
    assert list(tmp_path.glob(".*")) == []


def test_truncated_safetensors(tmp_path, out, refuses):
    source = write_mixin(CASE, tmp_path / "source")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors is damaged or incomplete" in refuses("convert", source, out)


def test_truncated_pickle(tmp_path, out, refuses):
    source = write_run(CASE, tmp_path / "run")
    weights = source / "model_best.pth.tar"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert "model_best.pth.tar is damaged" in refuses("convert", source, out)


class RunsCode:
    def __init__(self, command: str, function=os.system):
        self.command, self.function = command, function

    def __reduce__(self):
        return self.function, (self.command,)


@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "system"), (eval, "eval"), (subprocess.getoutput, "getoutput")]
)
def test_pickle_with_code_is_refused_and_not_run(tmp_path, out, refuses, function, name):
    source = write_run(CASE, tmp_path / "run")
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')" if function is eval else f"touch {mark}"
    torch.save({"state_dict": CASE.state, "args": RunsCode(code, function)}, source / "model_best.pth.tar")
    sentence = refuses("convert", source, out)
    assert "is refused" in sentence and name in sentence
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("written_by", ["pickle", "torch", "torch_legacy"])
def test_code_is_named_in_every_protocol(tmp_path, out, refuses, written_by, protocol):
    source = write_run(CASE, tmp_path / "run")
    mark, weights = tmp_path / "mark", source / "model_best.pth.tar"
    content = {"state_dict": RunsCode(f"touch {mark}")}
    if written_by == "pickle":
        weights.write_bytes(pickle.dumps(content, protocol))
    else:
        zipped = written_by == "torch"
        torch.save(content, weights, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sentence = refuses("convert", source, out)
    name = "posix.system" if os.name == "posix" else "nt.system"
    assert sentence == f"model_best.pth.tar is refused: its pickle asks for {name}, which is code and not data."
    assert not mark.exists()


def test_pickle_of_a_module_names_its_class(tmp_path, out, refuses):
    source = write_run(CASE, tmp_path / "run")
    for protocol in (2, 4):
        torch.save(torch.nn.Linear(2, 2), source / "model_best.pth.tar", pickle_protocol=protocol)
        assert "asks for torch.nn.modules.linear.Linear, which is code" in refuses("convert", source, out)


def test_strings_of_a_pickle_may_come_from_its_memo(tmp_path, out, refuses):
    """As in a pickle that names the same function twice, or that was written to hide it."""
    source = write_run(CASE, tmp_path / "run")
    content = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x9400h\x00h\x01\x93."
    (source / "model_best.pth.tar").write_bytes(content)
    assert "asks for os.system, which is code" in refuses("convert", source, out)


def test_tensors_in_another_protocol(tmp_path, out, refuses):
    source = write_run(CASE, tmp_path / "run")
    torch.save({"state_dict": CASE.state}, source / "model_best.pth.tar", pickle_protocol=4)
    sentence = refuses("convert", source, out)
    assert sentence == (
        "model_best.pth.tar is a pickle of protocol 4, of which PyTorch reads only 2 safely; save it with that."
    )


@pytest.mark.parametrize("written_by", ["pickle", "torch", "torch_legacy"])
def test_truncated_anywhere(tmp_path, out, refuses, written_by):
    source = write_run(CASE, tmp_path / "run")
    weights = source / "model_best.pth.tar"
    if written_by == "pickle":
        weights.write_bytes(pickle.dumps({"state_dict": {"epoch": list(range(300))}}))
    else:
        torch.save({"state_dict": CASE.state}, weights, _use_new_zipfile_serialization=written_by == "torch")
    whole = weights.read_bytes()
    for length in (1, 2, 10, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        sentence = refuses("convert", source, out)
        assert sentence == "model_best.pth.tar is damaged or no checkpoint of PyTorch."


class Lookup:
    """Pickled as the result of `getattr`, which training runs store too and which is not executed here."""

    def __call__(self, *arguments):
        raise AssertionError

    def __reduce__(self):
        return getattr, ("text", "upper")


def test_result_of_a_stored_lookup_cannot_be_called(tmp_path, out, refuses):
    source = write_run(CASE, tmp_path / "run")
    torch.save({"state_dict": CASE.state, "args": RunsCode("x", Lookup())}, source / "model_best.pth.tar")
    assert "is refused: its pickle calls an object" in refuses("convert", source, out)


def test_file_that_is_no_checkpoint(tmp_path, out, refuses):
    source = write_run(CASE, tmp_path / "run")
    for content in (b"", b"hello world" * 100):
        (source / "model_best.pth.tar").write_bytes(content)
        assert "model_best.pth.tar is damaged or no checkpoint" in refuses("convert", source, out)


def test_another_architecture(tmp_path, out, refuses):
    source = write_timm(CASE, tmp_path / "source", architecture="resnet50")
    assert "resnet50 cannot be converted" in refuses("convert", source, out)


def test_unknown_size(tmp_path, out, refuses):
    source = write_timm(CASE, tmp_path / "source", architecture="locatvit_huge")
    assert "unknown size 'huge'" in refuses("convert", source, out)


def test_transformers_checkpoint(tmp_path, out, refuses):
    source = write_timm(CASE, tmp_path / "source", model_type="vit")
    assert "from_vit" in refuses("convert", source, out)


def test_missing_args_yaml(tmp_path, out, refuses):
    source = write_run(CASE, tmp_path / "run")
    (source / "args.yaml").unlink()
    torch.save({"state_dict": CASE.state}, source / "model_best.pth.tar")
    sentence = refuses("convert", source, out)
    assert "no args.yaml beside model_best.pth.tar" in sentence and "`num_classes: 7`" in sentence


def test_args_yaml_that_is_no_yaml(tmp_path, out, refuses):
    source = write_run(CASE, tmp_path / "run")
    (source / "args.yaml").write_text("model: [")
    assert "not valid YAML" in refuses("convert", source, out)
    (source / "args.yaml").write_text(yaml.dump(RunsCode(f"touch {tmp_path / 'mark'}")))
    assert "does not name a model" in refuses("convert", source, out) and not (tmp_path / "mark").exists()
    (source / "args.yaml").write_bytes(b"model: \xff\xfe")
    assert "not valid YAML" in refuses("convert", source, out)


def test_wrong_class_count(tmp_path, out, refuses):
    source = write_run(CASE, tmp_path / "run", num_classes=10)
    sentence = refuses("convert", source, out)
    assert "7 classes" in sentence and "10" in sentence


def test_two_class_counts(tmp_path, out, refuses):
    arguments = {**run_settings(CASE)["model_kwargs"], "num_classes": 8}
    source = write_run(CASE, tmp_path / "run", model_kwargs=arguments)
    assert "num_classes" in refuses("convert", source, out)


def test_unknown_and_missing_tensors_are_named(tmp_path, out, refuses):
    source = write_mixin(CASE, tmp_path / "source")
    state = load_file(source / "model.safetensors")
    save_file({**state, "blocks.0.attn.q_norm.weight": torch.ones(32)}, source / "model.safetensors")
    assert "holds blocks.0.attn.q_norm.weight" in refuses("convert", source, out)
    state.pop("blocks.1.norm2.bias")
    save_file(state, source / "model.safetensors")
    assert "lacks blocks.1.norm2.bias" in refuses("convert", source, out)


def test_wrong_shape_is_named(tmp_path, out, refuses):
    source = write_timm(CASE, tmp_path / "source", model_args={**CASE.arguments, "img_size": 128})
    sentence = refuses("convert", source, out)
    assert "pos_embed" in sentence and "(1, 65, 64)" in sentence and "(1, 257, 64)" in sentence


def test_heads_that_do_not_divide_the_channels(tmp_path, out, refuses):
    source = write_timm(CASE, tmp_path / "source", model_args={**CASE.arguments, "num_heads": 3})
    assert "hidden_size=64 must be divisible by num_attention_heads=3" in refuses("convert", source, out)


@pytest.mark.parametrize("argument", [{"qk_norm": True}, {"global_pool": "map"}, {"frobnicate": 3}])
def test_arguments_that_ours_does_not_have(tmp_path, out, refuses, argument):
    source = write_timm(CASE, tmp_path / "source", model_args={**CASE.arguments, **argument})
    assert next(iter(argument)) in refuses("convert", source, out)


@pytest.mark.parametrize(
    ("argument", "kind"),
    [
        ({"mlp_ratio": "4"}, "a number"),
        ({"mlp_ratio": float("inf")}, "a number"),
        ({"embed_dim": 64.0}, "a whole number"),
        ({"depth": "3"}, "a whole number"),
        ({"img_size": [64, 64, 3]}, "a whole number or two of them"),
        ({"patch_size": None}, "a whole number or two of them"),
        ({"qkv_bias": "yes"}, "true or false"),
        ({"gaug": "false"}, "true or false"),
        ({"init_values": "1e-5"}, "a number or null"),
        ({"no_embed_class": 2}, "true or false"),
        ({"num_heads": [2]}, "int"),
        ({"act_layer": ["gelu"]}, "unknown activation"),
        ({"global_pool": ["avg"]}, "pools"),
        ({"class_token": None}, "true or false"),
        ({"norm_layer": {"a": []}}, "does not have"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_argument_of_a_wrong_type(tmp_path, out, refuses, argument, kind):
    source = write_timm(CASE, tmp_path / "source", model_args={**CASE.arguments, **argument})
    sentence = refuses("convert", source, out)
    assert next(iter(argument)) in sentence or "num_attention_heads" in sentence
    assert kind in sentence


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ({"mean": "0.5 0.5 0.5"}, "a list of numbers"),
        ({"std": [0.5, "0.5", 0.5]}, "a list of numbers"),
        ({"crop_pct": "0.9"}, "a number"),
        ({"interpolation": 3}, "text"),
        ({"input_size": 224}, "three whole numbers"),
        ({"img_size": "224"}, "a whole number or two of them"),
        ({"num_classes": "7"}, "a whole number"),
        ({"model": 5}, "text"),
        ({"model_kwargs": ["a"]}, "a mapping"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_setting_of_a_wrong_type(tmp_path, out, refuses, setting, kind):
    source = write_run(CASE, tmp_path / "run", **setting)
    (name, value), *_ = setting.items()
    assert refuses("convert", source, out).endswith(f"args.yaml gives {name}={value!r}, which is not {kind}.")


def test_images_of_no_size_and_unknown_interpolation(tmp_path, out, refuses):
    for setting in ({"img_size": -5}, {"input_size": [3, 0, 64]}):
        source = write_run(CASE, tmp_path / "run", **setting)
        assert "pixels, which must be positive" in refuses("convert", source, out)
    source = write_run(CASE, tmp_path / "run", interpolation="cubist")
    assert "unknown interpolation='cubist'" in refuses("convert", source, out)


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ({"model_args": ["a"]}, "a mapping"),
        ({"pretrained_cfg": "a"}, "a mapping"),
        ({"architecture": 5}, "text"),
        ({"num_classes": "7"}, "a whole number"),
        ({"label_names": "abcdefg"}, "a list or a mapping"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_entry_of_a_wrong_type(tmp_path, out, refuses, entry, kind):
    source = write_timm(CASE, tmp_path / "source", **entry)
    (name, value), *_ = entry.items()
    assert refuses("convert", source, out).endswith(f"config.json gives {name}={value!r}, which is not {kind}.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensor_that_is_not_finite_is_named(tmp_path, out, refuses, value):
    source = write_mixin(CASE, tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["blocks.1.norm2.bias"][3] = value
    save_file(state, source / "model.safetensors")
    sentence = "The tensor blocks.1.norm2.bias holds numbers that are not finite."
    assert refuses("convert", source, out) == sentence


def test_no_moving_average(tmp_path, out, refuses):
    source = write_mixin(CASE, tmp_path / "source")
    assert "no state_dict_ema" in refuses("convert", source, out, "--ema")


def test_sources_that_are_nothing(tmp_path, out, refuses):
    assert "There is no file or folder" in refuses("convert", tmp_path / "nowhere", out)
    assert "no such Hub repository" in refuses("convert", "nobody/nothing", out)
    (tmp_path / "empty").mkdir()
    assert "neither config.json" in refuses("convert", tmp_path / "empty", out)
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"architecture": "locatvit_tiny"}))
    assert "no weights" in refuses("convert", tmp_path / "empty", out)
    (tmp_path / "empty" / "config.json").write_text("{")
    (tmp_path / "empty" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert "is not JSON" in refuses("convert", tmp_path / "empty", out)


def test_existing_destination_is_left_alone(tmp_path, refuses):
    source = write_mixin(CASE, tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "--overwrite" in refuses("convert", source, tmp_path / "out")
    assert "is not a folder" in refuses("convert", source, tmp_path / "out" / "mine.txt")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_failure_at_the_end_leaves_the_old_folder(tmp_path, refuses, monkeypatch):
    source = write_mixin(CASE, tmp_path / "source")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.txt").write_text("mine")

    def fail(*arguments):
        raise conversion.ConversionError("It differs.")

    monkeypatch.setattr(conversion, "verify", fail)
    for name in ("old", "new"):
        assert refuses("convert", source, tmp_path / name, "--overwrite") == "It differs."
    assert [file.name for file in (tmp_path / "old").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "new").exists() and list(tmp_path.glob(".*")) == []


def test_verification_notices_a_difference(tmp_path, refuses, monkeypatch):
    source = write_mixin(CASE, tmp_path / "source")
    build = conversion.build_model

    def build_and_spoil(*arguments):
        model = build(*arguments)
        save = model.save_pretrained

        def save_then_change(folder):
            save(folder)
            with torch.no_grad():
                model.classifier.bias += 1.0

        model.save_pretrained = save_then_change
        return model

    monkeypatch.setattr(conversion, "build_model", build_and_spoil)
    assert "does not give the output of its source" in refuses("convert", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_killed_in_the_middle(tmp_path, locatvit):
    source = write_mixin(CASE, tmp_path / "source")
    (tmp_path / ".out.notahexa.partial").mkdir()
    (tmp_path / ".other.01234567.partial").mkdir()
    script = (
        "import os, signal, sys; from pathlib import Path; from locatvit_hf.conversion import convert as c\n"
        "c.verify = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.convert(sys.argv[1], Path(sys.argv[2]))"
    )
    root = Path(__file__).resolve().parents[2]
    process = run_program("-c", script, source, tmp_path / "out", folder=root)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob(".out.*"))) == 2
    assert locatvit("convert", source, tmp_path / "out").exit_code == 0
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".other.01234567.partial", ".out.notahexa.partial"]
