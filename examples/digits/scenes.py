"""Cluttered scenes of handwritten digits, with one label an image and one label a pixel.

A scene shows two to four copies of *one* digit class among fragments of other digits: strokes that look like digits
from close by but are none. Its image label is the class; its pixel labels are `1 + class` on the digit's shape, its
strokes with narrow gaps and holes closed, and 0 elsewhere. The digits are the 1797 real ones that ship inside
scikit-learn; no digit is seen in both splits.
"""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

DIGITS = [str(digit) for digit in range(10)]
PIXEL_LABELS = ["background", *DIGITS]
HELD_OUT_SHARE = 0.25


def split_digits(seed: int) -> dict[str, np.ndarray]:
    """Indices into scikit-learn's digits for the two splits; disjoint, together all of them."""
    order = np.random.default_rng(seed).permutation(len(load_digits().target))
    held_out = round(HELD_OUT_SHARE * len(order))
    return {"train": np.sort(order[held_out:]), "validation": np.sort(order[:held_out])}


def make_scenes(train_size: int, validation_size: int, image_size: int = 64, seed: int = 0) -> DatasetDict:
    """Compose both splits.

    Args:
        train_size, validation_size: scenes in each split.
        image_size: side of the square scenes in pixels, at least 32.
        seed: the same seed gives the same scenes on every machine.

    Returns:
        Splits `train` and `validation` with the columns `image` (RGB), `label` (one of ten digits) and `segmentation`
        (8-bit map of the image's size: 0 background, 1 to 10 the digits 0 to 9).
    """
    if image_size < 32:
        raise ValueError(f"Scenes need at least 32 pixels a side to hold a digit and its clutter, not {image_size}.")
    digits = load_digits()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=DIGITS), "segmentation": ImageFeature()})
    pools, sizes = split_digits(seed), {"train": train_size, "validation": validation_size}

    def scenes(split: str):
        images, targets = digits.images[pools[split]], digits.target[pools[split]]
        for index in range(sizes[split]):
            rng = np.random.default_rng([seed, list(sizes).index(split), index])
            image, label, segmentation = compose_scene(images, targets, image_size, rng)
            yield {"image": image, "label": label, "segmentation": segmentation}

    return DatasetDict({split: Dataset.from_list(list(scenes(split)), features=features) for split in sizes})


def compose_scene(
    images: np.ndarray, targets: np.ndarray, image_size: int, rng: np.random.Generator
) -> tuple[Image.Image, int, Image.Image]:
    """One scene from a pool of digits.

    Args:
        images: (digits, 8, 8) intensities from 0 to 16.
        targets: (digits,) classes.

    Returns:
        The RGB scene, its class and its map of pixel labels.
    """
    canvas = _background(image_size, rng)
    segmentation = np.zeros((image_size, image_size), np.uint8)
    occupied = np.zeros((image_size, image_size), bool)
    label = int(rng.integers(10))

    for _ in range(rng.integers(2, 5)):
        digit = images[rng.choice(np.flatnonzero(targets == label))]
        stamp = _stamp(digit, side=rng.uniform(0.34, 0.46) * image_size, degrees=rng.uniform(-15, 15))
        shape = _close_gaps(_place(canvas, occupied, stamp, rng))
        segmentation[shape] = 1 + label
        occupied |= shape
    for _ in range(rng.integers(3, 7)):
        digit, (row, column) = images[rng.integers(len(images))], rng.integers(0, 5, size=2)
        fragment = digit[row : row + 4, column : column + 4]
        stamp = _stamp(fragment, side=rng.uniform(0.14, 0.21) * image_size, degrees=rng.uniform(0, 360))
        _place(canvas, occupied, stamp, rng)

    canvas += rng.normal(0, 0.03, canvas.shape)
    pixels = (255 * canvas.clip(0, 1)).round().astype(np.uint8)
    return Image.fromarray(pixels), label, Image.fromarray(segmentation)


def _background(image_size: int, rng: np.random.Generator) -> np.ndarray:
    """A dark and smooth colour texture, (size, size, 3) in 0 to 1."""
    coarse = Image.fromarray((255 * rng.uniform(0.0, 0.35, (5, 5, 3))).astype(np.uint8))
    return np.asarray(coarse.resize((image_size, image_size), Image.Resampling.BICUBIC), np.float64) / 255


def _stamp(strokes: np.ndarray, side: float, degrees: float) -> np.ndarray:
    """Enlarge and turn a piece of digit; the result holds opacities in 0 to 1."""
    stamp = Image.fromarray((255 / 16 * np.pad(strokes, 1)).clip(0, 255).astype(np.uint8))
    side = round(side * (len(strokes) + 2) / len(strokes))
    stamp = stamp.resize((side, side), Image.Resampling.BICUBIC).rotate(degrees, Image.Resampling.BICUBIC)
    opacity = np.asarray(stamp.filter(ImageFilter.GaussianBlur(0.5)), np.float64) / 255
    return (2.0 * opacity - 0.3).clip(0, 1)


def _close_gaps(opacity: np.ndarray) -> np.ndarray:
    """Morphological closing: gaps and holes of up to eight pixels between strokes belong to the shape."""
    margin = 8  # the filters leave the border of an image alone
    strokes = Image.fromarray(np.pad(np.where(opacity > 0.5, 255, 0).astype(np.uint8), margin))
    closed = strokes.filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.MinFilter(9))
    return np.asarray(closed)[margin:-margin, margin:-margin] > 0


def _place(canvas: np.ndarray, occupied: np.ndarray, stamp: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint a stamp in a bright colour on a free spot of the canvas; return its opacity on the whole canvas.

    Nothing is painted when no free spot is found in fifty tries.
    """
    side, opacity = len(stamp), np.zeros(occupied.shape)
    for row, column in rng.integers(0, len(canvas) - side + 1, size=(50, 2)):
        window = np.s_[row : row + side, column : column + side]
        if not (occupied[window] & (stamp > 0)).any():
            occupied[window] |= stamp > 0
            opacity[window] = stamp
            canvas += opacity[..., None] * (rng.uniform(0.55, 1.0, 3) - canvas)
            break
    return opacity


if __name__ == "__main__":
    import sys

    make_scenes(train_size=3000, validation_size=400).save_to_disk(sys.argv[1])
