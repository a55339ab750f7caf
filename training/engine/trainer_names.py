"""Options of other tools under our names: those of the `Trainer` of transformers and its examples are translated."""

from collections.abc import Callable
from typing import Any

from accelerate.utils import get_int_from_env

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
    "evaluation_strategy": "evaluate_every",
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
# Those whose value is text, taken as it was typed.
OF_TEXT = (
    "model_name_or_path", "dataset_name", "dataset_config_name", "image_column_name", "label_column_name",
    "hub_model_id",
)  # fmt: skip

# Where we do the same in another way: names of the Trainer, its examples, timm, mmengine and Detectron2.
OTHER_TOOLS = {
    "model_name": "pretrained",
    "initial_checkpoint": "pretrained",
    "load_from": "pretrained",
    "finetune": "pretrained",
    "data_dir": "dataset",
    "data_path": "dataset",
    "data_root": "dataset",
    "train_file": "train_split",
    "validation_file": "validation_split",
    "train_split_name": "train_split",
    "val_split": "validation_split",
    "class_map": "label_names",
    "num_classes": "label_names",
    "num_labels": "label_names",
    "img_size": "model.image_size",
    "image_size": "model.image_size",
    "input_size": "model.image_size",
    "drop_path": "model.drop_path_rate",
    "drop_path_rate": "model.drop_path_rate",
    "epochs": "length",
    "num_epochs": "length",
    "max_epochs": "length",
    "max_iters": "length",
    "lr": "learning_rate",
    "lr_base": "learning_rate",
    "lr_base_size": "learning_rate_batch_size",
    "min_lr": "final_learning_rate",
    "warmup_lr": "start_learning_rate",
    "warmup_epochs": "warmup",
    "warmup_iters": "warmup",
    "decay_milestones": "milestones",
    "sched": "schedule",
    "lr_scheduler": "schedule",
    "opt": "optimizer",
    "opt_betas": "optimizer_options",
    "opt_eps": "optimizer_options",
    "adam_beta1": "optimizer_options",
    "adam_beta2": "optimizer_options",
    "adam_epsilon": "optimizer_options",
    "momentum": "optimizer_options",
    "wd": "weight_decay",
    "weight_decay_end": "final_weight_decay",
    "clip_grad": "max_gradient_norm",
    "grad_accum_steps": "gradient_accumulation_steps",
    "train_batch_size": "batch_size",
    "samples_per_gpu": "batch_size",
    "ims_per_batch": "batch_size",
    "validation_batch_size": "eval_batch_size",
    "model_ema": "ema_decay",
    "model_ema_decay": "ema_decay",
    "amp": "mixed_precision",
    "amp_dtype": "mixed_precision",
    "torch_dtype": "dtype",
    "param_dtype": "dtype",
    "model_dtype": "dtype",
    "torchcompile": "compile",
    "grad_checkpointing": "gradient_checkpointing",
    "aa": "auto_augment",
    "reprob": "random_erasing",
    "smoothing": "label_smoothing",
    "hflip": "horizontal_flip",
    "ratio": "crop_ratio",
    "aug_repeats": "repeated_augmentation",
    "freeze_backbone": "freeze",
    "workers": "num_workers",
    "output": "output_dir",
    "work_dir": "output_dir",
    "log_interval": "log_every",
    "val_interval": "evaluate_every",
    "checkpoint_hist": "keep_checkpoints",
    "log_wandb": "trackers",
    "teacher_model_name_or_path": "teacher",
}

_CONTINUES = "a run that stopped continues with the same command, from the newest checkpoint in its output_dir"
_FOLDERS = (
    "name the folder with train/ and validation/ in it as --dataset, or one of class folders with "
    "--validation_share 0.1"
)
_BEST = "each program has one metric for the best model, and --export best or last says which weights are exported"
REMARKS = {
    **dict.fromkeys(WITHOUT_COUNTERPART, "leave it out, it is always so here or nothing here depends on it"),
    **dict.fromkeys(("resume", "resume_from", "resume_from_checkpoint", "auto_resume", "ignore_data_skip"), _CONTINUES),
    **dict.fromkeys(("train_dir", "validation_dir", "val_dir", "test_dir"), _FOLDERS),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(
        ("token", "use_auth_token", "hub_token", "push_to_hub_token"), "log in with `hf auth login` instead"
    ),
}
"""Names that no single option stands for, and what to do instead."""

# Those whose value is written differently.
VALUES: dict[str, Callable[[Any], Any]] = {
    "num_train_epochs": lambda epochs: f"{epochs} epochs",
    "max_steps": lambda steps: f"{steps} steps",
    "max_train_steps": lambda steps: f"{steps} steps",
    "num_warmup_steps": lambda steps: f"{steps} steps",
    "warmup_ratio": lambda ratio: f"{100 * float(ratio):g} %",
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

# The number of processes, as torchrun, which `accelerate launch` calls, and the launchers of MPI name it.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

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

    Raises:
        ValueError: Where an option is given under both names, and for a strategy that the Trainer does not know.
    """
    values = {name: value for name, value in values.items() if name not in WITHOUT_COUNTERPART}
    if "evaluation_strategy" in values:  # its name before transformers 4.41
        values.setdefault("eval_strategy", values.pop("evaluation_strategy"))
    changed: dict[str, Any] = {}
    if {"adam_beta1", "adam_beta2"} & values.keys():
        changed["betas"] = [values.pop("adam_beta1", 0.9), values.pop("adam_beta2", 0.999)]
    if "adam_epsilon" in values:
        changed["eps"] = float(values.pop("adam_epsilon"))
    if changed:
        values["optimizer_options"] = {**values.get("optimizer_options", {}), **changed}
    theirs = {name: value for name, value in values.items() if name in OPTIONS}
    ours = {name: value for name, value in values.items() if name not in OPTIONS}
    push = {"true": True, "false": False}.get(str(ours.get("push_to_hub")).lower())
    if push is not None:
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
        processes, steps = get_int_from_env(WORLD_SIZES, 1), ours.get("gradient_accumulation_steps", 1)
        ours["batch_size"] = theirs.pop("per_device_train_batch_size") * processes * steps
    for name, value in theirs.items():
        if name not in precisions:
            ours[OPTIONS[name]] = VALUES[name](value) if name in VALUES else value
    return ours
