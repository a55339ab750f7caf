"""The processes of a run: how many were started, what they work on together, and what they tell each other."""

import os
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration, get_int_from_env

from training.engine.arguments import console
from training.engine.settings import ProgramArguments
from training.engine.tracking import check_trackers
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


def create_accelerator(arguments: ProgramArguments) -> Accelerator:
    """The processes and devices that `accelerate launch` gives, with the precision that the recipe asks for.

    Raises:
        ValueError: A tracker is not there, or a way of sharding is not supported.
    """
    check_trackers(arguments.trackers)
    accelerator = create_processes(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        dynamo_backend="inductor" if arguments.compile and not arguments.dry_run else None,
        log_with=list(arguments.trackers) or None,
        project_config=ProjectConfiguration(project_dir=arguments.output_dir, logging_dir=arguments.output_dir),
    )
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # Accelerate shards on devices alone; over gloo it works just as well on CPU.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("Only FSDP2 is supported: set fsdp_version: 2 in the configuration of accelerate.")
    if state.distributed_type == DistributedType.DEEPSPEED:
        if state.deepspeed_plugin.zero_stage > 2:
            raise ValueError("DeepSpeed stage 3 is not supported: use stage 2, or FSDP2, which shards weights too.")
        state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = arguments.max_gradient_norm or 0.0
    return accelerator


def reduce_losses(
    accelerator: Accelerator, losses: dict[str, torch.Tensor], norm: torch.Tensor, corrupt: int, signal: int
) -> tuple[dict[str, float], float, int, int]:
    """What all processes know of a step together, in one exchange.

    Args:
        accelerator: Of the processes.
        losses: Of this process, by name, scalars on the device.
        norm: Of the gradients.
        corrupt: Images that this process could not decode.
        signal: That this process received, 0 for none.

    Returns:
        The mean losses, the norm, the corrupt images of all processes, and the largest signal.
    """
    own = torch.tensor([float(signal), float(corrupt)], device=accelerator.device)
    everyone = accelerator.gather(torch.cat([own, torch.stack([*losses.values(), norm])])[None])
    *means, norm = everyone.mean(dim=0)[2:].tolist()
    total, largest = int(everyone[:, 1].sum().item()), int(everyone[:, 0].max().item())
    return dict(zip(losses, means, strict=True)), norm, total, largest
