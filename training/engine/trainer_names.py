"""Options of other tools under our names: those of the `Trainer` of transformers and its examples are translated."""

from collections.abc import Callable
from typing import Any

from accelerate.utils import get_int_from_env

# For each of our options the names that the Trainer and its examples have for it, which are translated, and names of
# timm, mmengine, Detectron2 and others for much the same, which are refused with a word about ours.
_NAMES = {
    "pretrained": ("model_name_or_path", "model_name initial_checkpoint load_from finetune"),
    "dataset": ("dataset_name", "data_dir data_path data_root"),
    "dataset_config": ("dataset_config_name", ""),
    "image_column": ("image_column_name", ""),
    "label_column": ("label_column_name", ""),
    "validation_share": ("train_val_split", ""),
    "max_validation_samples": ("max_eval_samples", ""),
    "length": ("num_train_epochs max_steps max_train_steps", "epochs num_epochs max_epochs max_iters"),
    "warmup": ("warmup_ratio warmup_steps num_warmup_steps", "warmup_epochs warmup_iters"),
    "schedule": ("lr_scheduler_type", "sched lr_scheduler"),
    "optimizer": ("optim", "opt"),
    "max_gradient_norm": ("max_grad_norm", "clip_grad"),
    "label_smoothing": ("label_smoothing_factor", "smoothing"),
    "batch_size": ("per_device_train_batch_size", "train_batch_size samples_per_gpu ims_per_batch"),
    "eval_batch_size": ("per_device_eval_batch_size", "validation_batch_size"),
    "mixed_precision": ("fp16 bf16", "amp amp_dtype"),
    "compile": ("torch_compile", "torchcompile"),
    "num_workers": ("dataloader_num_workers", "workers"),
    "trackers": ("report_to", "log_wandb"),
    "log_every": ("logging_steps", "log_interval"),
    "evaluate_every": ("eval_strategy evaluation_strategy eval_steps", "val_interval"),
    "checkpoint_every": ("save_strategy save_steps checkpointing_steps", ""),
    "keep_checkpoints": ("save_total_limit", "checkpoint_hist"),
    "export": ("load_best_model_at_end", ""),
    "push_to_hub": ("hub_model_id", ""),
    "overwrite": ("overwrite_output_dir", ""),
    "train_split": ("", "train_file train_split_name"),
    "validation_split": ("", "validation_file val_split"),
    "label_names": ("", "class_map num_classes num_labels"),
    "model.image_size": ("", "img_size image_size input_size"),
    "model.drop_path_rate": ("", "drop_path drop_path_rate"),
    "learning_rate": ("", "lr lr_base"),
    "learning_rate_batch_size": ("", "lr_base_size"),
    "final_learning_rate": ("", "min_lr"),
    "start_learning_rate": ("", "warmup_lr"),
    "milestones": ("", "decay_milestones"),
    "optimizer_options": ("", "opt_betas opt_eps adam_beta1 adam_beta2 adam_epsilon momentum"),
    "weight_decay": ("", "wd"),
    "final_weight_decay": ("", "weight_decay_end"),
    "gradient_accumulation_steps": ("", "grad_accum_steps"),
    "ema_decay": ("", "model_ema model_ema_decay"),
    "dtype": ("", "torch_dtype param_dtype model_dtype"),
    "gradient_checkpointing": ("", "grad_checkpointing"),
    "auto_augment": ("", "aa"),
    "random_erasing": ("", "reprob"),
    "horizontal_flip": ("", "hflip"),
    "crop_ratio": ("", "ratio"),
    "repeated_augmentation": ("", "aug_repeats"),
    "freeze": ("", "freeze_backbone"),
    "output_dir": ("", "output work_dir"),
    "teacher": ("", "teacher_model_name_or_path"),
}
OPTIONS, OTHER_TOOLS = (
    {theirs: ours for ours, names in _NAMES.items() for theirs in names[column].split()} for column in (0, 1)
)
# What is always so here, or what nothing here depends on.
WITHOUT_COUNTERPART = (
    "do_train", "do_eval", "remove_unused_columns", "ignore_mismatched_sizes", "trust_remote_code", "with_tracking",
    "logging_strategy", "logging_first_step", "logging_dir", "run_name", "dataloader_pin_memory",
    "ddp_find_unused_parameters",
)  # fmt: skip

