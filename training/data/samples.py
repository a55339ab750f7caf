"""Data sets and loaders: augmented samples for training, untouched ones for evaluation."""

from collections.abc import Callable, Iterable
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from training.arguments import DataArguments, OptimizationArguments, RunArguments

from .batches import UpdateSampler, sample_randomness


class TrainingSamples(Dataset):
    """Augmented samples, addressed by (epoch, index) or (epoch, index, repeat).

    dataset: any `datasets.Dataset`.
    transform: maps the values of `columns` to a tuple of tensors; may draw from Python's, NumPy's and torch's streams.
        Where it has a method `at_epoch(epoch)`, this gives the transform of that epoch.
    """

    def __init__(self, dataset: datasets.Dataset, columns: list[str], transform: Callable[..., tuple], seed: int):
        self.dataset, self.columns, self.transform, self.seed = dataset, columns, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, ...]) -> tuple:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, ...]]) -> list[tuple]:
        """A whole batch at once, which `datasets` reads several times faster than image by image."""
        rows = self.dataset[[index for _, index, *_ in keys]]
        samples = []
        for key, *values in zip(keys, *(rows[column] for column in self.columns), strict=True):
            epoch, index, *_ = key
            transform = self.transform.at_epoch(epoch) if hasattr(self.transform, "at_epoch") else self.transform
            with sample_randomness(self.seed, *key):
                try:
                    samples.append(transform(*values))
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


def create_training_loader(
    samples: TrainingSamples,
    arguments: DataArguments | OptimizationArguments | RunArguments,
    accelerator: Accelerator,
    start: int,
    stop: int,
    collate: Callable[[list[tuple]], Any] | None = None,
) -> Iterable[Any]:
    """This process's batches of the updates from `start` until before `stop`, one an accumulation step.

    collate: makes a batch of a list of samples; by default tensors are stacked.
    """
    sampler = UpdateSampler(
        len(samples),
        arguments.batch_size,
        arguments.seed,
        start,
        stop,
        accumulation_steps=arguments.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        repeats=getattr(arguments, "repeated_augmentation", 1),
    )
    return DataLoader(samples, batch_sampler=sampler, collate_fn=collate, **_worker_options(arguments.num_workers))


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
