"""What the programs of `training/` do not say of a run: results image by image, Gaussians, and features layer by layer.

Image by image, because intervals come from resampling images; see `experiments.locality.analysis`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import PreTrainedModel

from locatvit_hf.inference import Checkpoint, Segmenter
from locatvit_hf.visualization import read_gaussians, read_layers
from training.data import create_evaluation_loader, load_splits
from training.data.label_maps import LabelReader
from training.engine.arguments import build_arguments, load_recipe
from training.evaluation.classification import load_classifier
from training.pretrain import PretrainArguments
from training.segment import SegmentArguments
from training.tasks.checkpoint_loading import load_processor
from training.tasks.classification import collate
from training.tasks.segmentation.evaluation import SegmentationCollator

from .runs import RECIPES

# Which validation image of CamVid the maps of similarity are of; chosen before any model was trained.
SHOWN_IMAGE = 50
QUARTILES = (0.25, 0.5, 0.75)


def measure_run(classifier: Path, segmenter: Path, tiny_imagenet: str, camvid: str) -> dict[str, Any]:
    """All that this file measures of the two exported models of a run; see its functions."""
    accelerator = Accelerator(cpu=True)
    opened = Checkpoint(str(segmenter)).load_segmenter(dtype=torch.float32, device="cpu")
    arguments = build_arguments(SegmentArguments, load_recipe(RECIPES / "segment" / "probe.yaml") | {"dataset": camvid})
    reader = LabelReader(arguments, len(opened.id2label))
    rows = load_splits(arguments, segmentation=True).validation
    collator = SegmentationCollator(opened.processor, reader, arguments)
    columns = [arguments.image_column, arguments.label_column]
    segmentation = create_evaluation_loader(rows, columns, collator, arguments, accelerator)

    arguments = build_arguments(
        PretrainArguments, load_recipe(RECIPES / "pretrain" / "shared.yaml") | {"dataset": tiny_imagenet}
    )
    named = load_classifier(str(classifier)).eval()
    rows = load_splits(arguments).validation
    reading = partial(collate, load_processor(str(classifier), named.config))
    columns = [arguments.image_column, arguments.label_column]
    classification = create_evaluation_loader(rows, columns, reading, arguments, accelerator)
    return {
        "num_images": len(rows),
        "correct": correct_images(named, classification),
        "pixels": count_pixels(opened, segmentation),
        "gaussians": summarize_gaussians(named, next(iter(classification))[0]),
        "features": summarize_features(opened.model, segmentation),
    }


@torch.inference_mode()
def correct_images(model: PreTrainedModel, loader) -> str:
    """Which images of a loader (pixels, labels) are given their label: one bit each, in hexadecimal."""
    correct = [model(pixel_values=pixels).logits.argmax(dim=-1) == torch.tensor(labels) for pixels, labels in loader]
    return np.packbits(torch.cat(correct).numpy()).tobytes().hex()


@torch.inference_mode()
def count_pixels(segmenter: Segmenter, loader) -> list[str]:
    """Of each image, of each class, pixels in the intersection and the union of label and prediction: "12/40 0/7"."""
    number, images = len(segmenter.id2label), []
    for views, labels in loader:
        sizes = [tuple(label_map.shape) for label_map in labels]
        predicted = segmenter.segment_views(views, sizes)
        for index, truth in enumerate(labels):
            valid = truth < number
            truth, found = (F.one_hot(ids[valid].long(), number).bool() for ids in (truth, predicted[index]))
            counts = torch.stack([(truth & found).sum(dim=0), (truth | found).sum(dim=0)], dim=1)
            images.append(" ".join(f"{both}/{either}" for both, either in counts.tolist()))
    return images


def summarize_gaussians(model: PreTrainedModel, pixels: torch.Tensor) -> list[dict[str, list[float]]]:
    """Of each layer, over images, heads and patches: quartiles of the standard deviations along rows and along columns,
    in patches, and of the amplitude, which is added to attention logits. Empty for a model without Gaussians.
    """
    if not getattr(model.config, "use_gaussian", False):
        return []
    layers = []
    for gaussian in read_gaussians(model, pixels):
        rows, columns = gaussian.inverse_variance.rsqrt().unbind(dim=-1)
        values = {"rows": rows, "columns": columns, "amplitude": gaussian.amplitude}
        layers.append({name: _quartiles(value) for name, value in values.items()})
    return layers


@torch.inference_mode()
def summarize_features(model: PreTrainedModel, loader) -> dict[str, Any]:
    """Whether the patches of an image say the same, as the probe sees them.

    `patches`: of each layer, quartiles over images of the mean cosine between the features of two patches, or of one.
    `class_token`: the same between a patch and the class token; None for a model without one.
    `map`: of each layer, for image `SHOWN_IMAGE`, the cosine of every patch to the class token, or to the mean patch,
    row by row, as "0.81 0.79".
    """
    patches, class_token, maps, seen = [], [], None, 0
    for views, _ in loader:
        for view in views:
            layers = read_layers(model, view[0][None])
            units = [F.normalize(layer.features, dim=-1) for layer in layers]
            patches.append([unit.mean(dim=0).square().sum() for unit in units])
            references = [
                F.normalize(layer.class_features[0] if len(layer.class_features) else unit.mean(dim=0), dim=-1)
                for layer, unit in zip(layers, units, strict=True)
            ]
            cosines = [unit @ reference for unit, reference in zip(units, references, strict=True)]
            if all(len(layer.class_features) for layer in layers):
                class_token.append([cosine.mean() for cosine in cosines])
            if seen == SHOWN_IMAGE:
                maps = [
                    [" ".join(f"{value:.2f}" for value in row) for row in cosine.reshape(layer.grid).tolist()]
                    for layer, cosine in zip(layers, cosines, strict=True)
                ]
            seen += 1
    by_layer = {name: [_quartiles(torch.stack(layer)) for layer in zip(*found, strict=True)] if found else None
                for name, found in (("patches", patches), ("class_token", class_token))}  # fmt: skip
    return {**by_layer, "map": maps}


def _quartiles(values: torch.Tensor) -> list[float]:
    quartiles = np.quantile(values.detach().float().numpy(), QUARTILES)
    return [round(float(value), 5) for value in quartiles]
