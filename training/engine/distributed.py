"""The processes of a run: how many were started, and what they work on together."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import get_int_from_env

from training.engine.arguments import console
from training.engine.trainer_names import WORLD_SIZES


def create_processes(**options: Any) -> Accelerator:
    """The accelerator of all processes that were started, on CPU where there is nothing faster.

    Says so where `accelerate launch` was asked for several processes and started one, as it does with `--cpu`.

    Args:
        options: Of `Accelerator`.

    Raises:
        ValueError: Where the processes that were started cannot work together.
    """
    processes = get_int_from_env(WORLD_SIZES, 1)
    # Without a device, processes would each work alone unless accelerate is told to use CPUs.
    accelerator = Accelerator(cpu=processes > 1 and not torch.accelerator.is_available(), **options)
    if accelerator.num_processes != processes:
        raise ValueError(f"{processes} processes were started, but they cannot work together on {accelerator.device}.")
    # Its launcher of one process names a meeting point only where it was asked for more.
    asked = all(name in os.environ for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"))
    if asked and processes == 1:
        console.print(
            "accelerate launch was asked for several processes but started one: several CPU processes need "
            "--config_file training/launch/several_cpus.yaml --num_processes N, without --cpu.",
            style="yellow",
        )
    return accelerator
