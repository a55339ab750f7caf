"""`locatvit segment`: images, folders, videos, datasets, and what may be wrong with them."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from locatvit_hf import (
    LocAtViTConfig,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
    LocAtViTImageProcessor,
)
from locatvit_hf.cli import app
from locatvit_hf.inference import Checkpoint, Segmenter, dataset
from locatvit_hf.inference.outputs import OutputFolder, Source
from locatvit_hf.utils.images import open_image, read_image
from tests.factories import SMALLEST
from tests.large_images import png_bomb, save_photograph
from tests.processes import run_program
from tests.tolerances import assert_same_labels

NAMES = ["background", "road", "sky", "tree", "car"]
SMALL = {**SMALLEST["locatvit"], "num_hidden_layers": 1}


def make_model(num_labels: int = len(NAMES)) -> LocAtViTForSemanticSegmentation:
    torch.manual_seed(0)
    names = dict(enumerate(NAMES)) if num_labels == len(NAMES) else {label: str(label) for label in range(num_labels)}
    config = LocAtViTConfig(**SMALL, segmentation_hidden_size=8, initializer_range=0.5, id2label=names)
    return LocAtViTForSemanticSegmentation(config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    make_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def segmenter(checkpoint) -> Segmenter:
    return Checkpoint(checkpoint).load_segmenter()


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images of several sizes, modes and depths of folders, one that is none, and a file that is no image."""
    photos = tmp_path / "photos"
    (photos / "inner").mkdir(parents=True)
    make_image(40, 30, 0).save(photos / "a.png")
    make_image(40, 30, 1).save(photos / "b.jpg")
    make_image(25, 50, 2).convert("L").save(photos / "c.png")
    make_image(33, 33, 3).convert("RGBA").save(photos / "inner" / "a.png")
    turned = Image.Exif()
    turned[274] = 6  # a quarter turn
    make_image(40, 24, 4).save(photos / "inner" / "turned.jpg", exif=turned)
    (photos / "broken.jpg").write_bytes((photos / "b.jpg").read_bytes()[:300])
    (photos / "notes.txt").write_text("not to be segmented")
    return photos


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["segment", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit | KeyboardInterrupt), result.exception
    return result.exit_code, " ".join(result.output.split())


