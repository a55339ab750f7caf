"""What `locatvit push` builds, checks and refuses, without a Hub."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UperNetConfig, UperNetForSemanticSegmentation
from typer.testing import CliRunner

from locatvit_hf import LocAtViTConfig, LocAtViTForImageClassification, LocAtViTImageProcessor, PaCaViTConfig
from locatvit_hf.cli import app
from locatvit_hf.hub.card import Card, CardError, Training, dump_card, read_card
from locatvit_hf.hub.config import RepositoryError
from locatvit_hf.hub.hub_api import RemoteFile, Snapshot
from locatvit_hf.hub.push import assemble, compare
from locatvit_hf.hub.repository import LARGEST_DIFFERENCE, build_repository, verify_repository
from locatvit_hf.utils.io import sha256
from tests.factories import VIT
from tests.remote.conftest import CODE, PUBLISHED

TINY = {**VIT, "num_hidden_layers": 2}
CARD = Card(
    title="Tiny",
    datasets=["unknown"],
    weights_license="mit",
    training=Training(program="pretrain", version="0.1.0", updates=10, step=10, batch_size=4, processes=1),
)


OTHER_ARITHMETIC = """
Original = LocAtViTForImageClassification


class LocAtViTForImageClassification(Original):
    def forward(self, pixel_values, **kwargs):
        return super().forward(2 * pixel_values, **kwargs)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as people have it: another person's code, a stale map, no processor, and files of its training."""
    folder = tmp_path / "checkpoint"
    LocAtViTForImageClassification(LocAtViTConfig(**TINY, num_labels=3)).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "other/place--configuration_locatvit.LocAtViTConfig"}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "preprocessor_config.json").unlink()
    (folder / "locat.py").write_text("old = True\n")
    (folder / "mine.py").write_text("")
    torch.save({}, folder / "training_args.bin")
    (folder / "card.yaml").write_text(dump_card(CARD))
    return folder


def test_the_repository_holds_what_belongs_there_and_computes_the_same(folder: Path, tmp_path: Path) -> None:
    built, lines = tmp_path / "built", []
    built.mkdir()
    assemble(folder, built, "tester/tiny", "v1", lines.append)
    assert verify_repository(built) < LARGEST_DIFFERENCE
    names = {path.name for path in built.iterdir()}
    assert names == CODE["locatvit"] | PUBLISHED
    assert lines == [f"locat.py of {folder} is not that of the installed package, which is taken instead."]
    auto_map = json.loads((built / "config.json").read_text())["auto_map"]
    assert auto_map == LocAtViTConfig().auto_map
    processor = LocAtViTImageProcessor.from_pretrained(built)
    assert processor.auto_map == {"AutoImageProcessor": "image_processing_locatvit.LocAtViTImageProcessor"}
    assert 'from_pretrained("tester/tiny", revision="v1", trust_remote_code=True)' in (built / "README.md").read_text()
    assert read_card(folder) == CARD
    checked = subprocess.run(["sha256sum", "--check", "CHECKSUMS.sha256"], cwd=built, capture_output=True, text=True)
    assert checked.returncode == 0
    assert {line.split(":")[0] for line in checked.stdout.splitlines()} == names - {
        "CHECKSUMS.sha256", "README.md", "card.yaml",
    }  # fmt: skip

    with (built / "modeling_locatvit.py").open("a") as code:
        code.write(OTHER_ARITHMETIC)
    with pytest.raises(RepositoryError, match=r"does not compute what this package computes: its output differs by"):
        verify_repository(built)


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "model.safetensors")


