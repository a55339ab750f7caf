"""What the names in a folder say about a dataset: which files belong to which split, and which class an image has."""

import re
import unicodedata
from collections import Counter, defaultdict
from typing import NamedTuple

from .images import readable_name

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words for splits, as `datasets` has them, to the names that splits have here."""

_WORDS = "|".join(SPLIT_WORDS)
_GENERIC = "set|split|data|dataset|images?|imgs?|photos?|pictures?"
# The whole name means a split: train, val2017, training_set, images-test.
_SPLIT_NAME = re.compile(rf"(?:(?:{_GENERIC})[-_. ]*)?({_WORDS})[-_. ]*(?:{_GENERIC})?[-_. ]*\d*")
# The name has such a word: my-train, flowers_val_01, dev board.
_WITH_SPLIT_WORD = re.compile(rf"(?:.*[-_. \d])?({_WORDS})(?:[-_. \d].*)?")
_SHARD_OF_THE_HUB = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")


class Layout(NamedTuple):
    """Which files belong to which split, as paths with `/` between folders.

    Attributes:
        splits: Name of a split to its files.
        others: Files that belong to none.
        depth: Number of folders at the start of each path that are those of the split.
    """

    splits: dict[str, list[str]]
    others: list[str]
    depth: int = 0


class Classes(NamedTuple):
    """Names of classes in alphabetical order, and the class of each image; or the reason why there are none."""

    names: list[str]
    labels: list[int]
    reason: str = ""


def split_images(names: list[str]) -> Layout:
    """Assign images in folders to splits.

    Folders are splits only directly below the root, and only where nothing speaks for their being classes: `train` and
    `val` are splits, `train`, `tank` and `tractor` are classes, and so are `bullet_train` and `car`. A single folder
    that holds everything counts as the root.

    Args:
        names: Paths relative to the root, with `/` between folders.

    Returns:
        The splits in the order of `SPLIT_WORDS`; `train` alone where there are no folders of splits.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    direct: list[str] = []
    for name in names:
        head, slash, _ = name.partition("/")
        (folders[head] if slash else direct).append(name)
    if len(folders) == 1 and not direct and not split_word(*folders):
        (root,) = folders
        inner = split_images([name[len(root) + 1 :] for name in names])
        if inner.depth:
            splits = {split: [f"{root}/{name}" for name in found] for split, found in inner.splits.items()}
            return Layout(splits, [f"{root}/{name}" for name in inner.others], inner.depth + 1)
    strict, loose = (
        {folder: SPLIT_WORDS[match[1]] for folder in folders if (match := pattern.fullmatch(folder.lower()))}
        for pattern in (_SPLIT_NAME, _WITH_SPLIT_WORD)
    )
    deep = {folder for folder, inside in folders.items() if all(name.count("/") > 1 for name in inside)}
    alone = len(strict) == len(folders) and not direct
    if strict and (alone or len(set(strict.values())) > 1 or deep.issuperset(strict)):
        found = strict
    elif len(loose) == len(folders) and not direct and deep.issuperset(folders):
        found = loose
    else:
        return Layout({"train": names}, [])
    return _group({name: found.get(name.partition("/")[0]) for name in names})._replace(depth=1)


def split_tables(names: list[str]) -> Layout:
    """Assign tables and shards to splits as `datasets` does: by shards of the Hub, by folders, or by their own names.

    Args:
        names: Paths relative to the root, with `/` between folders.
    """
    shards = {name: match and match[1] for name in names for match in [_SHARD_OF_THE_HUB.fullmatch(name)]}
    folders = {name: _first_word(name.split("/")[:-1]) for name in names}
    files = {name: _first_word(name.split("/")[-1:]) for name in names}
    for found in (shards, folders, files):
        if any(found.values()):
            return _group(found)
    return Layout({"train": names}, [])


def split_word(name: str) -> str | None:
    """The split that a folder is named like: `validation` for val and val2017; None for any other name."""
    match = _SPLIT_NAME.fullmatch(name.lower())
    return SPLIT_WORDS[match[1]] if match else None


def _first_word(parts: list[str]) -> str | None:
    matches = (_WITH_SPLIT_WORD.fullmatch(part.lower()) for part in parts)
    return next((SPLIT_WORDS[match[1]] for match in matches if match), None)


def _group(found: dict[str, str | None]) -> Layout:
    order = {split: place for place, split in enumerate(dict.fromkeys(SPLIT_WORDS.values()))}
    splits = sorted({split for split in found.values() if split}, key=lambda split: (order.get(split, 99), split))
    others = [name for name, split in found.items() if not split]
    return Layout({split: [name for name in found if found[name] == split] for split in splits}, others)


def find_classes(names: list[str], skip: int = 0) -> Classes:
    """The classes of images in class folders: the names of the folders that hold them, all at one depth.

    Args:
        names: Paths of images, with `/` between folders.
        skip: Number of folders at the start of each path that are those of the split.
    """
    depths = Counter(name.count("/") - skip for name in names)
    usual = depths.most_common(1)[0][0] if names else 0
    if len(depths) > 1:
        one, other = (next(n for n in names if (n.count("/") - skip == usual) is same) for same in (True, False))
        where = "in no class folder, unlike" if other.count("/") == skip else "at another depth of folders than"
        count = len(names) - depths[usual]
        more = f" ({count} such images)" if count > 1 else ""
        return Classes([], [], f"{readable_name(other)} lies {where} {readable_name(one)}{more}")
    if usual == 0:
        return Classes([], [], "the images lie in no class folders")
    # In one Unicode form: macOS writes é as two characters, most others as one.
    classes = [unicodedata.normalize("NFC", readable_name(name.rsplit("/", 2)[-2])) for name in names]
    ids = {name: label for label, name in enumerate(sorted(set(classes)))}
    if usual > 1 and all(map(split_word, ids)):
        return Classes([], [], f"folders of splits, as {names[0].rsplit('/', 1)[0]}, belong above those of classes")
    return Classes(list(ids), [ids[name] for name in classes])


__all__ = ["Classes", "Layout", "find_classes", "split_images", "split_tables", "split_word"]