def read_map(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_folder_becomes_maps_overlays_and_a_legend(folder, checkpoint, tmp_path):
    output = tmp_path / "out"
    code, said = run(folder, "--model", checkpoint, "--output", output, "--batch-size", 3)
    assert (
        code == 0 and "5 segmented, 1 could not be read or written" in said and "broken.jpg cannot be decoded" in said
    )
    written = {str(path.relative_to(output)) for path in output.rglob("[!.]*") if path.is_file()}
    names = ["a", "b", "c", "inner/a", "inner/turned"]
    expected = {f"maps/{name}.png" for name in names} | {f"overlays/{name}.jpg" for name in names}
    assert written == expected | {"labels.json", "legend.png"}
    segment = pipeline("image-segmentation", checkpoint, device="cpu")
    labels = json.loads((output / "labels.json").read_text())["labels"]
    assert [label["name"] for label in labels] == NAMES
    for name in ("a.png", "b.jpg", "inner/turned.jpg"):
        with Image.open((output / "maps" / name).with_suffix(".png")) as label_map:
            assert label_map.mode == "P"
            ids, colors = np.asarray(label_map), np.asarray(label_map.convert("RGB"))
        found = {entry["label"]: np.asarray(entry["mask"]) > 0 for entry in segment(str(folder / name))}
        assert len(found) > 1
        for label in labels:
            mask = ids == label["id"]
            assert np.mean(mask == found.get(label["name"], np.zeros_like(mask))) > 0.999
            assert (colors[mask] == list(bytes.fromhex(label["color"][1:]))).all()
    assert read_map(output / "maps" / "inner" / "turned.png").shape == (40, 24)
    with Image.open(output / "overlays" / "c.jpg") as overlay:
        assert overlay.size == (25, 50)


def test_what_a_folder_holds_besides_is_said_and_names_may_be_long(checkpoint, tmp_path):
    photos, store, output = tmp_path / "photos", tmp_path / "store", tmp_path / "out"
    for path in (photos / f"{'a' * 251}.png", store / f"{'b' * 251}.jpg", store / f"{'b' * 251}.png"):
        path.parent.mkdir(exist_ok=True)
        make_image(8, 8).save(path)
    (photos / "more").symlink_to(store)
    (photos / "._a.png").write_bytes(b"Mac OS X")
    (photos / "notes.txt").write_text("no image")
    pages = [make_image(8, 8, seed) for seed in range(3)]
    pages[0].save(photos / "pages.tif", save_all=True, append_images=pages[1:])
    make_image(60, 20).save(photos / "wide.png")
    code, said = run(photos, "--model", checkpoint, "--output", output, "--max-megapixels", 0.001)
    assert code == 0 and "4 segmented, 1 could not be read or written" in said
    assert "pages.tif holds 3 images: only the first is used." in said
    assert "Left out 1 file that is not an image: notes.txt." in said
    assert "wide.png has 0.0012 megapixels, more than the 0.001 that max_megapixels allows." in said
    assert len(list(output.rglob("maps/**/*.png"))) == 4
    code, said = run(photos, "--model", checkpoint, "--output", output)
    assert code == 0 and "1 segmented, 4 were there already" in said


def test_an_image_made_to_fill_the_memory_is_skipped_and_named(folder, checkpoint, tmp_path):
    (folder / "bomb.png").write_bytes(png_bomb())
    code, said = run(folder, "--model", checkpoint, "--output", tmp_path / "out")
    assert code == 0 and "5 segmented, 2 could not be read or written" in said
    assert "bomb.png has 900 megapixels, more than the 179 that max_megapixels allows." in said


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_large_photograph_is_segmented(suffix, checkpoint, tmp_path):
    """Of 108 megapixels; its label map, of as many, is known again."""
    photo = save_photograph(tmp_path / f"large.{suffix}", 12_000, 9_000)
    arguments = photo, "--model", checkpoint, "--output", tmp_path / "out"
    code, said = run(*arguments)
    assert code == 0 and "1 segmented" in said
    with open_image(tmp_path / "out" / "maps" / "large.png") as label_map:
        assert label_map.size == (12_000, 9_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        code, said = run(*arguments)
    assert code == 0 and "0 segmented, 1 were there already" in said


def test_a_changed_image_is_segmented_again_and_results_are_no_sources(folder, checkpoint, tmp_path):
    output = folder / "masks"
    arguments = (folder, "--model", checkpoint, "--output", output)
    assert "5 segmented" in run(*arguments)[1]
    make_image(20, 18, 9).save(folder / "a.png")
    code, said = run(*arguments)
    assert code == 0 and "1 segmented, 4 were there already" in said
    assert read_map(output / "maps" / "a.png").shape == (18, 20)


def test_other_weights_at_the_same_place_do_not_continue_a_run(folder, checkpoint, tmp_path):
    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint, model)
    assert run(folder, "--model", model, "--output", output)[0] == 0
    changed = make_model()
    torch.nn.init.ones_(next(changed.parameters()))
    changed.save_pretrained(model)
    code, said = run(folder, "--model", model, "--output", output)
    assert code == 1 and "results of another model" in said


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: f.joinpath("model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"), "damaged"),
        (lambda f: edit(f, hidden_size=32), "do not fit its config.json"),
        (lambda f: edit(f, patch_size=0), "is not valid"),
        (lambda f: edit(f, model_type=["a"]), "not one of"),
        (lambda f: edit(f, id2label={"0": "a", "7": "b"}), "by the ids 0, 1, 2"),
        (lambda f: edit(f, architectures=["\x1b]0;X\x07"]), "does not segment"),
    ],
)
def test_damaged_checkpoints_are_a_sentence_that_steers_no_terminal(damage, sentence, folder, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    damage(tmp_path / "model")
    code, said = run(folder, "--model", tmp_path / "model", "--output", tmp_path / "out")
    assert code == 1 and sentence in said and "\x1b" not in said and "Traceback" not in said


def edit(folder: Path, **settings) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | settings))


