"""`locatvit info` on folders: what it says of a good one, and that it names everything else before it runs."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from typer.testing import CliRunner

from locatvit_hf import (
    LocAtSwinConfig,
    LocAtViTBackbone,
    LocAtViTConfig,
    LocAtViTForImageClassification,
    PaCaViTConfig,
    __version__,
)
from locatvit_hf import LocAtSwinForImageClassification as Swin
from locatvit_hf import PaCaViTForImageClassification as PaCa
from locatvit_hf.cli import app
from locatvit_hf.hub.audit import Inspection, inspect
from locatvit_hf.hub.config import RepositoryError, build_config
from locatvit_hf.hub.repository import build_repository, write_checksums
from tests.factories import VIT
from training.engine.export import save_model

TINY = {**VIT, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as `locatvit push` builds it, without a card."""
    saved, folder = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("published")
    LocAtViTForImageClassification(LocAtViTConfig(**TINY, num_labels=3)).save_pretrained(saved)
    build_repository(saved, folder)
    write_checksums(folder)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def verdicts(found: Inspection) -> dict[str, str]:
    return {file.path: file.verdict for file in found.files}


def test_a_published_folder_is_as_it_should_be(folder: Path) -> None:
    found = inspect(str(folder))
    assert not found.alarms and not found.notes
    assert (found.family, found.architecture, found.labels) == ("locatvit", "LocAtViTForImageClassification", 3)
    numbers = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert found.parameters == found.expected_parameters == numbers
    assert found.dtypes == {"F32": numbers}
    assert {verdict for path, verdict in verdicts(found).items() if path.endswith(".py")} == {
        f"identical to locatvit-hf {__version__}"
    }
    assert verdicts(found)["model.safetensors"] == "weights, as recorded"
    lines = {path.name: len(path.read_text().splitlines()) for path in folder.glob("*.py")}
    assert found.code() == (len(lines), sum(lines.values()))
    printed = " ".join(CliRunner().invoke(app, ["info", str(folder)]).output.split())
    kernel = lines.pop("triton_locat.py")
    assert (
        f"{sum(lines.values()) + kernel:,} lines; without the GPU kernel {len(lines)} files, {sum(lines.values()):,}"
        in printed
    )
    assert subprocess.run(["sha256sum", "--check", "--quiet", "CHECKSUMS.sha256"], cwd=folder).returncode == 0


