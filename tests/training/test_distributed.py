"""Runs of several processes over gloo: they equal runs of one, and nothing is lost when they are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command as validate_launch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from safetensors.torch import load_file

from tests.training.conftest import PLAIN_DESCENT, SMALL_MODEL
from tests.training.programs import ROOT, spoil_third_step_of_second_process, train
from training.engine.checkpoints import list_checkpoints
from training.engine.distributed import create_processes

LAUNCH = ROOT / "training" / "launch"


@pytest.fixture
def settings(squares) -> dict:
    """Nothing acts on the batch of a process as a whole: no mixing, no drop path, no dropout."""
    return {
        "dataset": str(squares),
        "model": SMALL_MODEL,
        **PLAIN_DESCENT,
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
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "training.pretrain"])
    arguments, defaults, _ = validate_launch(arguments)
    assert (arguments.use_fsdp, arguments.use_deepspeed) == ("fsdp" in file.stem, "deepspeed" in file.stem)
    assert defaults.mixed_precision == "no"
    if arguments.use_fsdp:
        assert arguments.fsdp_version == 2
    # What `accelerate launch` starts several processes for; all the others get one, whatever num_processes says.
    assert arguments.use_fsdp or arguments.use_deepspeed or arguments.multi_gpu == (arguments.num_processes > 1)


@pytest.mark.parametrize(("options", "said"), [(["--num_processes", "2"], True), (["--num_processes", "1"], False)])
def test_one_process_instead_of_several_is_said(monkeypatch, capsys, options, said):
    """In the environment that `accelerate launch --cpu` makes."""
    arguments = launch_command_parser().parse_args(["--cpu", *options, "-m", "training.pretrain"])
    command, environment = prepare_simple_launcher_cmd_env(validate_launch(arguments)[0])
    assert command.count("training.pretrain") == 1
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    accelerator = create_processes()
    assert accelerator.num_processes == 1
    assert ("--config_file training/launch/several_cpus.yaml" in capsys.readouterr().out) == said


@pytest.mark.slow
def test_the_launch_file_for_cpus_starts_several_processes(settings, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**settings, "length": "2 steps", "warmup": "0 steps"}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "several_cpus.yaml")]
    launch += ["--main_process_port", "0", "-m", "training.pretrain", "--config", str(recipe)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    finished = subprocess.run([*launch, "--output_dir", str(tmp_path / "run")], **options)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["num_processes"] == 2


def test_slurm_gives_the_processes_the_cpus_of_the_job(tmp_path):
    """`srun` of SLURM 22.05 and later reads no --cpus-per-task of the job; an interrupted run is queued again."""
    for name, text in (
        ("srun", 'echo "cpus ${SRUN_CPUS_PER_TASK:-none}"; mkdir -p "$RUN"; touch "$RUN/interrupted"; exit 143'),
        ("scontrol", 'echo "$@" >> "$RUN-scontrol"; echo node1'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(tmp_path / "run")}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    command = ["bash", str(LAUNCH / "slurm.sh"), "-m", "training.pretrain", "--output_dir", str(tmp_path / "run")]
    for cpus in ("24", None):
        given = environment | ({"SLURM_CPUS_PER_TASK": cpus} if cpus else {})
        finished = subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)
        assert (finished.returncode, finished.stderr) == (143, "")
        assert finished.stdout.splitlines()[0] == f"cpus {cpus or 'none'}"
    assert (tmp_path / "run-scontrol").read_text().count("requeue 7") == 2
