"""Object detection and instance segmentation on COCO or data in its format, with Mask R-CNN on our encoders.

accelerate launch -m training.detect --config training/recipes/detect/coco_pacavit.yaml --pretrained FOLDER \
    --output_dir runs/coco
"""

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32, send_to_device
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tvF
from torchvision.utils import draw_bounding_boxes
from transformers import AutoBackbone, AutoConfig

from locatvit_hf import LocAtViTImageProcessor
from locatvit_hf.detection import Detector, DetectorSettings, pyramid_config
from locatvit_hf.detection.detector import backbone_class
from locatvit_hf.utils.colors import label_colors
from training.data import TrainingSamples, create_evaluation_loader, describe_data
from training.engine.arguments import option, run_program
from training.engine.distributed import create_accelerator
from training.engine.loop import TrainingLoop
from training.engine.optimization import create_optimizer
from training.engine.plotting import caption, restore_image
from training.engine.schedule import Schedule
from training.engine.settings import ProgramArguments
from training.metrics import compute_over_processes, load_metric
from training.tasks.checkpoint_loading import build_config
from training.tasks.detection import (
    DetectionAugmentation,
    DetectionDataArguments,
    DetectionTransform,
    EvaluationCollator,
    collate_training,
    load_detection_splits,
)

NUM_DRAWN = 10
"""Boxes that are drawn in an image."""


@strict
@dataclass(kw_only=True)
class DetectArguments(DetectionDataArguments, ProgramArguments, DetectorSettings, DetectionAugmentation):
    """Settings of `detect`; the defaults are the 1x schedule of Mask R-CNN with AdamW."""

    pretrained: str | None = option(None, "Folder or Hub name of the encoder to start from.")
    family: str = option("pacavit", "`model_type` of a fresh encoder.")
    preset: str | None = option(None, "Sizes of the paper, of a fresh encoder.")
    model: dict[str, Any] = option({}, "Fields of the encoder's configuration: --model.drop_path_rate 0.1.")
    length: str = "12 epochs"
    warmup: str = "500 steps"
    schedule: Literal["linear", "cosine", "constant", "step"] = "step"
    milestones: list[str] = field(default_factory=lambda: ["8 epochs", "11 epochs"])
    learning_rate: float | int = 1e-4
    max_gradient_norm: float | int | None = None
    batch_size: int = 16
    dtype: Literal["float32"] = option("float32", "The detector's operations on boxes need it; see mixed_precision.")
    eval_batch_size: int = 1


def main(arguments: DetectArguments) -> dict[str, Any]:
    """Train, evaluate and export; returns the content of `all_results.json`."""
    accelerator = create_accelerator(arguments)
    splits = load_detection_splits(arguments, arguments.masks)
    columns = ["image", "objects"]
    schedule = Schedule.resolve(arguments, len(splits.train), accelerator.num_processes)

    torch.manual_seed(arguments.seed)
    model = build_model(arguments, splits.categories)
    processor = LocAtViTImageProcessor.from_model_config(model.encoder.config)
    optimizer = create_optimizer(model, arguments)
    reading = arguments.masks, processor.image_mean, processor.image_std
    samples = TrainingSamples(splits.train, columns, DetectionTransform(arguments, *reading), arguments.seed)
    validation = create_evaluation_loader(
        splits.validation, columns, EvaluationCollator(*reading), arguments, accelerator
    )

    names = [category["name"] for category in splits.categories]
    data = partial(describe_data, columns, names, training=splits.train, validation=splits.validation)
    run = accelerator, arguments, schedule, model, processor, optimizer, samples
    metric = "segm_ap" if arguments.masks else "bbox_ap"
    loop = TrainingLoop(*run, metric=metric, collate=collate_training, data=data)
    with loop:
        for note in splits.notes:
            loop.print(note)
        for images, targets in loop:
            losses = loop.model(images, targets)
            loop.update(sum(losses.values()), losses)
            if loop.evaluation_due:
                metrics = evaluate(loop.evaluation_model, validation, accelerator)
                loop.record(metrics, partial(draw_detections, loop.evaluation_model, validation, accelerator))
    return loop.finish(
        num_train_images=len(splits.train), num_validation_images=len(splits.validation), notes=splits.notes
    )


def build_model(arguments: DetectArguments, categories: list[dict[str, Any]]) -> Detector:
    """The detector with a pretrained or a fresh encoder."""
    settings = DetectorSettings(**{f.name: getattr(arguments, f.name) for f in fields(DetectorSettings)})
    if arguments.pretrained is None:
        config = pyramid_config(build_config(arguments.family, arguments.preset, arguments.model))
        return Detector(AutoBackbone.from_config(config), categories, settings)
    config = AutoConfig.from_pretrained(arguments.pretrained)
    build_config(config.model_type, None, arguments.model)  # refuses what is not a field
    for name, value in arguments.model.items():
        setattr(config, name, value)
    encoder = backbone_class(pyramid_config(config)).from_pretrained(
        arguments.pretrained, config=config, dtype=torch.float32
    )
    return Detector(encoder, categories, settings)


@torch.inference_mode()
def evaluate(model: Detector, loader: DataLoader, accelerator: Accelerator) -> dict[str, Any]:
    """COCO average precision over all batches of all processes."""
    metric = load_metric("coco_average_precision", iou_types=["bbox", "segm"] if model.settings.masks else ["bbox"])
    model.eval()
    for images, references in loader:
        with accelerator.autocast():
            results = model([image.to(accelerator.device) for image in images])
        predictions = send_to_device(convert_to_fp32(results), "cpu")  # NumPy has no bfloat16
        metric.add_batch(predictions=predictions, references=references)
    scores = compute_over_processes(accelerator, metric)
    for name in [name for name in scores if name.endswith("_per_category")]:
        # By the names of the categories, as a reader knows them.
        scores[name] = {model.categories[label]["name"]: value for label, value in scores[name].items()}
    return scores


@torch.inference_mode()
def draw_detections(model: Detector, loader: DataLoader, accelerator: Accelerator) -> list[Image.Image]:
    """The first images of the validation split with the boxes that the detector is most sure of."""
    images = [image.to(accelerator.device) for image in next(iter(loader))[0]]
    config, drawn = model.encoder.config, []
    table = label_colors(len(model.categories))
    with accelerator.autocast():
        found = model.eval()(images)
    for image, objects in zip(images, found, strict=True):
        pixels = tvF.pil_to_tensor(restore_image(image, config.image_mean, config.image_std))
        boxes, labels = objects["boxes"][:NUM_DRAWN].float().cpu(), objects["labels"][:NUM_DRAWN].tolist()
        if len(boxes):
            names = [model.categories[label]["name"] for label in labels]
            colors = [tuple(table[label].tolist()) for label in labels]
            pixels = draw_bounding_boxes(pixels, boxes, names, colors, width=2)
        drawn.append(caption(tvF.to_pil_image(pixels), ""))
    return drawn


if __name__ == "__main__":
    run_program(main, DetectArguments)
