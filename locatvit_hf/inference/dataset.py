"""The rows of a dataset, shared among the processes of `accelerate launch`, as parquet."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from ..utils.images import MAX_MEGAPIXELS, CorruptImageError, read_image, remark_on_frames
from ..utils.io import atomic_write
from ..utils.splits import failures_named, find_split, read_split
from .outputs import OutputFolder
from .segmenter import Segmenter

FEATURES = Features({"index": Value("int64"), "label_map": ImageFeature()})
# Rows between two points from which a killed run continues.
ROWS_AT_ONCE = 64


def open_dataset(name: str, split: str, column: str, report: Callable[[str], None] = lambda sentence: None) -> Dataset:
    """Open a split of a Hub dataset, or of a local folder of any layout, see `find_split`.

    Args:
        name: A Hub id or a folder.
        split: The name of the split.
        column: The column that holds the images.
        report: Called with a sentence for each kind of files that a folder holds and that were left out.

    Returns:
        The rows, with this column alone, whose images are not decoded yet.

    Raises:
        ValueError: There is no such dataset, split or column.
    """
    found = find_split(name, split)
    for sentence in found.remarks:
        report(sentence)
    with failures_named(name, split):
        dataset = read_split(found)
    if column not in dataset.column_names:
        raise ValueError(f"{name} has no column {column!r} but {', '.join(dataset.column_names)}.")
    return dataset.select_columns([column]).cast_column(column, ImageFeature(decode=False))


def shard_path(output: OutputFolder, process: int, num_processes: int) -> Path:
    """The file in which a process leaves its part of the rows."""
    return output.folder / f"label_maps-{process:05d}-of-{num_processes:05d}.parquet"


def rows_of(length: int, process: int, num_processes: int) -> range:
    """The rows of a process, of a dataset of this length."""
    return range(*(length * (process + end) // num_processes for end in (0, 1)))


def count_empty(path: Path) -> int:
    """How many rows of a finished file have no label map, as its footer says."""
    footer = pq.read_metadata(path)
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    return sum(column.statistics.null_count for column in columns if column.path_in_schema == "label_map.bytes")


def segment_dataset(
    segmenter: Segmenter,
    dataset: Dataset,
    column: str,
    output: OutputFolder,
    batch_size: int,
    process: int = 0,
    num_processes: int = 1,
    advance: Callable[[int], None] = lambda rows: None,
    max_megapixels: float = MAX_MEGAPIXELS,
    report: Callable[[str], None] = lambda sentence: None,
) -> Iterator[CorruptImageError]:
    """Segment this process's part of the rows into one parquet file, and yield what could not be read.

    The file has a row for each image: `index` in the split, and `label_map`, a PNG of its class ids, empty where the
    image cannot be read. Until all rows are there they stand in pieces beside it, with which a killed run continues.

    Args:
        segmenter: The model.
        dataset: All rows, from `open_dataset`.
        column: The column that holds the images.
        output: The folder to write.
        batch_size: Images that are segmented at once.
        process: The number of this process, from 0.
        num_processes: How many processes share the rows.
        advance: Called with a number of rows when they are done or were found done.
        max_megapixels: Larger images are not read.
        report: Called with a sentence for each image of several frames or pages, of which the first is used.
    """
    path = shard_path(output, process, num_processes)
    mine = rows_of(len(dataset), process, num_processes)
    if path.exists():
        advance(len(mine))
        return
    pieces = []
    for first in mine[::ROWS_AT_ONCE]:
        rows = range(first, min(first + ROWS_AT_ONCE, mine.stop))
        piece = path.with_suffix(".pieces") / f"{first:09d}.parquet"
        pieces.append(piece)
        if not piece.exists():
            label_maps: dict[int, bytes | None] = {}
            for at in range(0, len(rows), batch_size):
                batch = rows[at : at + batch_size]
                yield from _segment_rows(segmenter, dataset, column, batch, output, label_maps, max_megapixels, report)
            table = Dataset.from_dict(
                {"index": list(rows), "label_map": [label_maps[row] for row in rows]}, features=FEATURES
            )
            atomic_write(piece, table.to_parquet)
        advance(len(rows))
    atomic_write(path, lambda target: _join(pieces, target))
    shutil.rmtree(path.with_suffix(".pieces"), ignore_errors=True)


def _segment_rows(
    segmenter: Segmenter,
    dataset: Dataset,
    column: str,
    rows: range,
    output: OutputFolder,
    label_maps: dict[int, bytes | None],
    max_megapixels: float,
    report: Callable[[str], None],
) -> Iterator[CorruptImageError]:
    images = {}
    for row in rows:
        entry = dataset[row][column]
        try:
            if not entry:
                raise CorruptImageError(f"Row {row} holds no image.")
            source = io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"]
            images[row] = read_image(source, f"Row {row}", max_megapixels)
            for sentence in remark_on_frames(f"Row {row}", images[row]):
                report(sentence)
        except (CorruptImageError, OSError) as error:
            label_maps[row] = None
            yield CorruptImageError(str(error))
    for row, class_map in zip(images, segmenter(list(images.values())), strict=True):
        encoded = io.BytesIO()
        output.label_image(class_map).save(encoded, format="png")
        label_maps[row] = encoded.getvalue()


def _join(pieces: list[Path], path: Path) -> None:
    if not pieces:
        Dataset.from_dict({"index": [], "label_map": []}, features=FEATURES).to_parquet(path)
        return
    with pq.ParquetWriter(path, pq.read_schema(pieces[0])) as writer:
        for piece in pieces:
            writer.write_table(pq.read_table(piece))
