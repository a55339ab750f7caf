"""A folder of images beside a folder of masks, in the layouts that datasets come in."""

import os

import numpy as np
import pytest
from PIL import Image

from training.data import load_splits
from training.engine.settings import DataArguments


def write(folder, names, mode="L"):
    folder.mkdir(parents=True)
    for index, name in enumerate(names):
        path = folder / f"{name}{'.png' if mode == 'L' else '.jpg'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 6), index, np.uint8)).convert(mode).save(path)


@pytest.mark.parametrize("layout", ["{column}/{split}", "{split}/{column}", "{column}"])
def test_images_and_masks_are_paired_by_name(tmp_path, layout):
    arguments = {"train_split": "training", "validation_split": "val"}
    names = {"training": ["b", "city/a", "c.1"], "val": ["d"]}
    if layout == "{column}":  # one pair of folders, and lists of names
        for column, mode in (("images", "RGB"), ("annotations", "L")):
            write(tmp_path / column, ["b", "city/a", "c.1", "d"], mode)
        (tmp_path / "lists").mkdir()
        for split, found in names.items():
            (tmp_path / "lists" / f"{split}.txt").write_text("\n".join(sorted(found)) + "\n")
        arguments = {key: f"lists/{split}.txt" for key, split in arguments.items()}
    else:
        for split, found in names.items():
            for column, mode in (("images", "RGB"), ("annotations", "L")):
                write(tmp_path / layout.format(column=column, split=split), found, mode)
    columns = {"image_column": "images", "label_column": "annotations"}
    splits = load_splits(DataArguments(dataset=str(tmp_path), **columns, **arguments), segmentation=True)
    assert (len(splits.train), len(splits.validation)) == (3, 1)
    assert [np.asarray(row["annotations"]).max() for row in splits.train] == [0, 2, 1]  # in the order of the names
    assert splits.train[0]["images"].mode == "RGB" and splits.train[0]["annotations"].mode == "L"


def test_one_pair_of_folders_is_divided(tmp_path):
    write(tmp_path / "image", list("abcdefgh"), "RGB")
    write(tmp_path / "label", list("abcdefgh"))
    splits = load_splits(DataArguments(dataset=str(tmp_path), validation_share=0.25), segmentation=True)
    assert (len(splits.train), len(splits.validation)) == (6, 2)


def test_unpaired_files_are_named(tmp_path):
    write(tmp_path / "image" / "train", ["a", "b"], "RGB")
    write(tmp_path / "label" / "train", ["a"])
    write(tmp_path / "image" / "validation", ["a"], "RGB")
    write(tmp_path / "label" / "validation", ["a"])
    with pytest.raises(ValueError, match=r"train has no file 'b' \(of 1 that are missing there\)"):
        load_splits(DataArguments(dataset=str(tmp_path)), segmentation=True)


def test_an_empty_pair_of_folders_is_an_empty_split(tmp_path):
    for column in ("image", "label"):
        (tmp_path / column / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"The split 'train' of .* is empty"):
        load_splits(DataArguments(dataset=str(tmp_path)), segmentation=True)


def pairs(root, images, masks):
    write(root / "image", images, "RGB")
    write(root / "label", masks)
    return DataArguments(dataset=str(root), validation_share=0.5)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lists_as_people_write_them(tmp_path, capsys, end, encoding):
    """With blanks in names, with or without suffixes and folders, with empty lines."""
    names = ["my photo 1", "café", "city/c.1", "d"]
    pairs(tmp_path, names, names)
    lines = ["my photo 1 ", "", "cafe\u0301.jpg", "./city\\c.1", "d.JPG", "d"]
    (tmp_path / "train.txt").write_text(end.join(lines), encoding=encoding, newline="")
    (tmp_path / "val.txt").write_text("d", encoding=encoding)
    lists = {"train_split": "train.txt", "validation_split": "val.txt"}
    splits = load_splits(DataArguments(dataset=str(tmp_path), **lists), segmentation=True)
    assert [np.asarray(row["label"]).max() for row in splits.train] == [0, 1, 2, 3, 3] and len(splits.validation) == 1
    assert "several times, 1 of the images: d.jpg." in " ".join(capsys.readouterr().out.split())
    (tmp_path / "val.txt").write_text("d", encoding="utf-16")
    with pytest.raises(ValueError, match=r"val\.txt is in UTF-16"):
        load_splits(DataArguments(dataset=str(tmp_path), **lists), segmentation=True)
    (tmp_path / "val.txt").write_text("my foto 1")
    with pytest.raises(ValueError, match=r"has no file 'my foto 1' .*; the nearest is 'my photo 1'"):
        load_splits(DataArguments(dataset=str(tmp_path), **lists), segmentation=True)


