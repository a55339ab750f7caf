"""Settings that programs share: which data, how the weights move, and where results go."""

from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from locatvit_hf.utils.images import MAX_MEGAPIXELS
from training.engine.arguments import option


@strict
@dataclass(kw_only=True)
class DataArguments:
    """Which images, in which columns."""

    dataset: str | None = option(
        None, "Hub name, address, or folder: of `save_to_disk`, class folders, parquet files or tar shards."
    )
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.")
    dataset_hash: str | None = option(
        None, "Refuse other data: the SHA-256 of all images and labels of both splits, in their order."
    )
    train_split: str = option("train", "Name of the split, or its files in the dataset: train-{000..099}.tar")
    validation_split: str = option("validation", "Name of the split to validate on, or its files, as `train_split`.")
    validation_share: float | int | None = option(
        None, "Fraction of the training split to validate on, instead of a validation split."
    )
    image_column: str = option("image", "Column of the images; in tar shards an extension: jpg")
    label_column: str = option("label", "Column of the labels; in tar shards an extension: cls")
    label_names: list[str] | str | None = option(
        None, "Names of the classes in order, or a JSON file {id: name}; by default those of the dataset."
    )
    max_train_samples: int | None = option(None, "Use so many images only, evenly spaced over the split.")
    max_validation_samples: int | None = option(None, "As `max_train_samples`, of the validation split.")
    streaming: bool = option(False, "Read shards while training instead of copying them first.")
    shuffle_buffer: int = option(
        4096, "Streaming: encoded images held in memory to be mixed, over all processes.", least=1
    )
    parallel_shards: int = option(64, "Streaming: shards read side by side; at least processes times workers.", least=1)
    max_corrupt_share: float | int = option(
        0.01,
        "Images that cannot be decoded are replaced; stop where they are more than this.",
        least=0,
        most=1,
        runtime=True,
    )
    max_megapixels: float | int = option(
        MAX_MEGAPIXELS, "Larger images, in millions of pixels, are not decoded.", least=0
    )
    num_workers: int = option(0, "Data-loading processes beside every training process.", least=0, runtime=True)


@strict
@dataclass(kw_only=True)
class OptimizationArguments:
    """How the weights move. Durations read `300 epochs`, `20000 steps` (weight updates) or `25 %` (of the run)."""

    length: str = option("300 epochs", "Duration of the run.")
    warmup: str = option("20 epochs", "Duration of the rise to the peak learning rate.")
    schedule: Literal["linear", "cosine", "constant", "step"] = option(
        "linear", "Shape of the fall after the warmup; linear is the papers' one-cycle."
    )
    schedule_from: Literal["warmup", "start"] = option(
        "warmup", "Where the fall is counted from: the end of the warmup, or step 0, as timm's cosine."
    )
    milestones: list[str] = option([], "Of the step schedule: where the rate falls to a tenth, as '8 epochs'.")
    learning_rate: float | int = option(1e-3, "Peak learning rate.", least=0)
    start_learning_rate: float | int = option(1e-7, "Learning rate at the first step.", least=0)
    final_learning_rate: float | int = option(1e-7, "Learning rate at the end of the run.", least=0)
    learning_rate_batch_size: int | None = option(
        None, "Batch size that the three rates are meant for: at another they are scaled in proportion."
    )
    optimizer: str = option("adamw", "Any optimizer name that timm knows.")
    optimizer_options: dict[str, Any] = option(
        {}, "Its other settings, for example {betas: [0.9, 0.95]} or {momentum: 0.9}."
    )
    weight_decay: float | int = option(0.05, "Weight decay of the parameters that are decayed.", least=0)
    final_weight_decay: float | int | None = option(
        None, "Where a cosine takes the weight decay by the end of the run."
    )
    no_weight_decay: list[str] | None = option(
        None,
        "Which parameters are not decayed: parts of their names or regular expressions, or `vectors`, "
        "those of one dimension; an empty list decays all. By default vectors and what the model lists.",
    )
    layer_decay: float | int | None = option(
        None, "Learning rate of a layer relative to the next one.", least=0, most=1
    )
    learning_rate_factors: dict[str, Any] = option(
        {}, "Part of parameter names to a factor, as {gaussian: 10}; the longest part that fits counts."
    )
    max_gradient_norm: float | int | None = option(5.0, "Clip gradients to this norm.", least=1e-06)
    batch_size: int = option(1024, "Images per step, over all processes and accumulation steps.", least=1)
    gradient_accumulation_steps: int = option(
        1, "Forward and backward passes whose gradients one step adds up.", least=1
    )
    ema_decay: float | int | None = option(
        None, "Keep an average of the weights with this decay, evaluate and export it.", least=0, most=1
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", "Compute in half precision where that is safe; the weights keep their `dtype`."
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "Precision of the weights while they train, whatever that of the checkpoint. In bfloat16 they take "
        "half of the memory, and steps below 1/256 of a weight are lost.",
    )
    compile: bool = option(False, "torch.compile the model for training.")
    channels_last: bool = option(False, "Keep images and convolutions channels-last.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")


@strict
@dataclass(kw_only=True)
class RunArguments:
    """Where results go, how often, and from which seed."""

    output_dir: str | None = option(None, "Receives checkpoints, results and exported model.")
    overwrite: bool = option(False, "Start anew where `output_dir` holds another run.", runtime=True)
    seed: int = option(42, "Seed of everything that is drawn: weights, order, augmentation, dropout.")
    evaluate_every: str = option("1 epochs", "Duration between two evaluations.")
    checkpoint_every: str = option("1 epochs", "Duration between two checkpoints.", runtime=True)
    keep_checkpoints: int = option(2, "Number of most recent checkpoints to keep.", least=1, runtime=True)
    log_every: int = option(50, "Steps between two points of the training curve.", least=1)
    trackers: list[str] = option([], "Where curves are also sent: tensorboard, trackio, wandb.", runtime=True)
    export: Literal["best", "last"] = option("best", "Which weights to export.")
    push_to_hub: str | None = option(None, "Repository that receives the exported model.", runtime=True)
    eval_batch_size: int = option(64, "Images per step of evaluation, in every process.", least=1, runtime=True)
    dry_run: bool = option(
        False, "Print model, parameters, schedule and memory, draw one augmented batch, and stop.", runtime=True
    )


@strict
@dataclass(kw_only=True)
class ProgramArguments(DataArguments, OptimizationArguments, RunArguments):
    """What every training program takes."""
