"""Datasets and loaders: augmented samples for training, untouched ones for evaluation."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, default_collate

from locatvit_hf.utils.images import MAX_MEGAPIXELS, orientation_of, remark_on_frames
from training.engine.arguments import console
from training.engine.settings import ProgramArguments
from training.engine.shutdown import ignore_shutdown

from .images import CorruptImageError, decode_image, name_of
from .samplers import StepSampler, StreamSampler, reseed, sample_randomness
from .streaming import READ_AHEAD, ForwardReader, StreamedRows, num_streams

MAX_SUBSTITUTES = 100
"""Corrupt images in a row after which a run stops, whatever fraction of them it allows."""


class IndexedReader:
    """Rows of a split in memory or on disk, in any order, addressed by (epoch, index, …); images are encoded."""

    def __init__(self, split: datasets.Dataset, columns: list[str], seed: int):
        self.columns, self.seed, self.split = columns, seed, split.select_columns(list(dict.fromkeys(columns)))
        for column in columns:
            if isinstance(split.features[column], datasets.Image):
                self.split = self.split.cast_column(column, datasets.Image(decode=False))

    def read(self, keys: list[tuple[int, ...]]) -> list[tuple]:
        """A whole batch at once, which `datasets` reads several times faster than row by row."""
        rows = self.split[[key[1] for key in keys]]
        return list(zip(*(rows[column] for column in self.columns), strict=True))

    def substitute(self, key: tuple[int, ...], attempt: int) -> tuple[int, ...] | None:
        """Another row, drawn anew for each attempt."""
        epoch, index, *rest = key
        drawn = np.random.default_rng([self.seed, epoch, index, attempt]).integers(len(self.split))
        return (epoch, int(drawn), *rest)


class NumberedReader:
    """A reader whose rows end with their index."""

    def __init__(self, reader: IndexedReader | ForwardReader):
        self.reader = reader

    def read(self, keys: list[tuple[int, ...]]) -> list[tuple]:
        """The rows of keys (epoch, index)."""
        return [(*row, key[1]) for row, key in zip(self.reader.read(keys), keys, strict=True)]


class Loaded(NamedTuple):
    """Samples or rows, what each is called in a sentence, and what has to be said about others.

    Attributes:
        corrupt: Of each image that cannot be decoded its name and what is wrong with it.
        unclear: Names of turned images whose label map may or may not be made for the turned pixels, see `_unclear`.
        several: A sentence for each file of several frames or pages, of which the first is used.
    """

    samples: list[tuple]
    names: list[str]
    corrupt: list[str]
    unclear: list[str]
    several: list[str]


class TrainingSamples(Dataset):
    """Augmented samples, addressed by (epoch, index) or (epoch, index, repeat).

    A sample with an image that cannot be decoded is replaced by another one, which (seed, epoch, index) determine.

    Args:
        dataset: A split of `load_splits`.
        columns: The image comes first, and is handed over in RGB; further images, such as label maps, as they are.
        transform: Maps the values of `columns` to a tuple of tensors; may draw from Python's, NumPy's and torch's
            streams. Where it has a method `at_epoch(epoch)`, this gives the transform of that epoch.
    """

    def __init__(
        self, dataset: datasets.Dataset | StreamedRows, columns: list[str], transform: Callable[..., tuple], seed: int
    ):
        self.dataset, self.columns, self.transform, self.seed = dataset, columns, transform, seed
        self.max_megapixels: float = MAX_MEGAPIXELS
        self.is_image = [isinstance(dataset.features[column], datasets.Image) for column in columns]
        if isinstance(dataset, StreamedRows):
            self.reader: ForwardReader | IndexedReader = ForwardReader(dataset, columns, 1, READ_AHEAD, seed)
        else:
            self.reader = IndexedReader(dataset, columns, seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, ...]) -> tuple:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, ...]]) -> list[tuple]:
        return self.load(keys).samples

    def load(self, keys: list[tuple[int, ...]]) -> Loaded:
        """The samples of `keys`; an image that cannot be decoded is replaced by another one."""
        with sample_randomness(self.seed):  # entering and leaving takes longer than seeding: once for all samples
            return self._load(keys)

    def _load(self, keys: list[tuple[int, ...]]) -> Loaded:
        loaded = samples, names, corrupt, unclear, several = Loaded([], [], [], [], [])
        for key, row in zip(keys, self.reader.read(keys), strict=True):
            for attempt in range(1, MAX_SUBSTITUTES + 2):
                try:
                    values = _decode(row, self.is_image, f"training sample {key[1]}", self.max_megapixels, rgb=True)
                    samples.append(self._augment(key, row, values))
                    names.append(_call(row, self.is_image, f"Training sample {key[1]}"))
                    unclear += _unclear(values, row, self.is_image, f"training sample {key[1]}")
                    several += _several(values, row, self.is_image, f"Training sample {key[1]}")
                    break
                except CorruptImageError as error:
                    corrupt.append(str(error))
                other = self.reader.substitute(key, attempt) if attempt <= MAX_SUBSTITUTES else None
                if other is None:
                    raise ValueError(f"{attempt} images in a row cannot be decoded; the last is {corrupt[-1]}.")
                row = self.reader.read([other])[0]
        return loaded

    def _augment(self, key: tuple[int, ...], row: tuple, values: tuple) -> tuple:
        transform = self.transform.at_epoch(key[0]) if hasattr(self.transform, "at_epoch") else self.transform
        reseed(self.seed, *key)
        try:
            return transform(*values)
        except ValueError as error:
            raise ValueError(f"{_call(row, self.is_image, f'Training sample {key[1]}')}: {error}") from None
        except (OSError, SyntaxError) as error:  # of pixels that are decoded where they are first used
            name = name_of(row[self.is_image.index(True)], f"training sample {key[1]}")
            raise CorruptImageError(f"{name}, which cannot be decoded: {error}") from None


class EvaluationSamples(Dataset):
    """Rows as they are, each a tuple of the values of `columns`; those with a corrupt image are left out."""

    def __init__(
        self,
        reader: IndexedReader | ForwardReader | NumberedReader,
        is_image: list[bool],
        max_megapixels: float = MAX_MEGAPIXELS,
    ):
        self.reader, self.is_image, self.max_megapixels = reader, is_image, max_megapixels

    def load(self, indices: list[int]) -> Loaded:
        """The rows; an image that cannot be decoded is left out."""
        loaded = rows, names, corrupt, unclear, several = Loaded([], [], [], [], [])
        for index, row in zip(indices, self.reader.read([(0, index) for index in indices]), strict=True):
            name = f"evaluation sample {index}"
            try:
                rows.append(_decode(row, self.is_image, name, self.max_megapixels))
                names.append(_call(row, self.is_image, f"Evaluation sample {index}"))
                unclear += _unclear(rows[-1], row, self.is_image, name)
                several += _several(rows[-1], row, self.is_image, f"Evaluation sample {index}")
            except CorruptImageError as error:
                corrupt.append(str(error))
        return loaded


class Part(NamedTuple):
    """What a worker hands over: a batch or a part of one, None where it is empty, and what it tried to decode.

    Attributes:
        corrupt: As in `Loaded`.
        unclear: As in `Loaded`.
        several: As in `Loaded`.
    """

    batch: Any
    num_images: int
    corrupt: list[str] = []
    unclear: list[str] = []
    several: list[str] = []


class _Parts(Dataset):
    """Samples of a list of keys, collated where they were made."""

    def __init__(self, samples: TrainingSamples | EvaluationSamples, collate: Callable[[list], Any]):
        self.samples, self.collate = samples, collate

    def __getitems__(self, keys: list) -> Part:
        if not keys:
            return Part(None, 0)
        if hasattr(self.samples, "load"):
            samples, names, *remarks = self.samples.load(keys)
        else:
            samples, names, *remarks = [self.samples[key] for key in keys], [], []
        try:
            return Part(self.collate(samples) if samples else None, len(samples) + len(remarks[0]), *remarks)
        except ValueError as error:
            raise ValueError(f"{self._culprit(names, samples)}{error}") from None

    def _culprit(self, names: list[str], samples: list) -> str:
        """Which sample cannot be collated, where it is due to one alone."""
        for name, sample in zip(names, samples, strict=False):
            try:
                self.collate([sample])
            except ValueError:
                return f"{name}: "
        return ""


class ImageLoader:
    """Batches of one process; counts and names the images that could not be decoded, and others to look at.

    Args:
        samples: What the keys of the sampler stand for; any dataset that takes them, without the counting.
        sampler: Of lists of keys, one a batch or a part of a batch.
        parts: Where in their batch the samples of each part stand, for every batch of a cycle; None for whole batches.
        max_corrupt_share: The fraction of images that may be corrupt before a ValueError.
        fraction_of: Number of images that it is a fraction of, until more were read.
        ask_orientation: Print the names of turned images whose label map fits the stored pixels as well.
    """

    def __init__(
        self,
        samples: TrainingSamples | EvaluationSamples,
        sampler: Any,
        collate: Callable[[list], Any],
        num_workers: int,
        max_corrupt_share: float,
        fraction_of: float,
        parts: list[list[np.ndarray]] | None = None,
        ask_orientation: bool = True,
    ):
        # A generator of its own: a loader without one draws from the global stream, which dropout also reads.
        options = {"num_workers": num_workers, "generator": torch.Generator(), "pin_memory": torch.cuda.is_available()}
        if num_workers:
            options["worker_init_fn"] = _begin_worker
        self.loader = DataLoader(_Parts(samples, collate), batch_sampler=sampler, collate_fn=_keep_plain, **options)
        self.parts, self.max_corrupt_share, self.fraction_of = parts, max_corrupt_share, fraction_of
        self.num_images, self.num_corrupt, self.corrupt_images = 0, 0, dict[str, int]()
        self.ask_orientation, self.unclear_images, self.several_frames = ask_orientation, set[str](), set[str]()

    def __len__(self) -> int:
        return len(self.loader) // (len(self.parts[0]) if self.parts is not None else 1)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        for number in range(len(self)):
            if self.parts is None:
                batch = self._count_corrupt(next(batches))
            else:
                places = self.parts[number % len(self.parts)]
                batch = _join([(self._count_corrupt(next(batches)), place) for place in places])
            if batch is not None:
                yield batch

    def _count_corrupt(self, part: Part) -> Any:
        self.num_images, self.num_corrupt = self.num_images + part.num_images, self.num_corrupt + len(part.corrupt)
        for description in part.corrupt:
            if description not in self.corrupt_images:
                console.print(f"Skipped a corrupt image: {description}", markup=False, style="yellow")
            self.corrupt_images[description] = self.corrupt_images.get(description, 0) + 1
        if self.num_corrupt > self.max_corrupt_share * max(self.num_images, self.fraction_of):
            raise ValueError(
                f"{self.num_corrupt} of {self.num_images} images cannot be decoded, more than the fraction "
                f"{self.max_corrupt_share} that max_corrupt_share allows; the last is {description}."
            )
        if self.ask_orientation:
            for name in part.unclear:
                _say_rarely(
                    self.unclear_images,
                    f"{name} is turned as its EXIF orientation says, its label map, of the same size, is not.",
                    "Give --label_orientation stored where the maps belong to the pixels as they are stored, turned "
                    "where they belong to the turned image.",
                )
        for sentence in part.several:
            _say_rarely(self.several_frames, sentence)
        return part.batch


def create_training_loader(
    samples: TrainingSamples,
    arguments: ProgramArguments,
    accelerator: Accelerator,
    start: int,
    stop: int,
    collate: Callable[[list[tuple]], Any] | None = None,
) -> ImageLoader:
    """This process's batches of the steps from `start` until before `stop`, one per accumulation step.

    Args:
        samples: Or any other dataset that is addressed by (epoch, index).
        collate: Makes a batch of a list of samples; by default tensors are stacked.
    """
    options = {
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
        "start": start,
        "stop": stop,
        "accumulation_steps": arguments.gradient_accumulation_steps,
        "process_index": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "repeats": getattr(arguments, "repeated_augmentation", 1),
    }
    parts = None
    if isinstance(getattr(samples, "dataset", None), StreamedRows):
        split = samples.dataset
        images = arguments.batch_size // options["repeats"]
        streams = num_streams(images, arguments.parallel_shards, len(split.lengths))
        window = max(arguments.shuffle_buffer // streams, READ_AHEAD)
        samples.reader = ForwardReader(split, samples.columns, streams, window, samples.seed)
        # Batches of an unknown kind cannot be joined: whole ones go to the workers in turn, and all read every stream.
        sampler = StreamSampler(samples.reader, max(arguments.num_workers, 1) if collate is None else 1, **options)
        parts = sampler.parts if collate is None else None
    else:
        sampler = StepSampler(len(samples), **options)
    fraction_of = len(samples) / accelerator.num_processes
    collate = collate or default_collate
    if isinstance(samples, TrainingSamples):
        samples.max_megapixels = arguments.max_megapixels
    return ImageLoader(
        samples,
        sampler,
        collate,
        arguments.num_workers,
        arguments.max_corrupt_share,
        fraction_of,
        parts,
        getattr(arguments, "label_orientation", None) is None,
    )


def create_evaluation_loader(
    dataset: datasets.Dataset | StreamedRows,
    columns: list[str],
    collate: Callable[[list[tuple]], Any],
    arguments: Any,
    accelerator: Accelerator,
    numbered: bool = False,
) -> ImageLoader:
    """This process's part of a split, no sample twice; `collate` gets a list of rows (image, label).

    Args:
        arguments: With `eval_batch_size` and the settings of data that loaders read.
        numbered: Rows end with their index in the split: (image, label, index).
    """
    is_image = [isinstance(dataset.features[column], datasets.Image) for column in columns]
    rank, processes, size = accelerator.process_index, accelerator.num_processes, arguments.eval_batch_size
    if isinstance(dataset, StreamedRows):
        # Every worker reads a stream of its own; batches are dealt out to the workers in turn, some of them empty.
        workers = max(arguments.num_workers, 1)
        reader: Any = ForwardReader(dataset, columns, processes * workers, READ_AHEAD, seed=None)
        streams = list(pairwise(reader.bounds))[rank * workers : (rank + 1) * workers]
        longest = max(stop - first for first, stop in streams)
        batches = [
            list(range(first + done, min(first + done + size, stop)))
            for done in range(0, longest, size)
            for first, stop in streams
        ]
    else:
        reader = IndexedReader(dataset, columns, seed=0)
        mine = list(range(rank, len(dataset), processes))
        batches = [mine[done : done + size] for done in range(0, len(mine), size)]
    if numbered:
        reader, is_image = NumberedReader(reader), [*is_image, False]
    samples = EvaluationSamples(reader, is_image, arguments.max_megapixels)
    return ImageLoader(
        samples,
        batches,
        collate,
        arguments.num_workers,
        arguments.max_corrupt_share,
        len(dataset) / processes,
        ask_orientation=getattr(arguments, "label_orientation", None) is None,
    )


def _decode(row: tuple, is_image: list[bool], name: str, max_megapixels: float, rgb: bool = False) -> tuple:
    values = []
    for position, (value, image) in enumerate(zip(row, is_image, strict=True)):
        try:
            values.append(decode_image(value, rgb and position == 0, max_megapixels) if image else value)
        except CorruptImageError as error:
            raise CorruptImageError(f"{name_of(value, name)}, which {error}") from None
    return tuple(values)


def _call(row: tuple, is_image: list[bool], number: str) -> str:
    """The number of a sample, with the file of its image where that is known."""
    file = name_of(row[is_image.index(True)], "") if True in is_image else ""
    return f"{number} ({file})" if file else number


def _unclear(values: tuple, row: tuple, is_image: list[bool], name: str) -> list[str]:
    """The name of the first image where it was turned, and a label map of its size was not.

    Whether a map belongs to the turned or to the stored pixels then shows nowhere: sizes that differ would tell.
    """
    images = [(value, entry) for value, entry, image in zip(values, row, is_image, strict=True) if image]
    if len(images) < 2 or orientation_of(images[0][0]) == 1:
        return []
    (image, entry), (label_map, _) = images[:2]
    quarter = orientation_of(image) >= 5 and image.width != image.height
    same = label_map.size == image.size and orientation_of(label_map) == 1
    return [name_of(entry, name)] if same and not quarter else []


def _several(values: tuple, row: tuple, is_image: list[bool], name: str) -> list[str]:
    """A sentence for each file of a row that holds more images than the one that was read."""
    images = [(value, entry) for value, entry, image in zip(values, row, is_image, strict=True) if image]
    return [sentence for value, entry in images for sentence in remark_on_frames(name_of(entry, name), value)]


def _say_rarely(said: set[str], sentence: str, remedy: str = "") -> None:
    """Print the first of such sentences, the tenth, the hundredth, …, with their number; the same one counts once."""
    number = len(said)
    said.add(sentence)
    if len(said) > number and str(len(said)).strip("0") == "1":
        counted = f"{sentence.removesuffix('.')} ({len(said)} such so far). {remedy}"
        console.print(counted.rstrip(), markup=False, style="yellow")


def _join(parts: list[tuple[Any, np.ndarray]]) -> Any:
    """One batch of parts, with the places of their samples in it."""
    parts = [(batch, places) for batch, places in parts if batch is not None]
    if len(parts) < 2:
        return parts[0][0] if parts else None
    first = parts[0][0]
    if isinstance(first, torch.Tensor):
        joined = first.new_empty(sum(len(places) for _, places in parts), *first.shape[1:])
        for batch, places in parts:
            joined[torch.from_numpy(places)] = batch
        return joined
    if isinstance(first, dict):
        return {name: _join([(batch[name], places) for batch, places in parts]) for name in first}
    return [_join([(batch[entry], places) for batch, places in parts]) for entry in range(len(first))]


def _keep_plain(part: Part) -> Part:
    return part


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)
    ignore_shutdown()
