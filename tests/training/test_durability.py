"""Runs survive power failures, signals, damaged files, planted code and each other."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locatvit_hf.utils.io import claim_folder
from tests.power_loss import recorded, write_files
from training.engine.arguments import build_arguments
from training.engine.checkpoints import MANIFEST, find_damage, list_checkpoints, write_manifest
from training.engine.loop import TrainingLoop
from training.pretrain import PretrainArguments
from training.pretrain import main as pretrain


@pytest.fixture(scope="module")
def settings(pretrain_settings) -> dict:
    return {**pretrain_settings, "length": "6 steps", "warmup": "1 steps", "evaluate_every": "3 steps"}


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("durability") / "run"
    train(settings, output)
    return output


def train(settings: dict, output: Path) -> dict:
    return pretrain(build_arguments(PretrainArguments, {**settings, "output_dir": str(output)}))


def unfinished(finished: Path, output: Path) -> Path:
    """A copy of a run that was killed after its last checkpoint but one; returns that checkpoint."""
    shutil.copytree(finished, output)
    *_, newest, last = list_checkpoints(output / "checkpoints")
    shutil.rmtree(last)
    (output / "all_results.json").unlink()
    return newest


def assert_same_weights(output: Path, expected: Path) -> None:
    """Bit for bit: the same computation, on one machine."""
    last = [list_checkpoints(folder / "checkpoints")[-1] for folder in (output, expected)]
    assert last[0].name == last[1].name
    for files in [[path / f"{name}.safetensors" for path in last] for name in ("model", "average")]:
        mine, theirs = map(load_file, files)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def power_failures(settings: dict, folder: Path) -> dict[str, list[dict[str, bytes]]]:
    """What a power failure leaves of a run of six steps, at each moment; checked as far as files go."""
    disk_folder = folder / "disk"
    disk_folder.mkdir()
    with recorded(disk_folder) as disk:
        train({**settings, "keep_checkpoints": 1}, disk_folder / "run")
    for kind, moments in disk.left.items():
        best = 0
        for number, files in enumerate(moments):
            write_files(files, folder / kind / str(number))
            run_folder = folder / kind / str(number) / "run"
            whole = [path for path in list_checkpoints(run_folder / "checkpoints") if find_damage(path) is None]
            step = max([int(path.name.removeprefix("step_")) for path in whole], default=0)
            assert step >= best, (kind, number)  # a checkpoint goes after a newer one has reached the disk
            best = step
            weights = run_folder / "model" / "model.safetensors"
            assert not weights.exists() or load_file(weights)
        assert best == 6 and len(moments) >= 12
    return disk.left


def test_a_power_failure_leaves_a_usable_checkpoint(settings, finished, tmp_path):
    left = power_failures(settings, tmp_path)
    for kind, moments in left.items():
        output = tmp_path / kind / str(len(moments) // 2) / "run"
        train({**settings, "keep_checkpoints": 1}, output)
        assert_same_weights(output, finished)


@pytest.mark.slow
def test_runs_go_on_after_twenty_power_failures(settings, finished, tmp_path):
    for kind, moments in power_failures(settings, tmp_path).items():
        for number in range(1, len(moments), len(moments) // 10):
            output = tmp_path / kind / str(number) / "run"
            train({**settings, "keep_checkpoints": 1}, output)
            assert_same_weights(output, finished)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "weights cut": (lambda path: os.truncate(path / "model.safetensors", 100), "model.safetensors has 100 bytes"),
    "weights flipped": (lambda path: flip_a_bit(path / "model.safetensors"), "model.safetensors has another content"),
    "optimizer flipped": (lambda path: flip_a_bit(path / "optimizer.bin"), "optimizer.bin has another content"),
    "average gone": (lambda path: (path / "average.safetensors").unlink(), "average.safetensors is missing"),
    "settings empty": (lambda path: os.truncate(path / "arguments.yaml", 0), "arguments.yaml has 0 bytes"),
    "manifest empty": (lambda path: os.truncate(path / MANIFEST, 0), "its manifest.json cannot be read"),
    "manifest gone": (lambda path: (path / MANIFEST).unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(settings, finished, tmp_path, damage, capsys):
    output = tmp_path / "run"
    newest = unfinished(finished, output)
    spoil, reason = DAMAGES[damage]
    spoil(newest)
    train(settings, output)
    lines = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert len(lines) == 1 and reason in lines[0] and f"it is now damaged_{newest.name}" in lines[0]
    assert newest.with_name(f"damaged_{newest.name}").is_dir()
    assert_same_weights(output, finished)


def test_a_checkpoint_of_an_earlier_version_is_refused(settings, finished, tmp_path):
    newest = unfinished(finished, tmp_path / "run")
    (newest / MANIFEST).unlink()
    (newest / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps({"step": 1}))
    with pytest.raises(ValueError, match="written by an earlier version, in files that could run code"):
        train(settings, tmp_path / "run")


class Payload:
    """Runs code where a pickle of it is loaded."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin"])
