"""DINO, self-distillation without labels: views, student and teacher, loss (Caron et al., ICCV 2021)."""

import copy
import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from huggingface_hub.dataclasses import strict
from PIL import Image, ImageFilter
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from transformers import PreTrainedModel

from training.engine.arguments import option

NUM_GLOBAL_CROPS = 2
"""The teacher sees these; every other number changes what the loss compares."""


@strict
@dataclass(kw_only=True)
class MultiCropAugmentation:
    """Two large views of an image for student and teacher, and small ones for the student alone."""

    global_crop_scale: list[float | int] = option(
        [0.4, 1.0], "Fraction of the area that a view of `image_size` shows.", least=0, interval=True
    )
    local_crop_scale: list[float | int] = option(
        [0.05, 0.4], "Fraction of the area that a local view shows.", least=0, interval=True
    )
    local_crop_size: int = option(96, "Side of a local view in pixels.", least=1)
    num_local_crops: int = option(8, "Local views of every image.", least=0)
    horizontal_flip: float | int = option(0.5, "Probability of mirroring an image.", least=0, most=1)
    color_jitter: float | int = option(0.8, "Probability of a change of colors.", least=0, most=1)
    grayscale: float | int = option(0.2, "Probability of turning a view gray.", least=0, most=1)
    solarize: float | int = option(0.2, "Probability in the second global view.", least=0, most=1)
    blur: list[float | int] = option(
        [1.0, 0.1, 0.5], "Probability in the two global and the local views.", least=0, most=1
    )
    blur_sigma: list[float | int] = option(
        [0.1, 2.0], "Standard deviation of the blur in pixels, from and to.", interval=True
    )


@strict
@dataclass(kw_only=True)
class SelfDistillationArguments:
    """The projection head, the teacher and the temperatures."""

    num_prototypes: int = option(65536, "Outputs of the head.")
    head_hidden_size: int = option(2048, "Channels of the hidden layers of the head.")
    head_bottleneck_size: int = option(256, "Channels of the unit vector that is compared with the prototypes.")
    head_batch_norm: bool = option(
        False,
        "Normalize the hidden layers of the head over the batch of a process. A small encoder gives almost "
        "the same features to all images at first; without it, a short run ends with the same answer to all.",
    )
    teacher_momentum: float | int = option(
        0.996, "How much of the teacher a step keeps; a cosine takes it to 1.", least=0, most=1
    )
    student_temperature: float | int = option(0.1, "The student's answers are divided by this before the softmax.")
    teacher_temperature: float | int = option(0.04, "As `student_temperature`, of the teacher, after its warmup.")
    start_teacher_temperature: float | int = option(0.04, "From here it goes linearly to `teacher_temperature`.")
    teacher_temperature_warmup: str = option("0 epochs", "Duration of that.")
    centre_momentum: float | int = option(0.9, "How much of the center of the teacher's answers a step keeps.")
    freeze_last_layer: str = option("1 epochs", "Duration in which the last layer of the head does not move.")


class MultiCropTransform:
    """Maps an image to its views: two (3, image_size, image_size), then the local ones, all normalized.

    Args:
        image_size: Pixels, one number or [height, width].
        mean: Of the three channels, in 0 to 1.
        std: Of the three channels, in 0 to 1.
    """

    def __init__(
        self, arguments: MultiCropAugmentation, image_size: int | list[int], mean: list[float], std: list[float]
    ):
        if len(arguments.blur) != 3 or arguments.num_local_crops < 0:
            raise ValueError("blur needs three probabilities, and num_local_crops must not be negative.")
        local_size, local_scale = arguments.local_crop_size, arguments.local_crop_scale
        scale = arguments.global_crop_scale
        first, second, local = arguments.blur
        self.views = [
            _view(arguments, image_size, scale, first, 0.0, mean, std),
            _view(arguments, image_size, scale, second, arguments.solarize, mean, std),
            *[_view(arguments, local_size, local_scale, local, 0.0, mean, std)] * arguments.num_local_crops,
        ]

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, ...]:
        image = image.convert("RGB")
        return tuple(view(image) for view in self.views)


