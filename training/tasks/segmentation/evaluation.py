"""A segmentation model measured on labeled images, and drawn beside their labels."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from locatvit_hf import LocAtViTImageProcessor
from locatvit_hf.inference import InferenceArguments, Segmenter
from locatvit_hf.inference.segmenter import check_inference, prepare_views
from training.data.label_counts import LabelCounts, count_pixels
from training.data.label_maps import LabelArguments, LabelReader, resize_labels
from training.engine.plotting import draw_batch
from training.metrics import compute_over_processes, load_metric


class SegmentationCollator:
    """Turns rows (image, label map) into what `evaluate` takes from a loader.

    That is, for each image, a list of pixels (channels, height, width), one for each of `test_scales`, and its label
    map at its own size.

    Args:
        processor: The image processor of the model.
        read_labels: Reads a label map.
        arguments: How images are segmented.

    Raises:
        ValueError: Images of this processor cannot be segmented in this way.
    """

    def __init__(self, processor: LocAtViTImageProcessor, read_labels: LabelReader, arguments: InferenceArguments):
        check_inference(processor, arguments)
        self.processor, self.read_labels, self.arguments = processor, read_labels, arguments

    def __call__(self, rows: list[tuple[Image.Image, Image.Image]]) -> tuple[list[list[torch.Tensor]], list]:
        labels = [self.read_labels(image, label_map) for image, label_map in rows]
        return [prepare_views(self.processor, image, self.arguments) for image, _ in rows], labels


@torch.inference_mode()
def evaluate(
    segmenter: Segmenter,
    loader: Iterable,
    accelerator: Accelerator,
    report: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Mean IoU, mean and overall accuracy at the size of the labels, over all batches of all processes.

    Args:
        segmenter: Of a model with the names of the classes in its configuration. Where its arguments are
            `LabelArguments` too, they say how label maps were read.
        loader: Batches of a `SegmentationCollator`.
        accelerator: Of the processes.
        report: Called, in all processes, with a sentence that names the classes which no label map holds.

    Returns:
        The metrics, and by class name `per_category_iou` and `per_category_accuracy`, nan for classes that do not
        occur.

    Raises:
        ValueError: No label map holds any class.
    """
    names, arguments = list(segmenter.id2label.values()), segmenter.arguments
    counts = LabelCounts("validation", names, arguments if isinstance(arguments, LabelArguments) else LabelArguments())
    metric = load_metric("mean_iou", num_labels=len(names))
    for views, labels in loader:
        for label_map in labels:
            counts.add(count_pixels(label_map, len(names)))
        with accelerator.autocast():
            class_maps = segmenter.segment_views(views, [tuple(label_map.shape) for label_map in labels])
        metric.add_batch(predictions=[class_map.cpu() for class_map in class_maps], references=labels)
    counts.check(accelerator, report, least=1)
    result = compute_over_processes(accelerator, metric)
    for name in ("per_category_iou", "per_category_accuracy"):
        result[name] = dict(zip(names, result[name], strict=True))
    return result


def draw_examples(segmenter: Segmenter, loader: Iterable, most: int = 4) -> list[Image.Image]:
    """Draw the first images of a loader for `evaluate`, each under its labels and, beside that, under the prediction.

    Args:
        segmenter: As in `evaluate`.
        loader: As in `evaluate`.
        most: How many images are drawn, of the first batch.

    Returns:
        Images at the size that the model sees.
    """
    views, labels = (entries[:most] for entries in next(iter(loader)))
    drawn = []
    class_maps = segmenter.segment_views(views, [of_image[0].shape[-2:] for of_image in views])
    for (pixels, *_), truth, class_map in zip(views, labels, class_maps, strict=True):
        maps = torch.stack([resize_labels(truth, class_map.shape), class_map.cpu().long()])
        batch, processor = (pixels.cpu().expand(2, -1, -1, -1), maps), segmenter.processor
        drawn.append(draw_batch(batch, processor.image_mean, processor.image_std, segmenter.id2label))
    return drawn
