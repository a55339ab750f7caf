"""From the name of a dataset and of a split to its rows: on the Hub, at an address, or in a local folder."""

import contextlib
import csv
import glob
import io
import os
import posixpath
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from .images import (
    HEIC_SUFFIXES,
    NamedImages,
    choose_images,
    left_out,
    list_files,
    readable_name,
    remark_on_repeats,
    remarks_on_links,
)
from .io import one_line, read_lines, read_text
from .layouts import find_classes, split_images, split_tables
from .tar import read_members

SHARDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
    ".tgz": "webdataset",
}
"""Endings of files that hold images in their rows, and what reads them."""

TABLES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
"""Endings of files whose rows may name images, and what reads them."""

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of the images beside them, as the image folders of `datasets` have them."""

LONGEST_REASON = 250


class MissingSplitError(ValueError):
    """A dataset has no split of that name."""


class FoundSplit(NamedTuple):
    """Where the rows of a split are.

    Attributes:
        rows: The rows, where they are files of images or on disk already; then there is no builder.
        builder: What reads them otherwise.
        name: The name of the split there.
        remarks: A sentence for each kind of files that were left out.
        no_label: Why images in folders have no classes, or empty.
        folder: What names of files in the rows are relative to, for a local folder.
    """

    rows: datasets.Dataset | None
    builder: datasets.DatasetBuilder | None = None
    name: str = ""
    remarks: list[str] = []
    no_label: str = ""
    folder: Path | None = None


def find_split(dataset: str, split: str, config: str | None = None) -> FoundSplit:
    """Find a split by its name, or by a pattern of its files such as `train-{000..099}.tar`.

    A local folder may hold one of `save_to_disk`, images in class folders or beside metadata, parquet or other tables,
    or tar shards. Links in it are followed, hidden files are ignored, and splits are found as `layouts` says.

    Args:
        dataset: Name on the Hub, address, or local folder.
        split: Name of the split, or pattern of the paths of its files.
        config: Configuration of a dataset on the Hub.

    Raises:
        MissingSplitError: There is no split of that name.
        ValueError: There is no such dataset, or it cannot be read; one sentence.
    """
    folder = Path(dataset).expanduser()
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name its folder, and the file as --train_split or --validation_split.")
    if not folder.exists() and dataset.startswith((".", "/", "~")):
        raise ValueError(f"There is no dataset at {folder}.")
    with failures_named(dataset, split):
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(folder))
            if split not in splits:
                raise MissingSplitError(_missing(split, splits))
            return FoundSplit(splits[split])
        if (folder / "state.json").is_file():
            return FoundSplit(datasets.load_from_disk(str(folder)))
        if folder.is_dir() and config is None and not _describes_itself(folder):
            return _find_in_folder(folder, split)
        return _find_elsewhere(dataset, split, config)


@contextlib.contextmanager
def failures_named(dataset: str, split: str) -> Iterator[None]:
    """Turn what can go wrong while a split is found or read into one sentence, a ValueError."""
    kinds = (ValueError, OSError, tarfile.TarError, pa.ArrowException, datasets.exceptions.DatasetsError)
    try:
        yield
    except kinds as error:
        reason = _reason(error)
        missing = isinstance(error, MissingSplitError) or reason.startswith("Unknown split")
        kind = MissingSplitError if missing else ValueError
        raise kind(f"Cannot load the split {split!r} of {readable_name(dataset)}: {reason}.") from None


def _reason(error: BaseException) -> str:
    """What an error says, or what caused it where it only says that something did."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    reason = one_line(error)
    if isinstance(error, UnicodeEncodeError):
        reason = f"the name {readable_name(error.object)} is not in UTF-8"
    elif "at least one table" in reason:  # what pyarrow says where the first tar file holds nothing
        reason = "the first file is empty"
    elif not isinstance(error, ValueError | OSError | datasets.exceptions.DatasetsError):
        reason = f"{type(error).__name__}: {reason}"
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}…"


def _missing(split: str, splits: Any) -> str:
    return f"it has no split {split!r}, only {', '.join(map(repr, splits))}"


