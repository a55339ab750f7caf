"""What names of folders and files say: splits are not taken for classes, nor classes for splits."""

import pytest

from locatvit_hf.utils.layouts import find_classes, split_images, split_tables


def images(*folders: str) -> list[str]:
    """Two images in each folder; a name with a dot is an image itself."""
    return [f"{folder}/{i}.jpg" for folder in folders if "." not in folder for i in range(2)] + [
        folder for folder in folders if "." in folder
    ]


@pytest.mark.parametrize(
    "folders",
    [
        ["bullet_train", "train_station", "car", "bus"],
        ["train", "tank", "tractor"],
        ["crash test", "normal", "good"],
        ["train_station", "test_tube"],
        ["ant", "bee", "overview.jpg"],
        ["train", "x.jpg"],
        ["ant", "dev board.jpg"],
        ["a.jpg", "test.jpg"],
        ["2019/train_station", "2020/car"],
    ],
)
def test_classes_with_the_words_of_splits_are_classes(folders):
    names = images(*folders)
    assert split_images(names) == ({"train": names}, [], 0)


@pytest.mark.parametrize(
    ("folders", "splits", "others", "depth"),
    [
        (["train", "val"], {"train": 2, "validation": 2}, [], 1),
        (["train"], {"train": 2}, [], 1),
        (["Train/ant", "Valid/ant", "Valid/bee"], {"train": 2, "validation": 4}, [], 1),
        (["train2017/a", "val2017/a", "images-test"], {"train": 2, "validation": 2, "test": 2}, [], 1),
        (["train/ant", "previews"], {"train": 2}, ["previews/0.jpg", "previews/1.jpg"], 1),
        (["train", "val", "cover.jpg"], {"train": 2, "validation": 2}, ["cover.jpg"], 1),
        (["pets-train/cat", "pets-val/cat"], {"train": 2, "validation": 2}, [], 1),
        (["photos/train/ant", "photos/val/ant"], {"train": 2, "validation": 2}, [], 2),
    ],
)
def test_folders_of_splits_are_splits(folders, splits, others, depth):
    found = split_images(images(*folders))
    assert {split: len(names) for split, names in found.splits.items()} == splits
    assert (found.others, found.depth) == (others, depth)


@pytest.mark.parametrize(
    ("names", "splits", "others"),
    [
        (["train-0.parquet", "train-1.parquet", "validation-0.parquet", "x.parquet"], "train validation", 1),
        (["data/train-00000-of-00001.parquet", "data/my-00000-of-00001.parquet", "val.parquet"], "train my", 1),
        (["a/train/0.csv", "a/val/0.csv"], "train validation", 0),
        (["0.tar", "1.tar"], "train", 0),
    ],
)
def test_tables_belong_to_splits_as_in_datasets(names, splits, others):
    found = split_tables(names)
    assert list(found.splits) == splits.split() and len(found.others) == others


def test_classes_are_the_folders_of_images():
    found = find_classes(["train/bee/a.jpg", "train/ant/a.jpg", "train/bee/b.jpg"], skip=1)
    assert found == (["ant", "bee"], [1, 0, 1], "")
    assert find_classes(["caf\u00e9/a.jpg", "cafe\u0301/b.jpg", "dog/c.jpg"]) == (["caf\u00e9", "dog"], [0, 0, 1], "")
    assert find_classes(["2019/ant/a.jpg", "2020/ant/b.jpg", "2020/bee/c.jpg"]).labels == [0, 0, 1]


@pytest.mark.parametrize(
    ("names", "skip", "reason"),
    [
        (["ant/a.jpg", "bee/b.jpg", "o.jpg"], 0, "o.jpg lies in no class folder, unlike ant/a.jpg"),
        (["a/a.jpg", "a/s/b.jpg", "a/s/c.jpg", *images("b", "c")], 0, "a/s/b.jpg lies at another depth of folders than "
         "a/a.jpg (2 such images)"),
        (["train/a.jpg"], 1, "the images lie in no class folders"),
        (images("ant/train", "ant/val"), 0, "folders of splits, as ant/train, belong above those of classes"),
    ],
)  # fmt: skip
def test_why_there_are_no_classes(names, skip, reason):
    assert find_classes(names, skip) == ([], [], reason)
