"""Data sets and loaders: augmented samples for training, untouched ones for evaluation."""

from collections.abc import Callable
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from training.arguments import DataArguments, RunArguments

from .batches import sample_randomness


class TrainingSamples(Dataset):
    """Augmented samples, addressed by (epoch, index).

    dataset: any `datasets.Dataset`.
    transform: maps the values of `columns` to a tuple of tensors; may draw from Python's, NumPy's and torch's streams.
    """

    def __init__(self, dataset: datasets.Dataset, columns: list[str], transform: Callable[..., tuple], seed: int):
        self.dataset, self.columns, self.transform, self.seed = dataset, columns, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple]:
        """A whole batch at once, which `datasets` reads several times faster than image by image."""
        rows = self.dataset[[index for _, index in keys]]
        samples = []
        for (epoch, index), *values in zip(keys, *(rows[column] for column in self.columns), strict=True):
            with sample_randomness(self.seed, epoch, index):
                try:
                    samples.append(self.transform(*values))
                except ValueError as error:
                    raise ValueError(f"Training sample {index}: {error}") from None
        return samples


class EvaluationSamples(Dataset):
    """Rows as they are, each a tuple of the values of `columns`."""

    def __init__(self, dataset: datasets.Dataset, columns: list[str]):
        self.dataset, self.columns = dataset, columns

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[tuple]:
        rows = self.dataset[indices]
        return list(zip(*(rows[column] for column in self.columns), strict=True))


def create_training_loader(samples: TrainingSamples, sampler: Sampler, num_workers: int) -> DataLoader:
    """Batches of stacked tensors in the order of the sampler."""
    return DataLoader(samples, batch_sampler=sampler, **_worker_options(num_workers))


def create_evaluation_loader(
    dataset: datasets.Dataset,
    columns: list[str],
    collate: Callable[[list[tuple]], Any],
    arguments: DataArguments | RunArguments,
    accelerator: Accelerator,
) -> DataLoader:
    """This process's share of a split, in order, no sample twice; `collate` gets a list of rows (image, label)."""
    samples = EvaluationSamples(dataset.shard(accelerator.num_processes, accelerator.process_index), columns)
    options = _worker_options(arguments.num_workers)
    return DataLoader(samples, batch_size=arguments.eval_batch_size, collate_fn=collate, **options)


def _worker_options(num_workers: int) -> dict[str, Any]:
    # A generator of its own: a loader without one draws from the global stream, which dropout also reads.
    options = {"num_workers": num_workers, "generator": torch.Generator(), "pin_memory": torch.cuda.is_available()}
    return {**options, "worker_init_fn": _use_one_thread} if num_workers else options


def _use_one_thread(worker: int) -> None:
    torch.set_num_threads(1)
