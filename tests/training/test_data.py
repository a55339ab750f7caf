"""Reading images: the same ones in the same order, whoever reads them, however often they were interrupted."""

import base64
import io
import json
import pickle
import re
import signal
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file

from benchmarks import input_pipeline
from locatvit_hf import LocAtViTImageProcessor
from tests.large_images import png_bomb, save_photograph
from tests.training.programs import train
from training.data import TrainingSamples, create_evaluation_loader, create_training_loader, load_splits
from training.data.images import CorruptImageError, decode_image, read_header
from training.data.loading import read_label_names
from training.data.streaming import ForwardReader
from training.engine.arguments import build_arguments, run_program
from training.engine.checkpoints import list_checkpoints
from training.pretrain import PretrainArguments
from training.pretrain import main as pretrain
from training.segment import SegmentArguments
from training.tasks.classification import ClassificationTransform

NUM_IMAGES = 48
ONE_PROCESS = SimpleNamespace(process_index=0, num_processes=1)


def encoded(number: int, format: str = "PNG") -> bytes:
    """An image of which every pixel says which one it is."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """48 images in uneven shards: 3 parquet files in row groups of 5, and 6 tar files; labels are numbers mod 3."""
    parquet, tar = tmp_path_factory.mktemp("parquet"), tmp_path_factory.mktemp("tar")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    bounds = [0, 11, 30, NUM_IMAGES]
    for shard, (first, stop) in enumerate(pairwise(bounds)):
        rows = [{"image": {"bytes": encoded(i), "path": f"{i}.png"}, "label": i % 3} for i in range(first, stop)]
        Dataset.from_list(rows, features=features).to_parquet(parquet / f"train-{shard}.parquet", batch_size=5)
    for split in ("train", "validation"):
        bounds = [0, 5, 15, 22, 30, 41, NUM_IMAGES]
        for shard, (first, stop) in enumerate(pairwise(bounds)):
            write_tar(tar / f"{split}-{shard:03d}.tar", range(first, stop))
    Dataset.from_list(rows[:7], features=features).to_parquet(parquet / "validation-0.parquet")
    return {"parquet": parquet, "tar": tar}


def write_tar(path: Path, numbers, **members: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for extension, content in {"png": encoded(number), "cls": str(number % 3).encode(), **members}.items():
                entry = tarfile.TarInfo(f"{number:04d}.{extension}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def arguments_for(folder: Path, **changes):
    columns = {"image_column": "png", "label_column": "cls"} if "tar" in folder.name else {}
    small = {"batch_size": 12, "shuffle_buffer": 8, "streaming": True, "seed": 5, "eval_batch_size": 4}
    return build_arguments(PretrainArguments, {"dataset": str(folder), **columns, **small, **changes})


def columns_of(arguments) -> list[str]:
    return [arguments.image_column, arguments.label_column]


def number_of(image: Image.Image, label: int) -> tuple[torch.Tensor, int]:
    """Which image it is, and a random number: what the updates are compared by."""
    return torch.tensor([image.getpixel((0, 0))[0], np.random.randint(1000)]), label


def read_updates(folder: Path, processes: int = 1, start: int = 0, stop: int = 8, **changes) -> np.ndarray:
    """(updates, images of an update, 2): number of the image and random draw, as all processes together read them."""
    arguments = arguments_for(folder, **changes)
    shares = []
    for rank in range(processes):
        splits = load_splits(arguments)
        samples = TrainingSamples(splits.train, columns_of(arguments), number_of, arguments.seed)
        accelerator = SimpleNamespace(process_index=rank, num_processes=processes)
        loader = create_training_loader(samples, arguments, accelerator, start, stop)
        batches = list(loader)
        assert len(batches) == len(loader) == (stop - start) * arguments.gradient_accumulation_steps
        assert all((batch[0, 0] % 3 == label[0]).all() for batch, label in batches)
        shares.append(torch.stack([batch for batch, _ in batches]).reshape(stop - start, -1, 2))
    return torch.stack(shares, dim=2).reshape(stop - start, -1, 2).numpy()


@pytest.fixture(scope="module", params=["parquet", "tar"])
def folder(request, folders) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def whole(folder) -> np.ndarray:
    return read_updates(folder)


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own(whole):
    epochs = whole[:, :, 0].reshape(2, NUM_IMAGES)
    assert all(sorted(epoch) == list(range(NUM_IMAGES)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).mean() > 0.8
    assert len(set(whole[:, :, 1].ravel())) > NUM_IMAGES


@pytest.mark.parametrize(
    "split",
    [
        {"processes": 2},
        {"processes": 3, "gradient_accumulation_steps": 2},
        {"num_workers": 2},
        {"processes": 2, "num_workers": 3, "gradient_accumulation_steps": 3},
    ],
)
def test_streamed_updates_are_the_same_however_they_are_split(folder, whole, split):
    assert np.array_equal(read_updates(folder, **split), whole)


@pytest.mark.parametrize("start", [1, 3, 4, 6])
def test_streaming_goes_on_where_it_stopped(folder, whole, start):
    assert np.array_equal(read_updates(folder, processes=2, start=start), whole[start:])


def test_no_process_and_no_worker_reads_the_images_of_another(folder, monkeypatch):
    """Two processes with two workers each, played by four readers."""
    arguments = arguments_for(folder, num_workers=2)
    split, rows, read = load_splits(arguments).train, ForwardReader._rows, []

    def note(*places):
        for row in rows(*places):
            read.append(decode_image(row[0]).getpixel((0, 0))[0])
            yield row

    monkeypatch.setattr(ForwardReader, "_rows", note)
    for rank in range(2):
        samples = TrainingSamples(split, columns_of(arguments), number_of, arguments.seed)
        accelerator = SimpleNamespace(process_index=rank, num_processes=2)
        keys = list(create_training_loader(samples, arguments, accelerator, 0, 4).loader.batch_sampler)
        for worker in range(2):
            reader = pickle.loads(pickle.dumps(samples.reader))  # as a worker gets it
            for batch in keys[worker::2]:
                reader.read(batch)
    assert sorted(read) == list(range(NUM_IMAGES))


def test_streaming_changes_the_order_alone(folders):
    """The augmentation of an image depends on seed, epoch and index, however it is read."""
    drawn = []
    for streaming in (True, False):
        arguments = arguments_for(folders["parquet"], streaming=streaming)
        samples = TrainingSamples(load_splits(arguments).train, columns_of(arguments), number_of, arguments.seed)
        drawn.append([samples[1, index][0].tolist() for index in range(NUM_IMAGES)])
    assert drawn[0] == drawn[1]


def test_reading_goes_on_when_updates_skip_whole_windows(folders):
    """A worker that gets every third batch of a program's own collation passes over windows, forward only."""
    arguments = arguments_for(folders["tar"], num_workers=3)
    splits = load_splits(arguments)
    samples = TrainingSamples(splits.train, columns_of(arguments), number_of, arguments.seed)
    loader = create_training_loader(samples, arguments, ONE_PROCESS, 0, 8, lambda rows: [row[0] for row in rows])
    assert np.array_equal(np.stack([torch.stack(batch) for batch in loader]), read_updates(folders["tar"]))


