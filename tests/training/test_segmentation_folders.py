"""A folder of images beside a folder of masks, in the layouts that data sets come in."""

import numpy as np
import pytest
from PIL import Image

from training.arguments import DataArguments
from training.data import load_splits


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
