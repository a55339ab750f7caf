"""Inputs of strangers that are wrong on purpose, and the programs that must answer each with one sentence.

A `Case` writes one wrong thing into a folder with a good checkpoint, recipe or data set, and names the commands that
read it. `run_cases` forks a process for each command from this one, which has imported everything: with a limit of
memory, a limit of time, and a file that exists afterwards where something of the input was executed.
"""

import contextlib
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from locatvit_hf import LocAtViTConfig, LocAtViTForSemanticSegmentation, LocAtViTImageProcessor
from locatvit_hf.cli import app
from tests.factories import SMALLEST
from training import detect, finetune, pretrain
from training.engine.arguments import run_program

SECONDS = 20
GIGABYTES = 3
MARK = "executed"
FOLDER = "{folder}"
# Commands, by what reads the input.
INFO = ("locatvit", "info", f"{FOLDER}/model")
SEGMENT = ("locatvit", "segment", f"{FOLDER}/photo.png", "--model", f"{FOLDER}/model", "--output", f"{FOLDER}/out")
LOOK = ("locatvit", "look", f"{FOLDER}/photo.png", "--model", f"{FOLDER}/model", "--output", f"{FOLDER}/out")
CONVERT = ("locatvit", "convert", f"{FOLDER}/source", f"{FOLDER}/out")
FINETUNE = ("finetune", "--config", f"{FOLDER}/recipe.yaml", "--pretrained", f"{FOLDER}/model")
PRETRAIN = ("pretrain", "--config", f"{FOLDER}/recipe.yaml")
DETECT = ("detect", "--config", f"{FOLDER}/detect.yaml")
PROGRAMS = {
    "finetune": (finetune.main, finetune.FinetuneArguments),
    "pretrain": (pretrain.main, pretrain.PretrainArguments),
    "detect": (detect.main, detect.DetectArguments),
}


@dataclass(frozen=True)
class Case:
    """One wrong input.

    Attributes:
        name: Says what is wrong.
        spoil: Writes it into a folder made by `prepare`.
        commands: That read it.
    """

    name: str
    spoil: Callable[[Path], Any]
    commands: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Answer:
    """How a command ended. problem: what is wrong with that; None where it is as it should be."""

    case: str
    command: str
    status: int
    said: str
    problem: str | None


