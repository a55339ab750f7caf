"""Dense nearest-neighbor retrieval: patches are segmented by the labels of similar training patches, untrained.

accelerate launch -m training.evaluation.hummingbird --pretrained FOLDER --dataset FOLDER --output_dir runs/results

The protocol of Balažević et al., "Towards In-Context Scene Understanding", NeurIPS 2023, as used for LocAtViT:

1. The features are those of the last layer (Swin: of the third stage), before the norm and without the refinement.
2. Training images and their labels are resized to the model's size, or a random crop of them is; with probability 0.5
   each, brightness, contrast, saturation and hue change by up to 0.1. Crops are half of the area or more: our choice,
   where the evaluation also draws areas larger than the image.
3. The memory holds unit features with the fraction of each class in the pixels of their patch. It is unbounded there;
   here `memory_size` bounds it, which is our choice, and so is what is left out: every image gives an equal number of
   patches, those of rare classes with preference, see `sample_patches`. A memory that holds all patches samples none.
4. A patch of a validation image, whole and resized, gets the fractions of its k = 30 neighbors by cosine, weighted by
   softmax(cosine / 0.02); the map of fractions is upsampled bilinearly, and the largest is the class.

Also our choice: images are normalized as the model's processor does it, where the evaluation takes mean and standard
deviation of ImageNet (but 0.255 for blue, by a slip of 0.225); label maps are resized by the nearest center, as Pillow
does there; classes keep the names that the memory gives them, where the evaluation matches them anew by the
Hungarian method; pixels without a class are left out, where it counts them as class 0 in the memory; and scores are
taken at the size of the labels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from huggingface_hub.dataclasses import strict
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import AutoBackbone, PreTrainedModel

from locatvit_hf.configuration_utils_locat import pair
from locatvit_hf.image_processing_locatvit import pil_to_rgb
from training.data import create_evaluation_loader, load_splits, sample_randomness
from training.data.label_counts import LabelCounts, count_pixels
from training.data.label_maps import IGNORE_INDEX, LabelReader, ResizedLabelArguments, resize_labels
from training.engine.arguments import option, run_program
from training.evaluation.features import gather_in_order, load_encoder
from training.evaluation.results import EvaluationArguments, Meter, start_evaluation, tell, write_result
from training.metrics import compute_over_processes, load_metric
from training.tasks.checkpoint_loading import change_config


@strict
@dataclass(kw_only=True)
class HummingbirdArguments(EvaluationArguments, ResizedLabelArguments):
    """Settings of `evaluation.hummingbird`."""

    memory_size: int = option(1_000_000, "Patches that the memory holds at most.", least=1)
    k: int = option(30, "Patches of the memory that answer for a patch.", least=1)
    temperature: float | int = option(0.02, "Their weights are softmax(cosine / this).")
    epochs: int = option(1, "Passes over the training split that fill the memory.", least=1)
    augment: bool = option(True, "Crop and recolor the training images of the memory.")
    stage: str | None = option(None, "Stage that gives the features; by default the last, the third of a pyramid.")


def main(arguments: HummingbirdArguments) -> dict[str, Any]:
    """Fill the memory, segment the validation split; returns the content of `hummingbird.json`."""
    if not arguments.temperature > 0:
        raise ValueError(f"temperature must be above 0, got {arguments.temperature}.")
    if arguments.epochs > 1 and not arguments.augment:
        raise ValueError("Without --augment every epoch remembers the same patches: give one.")
    accelerator = start_evaluation(arguments)
    splits = load_splits(arguments, segmentation=True)
    if splits.label_names is None:
        raise ValueError("The data does not name its classes: give --label_names, a list or a JSON file {id: name}.")
    num_labels = len(splits.label_names)
    model = load_backbone(str(arguments.pretrained), arguments.stage).to(accelerator.device)
    columns = [arguments.image_column, arguments.label_column]
    read_labels = LabelReader(arguments, num_labels)
    meter = Meter(accelerator)
    remembered, measured = (LabelCounts(split, splits.label_names, arguments) for split in ("training", "validation"))
    with meter.measure():
        parts = []
        for epoch in range(arguments.epochs):
            settings = arguments.augment, arguments.label_interpolation
            transform = JointTransform(model.config, read_labels, arguments.seed, epoch, *settings)
            collate: Callable = partial(collate_patches, transform)
            loader = create_evaluation_loader(splits.train, columns, collate, arguments, accelerator, numbered=True)
            quotas = memory_quotas(arguments, len(splits.train), epoch)
            batches = meter.counted(counted(loader, remembered))
            parts += remember(model, batches, accelerator, quotas, num_labels, (arguments.seed, epoch))
        remembered.check(accelerator, partial(tell, accelerator), least=2)
        if not sum(len(keys) for keys, *_ in parts):
            raise ValueError("No training patch of this process has a label: nothing can be remembered.")
        features, fractions = gather_in_order(accelerator, *map(torch.cat, zip(*parts, strict=True)))
        bank = MemoryBank(features, fractions, arguments.k, arguments.temperature)

        transform = JointTransform(model.config, read_labels, arguments.seed, 0, augment=False)
        collate = partial(collate_queries, transform)
        loader = create_evaluation_loader(splits.validation, columns, collate, arguments, accelerator, numbered=True)
        metric = load_metric("mean_iou", num_labels=num_labels)
        for pixels, labels in meter.counted(counted(loader, measured)):
            for class_map, truth in zip(segment(model, bank, pixels, labels, accelerator), labels, strict=True):
                metric.add(prediction=class_map, reference=truth)
        measured.check(accelerator, partial(tell, accelerator), least=1)
        metrics = compute_over_processes(accelerator, metric)
    for name in ("per_category_iou", "per_category_accuracy"):
        metrics[name] = dict(zip(splits.label_names, metrics[name], strict=True))
    counts = {"num_train_images": len(splits.train), "num_images": len(splits.validation)}
    searched = {"memory_entries": len(bank), "search": bank.search_device}
    return write_result(meter, arguments, metrics, model, **searched, **counts)


def counted(loader: Iterable, counts: LabelCounts) -> Iterator[Any]:
    """The batches of a loader, whose second entry are label maps; their pixels are counted by class."""
    for batch in loader:
        for label_map in batch[1]:
            counts.add(count_pixels(label_map, len(counts.names)))
        yield batch


def load_backbone(pretrained: str, stage: str | None) -> PreTrainedModel:
    """The encoder of any checkpoint of ours, or of a plain ViT, that answers with the map of one stage, un-normed."""
    encoder = load_encoder(pretrained)
    names = encoder.config.stage_names
    if stage is None:
        stage = "stage3" if encoder.config.model_type in ("locatswin", "pacavit") else names[-1]
    if stage not in names:
        raise ValueError(f"{pretrained} has no stage {stage!r}; choose among {', '.join(names)}.")
    fields = {"out_features": [stage], "feature_pyramid": False, "apply_layernorm": False}
    fields = {name: value for name, value in fields.items() if hasattr(encoder.config, name) or name == "out_features"}
    model = AutoBackbone.from_config(change_config(encoder.config, fields))
    model.base_model.load_state_dict(encoder.state_dict())
    return model.eval()


class JointTransform:
    """Maps (image, label map, index) to pixels (3, height, width) and labels (height, width) of the model's size.

    The whole image is resized, its sides each for itself. With `augment` a random half or more of it is, and its
    colors change a little, as (seed, epoch, index) determine.
    """

    def __init__(
        self,
        config: Any,
        read_labels: LabelReader,
        seed: int,
        epoch: int,
        augment: bool,
        label_interpolation: str = "nearest-exact",
    ):
        size = list(pair(config.image_size))
        self.read_labels, self.key, self.is_gray = read_labels, (seed, epoch), config.num_channels == 1
        color = [{name: 0.1} for name in ("brightness", "contrast", "saturation", "hue")]
        self.transform = v2.Compose(
            [
                *([v2.RandomApply([v2.ColorJitter(**change)], 0.5) for change in color] if augment else []),
                JointCrop(size, augment, label_interpolation),
                v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}, scale=True),
                v2.Normalize(list(config.image_mean), list(config.image_std)),
            ]
        )

    def __call__(self, image: Image.Image, label_map: Image.Image, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = self.read_labels(image, label_map)
        pixels = pil_to_rgb(image)
        pixels = v2.functional.rgb_to_grayscale(pixels) if self.is_gray else pixels
        with sample_randomness(*self.key, index):
            moved, moved_labels = self.transform(tv_tensors.Image(pixels), tv_tensors.Mask(labels))
        return moved.as_subclass(torch.Tensor), moved_labels.as_subclass(torch.Tensor)


class JointCrop(v2.RandomResizedCrop):
    """A random half or more of an image and its label map, or the whole, resized to `size` (height, width)."""

    def __init__(self, size: list[int], augment: bool, label_interpolation: str):
        super().__init__(size, scale=(0.5, 1.0))
        self.augment, self.label_interpolation = augment, label_interpolation

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        if self.augment:
            return super().make_params(flat_inputs)
        height, width = v2.functional.get_size(flat_inputs[0])
        return {"top": 0, "left": 0, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            crop = v2.functional.crop_mask(inpt.as_subclass(torch.Tensor), **params)
            return tv_tensors.Mask(resize_labels(crop, self.size, self.label_interpolation))
        return super().transform(inpt, params)


def collate_patches(transform: JointTransform, rows: list[tuple]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Rows (image, label map, index) as pixels, labels of the same size, and indices."""
    pixels, labels = zip(*(transform(*row) for row in rows), strict=True)
    return torch.stack(pixels), torch.stack(labels), [index for *_, index in rows]


