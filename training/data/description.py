"""What tells one dataset from another: so that a run is continued with the data that it began with."""

import json
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from locatvit_hf.utils.io import sha256

from .dataset import IndexedReader
from .images import name_of
from .loading import Split, subsample_evenly
from .streaming import StreamedRows

NUM_COMPARED = 32
"""Images of a split whose content is compared, evenly spaced over it."""

MAX_NAMED = 2**17
"""Rows of a split whose labels and files are compared: all of a smaller split, or these, evenly spaced over it."""

READ_AT_ONCE = 2**14


def describe_data(columns: list[str], classes: list[str] | None = None, **splits: Split) -> dict[str, Any]:
    """Everything that `compare_data` compares, as JSON can hold it.

    Args:
        columns: Read by the run; images and labels.
        classes: Names of the classes in the order of their ids, where there are such.
        splits: By what they are for, such as `training`.

    Returns:
        `classes`, and for every split its number of images, the kind of each column, a digest of the labels and, where
        images are files, of their names, and digests of some rows; of streamed rows the lengths of the shards instead.
        Of files also digests of their sizes and of the times of their last change.
    """
    return {"classes": classes, "splits": {name: _describe_split(split, columns) for name, split in splits.items()}}


def compare_data(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two results of `describe_data`, each a part of a sentence that names it."""
    found = _compare_classes(then.get("classes"), now.get("classes"))
    for name in sorted(then.get("splits", {}).keys() | now.get("splits", {}).keys()):
        before, after = then.get("splits", {}).get(name), now.get("splits", {}).get(name)
        if before is None or after is None:
            found.append(f"there is {'a' if before is None else 'no'} {name} split now")
        elif {**before, "times": None} != {**after, "times": None}:
            found.append(f"the {name} split {_compare_splits(before, after)}")
    return found


def changed_times(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Splits whose files have other times than before, which a copy has too, while `compare_data` finds no change."""
    before, after = then.get("splits", {}), now.get("splits", {})
    return [name for name in before.keys() & after.keys() if before[name].get("times") != after[name].get("times")]


def _describe_split(split: Split, columns: list[str]) -> dict[str, Any]:
    columns = [column for column in columns if column in split.column_names]
    described: dict[str, Any] = {
        "images": len(split),
        "columns": {column: type(split.features[column]).__name__ for column in columns},
    }
    if isinstance(split, StreamedRows):
        names = [PurePath(file).name for file in split.shards.files]
        return described | {"shards": _digest([*map(int, split.lengths), *names])} | _describe_files(split.shards.files)
    images = [column for column in columns if isinstance(split.features[column], datasets.Image)]
    labels = [column for column in columns if column not in images]
    described["labels"] = _digest(_values(split, labels)) if labels else None
    reader = IndexedReader(split, columns, seed=0)
    chosen = np.unique(np.linspace(0, len(split) - 1, NUM_COMPARED).astype(int)).tolist()
    rows = dict(zip(chosen, reader.read([(0, index) for index in chosen]), strict=True))
    # The names of all files are at hand only where the images themselves do not stand beside them.
    first = rows[chosen[0]][columns.index(images[0])] if images else None
    if isinstance(first, dict) and first.get("bytes") is None and first.get("path") is not None:
        files = [entry["path"] or "" for entries in _values(reader.split, images) for entry in entries if entry]
        described["files"] = _digest("/".join(file.rsplit("/", 2)[-2:]) for file in files)
        described |= _describe_files(files)
    elif images and reader.split._indices is None:  # with indices, the rows themselves would have to be read
        bytes_of = [pc.struct_field(reader.split.data.column(column), "bytes") for column in images]
        described["sizes"] = _digest(pc.binary_length(column).to_pylist() for column in bytes_of)
    described["rows"] = {str(index): [_name_of_row(row), _digest(map(_content, row))] for index, row in rows.items()}
    return described


def _values(split: datasets.Dataset, columns: list[str]) -> Iterator[list]:
    """The values of some columns, many rows at once and as they are stored, which is faster than row by row."""
    for table in subsample_evenly(split, MAX_NAMED).select_columns(columns).with_format("arrow").iter(READ_AT_ONCE):
        yield from (column.to_pylist() for column in table.columns)


def _describe_files(files: list[str]) -> dict[str, str]:
    """Digests of sizes and times of those files that are on this machine."""
    found = [os.stat(file) if os.path.isfile(file) else None for file in files]
    return {
        "sizes": _digest(status and status.st_size for status in found),
        "times": _digest(status and status.st_mtime_ns for status in found),
    }


def _compare_classes(then: list[str] | None, now: list[str] | None) -> list[str]:
    # In one Unicode form: earlier versions took names as the file system writes them.
    then, now = ([unicodedata.normalize("NFC", name) for name in names or []] for names in (then, now))
    if then == now:
        return []
    gone, new = ([name for name in one if name not in set(other)] for one, other in ((then, now), (now, then)))
    if gone or new:
        parts = [
            f"{_list(names)} {'is' if len(names) == 1 else 'are'} {word}"
            for names, word in ((gone, "gone"), (new, "new"))
            if names
        ]
        return [f"of the classes {' and '.join(parts)}"]
    if len(then) != len(now):
        return [f"there were {len(then)} classes and are {len(now)}"]
    number = next(number for number, (a, b) in enumerate(zip(then, now, strict=True)) if a != b)
    return [f"class {number} was {then[number]!r} and is {now[number]!r}"]


def _compare_splits(then: dict[str, Any], now: dict[str, Any]) -> str:
    if then["images"] != now["images"]:
        return f"had {then['images']} images and has {now['images']}"
    if then["columns"] != now["columns"]:
        return f"had the columns {_columns(then)} and has {_columns(now)}"
    before, after = then.get("rows", {}), now.get("rows", {})
    changed = [index for index in before if before[index] != after.get(index)]
    if changed:
        names = before[changed[0]][0], after.get(changed[0], ["nothing"])[0]
        what = f"was {names[0]} and is {names[1]}" if names[0] != names[1] else f"({names[0]}) has other content"
        return f"has other rows: number {changed[0]} {what}"
    if then.get("labels") != now.get("labels"):
        return "has other labels"
    for what in ("files", "shards"):
        if then.get(what) != now.get(what):
            return f"has other {what}"
    return "has files of other sizes"


def _columns(described: dict[str, Any]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in described["columns"].items())


def _list(names: list[str], most: int = 3) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _name_of_row(row: tuple) -> str:
    return next((name for value in row if (name := _short_name(value))), "a row")


def _short_name(entry: Any) -> str | None:
    """The last two parts of the name of a file: the folder above may have been moved."""
    path = name_of(entry, "") if isinstance(entry, dict) else ""
    return "/".join(PurePath(path).parts[-2:]) or None


def _content(value: Any) -> Any:
    """What is hashed of a value of a row: of an image its file; a file that cannot be read is known by its absence."""
    if not isinstance(value, dict) or not value.keys() & {"bytes", "path"}:
        return value
    if value.get("bytes") is not None:
        return value["bytes"]
    try:
        return Path(value["path"]).read_bytes()
    except (OSError, TypeError, ValueError):
        return None


def _digest(values: Iterable[Any]) -> str:
    contents = (value if isinstance(value, bytes) else json.dumps(value, default=str).encode() for value in values)
    return sha256(b"%d:" % len(content) + content for content in contents)[:16]
