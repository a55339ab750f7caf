"""The digits alone: all of them, in the splits of the scenes, bright on black."""

import numpy as np

from examples.digits.scenes import split_digits
from examples.digits.single_digits import make_digits


def test_digits():
    splits = make_digits(image_size=32)
    assert {name: len(split) for name, split in splits.items()} == {n: len(i) for n, i in split_digits(0).items()}
    assert sum(map(len, splits.values())) == 1797
    row = splits["train"][0]
    assert row["image"].size == (32, 32) and row["image"].mode == "RGB"
    corners = np.asarray(row["image"])[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.max() < 60 < np.asarray(row["image"]).max()
    assert set(splits["validation"]["label"]) == set(range(10))
