"""A segmentation model measured on labelled images, and drawn beside their labels."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers import PreTrainedModel

from locatvit_hf import LocAtViTImageProcessor
from locatvit_hf.segmentation import InferenceArguments, check_inference, predict, prepare, scaled_size
from training.augmentation import LabelReader
from training.metrics import compute_over_processes, load_metric
from training.pictures import draw_batch


class SegmentationCollator:
    """Turns rows (image, label map) into what `evaluate` takes from a loader.

    That is, for each image, a list of pixels (channels, height, width), one for each of `test_scales`, and its label
    map at its own size.
    """

    def __init__(self, processor: LocAtViTImageProcessor, read_labels: LabelReader, arguments: InferenceArguments):
        check_inference(processor, arguments)
        self.processor, self.read_labels = processor, read_labels
        self.sizes = [scaled_size(processor, scale) for scale in arguments.test_scales]

    def __call__(self, rows: list[tuple[Image.Image, Image.Image]]) -> tuple[list[list[torch.Tensor]], list]:
        labels = [self.read_labels(image, label_map) for image, label_map in rows]
        return [prepare(self.processor, image, self.sizes) for image, _ in rows], labels


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    processor: LocAtViTImageProcessor,
    loader: Iterable,
    accelerator: Accelerator,
    arguments: InferenceArguments | None = None,
) -> dict[str, Any]:
    """Mean IoU, mean and overall accuracy at the size of the labels, over all batches of all processes.

    loader: batches of a `SegmentationCollator`.
    Returns also `per_category_iou` and `per_category_accuracy` by class name, nan for classes that do not occur.
    """
    arguments = arguments or InferenceArguments()
    metric = load_metric("mean_iou", num_labels=model.config.num_labels)
    model.eval()
    for images, labels in loader:
        images = [[pixels.to(accelerator.device) for pixels in views] for views in images]
        sizes = [tuple(label_map.shape) for label_map in labels]
        with accelerator.autocast():
            for index, class_map in predict(model, processor, images, sizes, arguments):
                metric.add(prediction=class_map.cpu(), reference=labels[index])
    result = compute_over_processes(accelerator, metric)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    for name in ("per_category_iou", "per_category_accuracy"):
        result[name] = dict(zip(names, result[name], strict=True))
    return result


@torch.inference_mode()
def draw_examples(
    model: PreTrainedModel,
    processor: LocAtViTImageProcessor,
    loader: Iterable,
    arguments: InferenceArguments,
    most: int = 4,
) -> list[Image.Image]:
    """The first images of a loader for `evaluate`, each under its labels and, beside that, under the prediction."""
    images, labels = (entries[:most] for entries in next(iter(loader)))
    images = [[pixels.to(model.device) for pixels in views] for views in images]
    model.eval()
    pictures = []
    # Drawn at the size that the model sees.
    for index, class_map in predict(model, processor, images, [views[0].shape[-2:] for views in images], arguments):
        truth = tvF.resize_mask(labels[index][None], list(class_map.shape))[0]
        batch = images[index][0].cpu().expand(2, -1, -1, -1), torch.stack([truth, class_map.cpu()])
        pictures.append(draw_batch(batch, processor.image_mean, processor.image_std, model.config.id2label))
    return pictures
