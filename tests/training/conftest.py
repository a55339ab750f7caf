"""A dataset small enough for the programs to learn from within seconds."""

from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image

from tests.factories import SMALLEST

SMALL_MODEL = {**SMALLEST["locatvit"], "segmentation_hidden_size": 16, "crop_pct": 1.0}
# For runs that must learn the same from sums in another order. AdamW scales every gradient to steps of one length, also
# one that is nothing but rounding, as that of a key's bias, which moves no attention.
PLAIN_DESCENT = {"optimizer": "sgd", "learning_rate": 0.05}


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> Path:
    """Saved splits of 48 and 10 images: a red or a green square on noise, with its label and its pixels."""
    folder = tmp_path_factory.mktemp("data") / "squares"
    features = Features(
        {"image": ImageFeature(), "label": ClassLabel(names=["red", "green"]), "segmentation": ImageFeature()}
    )

    def rows(count: int, seed: int):
        rng = np.random.default_rng(seed)
        for index in range(count):
            label, (row, column) = index % 2, rng.integers(0, 9, 2)
            pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
            classes = np.zeros((16, 16), np.uint8)
            pixels[row : row + 8, column : column + 8, label] = 250
            classes[row : row + 8, column : column + 8] = 1 + label
            yield {"image": Image.fromarray(pixels), "label": label, "segmentation": Image.fromarray(classes)}

    splits = {"train": list(rows(48, 0)), "validation": list(rows(10, 1))}
    DatasetDict({name: Dataset.from_list(split, features=features) for name, split in splits.items()}).save_to_disk(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def pretrain_settings(squares) -> dict:
    """Settings of `pretrain` that exercise everything random: augmentation, mixing, drop path, dropout."""
    return {
        "dataset": str(squares),
        "model": {**SMALL_MODEL, "drop_path_rate": 0.2, "hidden_dropout_prob": 0.1},
        "length": "4 epochs",
        "warmup": "1 epochs",
        "batch_size": 8,
        "evaluate_every": "2 epochs",
        "checkpoint_every": "1 steps",
        "log_every": 1,
        "ema_decay": 0.9,
        "seed": 3,
    }