CORRUPT = {7: b"no image at all", 20: encoded(20)[:45], 33: b"", 41: png_bomb()}


def corrupt_folder(folder: Path, corrupt: dict[int, bytes]) -> Path:
    rows = [
        {"image": {"bytes": corrupt.get(i, encoded(i)), "path": f"{i}.png"}, "label": i % 3} for i in range(NUM_IMAGES)
    ]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}-0.parquet", batch_size=5)
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_corrupt_images_are_replaced_counted_and_named(tmp_path, capsys, streaming):
    folder = corrupt_folder(tmp_path, CORRUPT)
    options = {"streaming": streaming, "max_corrupt_share": 0.3}
    updates = read_updates(folder, **options)
    assert updates.shape == (8, 12, 2) and not set(CORRUPT) & set(updates[:, :, 0].ravel())
    assert np.array_equal(read_updates(folder, processes=2, **options, num_workers=2), updates)

    arguments = arguments_for(folder, **options)
    samples = TrainingSamples(load_splits(arguments).train, columns_of(arguments), number_of, arguments.seed)
    capsys.readouterr()
    loader = create_training_loader(samples, arguments, ONE_PROCESS, 0, 8)
    assert len(list(loader)) == 8
    assert loader.num_corrupt >= 8 and loader.num_images == 96 + loader.num_corrupt  # each of them once an epoch
    assert sorted(name.split(",")[0] for name in loader.corrupt_images) == ["20.png", "33.png", "41.png", "7.png"]
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count("Skipped a corrupt image: 20.png") == said.count("41.png, which has 900 megapixels") == 1