def test_two_images_of_one_name_are_refused(tmp_path):
    arguments = pairs(tmp_path, ["p0", "p1"], ["p0", "p1"])
    write(tmp_path / "more", ["p0"])
    (tmp_path / "more" / "p0.png").rename(tmp_path / "image" / "p0.png")
    with pytest.raises(ValueError, match=r"image has several images named 'p0': p0\.jpg, p0\.png; keep one of them"):
        load_splits(arguments, segmentation=True)
    (tmp_path / "all.txt").write_text("p0.png\np1.jpg\n")  # which says which one
    lists = {"train_split": "all.txt", "validation_split": "all.txt"}
    assert len(load_splits(DataArguments(dataset=str(tmp_path), **lists), segmentation=True).train) == 2


def test_what_is_no_pair_is_ignored_or_named(tmp_path, capsys):
    arguments = pairs(tmp_path, ["p0", "p1"], ["p0", "p1"])
    for name in ("image/._p0.png", "label/._p0.png", "image/.ipynb_checkpoints/p0.png", "label/@eaDir/p0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"Mac OS X")
    for name in ("image/notes.txt", "label/classes.txt"):
        (tmp_path / name).write_text("x")
    splits = load_splits(arguments, segmentation=True)
    assert len(splits.train) + len(splits.validation) == 2
    said = capsys.readouterr().out
    assert "Left out 1 file that is not an image: notes.txt." in said and "classes.txt" in said and "p0" not in said


def test_links_lead_to_pairs(tmp_path, capsys):
    pairs(tmp_path / "store", ["p0", "p1", "p2"], ["p0", "p1", "p2"])
    for kind in ("image", "label"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "day").symlink_to(tmp_path / "store" / kind)
    write(tmp_path / "other", ["q"], "RGB")
    (tmp_path / "store" / "image" / "more").symlink_to(tmp_path / "other")
    (tmp_path / "store" / "label" / "more").symlink_to(tmp_path / "store" / "label")
    splits = load_splits(DataArguments(dataset=str(tmp_path), validation_share=0.5), segmentation=True)
    assert len(splits.train) + len(splits.validation) == 3
    assert "Left out 1 image whose partner is behind such a link: day/more/q." in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="names of Windows are Unicode")
def test_names_are_one_in_all_encodings(tmp_path):
    """Composed, decomposed, and in the bytes of Latin-1."""
    arguments = pairs(tmp_path, ["cafe\u0301", "b"], ["b", "c"])
    (tmp_path / "label" / "c.png").rename(tmp_path / "label" / os.fsdecode(b"caf\xe9.png"))
    splits = load_splits(arguments, segmentation=True)
    rows = [row for split in splits[:2] for row in split]
    assert sorted((row["image"].size, row["label"].size) for row in rows) == [((6, 4), (6, 4))] * 2


def test_splits_are_found_by_other_words(tmp_path):
    for column, mode in (("image", "RGB"), ("label", "L")):
        for split in ("train2017", "val2017"):
            write(tmp_path / column / split, ["a", "b"], mode)
    splits = load_splits(DataArguments(dataset=str(tmp_path)), segmentation=True)
    assert (len(splits.train), len(splits.validation)) == (2, 2)
