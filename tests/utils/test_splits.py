"""Local folders as people have them: every image is a row, or is counted and named."""

import os
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from locatvit_hf.utils.splits import MissingSplitError, failures_named, find_split, read_split

CLASS_FOLDERS = ["ant/a.jpg", "ant/B.JPG", "bee/a.png", "bee/b.avif"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def save(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(root / name)
    return root


def load(root: Path, split: str = "train") -> tuple[Dataset, list[str]]:
    found = find_split(str(root), split)
    with failures_named(str(root), split):
        return read_split(found), found.remarks


def test_class_folders(tmp_path):
    root = save(tmp_path / "photos [2024]", *CLASS_FOLDERS, "bee/._a.png")
    (root / "notes.txt").write_text("x")
    rows, remarks = load(root)
    assert rows.features["label"].names == ["ant", "bee"] and rows["label"][:] == [0, 0, 1, 1]
    assert [row["image"].size for row in rows] == [(8, 6)] * 4
    assert remarks == ["Left out 1 file that is not an image: notes.txt."]
    with pytest.raises(MissingSplitError, match=r"Cannot load the split 'val.* no split 'validation', only 'train'"):
        find_split(str(root), "validation")
    assert len(load(root, "ant/*")[0]) == 2
    with pytest.raises(ValueError, match=r"no file there matches 'cat/\*'"):
        find_split(str(root), "cat/*")


def test_folders_of_splits(tmp_path):
    root = save(tmp_path, *(f"{split}/{name}" for split in ("train", "val") for name in CLASS_FOLDERS), "extra/a.png")
    rows, remarks = load(root, "validation")
    assert rows["label"][:] == [0, 0, 1, 1] and remarks == ["Left out 1 image in no split: extra/a.png."]
    assert load(root, "val")[0]["label"][:] == [0, 0, 1, 1]  # by the name of the folder
    (root / "train" / "wasp").mkdir()
    (root / "train" / "wasp" / ".gitkeep").touch()
    assert load(root)[1][-1] == "Left out 1 folder without an image: train/wasp."
    found = find_split(str(root), "extra")
    assert len(found.rows) == 1 and found.no_label == "the images lie in no class folders"


def test_lists_of_names(tmp_path):
    root = save(tmp_path, *CLASS_FOLDERS)
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text("bee/b\r\nant/B.JPG\r\n\r\n", encoding="utf-8-sig")
    rows, _ = load(root, "lists/train.txt")
    paths = [image["path"] for image in rows.cast_column("image", ImageFeature(decode=False))["image"]]
    assert paths == [str(root / "bee" / "b.avif"), str(root / "ant" / "B.JPG")] and rows["label"][:] == [1, 0]
    (root / "lists" / "train.txt").write_text("bee/b 0\n")
    with pytest.raises(ValueError, match=r"has no file 'bee/b 0' .*; the nearest is 'bee/b'"):
        load(root, "lists/train.txt")


def test_links_are_followed(tmp_path):
    save(tmp_path / "store", "cat/a.jpg")
    root = save(tmp_path / "root", *CLASS_FOLDERS)
    (root / "cat").symlink_to(tmp_path / "store" / "cat")
    (root / "bee" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    rows, remarks = load(root)
    assert rows.features["label"].names == ["ant", "bee", "cat"] and len(rows) == 5
    assert remarks == ["Left out 1 link that leads nowhere: bee/gone.jpg."]


@pytest.mark.skipif(os.name == "nt", reason="names of Windows are Unicode")
def test_names_that_are_not_unicode(tmp_path):
    root = save(tmp_path, *CLASS_FOLDERS)
    (root / os.fsdecode(b"\xe9t\xe9")).mkdir()
    (root / os.fsdecode(b"\xe9t\xe9/caf\xe9.png")).write_bytes((root / "bee" / "a.png").read_bytes())
    rows, remarks = load(root)
    assert rows.features["label"].names == ["ant", "bee", "été"] and not remarks
    assert rows[4]["image"].size == (8, 6) and rows[4]["label"] == 2


METADATA = {
    "metadata.csv": "file_name,label,mask_file_name\nant/a.jpg,x,masks/a.png\nsub/é.jpg,NA,masks/a.png\ngone.jpg,x,\n",
    "metadata.jsonl": '{"file_name": "ant\\\\a.jpg", "label": "x", "boxes": [[1, 2]]}\n',
}


def test_metadata_in_every_form(tmp_path):
    """With what it does not name, and what it names in vain."""
    root = save(tmp_path / "csv", "ant/a.jpg", "sub/e\u0301.jpg", "masks/a.png")
    (root / "metadata.csv").write_text(METADATA["metadata.csv"].replace("x,\n", "x,masks/a.png\n"), encoding="utf-8")
    rows, remarks = load(root)
    assert rows.column_names == ["image", "mask", "label"] and rows["label"][:] == ["x", "NA"]
    assert rows[1]["image"].size == rows[1]["mask"].size == (8, 6)
    assert remarks == [
        "Left out 1 image that metadata names and is not there: gone.jpg.",
        "Left out 1 image without a row of metadata: masks/a.png.",
    ]

    root = save(tmp_path / "jsonl", "ant/a.jpg", "train/b.jpg")
    (root / "metadata.jsonl").write_text(METADATA["metadata.jsonl"] + '{"file_name": "train/b.jpg", "label": "y"}\n')
    rows, _ = load(root)
    assert rows["label"][:] == ["x", "y"] and rows["boxes"][:] == [[[1, 2]], None]

    root = save(tmp_path / "parquet", "train/a.jpg", "validation/b.jpg")
    for split, name in (("train", "a.jpg"), ("validation", "b.jpg")):
        Dataset.from_dict({"file_name": [name], "label": [3]}).to_parquet(root / split / "metadata.parquet")
    assert load(root, "validation")[0]["label"][:] == [3]

    root = save(tmp_path / "excel", "a.jpg", "b.jpg")
    (root / "metadata.csv").write_bytes("\ufefffile_name;label;n\r\na.jpg;x y;1\r\nb.jpg;z;2,5\r\n".encode())
    rows, _ = load(root)
    assert rows["label"][:] == ["x y", "z"] and rows.column_names == ["image", "label", "n"]

    (root / "metadata.csv").write_text("file_name, label\na.jpg, x\nb.jpg,\na.jpg,y \n")
    rows, remarks = load(root)
    assert rows["label"][:] == ["x", None, "y"]
    assert remarks == ["Took several times what is named several times, 1 of the images: a.jpg."]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name,label\na.jpg,x\n", "metadata.csv has no column 'file_name', only 'name', 'label'"),
        ("file_name,label\n../a.jpg,x\n", "names the file '../a.jpg', which is not below its folder"),
        ("file_name,label\n/etc/a.jpg,x\n", "names the file '/etc/a.jpg', which is not"),
        ("file_name,label\nb.jpg,x\n", "metadata.csv names none of the images there; it names 'b.jpg'"),
        ("file_name,label\na.jpg,x,y\n", "metadata.csv cannot be read: "),
    ],
)
def test_metadata_that_cannot_be_used_is_one_sentence(tmp_path, content, sentence):
    root = save(tmp_path, "a.jpg")
    (root / "metadata.csv").write_text(content)
    with pytest.raises(ValueError) as caught:
        load(root)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_tables_and_shards(tmp_path):
    """In a folder with brackets in its name, hidden ones and those of no split left out, also behind links."""
    root, store = tmp_path / "rows [v2]", tmp_path / "store"
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"image": [None] * 2, "label": [0, 1]}, features=features)
    for path in (root / "train-0.parquet", root / "other.parquet", root / "._train-0.parquet", store / "1.parquet"):
        path.parent.mkdir(exist_ok=True)
        rows.to_parquet(path)
    (root / "train").symlink_to(store)
    (root / "names.json").write_text("{}")
    found, remarks = load(root)
    assert len(found) == 2 and found.features == features  # folders of splits come before names of files
    assert remarks == [
        "Left out 1 file that is not parquet: names.json.",
        "Left out 2 files of no split: other.parquet, train-0.parquet.",
    ]
    assert len(load(root, "train*.parquet")[0]) == 2 and len(load(root, "**/*.parquet")[0]) == 6