def read_split(found: FoundSplit) -> datasets.Dataset:
    """The rows of a split, copied once into the cache of `datasets` where a builder reads them."""
    if found.builder is None:
        return found.rows
    if isinstance(found.builder, WebDataset) and not os.path.isdir(found.builder.cache_dir):
        for file in found.builder.config.data_files[found.name]:
            for _ in read_members(str(file)):
                pass  # `datasets` takes a file that was cut for a shorter one
    found.builder.download_and_prepare()
    return found.builder.as_dataset(split=found.name)


def _describes_itself(folder: Path) -> bool:
    """Whether the card of a dataset says which files are which split, or what their columns are."""
    for name in ("README.md", ".huggingface.yaml"):
        path = folder / name
        if path.is_file() and re.search(rb"^(configs|dataset_info)\s*:", path.read_bytes(), re.MULTILINE):
            return True
    return False


def _find_elsewhere(dataset: str, split: str, config: str | None) -> FoundSplit:
    """On the Hub, at an address, or in a folder whose card describes it."""
    if not _is_pattern(split):
        return FoundSplit(None, datasets.load_dataset_builder(dataset, config), split)
    files = expand_ranges(split)
    if "://" not in dataset:
        try:
            builder = datasets.load_dataset_builder(dataset, config, data_files={"files": files})
        except FileNotFoundError:
            raise ValueError(f"no file there matches {split!r}") from None
        return FoundSplit(None, builder, "files")
    reader = next((reader for ending, reader in SHARDS.items() if split.endswith(ending)), None)
    if reader is None:
        raise ValueError(f"{split!r} must end in one of {', '.join(SHARDS)}")
    addresses = [f"{dataset.rstrip('/')}/{file}" for file in files]
    return FoundSplit(None, datasets.load_dataset_builder(reader, data_files={"files": addresses}), "files")


def _is_pattern(split: str) -> bool:
    return "*" in split or "{" in split or split.endswith((*SHARDS, *TABLES))


