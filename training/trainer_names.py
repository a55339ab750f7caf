"""Options of the `Trainer` of transformers, and of its image examples, under our names."""

import os
from collections.abc import Callable
from typing import Any

# Our option for each of theirs, and of the examples that use accelerate.
OPTIONS = {
    "model_name_or_path": "pretrained",
    "dataset_name": "dataset",
    "dataset_config_name": "dataset_config",
    "image_column_name": "image_column",
    "label_column_name": "label_column",
    "train_val_split": "validation_share",
    "max_eval_samples": "max_validation_samples",
    "num_train_epochs": "length",
    "max_steps": "length",
    "max_train_steps": "length",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "num_warmup_steps": "warmup",
    "lr_scheduler_type": "schedule",
    "optim": "optimizer",
    "max_grad_norm": "max_gradient_norm",
    "label_smoothing_factor": "label_smoothing",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
    "torch_compile": "compile",
    "dataloader_num_workers": "num_workers",
    "report_to": "trackers",
    "logging_steps": "log_every",
    "eval_strategy": "evaluate_every",
    "eval_steps": "evaluate_every",
    "save_strategy": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "checkpointing_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "load_best_model_at_end": "export",
    "hub_model_id": "push_to_hub",
    "overwrite_output_dir": "overwrite",
}
# What is always so here, or what nothing here depends on.
WITHOUT_COUNTERPART = (
    "do_train", "do_eval", "remove_unused_columns", "ignore_mismatched_sizes", "trust_remote_code", "with_tracking",
    "logging_strategy", "logging_first_step", "logging_dir", "run_name", "dataloader_pin_memory",
    "ddp_find_unused_parameters",
)  # fmt: skip

# Those whose value is written differently.
VALUES: dict[str, Callable[[Any], Any]] = {
    "num_train_epochs": lambda epochs: f"{epochs} epochs",
    "max_steps": lambda steps: f"{steps} steps",
    "max_train_steps": lambda steps: f"{steps} steps",
    "num_warmup_steps": lambda steps: f"{steps} steps",
    "warmup_ratio": lambda share: f"{100 * float(share):g} %",
    "warmup_steps": lambda steps: f"{steps} steps" if steps >= 1 else f"{100 * steps:g} %",
    "lr_scheduler_type": lambda name: {"constant_with_warmup": "constant"}.get(name, name),
    "optim": lambda name: "adamw" if name in ("adamw_torch", "adamw_torch_fused") else name,
    "max_grad_norm": lambda norm: norm or None,
    "report_to": lambda names: [] if names in ("none", None) else [names] if isinstance(names, str) else names,
    "eval_steps": lambda steps: f"{steps} steps",
    "save_steps": lambda steps: f"{steps} steps",
    "checkpointing_steps": lambda steps: "1 epochs" if steps == "epoch" else f"{steps} steps",
    "load_best_model_at_end": lambda best: "best" if best else "last",
}

# Numbers of steps, and what they win over.
STEPS = {
    "max_steps": ("num_train_epochs",),
    "max_train_steps": ("num_train_epochs",),
    "warmup_steps": ("warmup_ratio",),
    "num_warmup_steps": ("warmup_ratio",),
}


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """Options under the names of the Trainer as ours; others stay.

    `per_device_train_batch_size` is multiplied by the processes and the accumulation steps. As with the Trainer,
    `max_steps` and `warmup_steps` win over epochs and ratio.
    Raises ValueError where an option is given under both names, and for a strategy that the Trainer does not know.
    """
    values = {name: value for name, value in values.items() if name not in WITHOUT_COUNTERPART}
    changed = {}
    if {"adam_beta1", "adam_beta2"} & values.keys():
        changed["betas"] = [values.pop("adam_beta1", 0.9), values.pop("adam_beta2", 0.999)]
    if "adam_epsilon" in values:
        changed["eps"] = float(values.pop("adam_epsilon"))
    if changed:
        values["optimizer_options"] = {**values.get("optimizer_options", {}), **changed}
    theirs = {name: value for name, value in values.items() if name in OPTIONS}
    ours = {name: value for name, value in values.items() if name not in OPTIONS}
    if isinstance(push := ours.get("push_to_hub"), bool):
        # A switch for the Trainer, which names the repository apart.
        del ours["push_to_hub"]
        repository = theirs.pop("hub_model_id", None)
        if push and repository is None:
            raise ValueError("Name the repository to push to: --push_to_hub ME/MODEL.")
        ours |= {"push_to_hub": repository} if push else {}
    for name in theirs:
        if OPTIONS[name] in ours:
            raise ValueError(f"Give {OPTIONS[name]} or {name}, not both: they are one option.")
    for one, other in (("max_steps", "max_train_steps"), ("warmup_steps", "num_warmup_steps")):
        if {one, other} <= theirs.keys():
            raise ValueError(f"Give {one} or {other}, not both: they are one option.")
    for steps, others in STEPS.items():
        # Zero, or -1, is how the Trainer writes that there are none.
        if not isinstance(theirs.get(steps, 0), int | float):
            raise ValueError(f"{steps} must be a number, got {theirs[steps]!r}.")
        if theirs.get(steps, 0) <= 0:
            theirs.pop(steps, None)
        else:
            theirs = {name: value for name, value in theirs.items() if name not in others}
    for name, steps in (("eval_strategy", "eval_steps"), ("save_strategy", "save_steps")):
        if name not in theirs:
            continue
        # The last weights are evaluated and kept in any case.
        every = {"no": "100 %", "epoch": "1 epochs", "steps": f"{theirs.get(steps, 500)} steps"}
        if theirs[name] not in every:
            raise ValueError(f"{name} must be one of {', '.join(every)}, got {theirs[name]!r}.")
        ours[OPTIONS[name]] = every[theirs.pop(name)]
        theirs.pop(steps, None)
    precisions = [name for name in ("fp16", "bf16") if name in theirs]
    if precisions:
        ours["mixed_precision"] = next((name for name in precisions if theirs[name]), "no")
    if "per_device_train_batch_size" in theirs:
        processes, steps = int(os.environ.get("WORLD_SIZE", 1)), ours.get("gradient_accumulation_steps", 1)
        ours["batch_size"] = theirs.pop("per_device_train_batch_size") * processes * steps
    for name, value in theirs.items():
        if name not in precisions:
            ours[OPTIONS[name]] = VALUES[name](value) if name in VALUES else value
    return ours