def _view(
    arguments: MultiCropAugmentation,
    size: int | list[int],
    scale: list[float],
    blur: float,
    solarize: float,
    mean: list[float],
    std: list[float],
) -> v2.Transform:
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    steps = [
        (1.0, v2.RandomResizedCrop(size, scale=tuple(scale), interpolation=InterpolationMode.BICUBIC)),
        (arguments.horizontal_flip, v2.RandomHorizontalFlip(arguments.horizontal_flip)),
        (arguments.color_jitter, v2.RandomApply([jitter], arguments.color_jitter)),
        (arguments.grayscale, v2.RandomGrayscale(arguments.grayscale)),
        (blur, v2.RandomApply([RandomBlur(arguments.blur_sigma)], blur)),
        (solarize, v2.RandomSolarize(128, solarize)),
        (1.0, v2.PILToTensor()),
        (1.0, v2.ToDtype(torch.float32, scale=True)),
        (1.0, v2.Normalize(mean, std)),
    ]
    return v2.Compose([step for probability, step in steps if probability > 0])


class RandomBlur(v2.Transform):
    """Gaussian blur of a PIL image, by Pillow: torchvision's would turn it into a tensor and back.

    Args:
        sigma: Standard deviation in pixels, drawn evenly between these two.
    """

    def __init__(self, sigma: list[float]):
        super().__init__()
        self.sigma = sigma

    def make_params(self, flat_inputs: list[Any]) -> dict[str, float]:
        low, high = self.sigma
        return {"sigma": low + (high - low) * torch.rand(()).item()}

    def transform(self, image: Image.Image, params: dict[str, float]) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(params["sigma"]))


class DinoHead(nn.Module):
    """Three linear layers to a unit vector, and its cosine with every prototype, the last layer."""

    def __init__(self, hidden_size: int, arguments: SelfDistillationArguments):
        super().__init__()
        inner, bottleneck = arguments.head_hidden_size, arguments.head_bottleneck_size
        # Of the batch, also in the teacher, which evaluates always.
        norm = partial(nn.BatchNorm1d, affine=False, track_running_stats=False)
        hidden = [
            layer
            for width in (hidden_size, inner)
            for layer in (nn.Linear(width, inner), *([norm(inner)] if arguments.head_batch_norm else []), nn.GELU())
        ]
        self.layers = nn.Sequential(*hidden, nn.Linear(inner, bottleneck))
        self.prototypes = nn.Linear(bottleneck, arguments.num_prototypes, bias=False)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) to (..., num_prototypes), from -1 to 1."""
        # A batch norm takes the second of three axes for the channels.
        hidden = self.layers(features.flatten(0, -2)).unflatten(0, features.shape[:-1])
        # Half precision knows no smaller epsilon.
        unit = F.normalize(hidden, dim=-1, eps=1e-6)
        return F.linear(unit, F.normalize(self.prototypes.weight, dim=-1, eps=1e-6))


class DinoNetwork(nn.Module):
    """An encoder and the head on what it pools. Student and teacher are one each.

    Args:
        backbone: The encoder.
        arguments: Of the head.

    Raises:
        ValueError: The encoder takes no images, or has batch norms: their running statistics are no weights, which are
            all that a teacher averages.
    """

    supports_gradient_checkpointing = True

    def __init__(self, backbone: PreTrainedModel, arguments: SelfDistillationArguments):
        super().__init__()
        family = backbone.config.model_type
        if backbone.main_input_name != "pixel_values":
            raise ValueError(f"DINO learns from images, which {family} does not take: choose another family.")
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()):
            raise ValueError(
                f"This {family} has batch norms, whose statistics DINO's teacher would not follow: choose another "
                "clustering_type, or another family."
            )
        self.backbone = backbone
        self.pooled_size = getattr(backbone.config, "jumbo_hidden_size", backbone.config.hidden_size)
        self.head = DinoHead(self.pooled_size, arguments)

    def forward(self, crops: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Views, each (batch, 3, height, width), to features (views, batch, pooled_size) and the head's answers.

        Views of one size that follow each other go through the encoder together.
        """
        groups = (list(group) for _, group in itertools.groupby(crops, key=lambda crop: crop.shape))
        pooled = [self.backbone(pixel_values=torch.cat(group)).pooler_output for group in groups]
        features = torch.cat([part.unflatten(0, (-1, len(crops[0]))) for part in pooled])
        return features, self.head(features)

    def gradient_checkpointing_enable(self, *options: Any) -> None:
        """As in transformers, of the encoder."""
        self.backbone.gradient_checkpointing_enable(*options)