@pytest.mark.parametrize(
    ("model_class", "config", "gmacs"),
    [
        (LocAtViTForImageClassification, LocAtViTConfig.from_preset("tiny", num_labels=1000), 1.255),
        (Swin, LocAtSwinConfig.from_preset("tiny", num_labels=1000), 4.499),
        (PaCa, PaCaViTConfig.from_preset("tiny", num_labels=1000), 3.219),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_cost_is_that_of_the_readme(model_class: type, config: object, gmacs: float, tmp_path: Path) -> None:
    config.architectures = [model_class.__name__]
    config.save_pretrained(tmp_path)
    found = inspect(str(tmp_path))
    assert round(found.gmacs, 3) == gmacs
    assert found.parameters == 0 and "There are no weights in safetensors (model.safetensors)." in found.notes


def change_code(folder: Path, mark: Path) -> None:
    code = folder / "locat.py"
    code.write_text(f"open({str(mark)!r}, 'w')\n" + code.read_text())


def add_code(folder: Path, mark: Path) -> None:
    (folder / "helper.py").write_text(f"open({str(mark)!r}, 'w')\n")


def remove_code(folder: Path, mark: Path) -> None:
    (folder / "locat.py").unlink()


def change_weights(folder: Path, mark: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors")


def add_weights(folder: Path, mark: Path) -> None:
    save_file({"extra": torch.zeros(1)}, folder / "extra.safetensors")


def pickle_weights(folder: Path, mark: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return open, (str(mark), "w")

    torch.save(Payload(), folder / "pytorch_model.bin")


def edit_json(name: str, **settings: object) -> Callable[[Path, Path], None]:
    def edit(folder: Path, mark: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **settings}))

    return edit


def load_other_weights(folder: Path, mark: Path) -> None:
    add_weights(folder, mark)
    edit_json("config.json", transformers_weights="extra.safetensors")(folder, mark)


def write(name: str, content: str) -> Callable[[Path, Path], None]:
    def write_file(folder: Path, mark: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return write_file


@pytest.mark.parametrize(
    ("spoil", "alarm"),
    [
        (change_code, f"locat.py differs from that of locatvit-hf {__version__}."),
        (add_code, "helper.py is code that is not of this package."),
        (change_weights, "model.safetensors is not what was published: its SHA-256 differs from CHECKSUMS.sha256."),
        (add_weights, "extra.safetensors is not among the files that CHECKSUMS.sha256 records."),
        (pickle_weights, "pytorch_model.bin is a pickle, which can run code when it is loaded."),
        (remove_code, "locat.py is recorded in CHECKSUMS.sha256 and is not there."),
        (
            edit_json("config.json", auto_map={"AutoModel": "other/place--modeling_locatvit.LocAtViTModel"}),
            "config.json makes AutoModel load other/place--modeling_locatvit.LocAtViTModel, which is not a class of "
            "this package.",
        ),
        (
            edit_json("preprocessor_config.json", auto_map={"AutoImageProcessor": "helper.Evil"}),
            "preprocessor_config.json makes AutoImageProcessor load helper.Evil, which is not a class of this package.",
        ),
        (
            write("processor_config.json", '{"image_processor": {"auto_map": {"AutoImageProcessor": "x--y.P"}}}'),
            "processor_config.json makes transformers load something else than what is shown here.",
        ),
        (
            write("adapter_config.json", '{"base_model_name_or_path": "other/model"}'),
            "adapter_config.json makes transformers load something else than what is shown here.",
        ),
        (
            write("video_processor.json", '{"deep": [{"auto_map": {"AutoImageProcessor": "x--y.P"}}]}'),
            "video_processor.json sets auto_map, which can make transformers run foreign code.",
        ),
        (write("locat.so", "ELF"), "locat.so is compiled code."),
        (
            edit_json("config.json", attn_implementation="other/kernel:attend"),
            "config.json sets attn_implementation, which can make transformers run code from elsewhere.",
        ),
        (
            load_other_weights,
            "config.json makes transformers load extra.safetensors in place of model.safetensors.",
        ),
        (
            edit_json("config.json", quantization_config={"quant_method": "bitsandbytes"}),
            "config.json sets quantization_config, which is no setting of LocAtViTConfig: transformers may act on it.",
        ),
        (
            edit_json("config.json", use_kernels=True),
            "config.json sets use_kernels, which is no setting of LocAtViTConfig: transformers may act on it.",
        ),
        (
            edit_json("preprocessor_config.json", fetch="x"),
            "preprocessor_config.json sets fetch, which is no setting of LocAtViTImageProcessor: transformers may act "
            "on it.",
        ),
        (
            write("pytorch_model.bin.index.json", "{}"),
            "pytorch_model.bin.index.json makes transformers load pickles, which can run code.",
        ),
        (write(".hidden/helper.py", ""), ".hidden/helper.py is code that is not of this package."),
    ],
)  # fmt: skip
def test_what_was_changed_is_named_before_it_runs(
    spoil: Callable[[Path, Path], None], alarm: str, folder: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    spoil(folder, mark)
    run = CliRunner().invoke(app, ["info", str(folder), "--json"])
    assert run.exit_code == 1, run.output
    assert alarm in json.loads(run.stdout)["alarms"]
    assert not mark.exists()


def test_weights_are_looked_for_where_transformers_does(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    (folder / "CHECKSUMS.sha256").unlink()
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    save_file({"stray": torch.zeros(3)}, folder / "c.safetensors")
    places = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = inspect(str(folder))
    assert found.parameters == found.expected_parameters and not found.alarms
    assert "c.safetensors holds weights that transformers does not load." in found.notes
    for places, problem in (
        ({"x": "../a.safetensors"}, "names the weights ../a.safetensors, which are not there."),
        ({"x": 3}, "is damaged: it names no file for each tensor."),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        with pytest.raises(RepositoryError, match=re.escape(problem)):
            inspect(str(folder))


def test_hidden_folders_and_links_are_named(folder: Path) -> None:
    for name in (".git", ".cache"):
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "deep" / "file").touch()
    (folder / "elsewhere").symlink_to(folder.parent, target_is_directory=True)
    notes = inspect(str(folder)).notes
    assert "The hidden folder .git holds 1 files, which are not looked at." in notes
    assert "The hidden folder .cache holds 1 files, which are not looked at." in notes
    assert "elsewhere is a link to a folder, which is not looked at." in notes


def lie(**changes: object) -> Callable[[dict, bytes], bytes]:
    """A safetensors file whose header says something else of the first tensor."""

    def write_header(header: dict, data: bytes) -> bytes:
        first = min((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        header[first] |= changes
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    return write_header


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lie(shape=[1 << 40]), "bytes, not those of its shape"),
        (lie(data_offsets=[-8, 100]), "does not follow the one before it"),
        (lie(data_offsets=[0, 1 << 50]), "bytes, not those of its shape"),
        (lie(data_offsets=[64, 0]), "does not follow the one before it"),
        (lie(shape=[-1, -4]), "does not follow the one before it"),
        (lie(dtype="WIDE"), "its header is none"),
        (lambda header, data: lie()(header, data[:-10]), "bytes of tensors, and its header says"),
        (lambda header, data: lie()(header, data + b"more"), "bytes of tensors, and its header says"),
        (lambda header, data: b"", "it has no header"),
        (lambda header, data: (1 << 62).to_bytes(8, "little") + data, "it has no header"),
        (lambda header, data: (2).to_bytes(8, "little") + b"[]" + data, "its header is none"),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused(spoil: Callable, problem: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    weights.write_bytes(spoil(json.loads(content[8 : 8 + length]), content[8 + length :]))
    with pytest.raises(RepositoryError, match=r"model.safetensors of .* is damaged: ") as caught:
        inspect(str(folder))
    assert problem in str(caught.value)


AUTO = {
    "AutoConfig": AutoConfig,
    "AutoModel": AutoModel,
    "AutoModelForImageClassification": AutoModelForImageClassification,
    "AutoModelForSemanticSegmentation": AutoModelForSemanticSegmentation,
    "AutoBackbone": LocAtViTBackbone,  # the library's Auto class asks the Hub for the names of folders
}


def test_code_of_another_repository_does_not_go_on_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Whatever its files name for each Auto class: what is loaded and saved again names our own classes."""
    foreign = dict.fromkeys([*AUTO, "AutoModelForObjectDetection", "AutoProcessor"], "other/place--helper.Evil")
    for file in ("config.json", "preprocessor_config.json"):
        edit_json(file, auto_map={**foreign, "AutoImageProcessor": "other/place--helper.Evil"})(folder, tmp_path)
    loaded = {name: auto.from_pretrained(str(folder)) for name, auto in AUTO.items()}
    loaded["AutoImageProcessor"] = AutoImageProcessor.from_pretrained(str(folder))
    for name, saver in loaded.items():
        saver.save_pretrained(tmp_path / name)
        saved = [path for path in (tmp_path / name).glob("*.json") if "Evil" in path.read_text()]
        assert list((tmp_path / name).glob("*.json")) and not saved, name
    save_model(tmp_path / "export", loaded["AutoModelForImageClassification"], loaded["AutoImageProcessor"])
    (tmp_path / "repository").mkdir()
    build_repository(folder, tmp_path / "repository")
    for place in ("export", "repository"):
        assert not [path for path in (tmp_path / place).glob("*.json") if "Evil" in path.read_text()]


def test_a_changed_file_is_shown_and_cannot_steer_the_terminal(folder: Path, tmp_path: Path) -> None:
    change_code(folder, tmp_path / "ran")
    code = folder / "locat.py"
    code.write_text(code.read_text() + "# \x1b[2K hidden \u202e reversed [red]\n")
    run = CliRunner().invoke(app, ["info", str(folder)])
    assert "CHANGED against locatvit-hf" in run.output
    assert "\n+open(" in run.output
    assert "+# \\x1b[2K hidden \\u202e reversed [red]\n" in run.output
    assert run.exit_code == 1 and not (tmp_path / "ran").exists()


def test_a_file_that_nobody_expects_is_a_note(folder: Path) -> None:
    (folder / "run.sh").write_text("true")
    (folder / "figure.png").write_text("")
    found = inspect(str(folder))
    assert found.notes == ["run.sh is a file that nobody expects in a checkpoint."]
    assert not found.alarms


def test_without_checksums_it_says_what_it_cannot_know(folder: Path) -> None:
    (folder / "CHECKSUMS.sha256").unlink()
    assert inspect(str(folder)).notes == [
        "It has no CHECKSUMS.sha256, so nothing says whether its weights are those that were published."
    ]


def test_weights_of_another_size_are_noted(folder: Path) -> None:
    save_file({"weight": torch.zeros(7, dtype=torch.bfloat16)}, folder / "model.safetensors")
    found = inspect(str(folder))
    assert found.dtypes == {"BF16": 7}
    assert f"The weights hold 7 numbers, and the model needs {found.expected_parameters:,}." in found.notes


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object."),
        ('{"model_type": "vit"}', "is a vit, not one of locatvit, locatswin, locatjumbo, pacavit."),
        ('{"model_type": "locatvit", "hidden_size": "wide"}', "is not valid: "),
        ('{"model_type": "locatvit", "architectures": ["Evil"]}', "names no model class for its settings, but Evil."),
        ('{"model_type": "locatvit", "architectures": ["pipeline"]}', "names no model class for its settings, but pi"),
        ('{"model_type": "locatvit", "architectures": ["PaCaViTModel"]}', "names no model class for its settings, but"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_a_sentence(content: str, problem: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    run = CliRunner().invoke(app, ["info", str(folder)])
    assert run.exit_code == 1
    assert problem in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr


def test_damaged_weights_and_missing_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RepositoryError, match=r"model.safetensors of .* is damaged: it has no header"):
        inspect(str(folder))
    with pytest.raises(RepositoryError, match=r"is not a folder with a config.json"):
        inspect(str(tmp_path))


def test_a_configuration_is_built_without_what_names_code() -> None:
    config = build_config(
        {"model_type": "locatvit", "attn_implementation": "other/kernel", "auto_map": {"A": "b.C"}}, "x"
    )
    assert config._attn_implementation is None
    assert config.auto_map["AutoModel"] == "modeling_locatvit.LocAtViTModel"
