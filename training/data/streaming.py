"""Shards that are only read forward, in an order that depends on nothing but (seed, epoch).

`datasets` shuffles a stream with a buffer whose content is lost when a run stops. Here nothing needs to be kept: how
many rows every shard holds is found out first, so the place of every image in every epoch is arithmetic.

An epoch lays the shards behind each other in a drawn order, cuts this sequence into equal streams, and mixes each
stream in windows: a window is read, and its rows are used in a drawn order. Image number p of the epoch comes from
stream p modulo their number. As that number divides the batch, each process and each of its workers has streams of
its own. No image is read twice, except where two streams share a shard: the second one skips its first part.

Resuming costs, for every stream, reading from the start of one shard to the place of interruption, without decoding:
one row group of a parquet file, or one tar file.
"""

import json
import os
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext
from datasets.utils.file_utils import xopen

from locatvit_hf.utils.tar import read_members

MIN_STREAMS = 8
"""Streams that are made even of fewer shards, which costs reading these several times, but keeps the workers busy."""

READ_AHEAD = 16
"""Rows that are read at once."""


class ParquetShards:
    """The row groups of parquet files; only the needed columns are read."""

    def __init__(self, files: list[str]):
        with ThreadPoolExecutor(16) as threads:
            self.metadata = list(threads.map(_read_parquet_metadata, files))
        self.groups = [(f, g) for f, metadata in enumerate(self.metadata) for g in range(metadata.num_row_groups)]
        self.lengths = [self.metadata[f].row_group(g).num_rows for f, g in self.groups]
        self.files = files

    def read(self, shard: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        number, group = self.groups[shard]
        with xopen(self.files[number], "rb") as file:
            # Pages are read when it is their turn: a row group may be larger than memory.
            parquet = pq.ParquetFile(file, metadata=self.metadata[number], buffer_size=2**20)
            for rows in parquet.iter_batches(READ_AHEAD, [group], columns, use_threads=False):
                yield from rows.to_pylist()


class OtherShards:
    """The shards of any dataset that `datasets` can stream, WebDataset's tar files among them."""

    def __init__(self, builder: datasets.DatasetBuilder, split: str, stream: datasets.IterableDataset):
        self.stream = stream
        self.files = list(map(str, (getattr(builder.config, "data_files", None) or {}).get(split, [])))
        # Counting may take a pass over the data, so it is done once; the name of the folder changes with the data.
        known = Path(f"{builder.cache_dir}-{split}-rows.json")
        if known.is_file():
            self.lengths = json.loads(known.read_text(encoding="utf-8"))
            return
        if isinstance(builder, WebDataset):
            with ThreadPoolExecutor(4) as threads:
                self.lengths = list(threads.map(_count_samples_of_tar, builder.config.data_files[split]))
        else:
            shards = (self.read(shard, stream.column_names[-1:]) for shard in range(stream.num_shards))
            self.lengths = [sum(1 for _ in rows) for rows in shards]
        known.parent.mkdir(parents=True, exist_ok=True)
        temporary = known.with_name(f".partial-{os.getpid()}-{known.name}")  # every process counts
        temporary.write_text(json.dumps(self.lengths), encoding="utf-8")
        temporary.replace(known)

    def read(self, shard: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        stream = self.stream.select_columns(columns).shard(self.stream.num_shards, shard)
        # `iter`, because in a data-loading process `__iter__` deals the shards out among the workers by itself.
        for rows in stream.iter(READ_AHEAD):
            yield from (dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True))


def open_shards(builder: datasets.DatasetBuilder, split: str) -> "StreamedRows":
    """The rows of a split that is streamed; raises ValueError for files that cannot be read."""
    stream = builder.as_streaming_dataset(split=split)
    if stream.features is None:
        stream = stream._resolve_features()
    for column, feature in stream.features.items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    if isinstance(builder, Parquet):
        return StreamedRows(ParquetShards(list(builder.config.data_files[split])), stream.features)
    return StreamedRows(OtherShards(builder, split, stream), stream.features)


class StreamedRows:
    """A split that is streamed: its shards and what stands in their rows.

    files: columns of names of image files, and the folder that these are relative to.
    """

    def __init__(self, shards: ParquetShards | OtherShards, features: datasets.Features):
        self.shards, self.features = shards, features
        self.label_column: str | None = None
        self.label_ids: dict[Hashable, int] = {}
        self.files: dict[str, Path | None] = {}
        self.lengths = np.asarray(shards.lengths, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.lengths.sum())

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    def limit(self, num_rows: int) -> None:
        """Keep no more rows: of every shard its first ones, in proportion to its length."""
        ends = np.cumsum(self.lengths)
        self.lengths = np.diff(ends * min(num_rows, len(self)) // ends[-1], prepend=0)

    def unique(self, column: str) -> set:
        """The values of a column, which takes a pass over the data. Raises ValueError for lists and the like."""
        read = (islice(self.shards.read(i, [column]), int(length)) for i, length in enumerate(self.lengths) if length)
        return {_hashable(row[column]) for rows in read for row in rows}

    def first(self, column: str) -> Any:
        """The value of a column in the first row."""
        shard = int(np.flatnonzero(self.lengths)[0])
        return next(iter(self.shards.read(shard, [column])))[column]

    def number_labels(self, column: str, label_ids: dict[Hashable, int]) -> None:
        """Replace the labels of a column by their ids; a label without one is a ValueError where it is read."""
        self.label_column, self.label_ids = column, label_ids

    def read(self, shard: int, columns: list[str]) -> Iterator[tuple]:
        """The rows of a shard from its first, each a tuple of the values of `columns`; images are encoded."""
        for number, row in enumerate(self.shards.read(shard, columns)):
            if self.label_column in columns:
                label = _hashable(row[self.label_column])
                if label not in self.label_ids:
                    index = int(self.lengths[:shard].sum()) + number
                    count = len(set(self.label_ids.values()))
                    raise ValueError(f"The label {label!r} of sample {index} is none of the {count} classes.")
                row[self.label_column] = self.label_ids[label]
            for column in self.files.keys() & set(columns):
                row[column] = find_file(self.files[column], row[column])
            yield tuple(row[column] for column in columns)


class ForwardReader:
    """Rows of a streamed split, addressed by (epoch, index, …) and asked for in the order that `order` gives.

    Args:
        num_streams: Pieces of equal length into which an epoch is cut.
        window: Rows of a stream that are mixed with each other.
        seed: Of the order; None for the rows as they stand in the shards.
    """

    def __init__(self, split: StreamedRows, columns: list[str], num_streams: int, window: int, seed: int | None):
        self.split, self.columns, self.window, self.seed = split, columns, window, seed
        self.num_streams = num_streams
        self.bounds = np.arange(num_streams + 1) * len(split) // num_streams
        self._epoch: _Epoch | None = None
        self._streams: dict[int, _Stream] = {}

    def order(self, epoch: int, rows_per_stream: int) -> np.ndarray:
        """Indices in the order of use: one of every stream, then another one of every stream."""
        plan, rng = self._plan(epoch), np.random.default_rng([self.seed, epoch, 1])
        used = []
        for start, stop in pairwise(self.bounds):
            windows = np.arange(stop - start) // self.window
            used.append(start + np.argsort(windows + rng.random(stop - start))[:rows_per_stream])
        return plan.index_at(np.stack(used, axis=1).ravel())

    def read(self, keys: list[tuple[int, ...]]) -> list[tuple]:
        """The values of `columns` for every key."""
        return [self._read(*self._locate(epoch, index)) for epoch, index, *_ in keys]

    def substitute(self, key: tuple[int, ...], attempt: int) -> tuple[int, ...] | None:
        """Another row of the same window, which is in memory; None where all were tried."""
        epoch, index, *rest = key
        plan, stream, offset = self._locate(epoch, index)
        first = offset - offset % self.window
        length = min(self.window, self.bounds[stream + 1] - self.bounds[stream] - first)
        if attempt >= length:
            return None
        other = first + (offset - first + attempt) % length
        return (epoch, int(plan.index_at(self.bounds[stream] + other)), *rest)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_streams": {}}  # a process of its own opens files of its own

    def _plan(self, epoch: int) -> "_Epoch":
        if self._epoch is None or self._epoch.number != epoch:
            self._epoch = _Epoch(self.split.lengths, epoch, self.seed)
        return self._epoch

    def _locate(self, epoch: int, index: int) -> tuple["_Epoch", int, int]:
        """The plan of the epoch, the stream of a row and the place of the row in it."""
        plan = self._plan(epoch)
        place = plan.place_of(index)
        stream = int(np.searchsorted(self.bounds, place, side="right")) - 1
        return plan, stream, int(place - self.bounds[stream])

    def _read(self, plan: "_Epoch", stream: int, offset: int) -> tuple:
        state = self._streams.get(stream)
        number, position = divmod(offset, self.window)
        if state is None or state.epoch != plan.number or number < state.number:
            source = self._rows(plan, self.bounds[stream] + number * self.window, self.bounds[stream + 1])
            state = self._streams[stream] = _Stream(plan.number, number, [], [], source)
            state.rows = list(islice(source, self.window))
        elif number > state.number:
            missing = (number - state.number) * self.window - len(state.ahead)
            state.ahead += islice(state.source, max(missing, 0))
            state.rows, state.ahead = state.ahead[(number - state.number - 1) * self.window :], []
            state.number = number
        elif len(state.ahead) < self.window:
            # The next window is read row by row while this one is used, so that no batch waits for a whole window.
            state.ahead += islice(state.source, 1)
        return state.rows[position]

    def _rows(self, plan: "_Epoch", start: int, stop: int) -> Iterator[tuple]:
        """The rows at places from `start` until before `stop` of the epoch."""
        number = int(np.searchsorted(plan.begins, start, side="right")) - 1
        while start < stop:
            shard, skip = int(plan.shards[number]), int(start - plan.begins[number])
            count = int(min(plan.begins[number + 1], stop) - start)
            rows = 0
            for row in islice(self.split.read(shard, self.columns), skip, skip + count):
                rows += 1
                yield row
            if rows < count:
                raise ValueError(f"Shard {shard} holds fewer rows than it did when they were counted.")
            start, number = start + count, number + 1


class _Epoch:
    """Where every row stands in an epoch, whose shards lie behind each other in a drawn order."""

    def __init__(self, lengths: np.ndarray, number: int, seed: int | None):
        self.number, count = number, len(lengths)
        self.shards = np.arange(count) if seed is None else np.random.default_rng([seed, number]).permutation(count)
        self.begins = np.concatenate([[0], np.cumsum(lengths[self.shards])])
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._numbers = np.argsort(self.shards)

    def place_of(self, index: int) -> int:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return int(self.begins[self._numbers[shard]] + index - self._starts[shard])

    def index_at(self, places: np.ndarray) -> np.ndarray:
        numbers = np.searchsorted(self.begins, places, side="right") - 1
        return self._starts[self.shards[numbers]] + places - self.begins[numbers]


@dataclass
class _Stream:
    """The open place of a stream: the rows of the current window, and of the next one what was read so far."""

    epoch: int
    number: int
    rows: list[tuple]
    ahead: list[tuple]
    source: Iterator[tuple]


def num_streams(batch_size: int, parallel_shards: int, num_shards: int) -> int:
    """The largest divisor of the images of a step that the shards allow."""
    most = min(parallel_shards, max(num_shards, MIN_STREAMS), batch_size)
    return next(count for count in range(most, 0, -1) if batch_size % count == 0)


def _hashable(label: Any) -> Any:
    if isinstance(label, list | dict):
        raise ValueError(f"A label is one name or number per image, not {str(label)[:60]}.")
    return label


def find_file(folder: Path | None, name: str | None) -> str | None:
    """The path of an image file that a table names: relative to the dataset where it is there, else as it is."""
    if folder is not None and name and "://" not in name:
        path = os.path.join(folder, name.replace("\\", "/"))
        return path if os.path.exists(path) else name
    return name


def _read_parquet_metadata(file: str) -> pq.FileMetaData:
    try:
        with xopen(file, "rb") as source:
            return pq.ParquetFile(source).metadata
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a parquet file that can be read: {error}.") from None


def _count_samples_of_tar(file: str) -> int:
    """Samples of a shard: neighboring members of one name but for the extension, as `datasets` groups them."""
    count, last = 0, None
    for member in read_members(file):
        if member.isreg() and not PurePosixPath(member.name).name.startswith((".", "__")):
            key = base_plus_ext(member.name)[0]
            count, last = count + (key is not None and key != last), key or last
    return count