@pytest.mark.parametrize("pickled", ["plainly", "by torch"])
def test_nothing_in_a_run_folder_is_executed(settings, finished, tmp_path, file, pickled):
    newest, proof = unfinished(finished, tmp_path / "run"), tmp_path / "executed"
    if pickled == "plainly":
        (newest / file).write_bytes(pickle.dumps(Payload(proof)))
    else:
        torch.save(Payload(proof), newest / file)
    write_manifest(newest)
    if file in ("scheduler.bin", "random_states_0.pkl"):  # nothing reads it; no step depends on it
        train(settings, tmp_path / "run")
    else:
        with pytest.raises(ValueError, match="Cannot continue from the checkpoint") as caught:
            train(settings, tmp_path / "run")
        assert "\n" not in str(caught.value)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("[1]", "the state of the run has other entries"),
        ('{"step": 1}', "the state of the run has other entries"),
        ({"step": "3"}, "the entry step of the state of the run is '3'"),
        ({"train_curve": {}}, "the entry train_curve of the state of the run is {}"),
    ],
)
def test_the_state_of_a_run_is_checked(settings, finished, tmp_path, state, reason):
    newest = unfinished(finished, tmp_path / "run")
    written = json.loads((newest / "run_state.json").read_text())
    (newest / "run_state.json").write_text(state if isinstance(state, str) else json.dumps({**written, **state}))
    write_manifest(newest)
    with pytest.raises(ValueError, match=f"Cannot continue from the checkpoint .*{reason}"):
        train(settings, tmp_path / "run")


def with_workers(monkeypatch, after_step, then) -> None:
    """`then` is called with the numbers of the processes that load data, when a step of a run was done."""
    update = TrainingLoop.update

    def updated(self, *arguments, **options):
        update(self, *arguments, **options)
        if self.state.step == after_step:
            then([child.pid for child in multiprocessing.active_children()])

    monkeypatch.setattr(TrainingLoop, "update", updated)


def test_data_workers_outlive_the_signals_of_a_scheduler(settings, finished, tmp_path, monkeypatch):
    """A scheduler signals all processes of a run; only the one that saves acts on it."""

    def signal_all(workers: list[int]) -> None:
        assert len(workers) == 2
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            for worker in (*workers, os.getpid()) if number == signal.SIGTERM else workers:
                os.kill(worker, number)

    with_workers(monkeypatch, 3, signal_all)
    with pytest.raises(SystemExit) as ended:
        train({**settings, "num_workers": 2}, tmp_path / "run")
    assert ended.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    train({**settings, "num_workers": 2}, tmp_path / "run")
    assert_same_weights(tmp_path / "run", finished)


def test_a_killed_data_worker_ends_the_run_with_a_checkpoint(settings, finished, tmp_path, monkeypatch):
    seldom = {**settings, "num_workers": 1, "checkpoint_every": "6 steps", "evaluate_every": "6 steps"}

    def kill(workers: list[int]) -> None:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)

    with_workers(monkeypatch, 3, kill)
    with pytest.raises(
        ValueError,
        match=r"^A process that loads data was ended from outside\. The same command continues after step \d\.",
    ):
        train(seldom, tmp_path / "run")
    monkeypatch.undo()
    (kept,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert int(kept.name.removeprefix("step_")) >= 2
    train(seldom, tmp_path / "run")
    assert_same_weights(tmp_path / "run", finished)


def hold(folder: Path, ready, end) -> None:
    with claim_folder(folder, print):
        ready.set()
        end.wait()


def test_one_run_writes_a_folder(settings, finished, tmp_path):
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "run", ready, end))
    holder.start()
    ready.wait()
    sentence = f"run is being written by process {holder.pid} on {socket.gethostname()}: wait until it ends"
    with pytest.raises(ValueError, match=sentence):
        train(settings, tmp_path / "run")
    holder.kill()  # what it held is free at once
    holder.join()
    train(settings, tmp_path / "run")
    assert_same_weights(tmp_path / "run", finished)


def test_a_model_that_is_gone_is_not_said_to_be_there(settings, finished, tmp_path, capsys):
    """It was exported before the run was stopped, and deleted before it went on."""
    unfinished(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match=r"the model that was exported at step 3 is not in .*/run/model any more"):
        train(settings, tmp_path / "run")
    assert "Model in" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["updates"] == 6


def test_overwrite_counts_once(settings, finished, tmp_path, monkeypatch, capsys):
    """The command that a scheduler repeats goes on with the run that it began."""
    shutil.copytree(finished, tmp_path / "run")
    again = {**settings, "overwrite": True}
    with_workers(monkeypatch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(again, tmp_path / "run")
    monkeypatch.undo()
    assert "the same command continues there" in capsys.readouterr().out
    results = train(again, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "begun with --overwrite and has not ended" in printed and "Continuing at step 4 of 6" in printed
    assert results["updates"] == 6
    assert_same_weights(tmp_path / "run", finished)
    train(again, tmp_path / "run")  # it has ended, so this begins anew
    assert "Continuing" not in capsys.readouterr().out