@pytest.mark.parametrize("streaming", [True, False])
def test_a_run_with_too_many_corrupt_images_stops(tmp_path, streaming):
    folder = corrupt_folder(tmp_path, CORRUPT)
    with pytest.raises(
        ValueError, match=r"images cannot be decoded, more than the fraction 0.01 .* is .*png"
    ) as caught:
        read_updates(folder, streaming=streaming)
    assert "\n" not in str(caught.value)
    corrupt_folder(tmp_path, dict.fromkeys(range(NUM_IMAGES), b"x"))
    with pytest.raises(ValueError, match="images in a row cannot be decoded"):
        read_updates(folder, streaming=streaming, max_corrupt_share=1.0)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 2)])
def test_evaluation_sees_every_good_image_once(tmp_path, streaming, processes, workers):
    folder = corrupt_folder(tmp_path, CORRUPT)
    arguments = arguments_for(folder, streaming=streaming, num_workers=workers, max_corrupt_share=0.2)
    seen = []
    for rank in range(processes):
        accelerator = SimpleNamespace(process_index=rank, num_processes=processes)
        loader = create_evaluation_loader(
            load_splits(arguments).validation, columns_of(arguments), list, arguments, accelerator
        )
        for _ in range(2):  # as evaluation does, again and again
            rows = [row for batch in loader for row in batch]
        assert all(label == image.getpixel((0, 0))[0] % 3 for image, label in rows)
        seen += [image.getpixel((0, 0))[0] for image, _ in rows]
    assert sorted(seen) == sorted(set(range(NUM_IMAGES)) - set(CORRUPT))


