"""The digits alone, one an image: `python -m examples.digits.single_digits FOLDER` saves them as a data set."""

import sys

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

from examples.digits.scenes import DIGITS, split_digits


def make_digits(image_size: int = 32, seed: int = 0) -> DatasetDict:
    """All 1797 digits, enlarged, in the splits that the scenes are made of.

    Returns splits `train` and `validation` with the columns `image` (RGB, bright on black) and `label`.
    """
    digits = load_digits()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=DIGITS)})
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)

    def row(index: int) -> dict:
        image = Image.fromarray(pixels[index]).resize((image_size, image_size), Image.Resampling.BICUBIC)
        return {"image": image.convert("RGB"), "label": int(digits.target[index])}

    splits = split_digits(seed)
    return DatasetDict({s: Dataset.from_list([row(i) for i in chosen], features) for s, chosen in splits.items()})


if __name__ == "__main__":
    make_digits().save_to_disk(sys.argv[1])
