"""Which images make up which step, and the randomness that belongs to each image."""

import contextlib
import itertools
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from .streaming import ForwardReader


class StepSampler(Sampler[list[tuple[int, ...]]]):
    """Batches of (epoch, index) for one process, step after step; (epoch, index, repeat) with repeats.

    The order depends on nothing but the seed: step k holds the same images for any number of processes, accumulation
    steps and workers, and a run that starts at step k goes on exactly as one that never stopped. An epoch drops
    the remainder that fills no batch.

    Args:
        num_samples: Images in the dataset.
        batch_size: Images per step, over all processes and accumulation steps.
        start: The first step.
        stop: The step after the last.
        repeats: Times that an image occurs in its step, each augmented anew (repeated augmentation). An epoch has as
            many steps as without, and so sees a different part of the images.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        accumulation_steps: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        repeats: int = 1,
    ):
        if batch_size > num_samples:
            raise ValueError(f"A batch of {batch_size} needs more images than the {num_samples} of the training split.")
        if batch_size < 1 or batch_size % (accumulation_steps * num_processes):
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of {num_processes} processes times "
                f"{accumulation_steps} accumulation steps."
            )
        if repeats < 1 or batch_size % repeats:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {repeats} repeats of every image.")
        self.num_samples, self.batch_size, self.seed, self.repeats = num_samples, batch_size, seed, repeats
        self.start, self.stop = start, stop
        self.accumulation_steps = accumulation_steps
        self.process_index, self.num_processes = process_index, num_processes

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        for epoch, positions, order in self.micro_batches():
            yield [self.key(epoch, position, order) for position in positions]

    def micro_batches(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(epoch, positions in the epoch, order of the epoch) of every micro-batch; see `key`."""
        steps_per_epoch, current, order = self.num_samples // self.batch_size, None, None
        for step in range(self.start, self.stop):
            epoch, number = divmod(step, steps_per_epoch)
            if epoch != current:
                current, order = epoch, self.order(epoch)
            positions = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
            for part in np.split(positions[self.process_index :: self.num_processes], self.accumulation_steps):
                yield epoch, part, order

    def order(self, epoch: int) -> np.ndarray:
        """Indices of the images in the order in which the epoch uses them."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)

    def key(self, epoch: int, position: int, order: np.ndarray) -> tuple[int, ...]:
        """What `TrainingSamples` is asked for at a position of an epoch."""
        number, repetition = divmod(int(position), self.repeats)
        return (epoch, int(order[number])) if self.repeats == 1 else (epoch, int(order[number]), repetition)


class StreamSampler(StepSampler):
    """As `StepSampler`, for rows that are read forward: a batch comes in parts, one for each worker in turn.

    A worker always gets the images of its own streams, so that no other has to read them. `parts` says where in their
    batch the images of every part stand, for each accumulation step.

    Args:
        reader: Draws the order of an epoch; the number of its streams divides the images of a step.
        num_parts: Data-loading workers, at least 1.
    """

    def __init__(self, reader: ForwardReader, num_parts: int, *arguments, **options):
        super().__init__(len(reader.split), *arguments, **options)
        self.reader, streams = reader, reader.num_streams
        positions_of_step = np.arange(self.batch_size)[self.process_index :: self.num_processes]
        self.parts = []
        for positions in np.split(positions_of_step, self.accumulation_steps):
            owner = positions // self.repeats % streams // self.num_processes % num_parts
            self.parts.append([np.flatnonzero(owner == part) for part in range(num_parts)])

    def __len__(self) -> int:
        return super().__len__() * len(self.parts[0])

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        for keys, parts in zip(super().__iter__(), itertools.cycle(self.parts), strict=False):
            yield from ([keys[place] for place in part] for part in parts)

    def order(self, epoch: int) -> np.ndarray:
        used = self.num_samples // self.batch_size * self.batch_size
        return self.reader.order(epoch, used // self.reader.num_streams)


@contextlib.contextmanager
def sample_randomness(*key: int) -> Iterator[None]:
    """Inside, Python, NumPy and torch draw from a stream that depends on `key` alone; outside, nothing has changed.

    key: for an image (seed, epoch, index), so that its augmentation is the same in any worker of any run.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    reseed(*key)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def reseed(*key: int) -> None:
    """Start the streams of Python, NumPy and torch (on CPU) from a tuple of numbers."""
    seed = _fold(key)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` also visits every device: 200 µs, for each image


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a tuple of numbers."""
    reseed(*key)
    torch.manual_seed(_fold(key))


def _fold(key: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])