@pytest.mark.parametrize("option", [None, "turned"])
def test_turned_images_whose_maps_may_be_either_are_named_and_counted(tmp_path, capsys, option):
    """Ten square images of twelve are turned; nothing tells whether their maps are made for that."""
    for column in ("image", "label"):
        (tmp_path / column).mkdir()
    for number in range(12):
        image, exif = Image.new("RGB", (8, 8 if number else 4)), Image.Exif()
        exif[0x0112] = 6 if number < 11 else 1
        image.save(tmp_path / "image" / f"{number:02d}.jpg", exif=exif)
        Image.new("L", (8, 8) if number else (4, 8)).save(tmp_path / "label" / f"{number:02d}.png")
    columns = {"image_column": "image", "label_column": "label"}
    (tmp_path / "all.txt").write_text("".join(f"{number:02d}\n" for number in range(12)))
    settings = {"dataset": str(tmp_path), **columns, "train_split": "all.txt", "validation_split": "all.txt"}
    settings |= {"batch_size": 12, "eval_batch_size": 4}
    arguments = build_arguments(SegmentArguments, {**settings, "label_orientation": option})
    splits = load_splits(arguments, segmentation=True)
    samples = TrainingSamples(splits.train, list(columns.values()), lambda image, label: (0,), 0)
    for loader in (
        create_training_loader(samples, arguments, ONE_PROCESS, 0, 1),
        create_evaluation_loader(splits.train, list(columns.values()), list, arguments, ONE_PROCESS),
    ):
        for _ in range(2):
            list(loader)
        said = capsys.readouterr().out
        assert len(loader.unclear_images) == (0 if option else 10)
        assert said.count("is turned as its EXIF orientation says") == (0 if option else 2)
        assert option or re.search(r"\d\d.jpg is turned .* \(10 such so far\).*--label_orientation stored", said)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_files_of_several_frames_are_named_and_counted(tmp_path, capsys, format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    for number in range(11):
        path = tmp_path / "train" / str(number % 2) / f"{number:02d}.{format.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(path, lossless=True, save_all=number > 0, append_images=frames[1:] if number else [])
    frames[0].save(path.with_suffix(".mpo"), save_all=True, append_images=frames[1:])  # a second lens is no frame
    options = {"train_split": "train", "validation_split": "train", "streaming": False, "num_workers": 1}
    arguments = arguments_for(tmp_path, **options)
    rows, columns = load_splits(arguments).train, columns_of(arguments)
    samples = TrainingSamples(rows, columns, lambda image, label: (label,), 0)
    for loader in (
        create_training_loader(samples, arguments, ONE_PROCESS, 0, 3),
        create_evaluation_loader(rows, columns, list, arguments, ONE_PROCESS),
    ):
        list(loader)
        said = capsys.readouterr().out.replace("\n", " ")
        assert said.count("holds 3 images: only the first is used (1 such so far).") == 1
        assert said.count("holds 3 images: only the first is used (10 such so far).") == 1
        assert len(loader.several_frames) == 10 and said.count("such so far") == 2


def test_pixels_beyond_the_limit_are_not_decoded(folders, capsys):
    arguments = arguments_for(folders["parquet"], max_megapixels=5e-5, max_corrupt_share=1.0, streaming=False)
    splits = load_splits(arguments)
    assert list(create_evaluation_loader(splits.validation, columns_of(arguments), list, arguments, ONE_PROCESS)) == []
    assert "which has 6.4e-05 megapixels, more than the 5e-05 that max_megapixels allows" in capsys.readouterr().out
    samples = TrainingSamples(splits.train, columns_of(arguments), number_of, arguments.seed)
    with pytest.raises(ValueError, match=r"in a row cannot be decoded; the last is .* has 6\.4e-05 megapix"):
        list(create_training_loader(samples, arguments, ONE_PROCESS, 0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_large_photographs_are_decoded(tmp_path, suffix):
    """Of 108 megapixels, with the settings that a run has by default."""
    for name, size in (("a", (12_000, 9_000)), ("b", (12, 9))):
        (tmp_path / name).mkdir()
        save_photograph(tmp_path / name / f"photo.{suffix}", *size)
    arguments = arguments_for(tmp_path, train_split="train", validation_split="train", streaming=False, batch_size=2)
    transform = ClassificationTransform(arguments, 32, [0.5] * 3, [0.5] * 3)
    samples = TrainingSamples(load_splits(arguments).train, columns_of(arguments), transform, arguments.seed)
    loader = create_training_loader(samples, arguments, ONE_PROCESS, 0, 1)
    ((pixels, labels),) = loader
    assert pixels.shape == (2, 3, 32, 32) and sorted(labels.tolist()) == [0, 1] and loader.num_corrupt == 0
    (rows,) = create_evaluation_loader(
        samples.dataset, columns_of(arguments), lambda rows: [image.size for image, _ in rows], arguments, ONE_PROCESS
    )
    assert rows == [(12_000, 9_000), (12, 9)]


@pytest.mark.parametrize("files", [False, True])
def test_a_sample_that_does_not_fit_is_named(folders, tmp_path, files):
    """A row of a table, or a file behind one that cannot be decoded, which is left out."""
    if files:
        for number in range(6):
            (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
            (tmp_path / "ab"[number % 2] / f"{number}.png").write_bytes(b"" if number == 2 else encoded(number))
        splits = {"train_split": "train", "validation_split": "train"}
        arguments, row, number, name = arguments_for(tmp_path, max_corrupt_share=0.5, **splits), 4, 3, r".*/b/3\.png"
    else:
        arguments, row, number, name = arguments_for(folders["parquet"]), 44, 44, r"44\.png"

    def refuse(image, label):
        if image.getpixel((0, 0))[0] == number:
            raise ValueError("mask and image differ.")
        return (label,)

    splits, columns = load_splits(arguments), columns_of(arguments)
    with pytest.raises(ValueError, match=rf"^Training sample {row} \({name}\): mask and image differ\.$"):
        TrainingSamples(splits.train, columns, refuse, arguments.seed)[0, row]
    with pytest.raises(ValueError, match=rf"^Evaluation sample {row} \({name}\): mask and image differ\.$"):
        list(
            create_evaluation_loader(
                splits.train, columns, lambda rows: [refuse(*row) for row in rows], arguments, ONE_PROCESS
            )
        )


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}], "is not a JSON file of the form"),
        ({"0": "cat", "1": None}, "is not a JSON file of the form"),
        ({"cat": 0, "dog": 1}, "is not a JSON file of the form"),
    ],
)
def test_names_that_tell_no_classes_apart_are_refused(tmp_path, names, sentence):
    (tmp_path / "names.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=sentence):
        read_label_names(arguments_for(tmp_path, label_names=str(tmp_path / "names.json")))


MODES = {
    "1": lambda ramp: ramp.convert("1"),
    "L": lambda ramp: ramp,
    "LA": lambda ramp: ramp.convert("LA"),
    "P": lambda ramp: ramp.convert("RGB").convert("P"),
    "RGBA": lambda ramp: Image.merge("RGBA", [ramp, ramp.rotate(90), ramp, ramp.rotate(180)]),
    "CMYK": lambda ramp: Image.merge("CMYK", [ramp, ramp.rotate(90), ramp, ramp.rotate(180)]),
    "I;16": lambda ramp: Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257),
    "RGB": lambda ramp: Image.merge("RGB", [ramp, ramp.rotate(90), ramp]),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_converted_as_the_image_processor_does(mode):
    image = MODES[mode](Image.linear_gradient("L").resize((20, 20)))
    assert image.mode == mode
    file = io.BytesIO()
    image.save(file, "JPEG" if mode in ("CMYK", "RGB") else "PNG")
    decoded = decode_image({"bytes": file.getvalue(), "path": None}, rgb=True)
    expected = LocAtViTImageProcessor().process_image(Image.open(file), do_convert_rgb=True)
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("rgb", [True, False])
@pytest.mark.parametrize("metadata", ["exif", "xmp"])
def test_images_are_turned_as_their_orientation_says(rgb, metadata):
    image, exif = Image.new("RGB", (20, 10)), Image.Exif()
    image.paste((250, 250, 250), (0, 0, 5, 10))
    exif[0x0112] = 6  # what is left in the file belongs to the top
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **{metadata: exif if metadata == "exif" else b'tiff:Orientation="6"'})
    decoded = decode_image({"bytes": file.getvalue()}, rgb)
    expected = ImageFeature().decode_example({"bytes": file.getvalue(), "path": None})
    assert decoded.size == (10, 20) and decoded.getpixel((5, 2))[0] > 200 > decoded.getpixel((5, 17))[0]
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_header_tells_size_and_orientation(format, tmp_path):
    image, exif = Image.new("RGB", (20, 10)), Image.Exif()
    exif[0x0112] = 8
    image.save(tmp_path / "turned", format, exif=exif)
    content = (tmp_path / "turned").read_bytes()
    entries = {"bytes": content, "path": "a"}, {"bytes": None, "path": str(tmp_path / "turned")}, io.BytesIO(content)
    for entry in entries:
        assert read_header(entry) == ((20, 10), 8)
    assert read_header(image) == ((20, 10), 1)
    with pytest.raises(CorruptImageError, match="not an image file"):
        read_header(b"nothing")
    with pytest.raises(CorruptImageError, match="No such file"):
        read_header(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("streaming", [True, False])
def test_splits_are_names_or_patterns(folders, streaming):
    tar = {"streaming": streaming, "train_split": "train-{001..003}.tar", "validation_split": "valid*-005.tar"}
    splits = load_splits(arguments_for(folders["tar"], **tar))
    assert (len(splits.train), len(splits.validation)) == (25, 7) and splits.label_names == ["0", "1", "2"]
    parquet = {"streaming": streaming, "train_split": "train-[02].parquet", "max_train_samples": 20}
    splits = load_splits(arguments_for(folders["parquet"], **parquet))
    assert (len(splits.train), len(splits.validation)) == (20, 7) and splits.label_names == ["a", "b", "c"]
    samples = TrainingSamples(splits.train, ["image", "label"], number_of, 0)
    numbers = [samples[0, index][0][0].item() for index in range(20)]
    kept = list(range(11)) + list(range(30, NUM_IMAGES))
    assert len(set(numbers)) == 20 and set(numbers) <= set(kept)
    assert sum(number < 11 for number in numbers) in (7, 8)  # of 20 * 11 / 29: every file gives its share


@pytest.mark.parametrize("streaming", [True, False])
def test_a_label_map_must_be_an_image(folders, streaming):
    arguments = arguments_for(folders["parquet"], streaming=streaming)
    with pytest.raises(ValueError, match=r"The column 'label' of the split 'train' .* must hold images.*class labels"):
        load_splits(arguments, segmentation=True)
    with pytest.raises(ValueError, match=r"The column 'label' .* must hold images"):
        load_splits(arguments_for(folders["parquet"], streaming=streaming, image_column="label", label_column="image"))


@pytest.mark.parametrize("streaming", [True, False])
def test_fewer_samples_of_sorted_rows_still_have_all_classes(tmp_path, streaming):
    rows = [{"image": {"bytes": encoded(i), "path": None}, "label": "abc"[i // 8]} for i in range(24)]
    for split in ("train", "validation"):
        Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet(
            tmp_path / f"{split}.parquet", batch_size=4
        )
    splits = load_splits(arguments_for(tmp_path, streaming=streaming, max_train_samples=6, max_validation_samples=5))
    assert (len(splits.train), len(splits.validation)) == (6, 5) and splits.label_names == ["a", "b", "c"]
    samples = TrainingSamples(splits.validation, ["image", "label"], number_of, 0)
    assert {samples[0, i][1] for i in range(5)} == {0, 1, 2}


def test_a_data_set_is_told_from_another_by_its_content(tmp_path):
    def save(folder: Path, labels: str) -> Path:
        rows = [{"image": {"bytes": encoded(i), "path": None}, "label": label} for i, label in enumerate(labels)]
        for split in ("train", "validation"):
            file = folder / f"{split}.parquet"
            file.parent.mkdir(exist_ok=True)
            Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet(file)
        return folder

    first, copy, other = (save(tmp_path / name, labels) for name, labels in (("a", "abc"), ("b", "abc"), ("c", "abb")))
    with pytest.raises(ValueError, match=r"is not the data .* is [0-9a-f]{64}, not 1234;") as caught:
        load_splits(arguments_for(first, streaming=False, dataset_hash="1234"))
    content = re.search("[0-9a-f]{64}", str(caught.value))[0]
    assert len(load_splits(arguments_for(copy, streaming=False, dataset_hash=content)).train) == 3
    with pytest.raises(ValueError, match="is not the data"):
        load_splits(arguments_for(other, streaming=False, dataset_hash=content))
    with pytest.raises(ValueError, match="leave out --streaming"):
        load_splits(arguments_for(first, dataset_hash=content))


def test_folders_without_splits_say_what_to_do(tmp_path):
    for column in ("image", "label"):
        (tmp_path / "streets" / column).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "streets" / column / "0.png")
    with pytest.raises(ValueError, match=r"folders image and label, but no splits: give --validation_share 0\.1"):
        load_splits(arguments_for(tmp_path / "streets", streaming=False), segmentation=True)
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        (tmp_path / "photos" / label / "0.png").write_bytes(encoded(0))
    with pytest.raises(ValueError, match=r"validation.*; --validation_share 0\.1 takes a tenth"):
        load_splits(arguments_for(tmp_path / "photos", streaming=False))


def test_a_folder_of_class_folders(tmp_path):
    for number in range(12):
        path = tmp_path / ("cat" if number % 3 else "dog") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(number))
    arguments = arguments_for(tmp_path, streaming=False, validation_share=0.25)
    splits, again = load_splits(arguments), load_splits(arguments)
    assert (len(splits.train), len(splits.validation)) == (9, 3) and splits.label_names == ["cat", "dog"]
    assert splits.train["label"][:] == again.train["label"][:]
    streamed = load_splits(arguments_for(tmp_path, validation_split="train"))
    samples = TrainingSamples(streamed.train, ["image", "label"], number_of, 0)
    assert sorted(samples[0, index][0][0].item() for index in range(12)) == list(range(12))
    assert all((samples[0, index][0][0] % 3 == 0) == samples[0, index][1] for index in range(12))


@pytest.mark.parametrize(
    ("files", "share", "reason"),
    [
        (["ant/a.png", "bee/b.png", "overview.png"], 0.5, "overview.png lies in no class folder, unlike ant/a.png"),
        (["ant/a.png", "ant/s/b.png", "bee/c.png"], 0.5, "ant/s/b.png lies at another depth of folders than ant/a.png"),
        (["train/a.png", "validation/b.png"], None, "the images lie in no class folders"),
    ],
)
def test_why_images_in_folders_have_no_labels(tmp_path, files, share, reason):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(0))
    arguments = arguments_for(tmp_path, streaming=False, validation_share=share)
    with pytest.raises(ValueError, match=f"have no labels: {reason}. Give every class a folder") as caught:
        load_splits(arguments)
    assert "column" not in str(caught.value)


@pytest.mark.parametrize("name", ["list.csv", "list.txt"])
def test_files_that_a_list_names_twice_are_said(tmp_path, capsys, name):
    for number in range(4):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(number))
    named = ["a/0.png", "b/1.png", "a/2.png", "a/0.png"]
    rows = ["image,label", *(f"{line},{line[0]}" for line in named)] if name == "list.csv" else named
    (tmp_path / name).write_text("\n".join(rows))
    arguments = arguments_for(tmp_path, train_split=name, validation_split=name, streaming=False)
    assert len(load_splits(arguments).train) == 4
    said = " ".join(capsys.readouterr().out.split())
    assert said == "Took several times what is named several times, 1 of the images: a/0.png."