def prepare(folder: Path) -> None:
    """A segmentation checkpoint, a photograph, class folders with a recipe, and COCO annotations with another."""
    torch.manual_seed(0)
    names = {"id2label": {0: "sky", 1: "road", 2: "tree"}, "label2id": {"sky": 0, "road": 1, "tree": 2}}
    config = LocAtViTConfig(**SMALLEST["locatvit"], segmentation_hidden_size=16, **names)
    LocAtViTForSemanticSegmentation(config).save_pretrained(folder / "model")
    LocAtViTImageProcessor.from_model_config(config, segmentation=True).save_pretrained(folder / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    for split, label, number in itertools.product(("train", "validation"), ("a", "b"), range(4)):
        place = folder / "photos" / split / label
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.png")
    small = {"length": "1 steps", "warmup": "0 steps", "batch_size": 2, "output_dir": str(folder / "run")}
    recipe = {**small, "dataset": str(folder / "photos"), "dry_run": True, "model": SMALLEST["locatvit"]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / "coco" / split).mkdir()
        for number in (0, 1):
            Image.fromarray(pixels).save(folder / "coco" / split / f"{number}.png")
        (folder / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(COCO))
    boxes = {"pyramid_channels": 8, "anchor_scale": 4, "shortest_sides": [32], "test_shortest_side": 32}
    boxes |= {"longest_side": 48, "crop": 0.0, "milestones": [], "model": SMALLEST["pacavit"], "dry_run": True}
    boxes |= {"train_split": "train", "validation_split": "val", "dataset": str(folder / "coco")}
    (folder / "detect.yaml").write_text(json.dumps({**small, **boxes}))


COCO = {
    "images": [{"id": n + 1, "file_name": f"{n}.png", "width": 32, "height": 24} for n in (0, 1)],
    "categories": [{"id": 1, "name": "box"}],
    "annotations": [
        {
            "id": n,
            "image_id": n,
            "category_id": 1,
            "bbox": [4, 4, 10, 10],
            "area": 100,
            "iscrowd": 0,
            "segmentation": [[4, 4, 14, 4, 14, 14, 4, 14]],
        }
        for n in (1, 2)
    ],
}


def edit_json(file: str, **settings: Any) -> Callable[[Path], None]:
    """Other values in a JSON file."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **settings}))

    return edit


def write(file: str, content: str | bytes) -> Callable[[Path], None]:
    """Another file."""

    def write_file(folder: Path) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return write_file


WRONG = (10**9, 10**18, -1, 0, "wide", 1.5, None, [], {"a": 1}, True, [3, 3, 3], float("nan"))
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "patch_size", "image_size")
SIZES += ("num_channels", "segmentation_hidden_size", "num_register_tokens")
DEEP = "[" * 100_000
LABELS = (
    {"0": "a", "999999999": "b"},
    {"0": "a", "1": "b", "2": "c", "3": "d"},
    {str(number): "x" for number in range(200_000)},
    ["a", "b", "c"],
    "abc",
    {"x": "a", "y": "b"},
    {"0": None, "1": [], "2": {}},
    {"-1": "a", "0": "b", "1": "c"},
    3,
    {"0": "[/b]", "1": "[bold red]x", "2": "\x1b[2Jx"},
)


def configurations() -> Iterator[Case]:
    """config.json, as `info`, `segment` and training read it."""
    readers = INFO, SEGMENT, FINETUNE

    def case(name: str, spoil: Callable[[Path], Any]) -> Case:
        return Case(f"config.json: {name}", spoil, readers)

    for field in SIZES:
        for value in WRONG:
            yield case(f"{field} {value!r}", edit_json("model/config.json", **{field: value}))
    for labels in LABELS:
        yield case(f"id2label {str(labels)[:40]}", edit_json("model/config.json", id2label=labels))
    others: dict[str, Iterable[Any]] = {
        "num_labels": (10**9, -1, "x", None),
        "architectures": ([], [3], "LocAtViTModel", {"a": 1}, None, ["os.system"]),
        "model_type": (3, [], "vit", None, {"a": 1}),
        "dtype": ("float1024", 3, [], "int8"),
        "out_indices": ([10**9], "x", [[]], [-100]),
        "stage_names": (["x"], 3, "x"),
        "hidden_act": ("evil", 3, None, []),
        "auto_map": ([], "x", {"AutoModel": 3}, {"AutoModel": ["a", "b"]}, 3),
        "image_mean": ([], "x", [1] * 10**6, [float("inf")] * 3),
        "problem_type": ("evil", 3, []),
        "layer_norm_eps": (-1, "x", float("nan"), 1e400),
        "backbone_config": ({"model_type": "locatvit"}, 3, "x", []),
        "attn_implementation": ("other/kernel", 3, []),
        "quantization_config": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 3, {"quant_method": "x"}),
        "transformers_weights": ("../photo.png", "/etc/passwd", 3, "missing.safetensors"),
    }
    for name, values in others.items():
        for value in values:
            yield case(f"{name} {str(value)[:40]}", edit_json("model/config.json", **{name: value}))
    texts: dict[str, str | bytes] = {
        "empty": "",
        "nested": DEEP,
        "a list": "[]",
        "a number": "3",
        "utf-16": '{"model_type": "locatvit"}'.encode("utf-16"),
        "not text": b"\xff\xfe\xfd",
        "a long number": '{"model_type": "locatvit", "hidden_size": ' + "9" * 10_000 + "}",
        "repeated keys": '{"model_type": "locatvit", "model_type": "vit"}',
    }
    for name, content in texts.items():
        yield case(name, write("model/config.json", content))


def processors() -> Iterator[Case]:
    """preprocessor_config.json, as `segment` and `info` read it."""
    values: dict[str, Iterable[Any]] = {
        "size": (
            {"shortest_edge": 10**9},
            {"height": 10**9, "width": 10**9},
            {"shortest_edge": -3},
            {"shortest_edge": "x"},
            {},
            3,
            "x",
            [],
            None,
        ),
        "crop_size": ({"height": 10**9, "width": 10**9}, {"height": -1, "width": 3}, "x"),
        "do_center_crop": ("x", 3),
        "size_divisor": (0, -1, 10**9, "x", 1.5),
        "image_mean": ([], ["a", "b", "c"], [0.5] * 5, float("nan"), "x"),
        "image_std": ([0, 0, 0], [], "x"),
        "resample": (99, "x", -1),
        "rescale_factor": ("x", None, float("inf")),
        "output_stride": ([0, 0], [10**9] * 2, "x", [1], -3),
        "ignore_index": ("x", 10**30),
        "image_processor_type": ("x", 3),
        "pad_size": ({"height": 10**9, "width": 10**9}, 3),
    }
    for name, wrong in values.items():
        for value in wrong:
            spoil = edit_json("model/preprocessor_config.json", **{name: value})
            yield Case(f"preprocessor_config.json: {name} {str(value)[:40]}", spoil, (SEGMENT, INFO))
    for name, content in {"empty": "", "nested": DEEP, "a list": "[]", "utf-16": "{}".encode("utf-16")}.items():
        yield Case(
            f"preprocessor_config.json: {name}", write("model/preprocessor_config.json", content), (SEGMENT, INFO)
        )


def weights() -> Iterator[Case]:
    """Files of weights, and indexes of them."""

    def cut(length: int) -> Callable[[Path], None]:
        return lambda folder: os.truncate(folder / "model" / "model.safetensors", length)

    def lie(name: str, **changes: Any) -> Case:
        def spoil(folder: Path) -> None:
            file = folder / "model" / "model.safetensors"
            content = file.read_bytes()
            (length,) = struct.unpack("<Q", content[:8])
            header = json.loads(content[8 : 8 + length])
            first = next(key for key in header if key != "__metadata__")
            header[first] |= changes
            text = json.dumps(header).encode()
            file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

        return Case(f"weights: {name}", spoil, (INFO, SEGMENT, FINETUNE))

    for length in (0, 4, 8, 100, 3000):
        yield Case(f"weights: cut to {length} bytes", cut(length), (INFO, SEGMENT, FINETUNE))
    yield lie("a huge shape", shape=[2**40])
    yield lie("a negative shape", shape=[-4])
    yield lie("a negative offset", data_offsets=[-8, 8])
    yield lie("an offset behind the end", data_offsets=[0, 2**50])
    yield lie("overlapping tensors", data_offsets=[0, 4])
    yield lie("a type that does not exist", dtype="Q7")
    yield lie("a shape of text", shape="wide")
    yield Case(
        "weights: a huge header",
        write("model/model.safetensors", struct.pack("<Q", 2**62) + b"x" * 99),
        (INFO, SEGMENT),
    )
    yield Case(
        "weights: a deep header",
        write("model/model.safetensors", struct.pack("<Q", 10**5) + DEEP.encode()),
        (INFO, SEGMENT),
    )

    def not_finite(folder: Path) -> None:
        file = folder / "model" / "model.safetensors"
        tensors = load_file(file)
        save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, file, metadata={"format": "pt"})

    yield Case("weights: not finite", not_finite, (SEGMENT,))
    for name, content in {
        "a file above": {"weight_map": {"a": "../photo.png"}},
        "a missing file": {"weight_map": {"a": "missing.safetensors"}},
        "no map": {"weight_map": 3},
        "a list": [],
        "numbers": {"weight_map": {"a": 3}},
    }.items():

        def spoil(folder: Path, content: Any = content) -> None:
            (folder / "model" / "model.safetensors").unlink()
            (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(content))

        yield Case(f"weights: an index with {name}", spoil, (INFO, SEGMENT, FINETUNE))


class Payload:
    """Makes the mark where a pickle of it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def pickles() -> Iterator[Case]:
    """What `convert` is given, and what lies beside weights."""

    def archive(content: bytes) -> bytes:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl", content)
            file.writestr("archive/version", "3")
        return packed.getvalue()

    streams = {
        "a huge array": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
        "a huge text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
        "many opcodes": b"\x80\x04" + b"N0" * 5_000_000 + b"N.",
        "deep tuples": b"\x80\x04" + b"N" + b"\x85" * 1_000_000 + b".",
        "a memo of billions": b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b".",
        "zeros": bytes(10_000_000),
        "an endless array": b"\x80\x05" + b"\x96" + struct.pack("<Q", 2**31) + bytes(1000) + b".",
        "nothing": b"",
    }
    for name, stream in streams.items():
        for wrapped, content in (("", stream), (" in an archive", archive(stream))):
            yield Case(f"pickle: {name}{wrapped}", write("source/model.pth", content), (CONVERT,))
            yield Case(f"pickle: {name}{wrapped} beside weights", write("model/pytorch_model.bin", content), (INFO,))

    def code(file: str, torch_writes: bool) -> Callable[[Path], None]:
        def spoil(folder: Path) -> None:
            (folder / file).parent.mkdir(exist_ok=True)
            if torch_writes:
                torch.save({"model": Payload(folder / MARK)}, folder / file)
            else:
                (folder / file).write_bytes(pickle.dumps({"model": Payload(folder / MARK)}))

        return spoil

    for torch_writes in (False, True):
        yield Case(f"pickle: code, by torch {torch_writes}", code("source/model.pth", torch_writes), (CONVERT,))

        def instead(folder: Path, torch_writes: bool = torch_writes) -> None:
            code("model/pytorch_model.bin", torch_writes)(folder)
            (folder / "model" / "model.safetensors").unlink()

        yield Case(f"pickle: code as weights, by torch {torch_writes}", instead, (SEGMENT, FINETUNE))


def recipes() -> Iterator[Case]:
    """YAML of recipes, of timm's settings, and JSON where it lies in their place."""
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    merges = "b0: &b0 {x: 1}\n" + "".join(
        f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
    )
    texts = {
        "aliases of aliases": laughs,
        "aliases in an option": laughs + "model: *a11\n",
        "merges of merges": merges,
        "deep": "[" * 5000,
        "a deep mapping": "".join(f"{' ' * n}a:\n" for n in range(3000)),
        "an alias of itself": "model: &m\n  a: *m\n",
        "code": "model: !!python/object/apply:os.system ['touch MARK']\n",
        "code of a class": "model: !!python/name:os.system\n",
        "extends itself": "extends: recipe.yaml\n",
        "extends another that extends it": "extends: other.yaml\n",
        "extends nothing": "extends: missing.yaml\n",
        "extends a number": "extends: 3\n",
        "extends a list": "extends: [a, b]\n",
        "extends a folder": "extends: photos\n",
        "a list": "- a\n",
        "a number": "3\n",
        "tabs": "a:\n\t- b\n",
        "utf-16": "a: b",
        "a null byte": "a: \0\n",
        "a long number": f"batch_size: {'9' * 10_000}\n",
        "a date of no calendar": "seed: 2024-99-99\n",
        "markup": '"[/b]": 3\n',
        "a key that is a list": "? [a]\n: b\n",
        "nan": "learning_rate: .nan\n",
        "infinity": "learning_rate: .inf\n",
        "a huge batch": "batch_size: 100000000000\n",
        "huge layers": "model: {num_hidden_layers: 1000000000}\n",
        "a huge image": "model: {image_size: 100000000}\n",
    }
    for name, text in texts.items():

        def spoil(folder: Path, name: str = name, text: str = text) -> None:
            mark = text.replace("MARK", str(folder / MARK))
            base = "" if name in ("a list", "a number", "deep", "utf-16") else (folder / "recipe.yaml").read_text()
            lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in json.loads(base or "{}").items())
            (folder / "other.yaml").write_text("extends: recipe.yaml\n")
            (folder / "recipe.yaml").write_bytes((lines + mark).encode("utf-16" if name == "utf-16" else "utf-8"))

        yield Case(f"recipe: {name}", spoil, (PRETRAIN,))
    for name in ("aliases of aliases", "deep", "code", "a list", "an alias of itself"):

        def source(folder: Path, text: str = texts[name]) -> None:
            (folder / "source").mkdir()
            torch.save({"state_dict": {"a": torch.zeros(1)}}, folder / "source" / "model.pth")
            (folder / "source" / "args.yaml").write_text(text.replace("MARK", str(folder / MARK)))

        yield Case(f"args.yaml: {name}", source, (CONVERT,))


