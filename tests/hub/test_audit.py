"""`locatvit info` on folders: what it says of a good one, and that it names everything else before it runs."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from locatvit_hf import LocAtSwinConfig, LocAtViTConfig, LocAtViTForImageClassification, PaCaViTConfig, __version__
from locatvit_hf import LocAtSwinForImageClassification as Swin
from locatvit_hf import PaCaViTForImageClassification as PaCa
from locatvit_hf.cli import app
from locatvit_hf.hub.audit import Inspection, inspect
from locatvit_hf.hub.config import RepositoryError, build_config
from locatvit_hf.hub.repository import build_repository, write_checksums
from tests.factories import VIT

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


def write(name: str, content: str) -> Callable[[Path, Path], None]:
    return lambda folder, mark: (folder / name).write_text(content)


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