@pytest.mark.parametrize("streaming", [True, False])
def test_files_that_a_table_names_are_found_beside_it(tmp_path, streaming):
    for number in range(12):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(number))
    lines = [f"images/{number}.png,{'abc'[number % 3]}" for number in range(12)]
    (tmp_path / "list.csv").write_text("\n".join(["file,class", *lines, ""]))
    columns = {"image_column": "file", "label_column": "class"}
    splits = {"train_split": "list.csv", "validation_split": "list.csv"}
    arguments = arguments_for(tmp_path, **columns, **splits, streaming=streaming)
    samples = TrainingSamples(load_splits(arguments).train, ["file", "class"], number_of, 0)
    assert [samples[0, index][0][0].item() for index in range(12)] == list(range(12))
    assert [samples[0, index][1] for index in range(12)] == [0, 1, 2] * 4


def test_labels_that_are_names(tmp_path):
    rows = [{"image": {"bytes": encoded(i), "path": None}, "label": ["zebra", "ape"][i % 2]} for i in range(6)]
    for split in ("train", "validation"):
        Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet(tmp_path / f"{split}.parquet")
    for streaming in (True, False):
        splits = load_splits(arguments_for(tmp_path, streaming=streaming))
        samples = TrainingSamples(splits.train, ["image", "label"], number_of, 0)
        assert splits.label_names == ["ape", "zebra"] and [samples[0, i][1] for i in range(6)] == [1, 0] * 3


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_split": "train-{100..103}.tar"}, r"no file there matches 'train-\{100\.\.103\}\.tar'"),
        ({"train_split": "train-{003..001}.tar"}, "the range .* is empty"),
        ({"train_split": "test"}, "Cannot load the split 'test'"),
        ({"train_split": "broken.tar"}, "Cannot load the split 'broken.tar'"),
        ({"train_split": "empty.tar"}, "empty"),
        ({"image_column": "jpg"}, "no column 'jpg', only 'png', 'cls'"),
        ({"label_names": ["a", "b"]}, "outside the 2 classes|none of the 2 classes"),
        ({"max_train_samples": 0}, "is empty"),
        ({"dataset_config": "nothing", "dataset": "nobody/nothing"}, "Cannot load the split"),
        ({"validation_share": 1.0}, "validation_share"),
    ],
)
def test_bad_data_is_one_sentence(folders, tmp_path, changes, message, streaming):
    (tmp_path / "tar").mkdir()
    for file in folders["tar"].glob("*.tar"):
        (tmp_path / "tar" / file.name).symlink_to(file)
    (tmp_path / "tar" / "broken.tar").write_bytes(b"\1" * 2000)
    tarfile.open(tmp_path / "tar" / "empty.tar", "w").close()
    arguments = arguments_for(tmp_path / "tar", **{"streaming": streaming, "train_split": "train-*.tar", **changes})
    with pytest.raises(ValueError, match=message) as caught:
        list(
            create_evaluation_loader(load_splits(arguments).train, columns_of(arguments), list, arguments, ONE_PROCESS)
        )
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("streaming", [False, True])
def test_a_shard_that_was_cut_is_refused(tmp_path, streaming):
    """Wherever it was cut, also between two samples: what is left looks like a shorter shard."""
    (tmp_path / "tar").mkdir()
    shard, other = tmp_path / "tar" / "train-0.tar", tmp_path / "tar" / "validation-0.tar"
    write_tar(other, range(6))
    whole = other.read_bytes()
    end = whole.rstrip(b"\0").__len__() // 512 * 512 + 512  # of the last member
    for cut in range(512, end + 1, 1024):
        shard.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"Cannot load the split 'train'|train-0\.tar is not a tar file") as caught:
            load_splits(arguments_for(tmp_path / "tar", streaming=streaming))
        assert "\n" not in str(caught.value)
    shard.write_bytes(whole[: end + 512])  # its mark is there
    assert len(load_splits(arguments_for(tmp_path / "tar", streaming=streaming)).train) == 6


