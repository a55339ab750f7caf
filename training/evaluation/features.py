"""Features of whole splits: computed by all processes, in the order of the split everywhere."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoModel, BaseImageProcessor, PreTrainedModel

from training.evaluation.results import Meter
from training.tasks.checkpoint_loading import load_pretrained
from training.tasks.classification import collate


def load_encoder(pretrained: str) -> PreTrainedModel:
    """The encoder of any checkpoint of ours, or a plain ViT as it is."""
    model, _ = load_pretrained(AutoModel, pretrained, keep_plain=True)
    return model.eval()


def collate_numbered(
    processor: BaseImageProcessor, rows: list[tuple[Image.Image, int, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows (image, label, index) as (pixel_values, labels, indices)."""
    pixel_values, labels = collate(processor, [row[:2] for row in rows])
    return pixel_values, torch.tensor(labels), torch.tensor([index for *_, index in rows])


@torch.inference_mode()
def pooled_features(
    model: PreTrainedModel, loader: Iterable, accelerator: Accelerator, meter: Meter
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a classifier would read, (images, channels) in float32, with labels and indices, of this process's part.

    Args:
        loader: Batches of `collate_numbered`.
    """
    found: list[tuple[torch.Tensor, ...]] = []
    for pixel_values, labels, indices in meter.counted(loader):
        with accelerator.autocast():
            features = model(pixel_values.to(accelerator.device)).pooler_output
        found.append((features.float(), labels.to(accelerator.device), indices.to(accelerator.device)))
    if not found:
        raise ValueError("There are fewer images than processes: start fewer processes.")
    features, labels, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return features, labels, indices


def gather_in_order(accelerator: Accelerator, keys: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The rows of all processes in the order of their keys, in every process.

    Args:
        accelerator: Of the processes.
        keys: (rows,) distinct numbers.
        tensors: (rows, …); the number of rows may differ from process to process.
    """
    sizes = accelerator.gather(torch.tensor([len(keys)], device=accelerator.device)).tolist()

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        if accelerator.num_processes == 1:
            return tensor
        parts = accelerator.gather(accelerator.pad_across_processes(tensor)).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    order = gather(keys).argsort()
    return [gather(tensor)[order] for tensor in tensors]