def expand_ranges(pattern: str) -> list[str]:
    """`a-{08..10}.tar` as [`a-08.tar`, `a-09.tar`, `a-10.tar`]."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if not numbers:
        raise ValueError(f"the range {match[0]} is empty")
    return [
        file for number in numbers for file in expand_ranges(pattern[: match.start()] + number + pattern[match.end() :])
    ]


def _find_in_folder(folder: Path, split: str) -> FoundSplit:
    listed = list_files(folder)
    names, remarks, chosen = listed.files, remarks_on_links(listed), None
    if split.endswith(".txt") and (folder / split).is_file():
        files, _ = choose_images(names)
        chosen = NamedImages(folder, files).find(read_lines(folder / split))
    elif _is_pattern(split) or (folder / split).is_file():
        chosen = _matching(folder, split)
    if chosen is not None:
        names = [*chosen, *(name for name in names if os.path.basename(name) in METADATA and name not in chosen)]
    images, _ = choose_images(name for name in names if os.path.basename(name) not in METADATA)
    shards, tables = ([name for name in names if _ending(name, kind)] for kind in (SHARDS, TABLES))
    tables = [name for name in tables if os.path.basename(name) not in METADATA]
    shards = [name for name in shards if os.path.basename(name) not in METADATA]
    if images and len(images) > len(shards) and len(images) >= len(tables):
        found = _find_images(folder, split, names, remarks, chosen is not None)
        if listed.empty and chosen is None and "label" in read_split(found).column_names:
            found.remarks.append(left_out(listed.empty, "folder without an image", "folders without an image"))
        return found
    if not shards and not tables:
        if chosen is None and any(name.lower().endswith(".zip") for name in names):
            return _find_elsewhere(str(folder), split, None)  # `datasets` looks into archives
        heic = [name for name in names if os.path.splitext(name)[1].lower() in HEIC_SUFFIXES]
        reason = f", only {len(heic)} HEIC images: pip install pillow-heif lets them be read" if heic else ""
        raise ValueError(f"the folder holds neither images nor tables{reason}")
    return _find_tables(folder, split, names, shards or tables, SHARDS if shards else TABLES, remarks, chosen)


def _ending(name: str, endings: dict[str, str]) -> str:
    return next((ending for ending in endings if name.lower().endswith(ending)), "")


def _matching(folder: Path, pattern: str) -> list[str]:
    """The files that a pattern with ranges and wildcards stands for, each once."""
    if (folder / pattern).is_file():
        return [pattern]
    found = []
    for part in expand_ranges(pattern):
        for name in sorted(glob.glob(part, root_dir=folder, recursive=True)):
            if os.path.isfile(folder / name):
                found.append(name.replace(os.sep, "/"))
    if not found:
        raise ValueError(f"no file there matches {pattern!r}")
    return list(dict.fromkeys(found))


def _find_tables(
    folder: Path,
    split: str,
    names: list[str],
    rows_in: list[str],
    endings: dict[str, str],
    remarks: list[str],
    chosen: list[str] | None,
) -> FoundSplit:
    """Tables or shards of one kind, the most frequent one."""
    (ending, _), *_ = Counter(_ending(name, endings) for name in rows_in).most_common()
    reader = endings[ending]
    alike = [name for name in rows_in if endings[_ending(name, endings)] == reader]
    if chosen is None:
        known = set(alike)
        others = [name for name in names if name not in known]
        if others:
            kinds = f"file that is not {reader}", f"files that are not {reader}"
            remarks = [*remarks, left_out(others, *kinds)]
        layout = split_tables(alike)
        if layout.others:
            remarks = [*remarks, left_out(layout.others, "file of no split", "files of no split")]
        if split in layout.splits:
            alike = layout.splits[split]
        elif not (alike := [name for name in alike if name.startswith(f"{split}/")]):
            raise MissingSplitError(_missing(split, layout.splits))
    if reader == "csv":  # pandas, with which `datasets` reads these, takes NA and None for cells without a word
        table = pa.concat_tables([_read_table(folder / name) for name in alike], promote_options="permissive")
        rows = datasets.Dataset(datasets.table.InMemoryTable(table))
        return FoundSplit(rows, None, split, remarks, folder=folder)
    # `datasets` takes paths for patterns, and does not enter links to folders where these have wildcards.
    paths = [os.path.join(os.path.realpath(folder / os.path.dirname(name)), os.path.basename(name)) for name in alike]
    paths = [glob.escape(path) for path in paths]
    name = split if chosen is None and split.isidentifier() else "files"
    builder = datasets.load_dataset_builder(reader, data_files={name: paths})
    return FoundSplit(None, builder, name, remarks, folder=folder)


def _find_images(folder: Path, split: str, names: list[str], remarks: list[str], chosen: bool) -> FoundSplit:
    """Images in folders; the tables beside them that are called metadata say more of each."""
    metadata = [name for name in names if os.path.basename(name) in METADATA]
    known = set(metadata)
    images, others = choose_images(name for name in names if name not in known)
    remarks, skip, everything = [*remarks, *others], 0, images
    if not chosen:
        layout = split_images(images)
        if split in layout.splits:
            images, skip = layout.splits[split], layout.depth
            if layout.others:
                remarks.append(left_out(layout.others, "image in no split", "images in no split"))
        elif inside := [name for name in images if name.startswith(f"{split}/")]:
            images, skip = inside, split.count("/") + 1
        else:
            raise MissingSplitError(_missing(split, layout.splits))
    if metadata:
        return _read_metadata(folder, images, everything, metadata, remarks)
    remarks += remark_on_repeats(images)
    columns: dict[str, list] = {"image": [image_entry(folder, name) for name in images]}
    features = datasets.Features({"image": datasets.Image()})
    classes = find_classes(images, skip)
    if classes.names:
        columns["label"] = classes.labels
        features["label"] = datasets.ClassLabel(names=classes.names)
    rows = datasets.Dataset.from_dict(columns, features=features)
    return FoundSplit(rows, None, split, remarks, classes.reason, folder)


def image_entry(folder: Path, name: str) -> dict[str, Any]:
    """A file for a column of images. A table holds text alone, so a file whose name is none goes into it whole."""
    path = os.path.join(folder, name)
    try:
        path.encode()
    except UnicodeEncodeError:
        return {"bytes": Path(path).read_bytes(), "path": readable_name(path)}
    return {"bytes": None, "path": path}


def _read_metadata(
    folder: Path, images: list[str], everything: list[str], metadata: list[str], remarks: list[str]
) -> FoundSplit:
    """The images that tables beside them name, with the other columns of these.

    As in `datasets`, a column `file_name` becomes `image`, and a column `mask_file_name` becomes `mask`. Names are
    relative to the folder of the table.

    images: those of the split. everything: all images in the folder.
    """
    wanted, known = ({_same_name(name): name for name in names} for names in (images, everything))
    tables, paths, absent = [], dict[str, list[str | None]](), []
    for table_name in metadata:
        table = _read_table(folder / table_name)
        columns = [name for name in table.column_names if name == "file_name" or name.endswith("_file_name")]
        if not columns:
            names = ", ".join(map(repr, table.column_names))
            raise ValueError(f"{readable_name(table_name)} has no column 'file_name', only {names}")
        named = {name: [_resolve(table_name, value) for value in table[name].to_pylist()] for name in columns}
        key = "file_name" if "file_name" in columns else columns[0]
        absent += [path for path in named[key] if _same_name(path) not in known]
        rows = [row for row, path in enumerate(named[key]) if _same_name(path) in wanted]
        before = len(next(iter(paths.values()), []))
        for name in columns:
            found = [known.get(_same_name(named[name][row]), named[name][row]) for row in rows]
            paths.setdefault(name, [None] * before).extend(found)
        tables.append(table.drop_columns(columns).take(pa.array(rows, pa.int64())))
        for values in paths.values():
            values.extend([None] * (before + len(rows) - len(values)))
    first = readable_name(metadata[0])
    key = "file_name" if "file_name" in paths else next(iter(paths))
    if not paths[key]:
        raise ValueError(f"{first} names none of the images there" + (f"; it names {absent[0]!r}" if absent else ""))
    if absent:
        kinds = "image that metadata names and is not there", "images that metadata names and are not there"
        remarks.append(left_out(absent, *kinds))
    if unnamed := sorted(set(images) - set(paths[key])):
        remarks.append(left_out(unnamed, "image without a row of metadata", "images without a row of metadata"))
    remarks += remark_on_repeats(paths[key])
    features, content = datasets.Features(), dict[str, list]()
    for name, values in paths.items():
        name = name.removesuffix("file_name").removesuffix("_") or "image"
        features[name] = datasets.Image()
        content[name] = [None if value is None else image_entry(folder, value) for value in values]
    table = pa.concat_tables(tables, promote_options="permissive")
    for name, feature in datasets.Features.from_arrow_schema(table.schema).items():
        features[name], content[name] = feature, table[name].to_pylist()
    return FoundSplit(datasets.Dataset.from_dict(content, features=features), None, "", remarks, folder=folder)


def _same_name(path: str) -> str:
    """One spelling of a path in all of its Unicode forms."""
    return unicodedata.normalize("NFC", readable_name(path))


def _resolve(table: str, name: str | None) -> str:
    """The path, relative to the dataset, of a file that a table names. Raises ValueError for one elsewhere."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(table), (name or "").replace("\\", "/")))
    if not name or "://" in name or path.startswith("../") or posixpath.isabs(path):
        raise ValueError(f"{readable_name(table)} names the file {name!r}, which is not below its folder")
    return path


def _read_table(path: Path) -> pa.Table:
    """A table of text; values are separated by tabs in .tsv, in .csv by what the first line shows.

    Blanks around them do not count, and where there is nothing else there is no value.
    """
    try:
        if path.suffix == ".parquet":
            return pa.parquet.read_table(path)
        text = read_text(path)
        content = io.BytesIO(text.encode())
        if path.suffix == ".jsonl":
            return pa.json.read_json(content)
        first_line = text.partition("\n")[0]
        separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first_line.count)
        header = next(csv.reader([first_line.strip()], delimiter=separator), [])
        table = pa.csv.read_csv(
            content,
            parse_options=pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                column_types={name: pa.string() for name in header if name.endswith("file_name")}
            ),
        )
    except pa.ArrowException as error:
        raise ValueError(f"{path.name} cannot be read: {one_line(error)}") from None
    for place, (name, values) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if pa.types.is_string(values.type):
            values = pc.utf8_trim_whitespace(values)
            values = pc.if_else(pc.equal(values, ""), None, values)
        table = table.set_column(place, name.strip(), values)
    return table


__all__ = [
    "FoundSplit",
    "MissingSplitError",
    "expand_ranges",
    "failures_named",
    "find_split",
    "image_entry",
    "read_split",
]