def test_a_kernel_that_a_checkpoint_names_is_not_asked_for(folder, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    edit(tmp_path / "model", attn_implementation="stranger/kernel", _attn_implementation="stranger/kernel")
    assert run(folder, "--model", tmp_path / "model", "--output", tmp_path / "out")[0] == 0


def test_a_killed_run_continues(folder, checkpoint, tmp_path, monkeypatch):
    output, seen = tmp_path / "out", []
    call = Segmenter.__call__

    def die(self, images):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(images))
        return call(self, images)

    arguments = (folder, "--model", checkpoint, "--output", output, "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "__call__", die)
        assert run(*arguments)[0] != 0
    before = {path: path.stat().st_mtime_ns for path in (output / "maps").rglob("*.png")}
    assert 0 < len(before) < 5
    (output / "maps" / ".partial-c.png").write_bytes(b"cut off")  # what a kill leaves
    code, said = run(*arguments)
    assert code == 0 and f"{5 - len(before)} segmented, {len(before)} were there already" in said
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(list((output / "maps").rglob("[!.]*.png"))) == 5
    code, said = run(*arguments, "--window", 16)
    assert code == 1 and "holds the results of another model or of other options" in said


def test_one_process_from_the_shell(folder, checkpoint, tmp_path):
    """Also that a loaded checkpoint runs none of its own code: what it carries is broken."""
    (Path(checkpoint) / "modeling_locatvit.py").write_text("raise SystemExit('this ran')")
    command = "-m", "locatvit_hf.cli", "segment", folder / "a.png", "--model", checkpoint
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = run_program(*command, folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "segmented" / "maps" / "a.png").is_file() and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing"], "There is no file or folder missing."),
        ([], "Name images, videos or folders to segment, or a --dataset, and not both."),
        (["empty"], "holds no images and no videos."),
        (["a.png", "other/a.png"], "Several inputs are named a"),
        (["a.png", "--model", "classifier"], "LocAtViTForImageClassification, which does not segment"),
        (["a.png", "--model", "empty"], "is not a folder with a config.json"),
        (["a.png", "--model", "nobody/nothing"], "There is no checkpoint nobody/nothing"),
        (["a.png", "--window", "17"], "a window must be a multiple of 4 pixels, not 17"),
        (["--dataset", "rows", "--column", "photo"], "has no column 'photo' but image."),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, sentence, checkpoint, tmp_path, monkeypatch, one_process):
    monkeypatch.chdir(tmp_path)
    for path in ("empty", "other"):
        (tmp_path / path).mkdir()
    for path in ("a.png", "other/a.png"):
        make_image(8, 8).save(path)
    if "classifier" in arguments:
        LocAtViTForImageClassification(LocAtViTConfig(**SMALL)).save_pretrained("classifier")
    if "rows" in arguments:
        Dataset.from_dict({"image": [None]}, features=Features({"image": ImageFeature()})).save_to_disk("rows")
    model = [] if "--model" in arguments else ["--model", checkpoint]
    code, said = run(*arguments, *model)
    assert code == 1 and sentence in said and "Traceback" not in said


def test_an_unreadable_single_image_is_an_error(checkpoint, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    code, said = run(tmp_path / "x.png", "--model", checkpoint, "--output", tmp_path / "out")
    assert (
        code == 1
        and "x.png is not an image file of a known format" in said
        and "0 segmented, 1 could not be read or written" in said
    )


def test_more_labels_than_a_palette_holds_take_sixteen_bits(tmp_path):
    model = make_model(300)
    processor = LocAtViTImageProcessor.from_model_config(model.config, segmentation=True)
    segmenter = Segmenter(model, processor)
    image = make_image(60, 40)
    (found,) = segmenter([image])
    output = OutputFolder(tmp_path, segmenter.id2label, {})
    image.save(tmp_path / "x.jpg")
    output.write(Source(tmp_path / "x.jpg", Path("x")), "1 1", image, found)
    with Image.open(tmp_path / "maps" / "x.png") as label_map:
        assert label_map.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(label_map), found)
    assert found.max() > 255


