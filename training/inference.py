"""A segmentation model measured on labelled images, and drawn beside their labels."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from transformers import PreTrainedModel

from locatvit_hf import LocAtViTImageProcessor
from locatvit_hf.segmentation import InferenceArguments, check_inference, predict, prepare, scaled_size
from training.augmentation import LabelArguments, LabelReader, resize_labels
from training.data.label_counts import LabelCounts, count_pixels
from training.engine.plotting import draw_batch
from training.metrics import compute_over_processes, load_metric


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
    report: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Mean IoU, mean and overall accuracy at the size of the labels, over all batches of all processes.

    Args:
        model: with the names of the classes in its configuration.
        processor: of the model.
        loader: batches of a `SegmentationCollator`.
        accelerator: of the processes.
        arguments: how images are segmented, and where they are `LabelArguments` too, how label maps were read.
        report: called, in all processes, with a sentence that names the classes which no label map holds.

    Returns:
        The metrics, and by class name `per_category_iou` and `per_category_accuracy`, nan for classes that do not
        occur.

    Raises:
        ValueError: no label map holds any class.
    """
    arguments = arguments or InferenceArguments()
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    counts = LabelCounts("validation", names, arguments if isinstance(arguments, LabelArguments) else LabelArguments())
    metric = load_metric("mean_iou", num_labels=model.config.num_labels)
    model.eval()
    for images, labels in loader:
        images = [[pixels.to(accelerator.device) for pixels in views] for views in images]
        sizes = [tuple(label_map.shape) for label_map in labels]
        for label_map in labels:
            counts.add(count_pixels(label_map, len(names)))
        with accelerator.autocast():
            for index, class_map in predict(model, processor, images, sizes, arguments):
                metric.add(prediction=class_map.cpu(), reference=labels[index])
    counts.check(accelerator, report, least=1)
    result = compute_over_processes(accelerator, metric)
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
        truth = resize_labels(labels[index], class_map.shape)
        batch = images[index][0].cpu().expand(2, -1, -1, -1), torch.stack([truth, class_map.cpu()])
        pictures.append(draw_batch(batch, processor.image_mean, processor.image_std, model.config.id2label))
    return pictures
