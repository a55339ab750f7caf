"""Starting the programs the way a user does."""

import importlib
import multiprocessing
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from tests.processes import run_program
from training.engine.arguments import build_arguments

ROOT = Path(__file__).resolve().parents[2]


def command(program: str, settings: dict, *options: str) -> list[str]:
    """`-m training.PROGRAM --config RECIPE OPTIONS`, with the recipe written beside the output folder."""
    recipe = Path(settings["output_dir"]).with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(settings))
    return ["-m", f"training.{program}", "--config", str(recipe), *options]


def run(program: str, settings: dict, *options: str) -> subprocess.CompletedProcess:
    """Start and wait; the caller looks at `returncode`."""
    return run_program(*command(program, settings, *options), folder=ROOT)


def train(
    settings: dict,
    num_processes: int = 1,
    sharded: bool = False,
    program: str = "pretrain",
    fault: Callable[[int], None] | None = None,
) -> "Processes":
    """Start a program in processes that work together over gloo, as `accelerate launch` would.

    fault: called with the rank in every process before the program starts.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    if sharded:
        launch = yaml.safe_load((ROOT / "training" / "launch" / "fsdp2.yaml").read_text())["fsdp_config"]
        environment |= {name.upper(): str(value) for name, value in launch.items()} | {"ACCELERATE_USE_FSDP": "true"}
    return Processes(program, settings, num_processes, environment, fault)


class Processes:
    """Processes of one run, forked from a server that has imported the program once."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.pretrain", "training.segment"])

    def __init__(
        self,
        program: str,
        settings: dict,
        number: int,
        environment: dict[str, str],
        fault: Callable[[int], None] | None = None,
    ):
        self.processes = [
            self.context.Process(target=_work, args=(program, settings, {**environment, "RANK": str(rank)}, fault))
            for rank in range(number)
        ]
        for process in self.processes:
            process.start()

    def send(self, number: int) -> None:
        """A signal to all of them."""
        for process in self.processes:
            os.kill(process.pid, number)

    def wait(self) -> list[int]:
        """Their exit codes."""
        for process in self.processes:
            process.join(300)
        return [process.exitcode for process in self.processes]

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)


def spoiled(objective: Callable, calls: Callable[[int], bool]) -> Callable:
    """`classification_objective` whose loss stays the same, but has a gradient of nan in some of its calls (from 1)."""

    def spoiled_objective(*arguments):
        mix, criterion = objective(*arguments)
        count = 0

        def spoiled_criterion(logits, targets):
            nonlocal count
            count += 1
            loss = criterion(logits, targets)
            # The root of 0 is 0, and has an infinite slope there.
            return loss + (0 * logits.sum()).square().sqrt() if calls(count) else loss

        return mix, spoiled_criterion

    return spoiled_objective


def spoil_third_step_of_second_process(rank: int) -> None:
    """A fault for `train`."""
    module = importlib.import_module("training.tasks.classification")
    module.classification_objective = spoiled(
        module.classification_objective, lambda call: call == 3 if rank == 1 else False
    )


def _work(program: str, settings: dict, environment: dict[str, str], fault: Callable[[int], None] | None) -> None:
    if environment["WORLD_SIZE"] != "1":
        os.environ |= {**environment, "LOCAL_RANK": environment["RANK"], "LOCAL_WORLD_SIZE": environment["WORLD_SIZE"]}
    if fault is not None:
        fault(int(environment["RANK"]))
    module = importlib.import_module(f"training.{program}")
    module.main(build_arguments(getattr(module, f"{program.title()}Arguments"), settings))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