def test_a_table_of_texts(tmp_path):
    save(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg")
    images, labels = ["images/a.jpg", "images/b.jpg", "images/c.jpg"], ["x, y", "NA", "None"]
    for name, separator, title in (("list.tsv", "\t", "bird, or other"), ("list.csv", ";", "label")):
        lines = [("image", title), *zip(images, labels, strict=True)]
        (tmp_path / name).write_text("".join(f"{separator.join(line)}\n" for line in lines), encoding="utf-8-sig")
        assert load(tmp_path, name)[0].to_dict() == {"image": images, title: labels}


def test_a_card_that_says_which_files_are_which_split_is_followed(tmp_path):
    Dataset.from_dict({"label": [1]}).to_parquet(tmp_path / "one.parquet")
    Dataset.from_dict({"label": [2]}).to_parquet(tmp_path / "two.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: fold\n    path: two.parquet\n---\n"
    )
    assert load(tmp_path, "fold")[0]["label"][:] == [2]


def test_a_saved_dataset_without_splits(tmp_path):
    Dataset.from_dict({"label": [1, 2]}).save_to_disk(tmp_path)
    assert load(tmp_path)[0]["label"][:] == [1, 2]


def test_what_is_behind_a_failure_is_said(tmp_path):
    """Not that an error occurred while the dataset was generated."""
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_bytes(b"label\n\xe9\n")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "train.jsonl").write_bytes(b'{"label": \n')
    (tmp_path / "heic").mkdir()
    (tmp_path / "heic" / "a.heic").write_bytes(b"")
    for name, reason in (
        ("csv", "train.csv is not in UTF-8 (byte 0xe9 at 6): save it as UTF-8"),
        ("json", "JSON parse error"),
        ("heic", "neither images nor tables"),
    ):
        with pytest.raises(ValueError) as caught:
            load(tmp_path / name)
        assert reason in str(caught.value) and "error occurred while generating" not in str(caught.value)
        assert "\n" not in str(caught.value)
