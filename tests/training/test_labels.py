"""Labels of every kind: numbered alike in both splits, or refused in one sentence that names the value."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from training.data import TrainingSamples, load_splits
from training.engine.arguments import build_arguments
from training.engine.settings import DataArguments
from training.evaluation.results import EvaluationArguments, load_validation


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Splits with these labels, as parquet files; the ids of the training split, and of validation, and the names."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def load(train, validation=None, **settings):
        root = tmp_path / "rows"
        root.mkdir(exist_ok=True)
        for split, labels in (("train", train), ("validation", train if validation is None else validation)):
            if isinstance(labels, Dataset):
                labels.to_parquet(root / f"{split}.parquet")
                continue
            images = [{"bytes": png(), "path": None}] * len(labels)
            pq.write_table(pa.table({"image": images, "label": labels}), root / f"{split}.parquet")
        splits = load_splits(build_arguments(DataArguments, {"dataset": str(root), **settings}))
        read = [TrainingSamples(split, ["image", "label"], lambda image, label: label, 0) for split in splits[:2]]
        return [[samples[0, index] for index in range(len(samples))] for samples in read], splits.label_names

    return load


def classes(names: list[str], labels: list[int]) -> Dataset:
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    images = [{"bytes": png(), "path": None}] * len(labels)
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("train", "validation", "settings", "ids", "names"),
    [
        ([True, False, True], [False], {}, [[1, 0, 1], [0]], ["False", "True"]),
        ([0.0, 2.0, 1.0], [1.0], {}, [[0, 2, 1], [1]], ["0", "1", "2"]),
        ([1, 0, 1], [0], {"label_names": ["x", "y"]}, [[1, 0, 1], [0]], ["x", "y"]),
        (["b", "a", "10"], ["a"], {}, [[2, 1, 0], [1]], ["10", "a", "b"]),
        (["b", "a", "b"], ["a"], {"label_names": ["b", "a"]}, [[0, 1, 0], [1]], ["b", "a"]),
        (classes(["a", "b"], [0, 1]), classes(["b", "a"], [0, 1]), {}, [[0, 1], [1, 0]], ["a", "b"]),
        (classes(["a", "b"], [0, 1]), None, {"label_names": ["b", "a"]}, [[1, 0], [1, 0]], ["b", "a"]),
        (classes(["a", "b"], [0, 1]), None, {"label_names": ["x", "y"]}, [[0, 1], [0, 1]], ["x", "y"]),
        (classes(["0", "10", *"23456789", "1"], [1, 2, 10]), None, {"label_names": list("abcdefghijk")},
         [[10, 2, 1], [10, 2, 1]], list("abcdefghijk")),
    ],
)  # fmt: skip
def test_labels_are_numbered(load, train, validation, settings, ids, names, streaming):
    assert load(train, validation, **settings, streaming=streaming) == (ids, names)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([[0], [0, 1]], "but they are lists: several labels per image are not supported; the first is [0]."),
        ([[1.0, 0.0], [0.0, 1.0]], "are not supported; the first is [1.0, 0.0]."),
        ([{"a": 1}, {"a": 2}], "but they are dictionaries; the first is {'a': 1}."),
        ([b"a", b"b"], "but they are of type binary; the first is b'a'."),
        ([0.5, 1.0], "must be names or whole numbers, but some are 0.5, which is no whole number."),
        ([0.0, float("nan")], "but some are nan, which is no whole number."),
        (["b", "a", None], "Some training labels in 'label' are None: every image needs a label."),
        ([1, 0, None], "are None: every image needs a label."),
        ([7, 100034], "are 2 numbers from 7 to 100034, but class ids run from 0 without large gaps"),
        ([-1, 0], "run from -1 to 0, but class ids begin at 0"),
        ([0, 0], "The training labels hold a single class, '0': training needs two or more."),
        (["ant", "ant"], "hold a single class, 'ant'"),
        ([True, True], "hold a single class, 'True'"),
        (classes(["a"], [0, 0]), "hold a single class, 'a'"),
    ],
)
def test_labels_that_name_no_classes_are_one_sentence(load, labels, sentence, streaming):
    with pytest.raises(ValueError) as caught:
        load(labels, streaming=streaming)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_classes_of_validation_alone_are_refused(load):
    with pytest.raises(ValueError, match="The validation label 'c' is none of the 2 classes of the training split"):
        load(classes(["a", "b"], [0, 1]), classes(["a", "c"], [0, 1]))


def test_classes_without_an_image_are_named(load, capsys):
    assert load([0, 2, 3, 0])[1] == ["0", "1", "2", "3"]
    assert "No training image is of 1 of the 4 classes: '1'." in capsys.readouterr().out


def test_names_that_differ_in_case_alone_are_said(load, capsys):
    assert load(["dog", "Dog", "cat"], streaming=True)[1] == ["Dog", "cat", "dog"]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("Names of classes are equal or differ in case alone") == 1 and "'Dog' and 'dog'." in said


def test_numbers_tell_classes_of_one_name_apart(load, capsys):
    """As the crane of ImageNet, a bird and a machine; of names nobody knows which is meant."""
    assert load([0, 1, 2], label_names=["crane", "dog", "crane"])[1] == ["crane", "dog", "crane"]
    assert "may be one class given twice: 'crane' and 'crane'" in " ".join(capsys.readouterr().out.split())
    for labels in (["crane", "dog"], classes(["crane", "dog"], [0, 1])):
        with pytest.raises(ValueError, match="gives several classes the name 'crane'"):
            load(labels, label_names=["crane", "dog", "crane"])


def test_one_class_can_be_evaluated(tmp_path):
    """A folder of ants tells how many of them a model knows; so do labels with gaps."""
    for number in range(3):
        path = tmp_path / "ants" / "validation" / "ant" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    validation, names = load_validation(build_arguments(EvaluationArguments, {"dataset": str(tmp_path / "ants")}))
    assert len(validation) == 3 and names == ["ant"]