def annotations() -> Iterator[Case]:
    """COCO files."""

    def case(name: str, **changes: Any) -> Case:
        def spoil(folder: Path) -> None:
            content = json.loads(json.dumps(COCO))
            for part, fields in changes.items():
                content[part] = (
                    fields if isinstance(fields, list) else [{**content[part][0], **fields}, *content[part][1:]]
                )
            (folder / "coco" / "annotations" / "instances_train.json").write_text(json.dumps(content))

        return Case(f"COCO: {name}", spoil, (DETECT,))

    huge, infinite = 1e9, float("inf")
    for name, polygon in {
        "coordinates of a billion": [0, 0, huge, 0, huge, huge, 0, huge],
        "coordinates of 1e18": [0, 0, 1e18, 0, 1e18, 1e18],
        "negative coordinates": [-huge, -huge, 5, 5, 9, 2],
        "infinite coordinates": [0, 0, infinite, 0, 5, 5],
        "nan": [float("nan")] * 6,
        "an odd number": [1, 2, 3, 4, 5],
        "text": ["a", "b", "c", "d", "e", "f"],
        "two points": [1, 1, 2, 2],
        "none": [None] * 6,
    }.items():
        yield case(f"a polygon with {name}", annotations={"segmentation": [polygon]})
    for name, mask in {
        "a huge size": {"size": [10**9, 10**9], "counts": [10**18]},
        "another size": {"size": [10, 10], "counts": [100]},
        "negative runs": {"size": [24, 32], "counts": [-5, 773]},
        "too many pixels": {"size": [24, 32], "counts": [10**9]},
        "bad text": {"size": [24, 32], "counts": "\x01\x02\xff"},
        "long text": {"size": [24, 32], "counts": "o" * 10**6},
        "no counts": {"size": [24, 32]},
        "a list": [[[]]],
        "text": "mask",
    }.items():
        yield case(f"a mask with {name}", annotations={"segmentation": mask})
    for box in ([0, 0, 1e18, 1e18], [infinite] * 4, ["a"] * 4, [1, 2], None, [-1e9, 0, 1, 1], [0, 0, -5, 3]):
        yield case(f"a box {str(box)[:40]}", annotations={"bbox": box})
    for fields in (
        {"width": 10**9, "height": 10**9},
        {"width": "x"},
        {"file_name": "../../photo.png"},
        {"file_name": 3},
    ):
        yield case(f"an image {fields}", images=fields)
    yield case("ids that repeat", images=[COCO["images"][0]] * 2)
    yield case("a category named in markup", categories={"name": "[/b]"})
    yield case("categories that are text", categories=["a", "b"])
    for name, content in {"nested": DEEP, "a list": "[]", "empty": "", "a number": "3"}.items():
        yield Case(f"COCO: {name}", write("coco/annotations/instances_train.json", content), (DETECT,))