_CONTINUES = "a run that stopped continues with the same command, from the newest checkpoint in its output_dir"
_FOLDERS = (
    "name the folder with train/ and validation/ in it as --dataset, or one of class folders with "
    "--validation_share 0.1"
)
_TOKEN = "log in with `hf auth login` instead"
_BEST = "each program has one metric for the best model, and --export best or last says which weights are exported"
REMARKS = {
    **dict.fromkeys(WITHOUT_COUNTERPART, "leave it out, it is always so here or nothing here depends on it"),
    **dict.fromkeys(("resume", "resume_from", "resume_from_checkpoint", "auto_resume", "ignore_data_skip"), _CONTINUES),
    **dict.fromkeys(("train_dir", "validation_dir", "val_dir", "test_dir"), _FOLDERS),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(("token", "use_auth_token", "hub_token", "push_to_hub_token"), _TOKEN),
}
"""Names that no single option stands for, and what to do instead."""

# Those whose value is written differently.
VALUES: dict[str, Callable[[Any], Any]] = {
    "num_train_epochs": "{} epochs".format,
    **dict.fromkeys(
        ("max_steps", "max_train_steps", "num_warmup_steps", "eval_steps", "save_steps"), "{} steps".format
    ),
    "warmup_ratio": lambda ratio: f"{100 * float(ratio):g} %",
    "warmup_steps": lambda steps: f"{steps} steps" if steps >= 1 else f"{100 * steps:g} %",
    "lr_scheduler_type": lambda name: {"constant_with_warmup": "constant"}.get(name, name),
    "optim": lambda name: "adamw" if name in ("adamw_torch", "adamw_torch_fused") else name,
    "max_grad_norm": lambda norm: norm or None,
    "report_to": lambda names: [] if names in ("none", None) else [names] if isinstance(names, str) else names,
    "checkpointing_steps": lambda steps: "1 epochs" if steps == "epoch" else f"{steps} steps",
    "load_best_model_at_end": lambda best: "best" if best else "last",
}
# The others are read as our option is: text is taken as it was typed.
AS_TYPED = tuple(OPTIONS.keys() - VALUES.keys() - {"fp16", "bf16"})

# The number of processes, as torchrun, which `accelerate launch` calls, and the launchers of MPI name it.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

# Numbers of steps, and what they win over.
STEPS = dict.fromkeys(("max_steps", "max_train_steps"), "num_train_epochs")
STEPS |= dict.fromkeys(("warmup_steps", "num_warmup_steps"), "warmup_ratio")


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
    for steps, other in STEPS.items():
        # Zero, or -1, is how the Trainer writes that there are none.
        if not isinstance(theirs.get(steps, 0), int | float):
            raise ValueError(f"{steps} must be a number, got {theirs[steps]!r}.")
        if theirs.get(steps, 0) <= 0:
            theirs.pop(steps, None)
        else:
            theirs.pop(other, None)
    for name, steps in (("eval_strategy", "eval_steps"), ("save_strategy", "save_steps")):
        if name not in theirs:
            continue
        # The last weights are evaluated and kept in any case.
        every = {"no": "100 %", "epoch": "1 epochs", "steps": f"{theirs.get(steps, 500)} steps"}
        if theirs[name] not in every:
            raise ValueError(f"{name} must be one of {', '.join(every)}, got {theirs[name]!r}.")
        ours[OPTIONS[name]] = every[theirs.pop(name)]
        theirs.pop(steps, None)
    if precisions := {name: theirs.pop(name) for name in ("fp16", "bf16") if name in theirs}:
        ours["mixed_precision"] = next((name for name, wanted in precisions.items() if wanted), "no")
    if "per_device_train_batch_size" in theirs:
        processes, steps = get_int_from_env(WORLD_SIZES, 1), ours.get("gradient_accumulation_steps", 1)
        ours["batch_size"] = theirs.pop("per_device_train_batch_size") * processes * steps
    return ours | {OPTIONS[name]: VALUES[name](value) if name in VALUES else value for name, value in theirs.items()}
