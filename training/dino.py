"""DINO: self-supervised pretraining of an encoder of any family on images without labels.

accelerate launch -m training.dino --config training/recipes/dino/digits.yaml --output_dir runs/digits_dino
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType
from huggingface_hub.dataclasses import strict
from transformers import AutoModel

from locatvit_hf import LocAtViTImageProcessor
from training.data import TrainingSamples, describe_data, load_split
from training.engine.arguments import option, run_program
from training.engine.distributed import create_accelerator
from training.engine.loop import TrainingLoop
from training.engine.optimization import VECTORS, create_optimizer
from training.engine.schedule import Schedule
from training.engine.settings import ProgramArguments
from training.tasks.checkpoint_loading import build_config
from training.tasks.dino import (
    NUM_GLOBAL_CROPS,
    DinoLoss,
    DinoNetwork,
    MultiCropAugmentation,
    MultiCropTransform,
    SelfDistillationArguments,
    create_teacher,
    teacher_momentum_at,
    teacher_temperature_at,
    update_teacher,
)


@strict
@dataclass(kw_only=True)
class DinoArguments(ProgramArguments, MultiCropAugmentation, SelfDistillationArguments):
    """Settings of `dino`; the defaults are those of the reference for 256 images per step.

    `batch_size`, `mixed_precision` and stochastic depth (`model`) have those of all programs; the recipes give them.
    """

    family: str = option("locatvit", "`model_type` of the configuration.")
    preset: str | None = option(None, "Sizes of the paper: tiny, small, base, large.")
    model: dict[str, Any] = option({}, "Fields of the configuration: --model.use_gaussian false.")
    length: str = "100 epochs"
    warmup: str = "10 epochs"
    schedule: Literal["linear", "cosine", "constant", "step"] = "cosine"
    learning_rate: float | int = option(5e-4, "Peak learning rate.")
    start_learning_rate: float | int = 0.0
    final_learning_rate: float | int = 1e-6
    weight_decay: float | int = 0.04
    no_weight_decay: list[str] | None = option(
        [VECTORS], "As everywhere; the reference also decays the class token and the position embeddings."
    )
    final_weight_decay: float | int | None = 0.4
    max_gradient_norm: float | int | None = 3.0
    dtype: Literal["float32"] = option("float32", "A teacher in bfloat16 would not follow; see mixed_precision.")
    ema_decay: None = option(None, "None: the teacher is the average, see teacher_momentum.")
    export: Literal["last"] = option("last", "Without labels no teacher is known as best.")
    seed: int = 0


def main(arguments: DinoArguments) -> dict[str, Any]:
    """Train and export the teacher; returns the content of `all_results.json`."""
    accelerator = create_accelerator(arguments)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError("Student and teacher stay whole in every process: launch DINO without FSDP or DeepSpeed.")
    columns = [arguments.image_column]
    images = load_split(arguments, arguments.train_split, columns, columns, arguments.max_train_samples)
    schedule = Schedule.resolve(arguments, len(images), accelerator.num_processes)
    temperature_warmup = schedule.steps(arguments.teacher_temperature_warmup)
    frozen = schedule.steps(arguments.freeze_last_layer)

    torch.manual_seed(arguments.seed)
    backbone = AutoModel.from_config(build_config(arguments.family, arguments.preset, arguments.model))
    student = DinoNetwork(backbone, arguments)
    teacher = create_teacher(student).to(accelerator.device)
    criterion = DinoLoss(student.pooled_size, arguments).to(accelerator.device)
    processor = LocAtViTImageProcessor.from_model_config(backbone.config)
    optimizer = create_optimizer(student, arguments)
    transform = MultiCropTransform(arguments, backbone.config.image_size, processor.image_mean, processor.image_std)
    samples = TrainingSamples(images, columns, transform, arguments.seed)

    def freeze_last_layer() -> None:
        if loop.state.step < frozen:
            student.head.prototypes.weight.grad = None

    run = accelerator, arguments, schedule, student, processor, optimizer, samples
    loop = TrainingLoop(
        *run,
        metric="feature_variance",
        evaluated=teacher.backbone,
        data=partial(describe_data, columns, training=images),
        state={"teacher": teacher, "criterion": criterion},
        before_step=freeze_last_layer,
    )
    with loop:
        for crops in loop:
            step = loop.state.step
            _, answers = loop.model(crops)
            with torch.no_grad(), accelerator.autocast():
                features, targets = teacher(crops[:NUM_GLOBAL_CROPS])
            loss = criterion(answers, targets, features, teacher_temperature_at(step, temperature_warmup, arguments))
            loop.update(loss)
            if loop.step_complete:
                momentum = teacher_momentum_at(step, schedule.total, arguments)
                update_teacher(teacher, accelerator.unwrap_model(loop.model), momentum)
                watched = criterion.update_center(accelerator)
            if loop.evaluation_due:
                loop.record(watched)
    return loop.finish(num_train_images=len(images))


if __name__ == "__main__":
    run_program(main, DinoArguments)