def names() -> Iterator[Case]:
    """Markup and control characters in names."""
    for name in ("[/b]", "[bold]x", "[link=file:///x]y[/link]", "a\x1b[2Jb"):
        yield Case(
            f"label {name!r}",
            edit_json("model/config.json", id2label={"0": name, "1": "b", "2": "c"}),
            (INFO, SEGMENT, LOOK),
        )

        def rename(folder: Path, name: str = name.replace("/", "∕")) -> None:
            photo = folder / f"{name}.png"
            shutil.copy(folder / "photo.png", photo)
            (folder / "photo.png").write_bytes(b"broken")
            (folder / "album").mkdir()
            photo.rename(folder / "album" / photo.name)
            (folder / "album" / f"broken {name}.png").write_bytes(b"broken")

        album = tuple(word.replace("photo.png", "album") for word in SEGMENT)
        yield Case(f"file {name!r}", rename, (album,))


def all_cases() -> list[Case]:
    return [*configurations(), *processors(), *weights(), *pickles(), *recipes(), *annotations(), *names()]


def run_cases(cases: Iterable[Case], scratch: Path) -> Iterator[Answer]:
    """How each command of each case ends, in a process of its own."""
    prepare(scratch / "good")
    for number, case in enumerate(cases):
        for command in case.commands:
            folder = scratch / f"{number}-{command[0]}-{command[1]}"
            shutil.copytree(scratch / "good", folder)
            for file in ("recipe.yaml", "detect.yaml"):
                text = (folder / file).read_text().replace(str(scratch / "good"), str(folder))
                (folder / file).write_text(text)
            case.spoil(folder)
            yield _run(case, [word.replace(FOLDER, str(folder)) for word in command], folder)
            shutil.rmtree(folder)


