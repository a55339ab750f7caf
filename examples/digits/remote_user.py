"""What a user without this package does: load the exported folders by `trust_remote_code=True`, run the pipelines.

    python -I examples/digits/remote_user.py MODELS SCENES PREDICTIONS

It runs in a process of its own that cannot import this project. MODELS holds the folders `NAME-classification` and
`NAME-segmentation`; SCENES is a saved `datasets.Dataset` with a column `image`. For every NAME it writes
`PREDICTIONS/NAME.npz` with `labels` (scenes,) and `maps` (scenes, height, width).
"""

import os
import sys
import tempfile
from pathlib import Path

sys.modules["locatvit_hf"] = None  # from here on, importing it is an ImportError
os.environ.update(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=tempfile.mkdtemp())

import numpy as np  # noqa: E402
from datasets import load_from_disk  # noqa: E402
from transformers import logging, pipeline  # noqa: E402

BATCH_SIZE = 50


def classify(folder: Path, images: list) -> np.ndarray:
    """The id of the best class of every image."""
    classifier = pipeline("image-classification", str(folder), trust_remote_code=True)
    label2id = classifier.model.config.label2id
    results = classifier(images, top_k=1, batch_size=BATCH_SIZE)
    return np.array([label2id[best["label"]] for (best,) in results])


def segment(folder: Path, images: list) -> np.ndarray:
    """The class of every pixel, put together from the masks that the pipeline returns."""
    segmenter = pipeline("image-segmentation", str(folder), trust_remote_code=True)
    label2id = segmenter.model.config.label2id
    maps = []
    for masks in segmenter(images, batch_size=BATCH_SIZE):
        label_map = np.zeros((masks[0]["mask"].height, masks[0]["mask"].width), np.uint8)
        for entry in masks:
            label_map[np.asarray(entry["mask"]) > 0] = label2id[entry["label"]]
        maps.append(label_map)
    return np.stack(maps)


def main(models: Path, scenes: Path, predictions: Path) -> None:
    logging.set_verbosity(
        logging.CRITICAL
    )  # the segmentation pipeline reports an error that is none, for any custom model
    logging.disable_progress_bar()
    images = list(load_from_disk(str(scenes))["image"])
    predictions.mkdir(parents=True, exist_ok=True)
    for folder in sorted(models.glob("*-classification")):
        name = folder.name.removesuffix("-classification")
        labels, maps = classify(folder, images), segment(models / f"{name}-segmentation", images)
        np.savez_compressed(predictions / f"{name}.npz", labels=labels, maps=maps)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