def collate_queries(transform: JointTransform, rows: list[tuple]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rows (image, label map, index) as pixels, and labels at their own size."""
    pixels = torch.stack([transform(*row)[0] for row in rows])
    return pixels, [transform.read_labels(image, label_map) for image, label_map, _ in rows]


def memory_quotas(arguments: HummingbirdArguments, num_images: int, epoch: int) -> np.ndarray:
    """How many patches of each image may be remembered in an epoch, (num_images,): `memory_size` together.

    Where it does not divide evenly, or is less than one patch an image, the seed decides who gets one more.
    """
    total = arguments.memory_size // arguments.epochs + (epoch < arguments.memory_size % arguments.epochs)
    quotas = np.full(num_images, total // num_images)
    lucky = np.random.default_rng([arguments.seed, epoch]).permutation(num_images)[: total % num_images]
    quotas[lucky] += 1
    return quotas


@torch.inference_mode()
def remember(
    model: PreTrainedModel,
    loader: Any,
    accelerator: Accelerator,
    quotas: np.ndarray,
    num_labels: int,
    key: tuple[int, int],
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of every image of this process the sampled patches: keys (n,), features (n, channels), fractions of classes.

    Args:
        key: (seed, epoch), which with the image's index determines what is sampled.
    """
    for pixels, labels, indices in loader:
        with accelerator.autocast():
            maps = model(pixels.to(accelerator.device)).feature_maps[0].float()
        counts = count_classes(labels.to(accelerator.device), tuple(maps.shape[-2:]), num_labels)
        for features, patch_counts, index in zip(maps.flatten(2).transpose(1, 2), counts, indices, strict=True):
            chosen = sample_patches(patch_counts.cpu(), int(quotas[index]), (*key, index)).to(features.device)
            histograms = patch_counts[chosen].float()
            # One number that orders epochs, then images, then patches.
            keys = (key[1] * len(quotas) + index) * features.shape[0] + chosen
            yield keys, F.normalize(features[chosen], dim=1), histograms / histograms.sum(dim=1, keepdim=True)


def count_classes(labels: torch.Tensor, grid: tuple[int, int], num_labels: int) -> torch.Tensor:
    """Pixels of each class in each patch, (batch, patches, classes), of labels (batch, height, width).

    Pixels without a class are not counted. Raises ValueError where patches do not divide the image.
    """
    (batch, height, width), (rows, columns) = labels.shape, grid
    if height % rows or width % columns:
        raise ValueError(f"An image of {height} x {width} pixels is not divided evenly by {rows} x {columns} patches.")
    patches = labels.reshape(batch, rows, height // rows, columns, width // columns).transpose(2, 3)
    patches = patches.reshape(batch, rows * columns, -1)
    patches = torch.where(patches == IGNORE_INDEX, num_labels, patches)
    counts = torch.zeros(batch, rows * columns, num_labels + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(2, patches, torch.ones_like(patches))[..., :num_labels]


def sample_patches(counts: torch.Tensor, quota: int, key: tuple[int, ...]) -> torch.Tensor:
    """Indices, ascending, of at most `quota` patches that have a label, patches of rare classes with preference.

    Our choice: those are taken for which a random number in [0, 1), times the sum of the numbers of patches in the
    image that hold each of the patch's classes, is lowest: a class that few patches hold gives a low score.

    Args:
        counts: (patches, classes) on CPU.
        quota: Patches at most.
        key: Determines the random numbers.
    """
    present = counts > 0
    labeled = present.any(dim=1).nonzero()[:, 0]
    if len(labeled) <= quota:
        return labeled
    frequency = present.sum(dim=0)
    scores = (present[labeled] * frequency).sum(dim=1).double()
    scores *= torch.from_numpy(np.random.default_rng(key).random(len(labeled)))
    return labeled[scores.argsort(stable=True)[:quota]].sort().values


class MemoryBank:
    """Features with fractions of classes, searched by FAISS: on a CUDA device where the installed one can, else on CPU.

    Args:
        features: (entries, channels) of length 1.
        fractions: (entries, classes).
        k: Neighbors, at most all entries.
    """

    def __init__(self, features: torch.Tensor, fractions: torch.Tensor, k: int, temperature: float):
        self.fractions, self.k, self.temperature = fractions, min(k, len(features)), temperature
        self.index = faiss.IndexFlatIP(features.shape[1])
        self.search_device = "cpu"
        if features.device.type == "cuda" and hasattr(faiss, "StandardGpuResources"):
            self.resources = faiss.StandardGpuResources()
            self.index = faiss.index_cpu_to_gpu(self.resources, features.device.index or 0, self.index)
            self.search_device = "cuda"
        self.index.add(features.cpu().numpy())

    def __len__(self) -> int:
        return self.index.ntotal

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Fractions of classes (patches, classes) that the neighbors of features (patches, channels) stand for."""
        queries = F.normalize(features, dim=1).cpu().contiguous().numpy()
        similarity, nearest = (
            torch.from_numpy(found).to(features.device) for found in self.index.search(queries, self.k)
        )
        weights = (similarity / self.temperature).softmax(dim=1)
        return (weights[..., None] * self.fractions[nearest]).sum(dim=1)


@torch.inference_mode()
def segment(
    model: PreTrainedModel, bank: MemoryBank, pixels: torch.Tensor, labels: list[torch.Tensor], accelerator: Accelerator
) -> Iterator[torch.Tensor]:
    """Class ids (height, width) of each image, at the size of its labels."""
    with accelerator.autocast():
        maps = model(pixels.to(accelerator.device)).feature_maps[0].float()
    for feature_map, truth in zip(maps, labels, strict=True):
        fractions = bank.classify(feature_map.flatten(1).T)
        scores = fractions.T.unflatten(1, feature_map.shape[-2:])[None]
        scores = F.interpolate(scores, size=tuple(truth.shape), mode="bilinear", align_corners=False)
        yield scores[0].argmax(dim=0).cpu()


if __name__ == "__main__":
    run_program(main, HummingbirdArguments)