def _run(case: Case, command: list[str], folder: Path) -> Answer:
    printed = folder / "printed.txt"
    if (child := os.fork()) == 0:
        _become(command, printed)
    _, status, used = os.wait4(child, 0)
    said = printed.read_text(errors="replace")
    code, problem = os.waitstatus_to_exitcode(status), None
    if code == -signal.SIGALRM:
        problem = f"took more than {SECONDS} s"
    elif code not in (0, 1, 2):
        problem = f"ended with {code}"
    elif "Traceback (most recent call last)" in said:
        problem = "a traceback"
    elif code and len([line for line in said.splitlines() if line.strip()]) == 0:
        problem = "says nothing"
    elif (folder / MARK).exists():
        problem = "executed code"
    elif used.ru_maxrss > GIGABYTES << 20:
        problem = f"took {used.ru_maxrss >> 10} MiB"
    return Answer(case.name, " ".join(command[:2]), code, said, problem)


def _become(command: list[str], printed: Path) -> None:
    """Runs a command in this process, and ends it."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (GIGABYTES << 30),) * 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    target = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    status: Any = 70
    try:
        program, *words = command
        sys.argv = [program, *words]
        if program == "locatvit":
            app(words)
        else:
            run_program(*PROGRAMS[program])
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    import tempfile

    words = [word for word in sys.argv[1:] if word != "--first"]
    chosen = [case for case in all_cases() if not words or any(word in case.name for word in words)]
    if "--first" in sys.argv:
        chosen = [replace(case, commands=case.commands[:1]) for case in chosen]
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        for answer in run_cases(chosen, Path(place)):
            if answer.problem:
                wrong.append(answer)
                print(f"{answer.case} | {answer.command} | {answer.problem}\n{answer.said[-700:]}\n", flush=True)
    print(f"{len(wrong)} answers of {len(chosen)} cases are wrong")
