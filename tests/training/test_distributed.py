"""Runs of several processes over gloo: they equal runs of one, and nothing is lost when they are killed."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command as validate_launch
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

from tests.training.conftest import SMALL_MODEL
from tests.training.programs import ROOT, spoil_third_step_of_second_process, train
from training.checkpointing import list_checkpoints

LAUNCH = ROOT / "training" / "launch"


@pytest.fixture
def settings(squares) -> dict:
    """Nothing acts on the batch of a process as a whole: no mixing, no drop path, no dropout."""
    return {
        "dataset": str(squares),
        "model": SMALL_MODEL,
        "length": "8 steps",
        "warmup": "2 steps",
        "batch_size": 32,
        "mixup": 0.0,
        "cutmix": 0.0,
        "evaluate_every": "4 steps",
        "checkpoint_every": "3 steps",
        "log_every": 1,
        "ema_decay": 0.9,
    }


def outcome(output: Path) -> tuple[list[float], dict, dict[str, torch.Tensor]]:
    """Losses of all updates, final metrics, exported weights."""
    results = json.loads((output / "all_results.json").read_text())
    losses = [point["loss"] for point in results["train_curve"]]
    return losses, results["metrics"], load_file(output / "model" / "model.safetensors")


def kill_midway(processes, output: Path, checkpoints: int = 1) -> None:
    """kill -9 all processes once there are checkpoints; the run must not have ended."""
    while processes.running and len(list_checkpoints(output / "checkpoints")) < checkpoints:
        time.sleep(0.01)
    processes.send(signal.SIGKILL)
    assert set(processes.wait()) == {-signal.SIGKILL}
    assert not (output / "all_results.json").exists()


def test_processes_and_accumulation_share_a_batch(settings, tmp_path):
    """32 images at once, 16 in each of two processes, and 4 times 8: the same losses, metrics and weights."""
    runs = {
        "whole": train({**settings, "output_dir": str(tmp_path / "whole")}),
        "two": train({**settings, "output_dir": str(tmp_path / "two")}, num_processes=2),
        "accumulated": train(
            {**settings, "output_dir": str(tmp_path / "accumulated"), "gradient_accumulation_steps": 4}
        ),
        "sharded": train({**settings, "output_dir": str(tmp_path / "sharded")}, num_processes=2, sharded=True),
    }
    for name, processes in runs.items():
        assert set(processes.wait()) == {0}, name
    losses, metrics, weights = outcome(tmp_path / "whole")
    assert len(losses) == 8 and losses[0] != losses[-1]
    for name in ("two", "accumulated", "sharded"):
        other_losses, other_metrics, other_weights = outcome(tmp_path / name)
        assert other_losses == pytest.approx(losses, abs=1e-5)
        assert other_metrics == metrics
        assert other_weights.keys() == weights.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(other_weights[key], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sharded", [False, True], ids=["copied", "sharded"])
def test_all_processes_end_where_the_gradient_of_one_is_spoiled(settings, tmp_path, sharded):
    output = tmp_path / "run"
    settings = {**settings, "output_dir": str(output), "checkpoint_every": "1 steps"}
    processes = train(settings, num_processes=2, sharded=sharded, fault=spoil_third_step_of_second_process)
    assert processes.wait() == [1, 1]
    assert [path.name for path in list_checkpoints(output / "checkpoints")] == ["step_00000001", "step_00000002"]
    assert not (output / "all_results.json").exists()
    files = sorted(path.name for path in (output / "not_finite").iterdir())
    assert files == ["update_3_process_0.pt", "update_3_process_1.pt"]
    losses = [torch.load(output / "not_finite" / name, weights_only=False)["losses"]["loss"] for name in files]
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["copied", "sharded"])
def test_killed_processes_continue_bit_identically(pretrain_settings, tmp_path, sharded):
    """With averaged weights, mixing, drop path, dropout and workers, killed in the middle of an epoch."""
    settings = {**pretrain_settings, "num_workers": 1, "checkpoint_every": "2 steps", "length": "2 epochs"}
    expected, output = tmp_path / "expected", tmp_path / "killed"
    assert set(train({**settings, "output_dir": str(expected)}, 2, sharded).wait()) == {0}
    settings["output_dir"] = str(output)
    kill_midway(train(settings, 2, sharded), output)
    assert set(train(settings, 2, sharded).wait()) == {0}
    (losses, metrics, weights), (other_losses, other_metrics, other_weights) = map(outcome, (expected, output))
    assert losses == other_losses and metrics == other_metrics
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_configurations_are_valid(file):
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "training/pretrain.py"])
    arguments, defaults, _ = validate_launch(arguments)
    assert (arguments.use_fsdp, arguments.use_deepspeed) == ("fsdp" in file.stem, "deepspeed" in file.stem)
    assert defaults.mixed_precision == "no"
    if arguments.use_fsdp:
        assert arguments.fsdp_version == 2
