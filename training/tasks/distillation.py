"""A second loss that asks a classifier to answer as a trained one does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from huggingface_hub.dataclasses import strict
from transformers import AutoImageProcessor, AutoModelForImageClassification

from training.engine.arguments import option
from training.evaluation.results import model_hash


@strict
@dataclass(kw_only=True)
class DistillationArguments:
    """Whether and how a classifier learns from a teacher."""

    teacher: str | None = option(None, "Any image classifier of transformers to learn from: folder or Hub name.")
    distillation: Literal["soft", "hard"] = option(
        "soft", "Learn the teacher's probabilities (KL divergence), or its best answer."
    )
    distillation_weight: float | int = option(0.5, "Fraction of the teacher in the loss; the labels have the rest.")
    distillation_temperature: float | int = option(1.0, "Soft answers of both are flattened by this.")


class Distillation:
    """The loss of a student with the term of its teacher mixed in.

    The teacher sees the same augmented images as the student, normalized its own way and at its own size. Its weights
    are float32, in whatever precision they are stored.

    Args:
        num_labels: Classes of the student, in the same order as the teacher's.
        mean: Of the channels of the student's images, in 0 to 1.
        std: Of the channels of the student's images, in 0 to 1.

    Raises:
        ValueError: Where the teacher cannot be loaded or knows another number of classes.
    """

    def __init__(
        self,
        arguments: DistillationArguments,
        num_labels: int,
        mean: Sequence[float],
        std: Sequence[float],
        accelerator: Accelerator,
    ):
        device, self.autocast = accelerator.device, accelerator.autocast
        self.hard = arguments.distillation == "hard"
        self.weight, self.temperature = arguments.distillation_weight, arguments.distillation_temperature
        if not 0 <= self.weight <= 1 or self.temperature <= 0:
            raise ValueError("distillation_weight must be from 0 to 1, and distillation_temperature above 0.")
        try:
            teacher = AutoModelForImageClassification.from_pretrained(arguments.teacher, dtype=torch.float32)
            processor = AutoImageProcessor.from_pretrained(arguments.teacher)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ValueError(f"Cannot load the teacher {arguments.teacher}: {reason}.") from None
        if teacher.config.num_labels != num_labels:
            raise ValueError(
                f"The teacher {arguments.teacher} knows {teacher.config.num_labels} classes, but the data has "
                f"{num_labels}."
            )
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        size = getattr(teacher.config, "image_size", None)
        self.size = (size, size) if isinstance(size, int) else tuple(size) if size is not None else None
        mean, std, other_mean, other_std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (mean, std, processor.image_mean, processor.image_std)
        )
        self.factor, self.offset = std / other_std, (mean - other_mean) / other_std

    def fingerprint(self) -> str:
        """Digest of the teacher's weights: a run that goes on with another teacher is another run."""
        return model_hash(self.teacher)[:16]

    def __call__(self, loss: torch.Tensor, logits: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mixed loss (`loss`) and its terms (`labels`, `teacher`).

        Args:
            loss: Of the labels.
            logits: (batch, classes) of the student.
            images: (batch, channels, height, width).
        """
        with torch.no_grad(), self.autocast():
            images = images * self.factor + self.offset
            if self.size is not None and tuple(images.shape[-2:]) != self.size:
                images = F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False)
            answer = self.teacher(pixel_values=images).logits.float()
        logits = logits.float()
        if self.hard:
            teacher = F.cross_entropy(logits, answer.argmax(dim=-1))
        else:
            ours, theirs = (F.log_softmax(values / self.temperature, dim=-1) for values in (logits, answer))
            # Times the temperature squared, so that its gradients keep their size (Hinton et al., 2015).
            teacher = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * self.temperature**2
        return {"loss": (1 - self.weight) * loss + self.weight * teacher, "labels": loss, "teacher": teacher}