class OnlyForUser(SimpleHTTPRequestHandler):
    """Files for those who name a user and a password."""

    def log_message(self, *arguments) -> None:
        pass

    def send_head(self):
        if self.headers.get("Authorization") != "Basic " + base64.b64encode(b"user:secret").decode():
            self.send_error(401)
            return None
        return super().send_head()


def test_credentials_of_an_address_are_written_nowhere(folders, pretrain_settings, tmp_path, capsys, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(OnlyForUser, directory=str(folders["parquet"])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    settings = {**pretrain_settings, "dataset": f"http://user:secret@{host}", "output_dir": str(tmp_path / "run")}
    settings |= {"train_split": "train-0.parquet", "validation_split": "validation-0.parquet", "length": "1 steps"}
    pretrain(build_arguments(PretrainArguments, {**settings, "warmup": "0 steps"}))
    for name in ("arguments.yaml", "all_results.json", "model/README.md", "model/card.yaml"):
        assert host in (tmp_path / "run" / name).read_text(encoding="utf-8")
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if b"secret" in path.read_bytes()]
    monkeypatch.setattr("sys.argv", ["pretrain", f"--dataset=http://user:secret@{host}/gone?signature=secret"])
    with pytest.raises(SystemExit):
        run_program(pretrain, PretrainArguments)
    server.shutdown()
    printed = "".join(capsys.readouterr())
    assert host in printed and "secret" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_streaming_run_continues_bit_identically(folders, pretrain_settings, tmp_path, processes):
    """`pretrain --streaming` with workers, averaged weights, mixing and drop path, killed in the middle of an epoch."""
    streaming = {"streaming": True, "image_column": "png", "label_column": "cls", "shuffle_buffer": 8}
    settings = {
        **pretrain_settings,
        **streaming,
        "dataset": str(folders["tar"]),
        "num_workers": 2,
        "eval_batch_size": 8,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert set(train({**settings, "output_dir": str(whole)}, processes).wait()) == {0}

    run = train({**settings, "output_dir": str(killed)}, processes)
    while run.running and len(list_checkpoints(killed / "checkpoints")) < 2:
        time.sleep(0.01)
    run.send(signal.SIGKILL)
    run.wait()
    step = int(list_checkpoints(killed / "checkpoints")[-1].name.removeprefix("step_"))
    assert 0 < step < 24 and step % 6
    assert set(train({**settings, "output_dir": str(killed)}, processes).wait()) == {0}

    results = [json.loads((output / "all_results.json").read_text()) for output in (whole, killed)]
    losses = [[point["loss"] for point in run["train_curve"]] for run in results]
    assert len(losses[0]) == 24 and losses[0] == losses[1]
    weights = [load_file(output / "model" / "model.safetensors") for output in (whole, killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_benchmark_compares_like_with_like(tmp_path, monkeypatch):
    """Both loaders hand over every file once, normalized alike."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    input_pipeline.generate(tmp_path / "images", 8)
    settings = {"dataset": str(tmp_path / "images"), "batch_size": 4, "num_workers": 0, "preset": "tiny"}
    for read in (input_pipeline.our_pass(settings), input_pipeline.timm_pass(settings)):
        batches = list(read(0))
        assert [tuple(pixels.shape) for pixels, _ in batches] == [(4, 3, 224, 224)] * 2
        assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == [0] * 4 + [1] * 4
        pixels = torch.cat([pixels for pixels, _ in batches])
        assert pixels.dtype == torch.float32 and abs(pixels.mean()) < 0.6 and 0.2 < pixels.std() < 1.2
    assert all(len(speeds) == 1 for speeds in input_pipeline.measure_speed(settings, rounds=1).values())
