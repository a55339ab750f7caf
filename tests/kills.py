"""Programs and verbs that are killed at random moments, started again by the same command, and compared.

    python -m tests.kills --kills 120

prints a table: how often each was killed, by which signals, and how many ends were equal to that of a run in one go.
Signals but SIGKILL go to the whole process group, as those of schedulers do.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from examples.digits.scenes import make_scenes
from examples.digits.scenes_to_coco import write_coco
from locatvit_hf import LocAtViTConfig, LocAtViTForSemanticSegmentation, LocAtViTImageProcessor
from locatvit_hf.utils.io import sha256
from tests.factories import SMALLEST
from tests.processes import run_program, start_program, wait_for

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MOST_KILLS_OF_A_RUN = 4
MODEL = {**SMALLEST["locatvit"], "image_size": 32, "num_hidden_layers": 4, "segmentation_hidden_size": 16}
COMMON = {
    "model": {**MODEL, "drop_path_rate": 0.2, "hidden_dropout_prob": 0.1},
    "length": "12 steps",
    "warmup": "2 steps",
    "batch_size": 8,
    "evaluate_every": "6 steps",
    "checkpoint_every": "1 steps",
    "log_every": 4,
    "seed": 3,
}


@dataclass
class Row:
    """What became of the runs of one program."""

    name: str
    runs: int = 0
    equal: int = 0
    kills: Counter = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


def prepare(folder: Path) -> None:
    """Write scenes of digits as a dataset and as COCO, a folder of photographs and models to start from."""
    scenes = make_scenes(24, 8, image_size=32)
    scenes.save_to_disk(str(folder / "scenes"))
    write_coco(scenes, folder / "coco")
    (folder / "photos").mkdir()
    for number, image in enumerate(scenes["train"]["image"]):
        image.resize((64, 48), Image.Resampling.BILINEAR).save(folder / "photos" / f"{number:02d}.png")
    torch.manual_seed(0)
    config = LocAtViTConfig(**MODEL, num_labels=11)
    LocAtViTForSemanticSegmentation(config).save_pretrained(folder / "segmenter")
    LocAtViTImageProcessor.from_model_config(config, segmentation=True).save_pretrained(folder / "segmenter")


def programs(folder: Path) -> dict[str, Callable[[Path], list[str]]]:
    """The arguments of `python` for each program and verb, given the folder that it writes."""
    scenes = {"dataset": str(folder / "scenes")}
    encoder = {"pretrained": str(folder / "segmenter"), "model": {}}
    views = {"local_crop_size": 16, "num_local_crops": 2, "num_prototypes": 16, "head_hidden_size": 16}
    views |= {"head_bottleneck_size": 8, "freeze_last_layer": "2 steps"}
    boxes = {"pyramid_channels": 8, "anchor_scale": 4, "shortest_sides": [32], "test_shortest_side": 32}
    boxes |= {"longest_side": 48, "crop": 0.0, "milestones": [], "max_detections": 10}
    boxes |= {"dataset": str(folder / "coco"), "train_split": "train", "validation_split": "validation"}
    boxes |= {"model": SMALLEST["pacavit"], "batch_size": 4}
    labels = {"label_column": "segmentation", "label_names": list(map(str, range(11))), "resize": 32, "crop_size": 32}
    frameworks = {"head": "upernet", "freeze": False, "num_workers": 2}
    frameworks |= {"upernet": {"hidden_size": 8, "auxiliary_channels": 8}}
    settings = {
        "pretrain": scenes | {"ema_decay": 0.9},
        "pretrain with data workers": scenes | {"num_workers": 2, "ema_decay": 0.9},
        "finetune": scenes | encoder | {"ignore_mismatched_sizes": True},
        "segment": scenes | encoder | labels | {"ema_decay": 0.9},
        "segment with upernet": scenes | encoder | labels | frameworks,
        "dino": scenes | views,
        "detect": boxes,
    }

    def train(name: str, output: Path) -> list[str]:
        recipe = output.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump({**COMMON, **settings[name], "output_dir": str(output)}))
        return ["-m", f"training.{name.split()[0]}", "--config", str(recipe)]

    def verb(*words: object) -> list[str]:
        return ["-m", "locatvit_hf.cli", *map(str, words)]

    found: dict[str, Callable[[Path], list[str]]] = {
        f"training.{name}": lambda output, name=name: train(name, output) for name in settings
    }
    segment = "segment", folder / "photos", "--model", folder / "segmenter", "--batch-size", 2
    found["locatvit segment"] = lambda output: verb(*segment, "--output", output)
    rows = "segment", "--dataset", folder / "scenes", "--split", "train", "--model", folder / "segmenter"
    found["locatvit segment --dataset"] = lambda output: verb(*rows, "--output", output)
    look = "look", folder / "photos" / "00.png", "--model", folder / "segmenter"
    found["locatvit look"] = lambda output: verb(*look, "--output", output)
    return found


def content(output: Path) -> dict[str, object]:
    """What a finished run left, files as their digests, but for times and for places on the disk."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            found[name] = sha256(b"".join(tensors[key].contiguous().numpy().tobytes() for key in sorted(tensors)))
        elif path.suffix == ".png":
            with Image.open(path) as image:
                found[name] = sha256(image.tobytes())
        elif path.suffix in (".jpg", ".parquet"):
            found[name] = sha256(path)
        elif path.name == "all_results.json":
            results = json.loads(path.read_text())
            losses = [point["loss"] for point in results["train_curve"]]
            found[name] = {"losses": losses, "metrics": results["metrics"]}
    return found