def create_teacher(student: DinoNetwork) -> DinoNetwork:
    """A copy of the student that learns nothing by itself and always evaluates."""
    return copy.deepcopy(student).eval().requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: DinoNetwork, student: DinoNetwork, momentum: float) -> None:
    """Move every weight of the teacher by 1 - momentum of the way to the student's."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def teacher_momentum_at(step: int, total: int, arguments: SelfDistillationArguments) -> float:
    """From `teacher_momentum` along a cosine to 1 at the end of the run."""
    return 1 - (1 - arguments.teacher_momentum) * (1 + math.cos(math.pi * step / total)) / 2


def teacher_temperature_at(step: int, warmup: int, arguments: SelfDistillationArguments) -> float:
    """Linear over `warmup` steps, then constant."""
    start, final = arguments.start_teacher_temperature, arguments.teacher_temperature
    return start + (final - start) * min(step / warmup, 1.0) if warmup else final


class DinoLoss(nn.Module):
    """Cross-entropy between the teacher's sharpened and centered answer to one view and the student's to another.

    Besides, it watches for collapse. `teacher_entropy` is the mean entropy of the teacher's answers in nats: zero, or
    log(num_prototypes), where it says the same of every image. `feature_variance` is that of the teacher's features,
    scaled to unit length: between 0, all equal, and 1.

    The center and these two belong to the batch of a step, over all processes and accumulation steps.
    """

    def __init__(self, hidden_size: int, arguments: SelfDistillationArguments):
        super().__init__()
        self.student_temperature, self.momentum = arguments.student_temperature, arguments.centre_momentum
        self.register_buffer("centre", torch.zeros(arguments.num_prototypes))
        # Sums over the views of the step in progress: answers, unit features, entropy, number.
        self.sizes = (arguments.num_prototypes, hidden_size, 1, 1)
        self.register_buffer("sums", torch.zeros(sum(self.sizes)), persistent=False)

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, features: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """The mean over images and pairs of different views.

        Args:
            student: Answers (views, batch, num_prototypes), the first of which are the teacher's views.
            teacher: Answers (global views, batch, num_prototypes).
            features: Of the teacher, (global views, batch, hidden_size).
            temperature: Of the teacher's softmax.
        """
        teacher = teacher.float()
        targets = ((teacher - self.centre) / temperature).softmax(dim=-1)
        self._observe(teacher, targets, features.float())
        log_probabilities = (student.float() / self.student_temperature).log_softmax(dim=-1)
        pairs = -torch.einsum("tbk,vbk->tv", targets, log_probabilities) / targets.shape[1]
        different = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
        return pairs[different].mean()

    @torch.no_grad()
    def _observe(self, answers: torch.Tensor, targets: torch.Tensor, features: torch.Tensor) -> None:
        entropy = torch.special.entr(targets).sum()
        sums = [answers.sum(dim=(0, 1)), F.normalize(features, dim=-1).sum(dim=(0, 1)), entropy[None]]
        number = entropy.new_full((1,), targets.shape[0] * targets.shape[1])
        self.sums += torch.cat([*sums, number])

    @torch.no_grad()
    def update_center(self, accelerator: Accelerator) -> dict[str, float]:
        """After the last batch of a step: move the center to the mean answer; returns what was watched."""
        means = accelerator.reduce(self.sums, reduction="sum")
        answers, features, entropy, _ = (means / means[-1]).split(self.sizes)
        self.centre.lerp_(answers, 1 - self.momentum)
        self.sums.zero_()
        return {"teacher_entropy": entropy.item(), "feature_variance": 1 - features.square().sum().item()}
