"""When what happens in a run, in steps: one step is one update of the weights."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

MILESTONE_FACTOR = 0.1


def parse_duration(text: str, steps_per_epoch: int, total: int | None = None) -> int:
    """Steps in `300 epochs`, `20000 steps` or, where `total` steps are given, `25 %`.

    Raises:
        ValueError: For anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(epochs?|steps?|%)\s*", text)
    if not match or (match[2] == "%" and total is None):
        raise ValueError(f"A duration reads '300 epochs', '20000 steps' or '25 %', not {text!r}.")
    unit = {"e": steps_per_epoch, "s": 1, "%": (total or 0) / 100}[match[2][0]]
    return round(float(match[1]) * unit)


@dataclass(frozen=True)
class Schedule:
    """The durations, rates and sizes of a run, resolved once from its settings, its images and its processes.

    With the linear fall from the end of the warmup the learning rate is the one-cycle of LocAt. timm, and with it
    PaCa-ViT, counts a cosine from the start, so that the rate after the warmup is a little below the peak.

    Args:
        steps_per_epoch: An epoch drops the images that fill no batch.
        total: Steps of the run.
        warmup: Steps of the linear rise of the learning rate.
        evaluate_every: Steps between two evaluations.
        checkpoint_every: Steps between two checkpoints.
        milestones: Steps at which the step schedule falls to a tenth.
        images_per_pass: Images that one process puts through the model at once.
        shape: Of the fall after the warmup.
        falls_from: Step that the fall is counted from, 0 or the end of the warmup.
        learning_rates: At the start, the peak and the end, scaled from `learning_rate_batch_size` to `batch_size`.
        weight_decays: At the start and at the end.
    """

    steps_per_epoch: int
    total: int
    warmup: int
    evaluate_every: int
    checkpoint_every: int
    milestones: tuple[int, ...]
    images_per_pass: int
    shape: Literal["linear", "cosine", "constant", "step"]
    falls_from: int
    learning_rates: tuple[float, float, float]
    weight_decays: tuple[float, float]

    @classmethod
    def resolve(cls, arguments: Any, num_images: int, num_processes: int = 1) -> "Schedule":
        """The schedule of a run.

        Args:
            arguments: Settings with those of `OptimizationArguments` and `RunArguments`.
            num_images: Of the training split.
            num_processes: Among which a batch is divided.

        Raises:
            ValueError: A duration cannot be read, or the run is shorter than its warmup.
        """
        steps_per_epoch = max(num_images // arguments.batch_size, 1)
        total = parse_duration(arguments.length, steps_per_epoch)
        warmup = parse_duration(arguments.warmup, steps_per_epoch, total)
        if not 0 <= warmup <= total or total == 0:
            raise ValueError(f"A run of {total} steps cannot warm up for {warmup}.")
        scale = arguments.batch_size / (arguments.learning_rate_batch_size or arguments.batch_size)
        rates = arguments.start_learning_rate, arguments.learning_rate, arguments.final_learning_rate
        decay, final_decay = arguments.weight_decay, arguments.final_weight_decay
        return cls(
            steps_per_epoch=steps_per_epoch,
            total=total,
            warmup=warmup,
            evaluate_every=max(parse_duration(arguments.evaluate_every, steps_per_epoch, total), 1),
            checkpoint_every=max(parse_duration(arguments.checkpoint_every, steps_per_epoch, total), 1),
            milestones=tuple(parse_duration(text, steps_per_epoch, total) for text in arguments.milestones),
            images_per_pass=max(arguments.batch_size // (num_processes * arguments.gradient_accumulation_steps), 1),
            shape=arguments.schedule,
            falls_from=0 if arguments.schedule_from == "start" else warmup,
            learning_rates=tuple(scale * rate for rate in rates),
            weight_decays=(decay, decay if final_decay is None else final_decay),
        )

    def steps(self, duration: str) -> int:
        """Steps in another duration of the run, such as `10 epochs` or `25 %`."""
        return parse_duration(duration, self.steps_per_epoch, self.total)

    def epochs(self, step: int) -> float:
        """Epochs that are done after a number of steps."""
        return step / self.steps_per_epoch

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step number `step` (from 0): a linear rise, then the fall that `shape` names."""
        start, peak, final = self.learning_rates
        if step < self.warmup:
            return start + (peak - start) * step / self.warmup
        if self.shape == "step":
            return peak * MILESTONE_FACTOR ** sum(step >= milestone for milestone in self.milestones)
        progress = (step - self.falls_from) / max(self.total - self.falls_from, 1)
        remaining = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}
        return final + (peak - final) * remaining[self.shape]

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of step number `step` (from 0): a cosine from the first value to the last."""
        start, final = self.weight_decays
        return final + (start - final) * (1 + math.cos(math.pi * step / self.total)) / 2