def write_video(path: Path, frames: int, rate: int, size: tuple[int, int]) -> None:
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            sink.mux(stream.encode(av.VideoFrame.from_image(make_image(*size, number // 4))))
        sink.mux(stream.encode())


def test_a_video_keeps_its_frames_and_its_rate(checkpoint, segmenter, tmp_path):
    clip, output = tmp_path / "clip.mp4", tmp_path / "out"
    write_video(clip, frames=11, rate=12, size=(48, 34))
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    arguments = (clip, tmp_path / "bad.mp4", "--model", checkpoint, "--output", output, "--batch-size", 4)
    code, said = run(*arguments, "--frame-maps")
    assert code == 0 and "1 segmented, 1 could not be read or written" in said and "bad.mp4 cannot be decoded" in said
    with av.open(str(output / "overlays" / "clip.mp4")) as written, av.open(str(clip)) as source:
        assert written.streams.video[0].average_rate == 12
        overlays = [frame.to_image() for frame in written.decode(video=0)]
        frames = [frame.to_image() for frame in source.decode(video=0)]
    assert len(overlays) == 11 and overlays[0].size == (48, 34)
    maps = sorted((output / "maps" / "clip").glob("*.png"))
    assert len(maps) == 11
    assert_same_labels(read_map(maps[5]), segmenter([frames[5]])[0])
    drawn = OutputFolder(tmp_path / "other", segmenter.id2label, {}).overlay(frames[5], read_map(maps[5]))
    assert np.abs(np.asarray(drawn, float) - np.asarray(overlays[5], float)).mean() < 25  # the codec loses some
    assert not list(output.rglob(".partial-*"))
    assert "0 segmented, 1 were there already" in run(*arguments, "--frame-maps")[1]
    assert "of other options" in run(*arguments)[1]


@pytest.fixture
def one_process():
    """What accelerate remembers of a process is forgotten after the test."""
    yield
    PartialState._reset_state()


def make_rows(path: Path, number: int) -> None:
    images = [{"bytes": None, "path": None}] * number
    for index in range(number):
        file = path.parent / f"row{index}.png"
        make_image(20 + index, 24, index).save(file)
        images[index] = {"bytes": file.read_bytes() if index != 3 else b"no image", "path": None}
    Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature(decode=False)})).save_to_disk(path)


def check_rows(output: Path, segmenter: Segmenter, number: int) -> None:
    rows = load_dataset("parquet", data_files=str(output / "*.parquet"), split="train", cache_dir=output / "cache")
    rows = sorted(rows, key=lambda row: row["index"])
    assert [row["index"] for row in rows] == list(range(number))
    assert rows[3]["label_map"] is None
    for index in (0, number - 1):
        assert_same_labels(rows[index]["label_map"], segmenter([make_image(20 + index, 24, index)])[0])


def test_a_data_set_becomes_parquet_and_continues(checkpoint, segmenter, tmp_path, monkeypatch, one_process):
    make_rows(tmp_path / "rows", 10)
    monkeypatch.setattr(dataset, "ROWS_AT_ONCE", 4)
    output, calls = tmp_path / "out", []
    call = Segmenter.__call__

    def die(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, images)

    arguments = ("--dataset", tmp_path / "rows", "--model", checkpoint, "--output", output, "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "__call__", die)
        assert run(*arguments)[0] != 0
    assert not list(output.glob("*.parquet")) and len(list(output.glob("*.pieces/*.parquet"))) == 1
    calls.clear()
    code, said = run(*arguments)
    assert code == 0 and "10 rows are in" in said and "1 of them empty" in said and "Creating" not in said
    check_rows(output, segmenter, 10)
    assert not list(output.glob("*.pieces"))


def test_class_folders_named_like_splits_are_segmented_whole(checkpoint, tmp_path, one_process):
    for name in ("test tubes/a.png", "train/b.png", "cups/c.png"):
        (tmp_path / "photos [1]" / name).parent.mkdir(parents=True)
        make_image(8, 8).save(tmp_path / "photos [1]" / name)
    (tmp_path / "photos [1]" / "notes.txt").write_text("x")
    output = tmp_path / "out"
    code, said = run("--dataset", tmp_path / "photos [1]", "--model", checkpoint, "--output", output)
    assert code == 0 and "3 rows are in" in said and "Left out 1 file that is not an image: notes.txt." in said


def test_what_a_data_set_needs_is_named(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    code, said = run("--dataset", "rows", "--model", checkpoint)
    assert code == 1 and "--dataset needs accelerate: pip install 'locatvit-hf[training]'" in said


@pytest.mark.slow
def test_two_processes_share_a_data_set(checkpoint, segmenter, tmp_path):
    make_rows(tmp_path / "rows", 9)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"]
    command += ["locatvit_hf.cli", "segment", "--dataset", "rows", "--model", checkpoint, "--output", "out"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == [
        "label_maps-00000-of-00002.parquet",
        "label_maps-00001-of-00002.parquet",
    ]
    check_rows(tmp_path / "out", segmenter, 9)


def test_a_file_that_vanishes_or_cannot_be_written_ends_no_run(checkpoint, tmp_path, monkeypatch):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in "abcd":
        make_image(40, 30).save(photos / f"{name}.png")
    write_video(photos / "e.mp4", frames=3, rate=5, size=(48, 34))
    write_video(photos / "f.mp4", frames=3, rate=5, size=(48, 34))
    (output / "maps" / "b.png").mkdir(parents=True)  # a folder stands where the map belongs
    (output / "overlays" / "f.mp4").mkdir(parents=True)
    state = Source.state

    def vanish(source: Source) -> str:
        if source.name.name in ("c", "e"):
            source.path.unlink(missing_ok=True)
        return state(source)

    monkeypatch.setattr(Source, "state", vanish)
    code, said = run(photos, "--model", checkpoint, "--output", output)
    assert code == 0 and "2 segmented, 4 could not be read or written" in said and "Traceback" not in said
    assert all(f"{name}" in said for name in ("b.png", "c.png", "e.mp4", "f.mp4"))
    assert (output / "maps" / "a.png").is_file() and (output / "maps" / "d.png").is_file()


def test_a_full_disk_under_a_video_is_said_as_such(checkpoint, tmp_path, monkeypatch):
    clip = tmp_path / "clip.mp4"
    write_video(clip, frames=3, rate=5, size=(48, 34))
    add_stream = av.container.OutputContainer.add_stream

    class Full:
        """A container whose disk is full."""

        def __init__(self, sink):
            self.sink = sink

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.sink.close()

        @property
        def metadata(self):
            return self.sink.metadata

        def add_stream(self, *arguments, **options):
            return add_stream(self.sink, *arguments, **options)

        def mux(self, packets):
            raise av.error.OSError(errno.ENOSPC, "No space left on device")

    open_container = av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: Full(open_container(*a, **k)) if "w" in a else open_container(*a))
    code, said = run(clip, "--model", checkpoint, "--output", tmp_path / "out")
    assert code == 1 and "No space left on device" in said and "could not be read" not in said


def test_results_say_what_their_image_was_before_it_was_read(checkpoint, tmp_path, monkeypatch):
    """An image that another program is still writing is segmented again."""
    photo, output = tmp_path / "a.png", tmp_path / "out"
    make_image(40, 30).save(photo)

    def read_and_change(*arguments, **options):
        image = read_image(*arguments, **options)
        make_image(48, 34).save(photo)
        return image

    monkeypatch.setattr("locatvit_hf.inference.files.read_image", read_and_change)
    assert "1 segmented" in run(photo, "--model", checkpoint, "--output", output)[1]
    monkeypatch.undo()
    assert "1 segmented" in run(photo, "--model", checkpoint, "--output", output)[1]
    with Image.open(output / "maps" / "a.png") as label_map:
        assert label_map.size == (48, 34)


def test_one_process_writes_a_folder(checkpoint, tmp_path):
    photo, output = tmp_path / "a.png", tmp_path / "out"
    make_image(40, 30).save(photo)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    holder.stdout.readline()
    code, said = run(photo, "--model", checkpoint, "--output", output)
    assert code == 1 and f"out is being written by process {holder.pid} on {socket.gethostname()}" in said
    holder.communicate("\n")
    assert run(photo, "--model", checkpoint, "--output", output)[0] == 0


HOLD = """
import pathlib, sys
from locatvit_hf.utils.io import claim_folder
with claim_folder(pathlib.Path(sys.argv[1]), print):
    print("held", flush=True)
    input()
"""