def cut_off(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def without_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def with_a_field_to_fill(folder: Path) -> None:
    (folder / "card.yaml").write_text((folder / "card.yaml").read_text().replace("mit", "TODO"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            as_pickle,
            "The weights of .* are a pickle, pytorch_model.bin, which can run code on the machine that loads it",
        ),
        (without_a_tensor, "The weights lack 1 tensors of the model, such as "),
        (cut_off, "model.safetensors is missing, damaged or incomplete"),
        (without_a_shard, "model-00002-of-00002.safetensors is missing, damaged or incomplete"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights: there is no model.safetensors"),
        (
            lambda folder: (folder / "config.json").unlink(),
            "is not a checkpoint: it is not a folder with a config.json",
        ),
        (lambda folder: (folder / "card.yaml").unlink(), "has no card.yaml"),
        (with_a_field_to_fill, "the field weights_license is unfilled"),
    ],
)
def test_a_folder_that_is_not_fit_is_refused(
    spoil: Callable[[Path], None], message: str, folder: Path, tmp_path: Path
) -> None:
    spoil(folder)
    built = tmp_path / "built"
    built.mkdir()
    with pytest.raises((RepositoryError, CardError), match=message):
        assemble(folder, built, "tester/tiny")
        verify_repository(built)


def test_the_command_says_so_in_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for arguments, message in (
        ([str(folder), "tester/tiny"], "You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN."),
        (
            [str(folder / "no"), "tester/tiny", "--dry-run"],
            f"{folder}/no is not a checkpoint: it is not a folder with a",
        ),
        ([str(folder), "tester/tiny", "--pull-request", "--tag", "v1"], "--pull-request and --tag exclude each other"),
    ):
        run = CliRunner().invoke(app, ["push", *arguments])
        assert run.exit_code == 1
        assert run.stderr.startswith(message) and len(run.stderr.splitlines()) == 1, run.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tag", "v1"], "It would be refused: tester/tiny has a tag v1 already, at 1111111: choose another tag."),
        (["--tag", "v2"], None),
        (["--private"], "It would be refused: tester/tiny exists and is public"),
    ],
)
def test_a_dry_run_says_what_would_be_refused(
    options: list[str], message: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to somebody who is not logged in: tags of public repositories can be read by all."""
    there = SimpleNamespace(sha="2" * 40, private=False, siblings=[])
    tags = SimpleNamespace(tags=[SimpleNamespace(name="v1", target_commit="1" * 40)])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.model_info", lambda *_, **__: there)
    monkeypatch.setattr("huggingface_hub.list_repo_refs", lambda *_, **__: tags)
    monkeypatch.setattr("locatvit_hf.hub.repository.verify_repository", lambda built: 0.0)
    run = CliRunner().invoke(app, ["push", str(folder), "tester/tiny", "--dry-run", *options])
    assert "added" in run.stdout and "Nothing was uploaded." in run.stdout
    assert run.exit_code == (message is not None)
    assert run.stderr.splitlines()[-1].startswith(message) if message else "refused" not in run.stderr


def test_changes_are_told_apart_by_content_and_strangers_files_stay(tmp_path: Path) -> None:
    (tmp_path / "same.py").write_text("1")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "new.md").write_text("")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    blob = "56a6051ca2b02b04ef92d5150c9ef600403cb1de"  # `printf 1 | git hash-object --stdin`
    there = [
        RemoteFile("same.py", 1, blob, None),
        RemoteFile("other.json", 2, blob, None),
        RemoteFile("model.safetensors", 5, "", sha256(tmp_path / "model.safetensors")),
        *(RemoteFile(name, 1, blob, None) for name in ("old.py", "sub/old.py", "model.bin", "figure.png", "app.txt")),
        RemoteFile(".eval_results/old.yaml", 1, blob, None),
    ]
    changes = compare(tmp_path, Snapshot("tester/tiny", "0" * 40, False, {file.path: file for file in there}))
    assert changes.added == ["new.md"]
    assert changes.changed == ["other.json"]
    assert changes.unchanged == ["model.safetensors", "same.py"]
    assert changes.removed == [".eval_results/old.yaml", "model.bin", "old.py"]
    assert compare(tmp_path, None).added == ["model.safetensors", "new.md", "other.json", "same.py"]


@pytest.mark.slow
def test_a_segmenter_of_transformers_around_our_backbone_is_published_with_the_code_of_its_processor(
    tmp_path: Path,
) -> None:
    backbone = PaCaViTConfig(
        image_size=64, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
        num_clusters=[4, 4, 4, 0], out_indices=[1, 2, 3, 4],
    )  # fmt: skip
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32, num_labels=3)
    UperNetForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    (tmp_path / "built").mkdir()
    build_repository(tmp_path / "model", tmp_path / "built")
    assert sorted(path.name for path in (tmp_path / "built").glob("*.py")) == [
        "configuration_utils_locat.py",
        "image_processing_locatvit.py",
    ]
    assert verify_repository(tmp_path / "built") < LARGEST_DIFFERENCE