def kill_and_continue(
    name: str, command: Callable[[Path], list[str]], folder: Path, kills: int, rng: random.Random
) -> Row:
    """Kill runs of a program at random moments until there were so many kills, each run until it ends.

    Args:
        name: Of the program.
        command: Its arguments, given the folder that it writes.
        folder: An empty folder.
        kills: How many.
        rng: Chooses moments and signals.
    """
    row = Row(name)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    whole = run_program(*command(folder / "whole"), folder=ROOT)
    seconds = time.perf_counter() - began
    if whole.returncode != 0:
        raise RuntimeError(f"{name} does not run: {whole.stdout[-2000:]}{whole.stderr[-2000:]}")
    expected = content(folder / "whole")
    while row.kills.total() < kills:
        row.runs += 1
        output = folder / f"run{row.runs}"
        for _ in range(min(rng.randint(1, MOST_KILLS_OF_A_RUN), kills - row.kills.total())):
            number = rng.choice(SIGNALS)
            process = start_program(*command(output), folder=ROOT, group=True)
            time.sleep(rng.uniform(0, seconds))
            try:
                (os.kill if number == signal.SIGKILL else os.killpg)(process, number)
                row.kills[number.name] += 1
            except ProcessLookupError:  # it had ended, or has not yet begun
                pass
            wait_for(process)
        last = run_program(*command(output), folder=ROOT)
        if last.returncode == 0 and content(output) == expected:
            row.equal += 1
        else:
            row.errors.append((last.stderr or last.stdout)[-500:])
    return row


def as_markdown(rows: list[Row]) -> str:
    """The table of docs/durability.md."""
    lines = ["| program | kills | by | runs | equal ends |", "|---|---|---|---|---|"]
    for row in rows:
        signals = ", ".join(f"{name} {count}" for name, count in sorted(row.kills.items()))
        lines.append(f"| `{row.name}` | {row.kills.total()} | {signals} | {row.runs} | {row.equal} |")
    total = sum(row.kills.total() for row in rows), sum(row.runs for row in rows), sum(row.equal for row in rows)
    return "\n".join([*lines, f"| all | {total[0]} | | {total[1]} | {total[2]} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=120, help="over all programs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        rows = []
        for number, (name, command) in enumerate(commands := programs(folder).items()):
            share = -(-options.kills // len(commands))
            rows.append(
                kill_and_continue(name, command, folder / str(number), share, random.Random(f"{options.seed} {name}"))
            )
            print(rows[-1], flush=True)
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
