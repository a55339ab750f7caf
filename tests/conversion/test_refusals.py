"""Bad input: one clear sentence, a non-zero exit code, and no folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from locatvit_hf.conversion import convert as conversion
from tests.conversion.layouts import run_settings, write_mixin, write_run, write_timm
from tests.golden import load_case

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
    assert "no args.yaml beside model_best.pth.tar" in refuses("convert", source, out)


def test_args_yaml_that_is_no_yaml(tmp_path, out, refuses):
    source = write_run(CASE, tmp_path / "run")
    (source / "args.yaml").write_text("model: [")
    assert "not valid YAML" in refuses("convert", source, out)
    (source / "args.yaml").write_text(yaml.dump(RunsCode("true")))
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
    assert "not valid JSON" in refuses("convert", tmp_path / "empty", out)


def test_existing_destination_is_left_alone(tmp_path, refuses):
    source = write_mixin(CASE, tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "--overwrite" in refuses("convert", source, tmp_path / "out")
    assert "is no folder" in refuses("convert", source, tmp_path / "out" / "mine.txt")
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


def test_killed_in_the_middle(tmp_path):
    source = write_mixin(CASE, tmp_path / "source")
    script = (
        "import os, signal, sys; from pathlib import Path; from locatvit_hf.conversion import convert as c\n"
        "c.verify = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.convert(sys.argv[1], Path(sys.argv[2]))"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.run([sys.executable, "-c", script, str(source), str(tmp_path / "out")], cwd=root)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
