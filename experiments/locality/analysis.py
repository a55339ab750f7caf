"""The analysis, fixed before the first run: differences between models, paired by seed, with two kinds of intervals.

One is over seeds, as training varies: Student's t for the mean of the differences. The other is over images: a
bootstrap that draws the same images for both models and for all seeds.

What was added after the first results, and decides nothing: a bootstrap over blocks of neighbouring images, because
those of CamVid follow each other in a video and are not independent, as the first one takes them to be.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from .runs import Run

NUM_RESAMPLES = 2000
LEVEL = 0.95
BLOCK = 10
"""Neighbouring images that are drawn together: 20 frames of CamVid's video, two thirds of a second."""
# What is compared, and with what. The first is the claim that the experiment is about.
COMPARISONS = [
    ("locatvit", "vit"),
    ("gaussian", "vit"),
    ("refinement", "vit"),
    ("locat_regvit", "regvit"),
    ("locat_no_position", "no_position"),
    ("mean_pooling", "vit"),
    ("pacavit", "vit"),
]


@dataclass(frozen=True)
class Difference:
    """A model less another in one measure, as shares between -1 and 1.

    runs: names of those behind it. by_seed: one difference a seed. over_seeds: the interval of their mean, None of one
    seed. over_images: that of the bootstrap, None for measures that are not known image by image. over_blocks: that of
    blocks of images, None for images that do not follow each other.
    """

    runs: list[str]
    by_seed: list[float]
    over_seeds: tuple[float, float] | None
    over_images: tuple[float, float] | None
    over_blocks: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.by_seed))

    @property
    def verdict(self) -> str:
        """What the intervals allow to say: "better" or "worse" where both are on one side of zero, else "open".

        "not tested" where one of them is missing.
        """
        intervals = [self.over_seeds, self.over_images]
        if None in intervals:
            return "not tested"
        if all(low > 0 for low, _ in intervals):
            return "better"
        return "worse" if all(high < 0 for _, high in intervals) else "open"


def accuracy(run: Run, weights: np.ndarray | None = None) -> np.ndarray:
    """Share of images classified right; with weights (resamples, images), of each resample."""
    correct = np.unpackbits(np.frombuffer(bytes.fromhex(run.content["correct"]), np.uint8))
    correct = correct[: run.content["num_images"]].astype(float)
    return np.mean(correct) if weights is None else weights @ correct / weights.sum(axis=1)


def mean_iou(run: Run, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean over classes of intersection over union, both summed over images; classes that do not occur do not count."""
    return np.nanmean(class_iou(run, weights), axis=-1)


def class_iou(run: Run, weights: np.ndarray | None = None) -> np.ndarray:
    """IoU of each class, (classes,) or (resamples, classes); nan for a class that does not occur."""
    pixels = np.array([[entry.split("/") for entry in image.split()] for image in run.content["pixels"]], float)
    weights = np.ones((1, len(pixels))) if weights is None else weights
    both, either = np.moveaxis(np.tensordot(weights, pixels, axes=1), -1, 0)
    iou = np.divide(both, either, out=np.full_like(both, np.nan), where=either > 0)
    return iou[0] if len(iou) == 1 else iou


def stored_metric(program: str, metric: str) -> Callable[[Run], float]:
    """A measure that a program wrote down for all images together."""
    return lambda run: run.content[program]["metrics"][metric]


# Name in tables -> measure, and whether it takes weights of images.
MEASURES: dict[str, tuple[Callable, bool]] = {
    "frozen mIoU": (mean_iou, True),
    "accuracy": (accuracy, True),
    "k-NN accuracy": (stored_metric("knn", "accuracy"), False),
    "retrieval mIoU": (stored_metric("hummingbird", "mean_iou"), False),
}


def compare(runs: Iterable[Run], model: str, other: str, measure: str) -> Difference | None:
    """A model less another over the seeds that both have; None where there is no such seed."""
    function, by_image = MEASURES[measure]
    found = {(run.model, run.seed): run for run in runs}
    seeds = sorted({seed for name, seed in found if name == model} & {seed for name, seed in found if name == other})
    if not seeds:
        return None
    pairs = [(found[model, seed], found[other, seed]) for seed in seeds]
    differences = [float(function(ours) - function(theirs)) for ours, theirs in pairs]
    over_images = over_blocks = None
    if by_image:
        number = pairs[0][0].content["num_images"] if measure == "accuracy" else len(pairs[0][0].content["pixels"])
        draws = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=NUM_RESAMPLES)
        over_images = _bootstrap(function, pairs, draws)
        if measure == "frozen mIoU":
            over_blocks = _bootstrap(function, pairs, draw_blocks(number))
    names = [run.name for pair in pairs for run in pair]
    return Difference(names, differences, seed_interval(differences), over_images, over_blocks)


def draw_blocks(number: int) -> np.ndarray:
    """Weights (resamples, number) of images in a row, drawn in blocks of `BLOCK`; the last is followed by the first."""
    starts = np.random.default_rng(0).integers(number, size=(NUM_RESAMPLES, -(-number // BLOCK)))
    drawn = ((starts[..., None] + np.arange(BLOCK)) % number).reshape(NUM_RESAMPLES, -1)[:, :number]
    return np.stack([np.bincount(images, minlength=number) for images in drawn]).astype(float)


def _bootstrap(function: Callable, pairs: list[tuple[Run, Run]], weights: np.ndarray) -> tuple[float, float]:
    """The interval of the mean difference over the resamples."""
    resampled = np.mean([function(ours, weights) - function(theirs, weights) for ours, theirs in pairs], axis=0)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def seed_interval(values: list[float]) -> tuple[float, float] | None:
    """Student's interval of a mean; None of a single value."""
    if len(values) < 2:
        return None
    reach = student.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - reach), float(np.mean(values) + reach)
