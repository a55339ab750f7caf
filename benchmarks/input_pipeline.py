"""`python -m benchmarks.input_pipeline`: reading and augmenting a folder of JPEG files, ours beside timm's loader.

Both read the same files with the same augmentation, batch and workers, in turn, in an order drawn anew each round; a
ratio is taken within a round, so that what slows a round down cancels. Then a LocAtViT-tiny is trained on the folder
for a moment, and the share of time that it waits for data is printed.
"""

import gc
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import datasets
import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data import create_dataset, create_loader

from locatvit_hf.cli.console import friendly_errors
from training.data import TrainingSamples, create_training_loader, load_splits
from training.engine.arguments import build_arguments
from training.pretrain import PretrainArguments
from training.pretrain import main as pretrain
from training.tasks.classification import ClassificationTransform

from . import measure

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)

SIZE = 224
MEAN = STD = [0.5, 0.5, 0.5]
SIZES = ((375, 500), (500, 375), (333, 500), (500, 500), (480, 640))
"""Height and width in pixels of frequent images of ImageNet."""


@app.command()
@friendly_errors
def main(
    dataset: Annotated[Path | None, typer.Option(help="Folder train/CLASS/*.jpg; by default one is generated.")] = None,
    images: Annotated[int, typer.Option(help="Number of generated files.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Images a batch.")] = 32,
    workers: Annotated[int, typer.Option(help="Data-loading processes.")] = 2,
    rounds: Annotated[int, typer.Option(help="Passes of each over the folder.")] = 15,
    updates: Annotated[int, typer.Option(help="Updates of the training; 0 for none.")] = 12,
) -> None:
    """Measure and print."""
    if min(images, batch_size, rounds) < 1 or min(workers, updates) < 0:
        raise ValueError("--images, --batch-size and --rounds must be at least 1, --workers and --updates at least 0.")
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"  # of a folder that will be gone
        datasets.disable_progress_bars()
        if dataset is None:
            dataset = Path(folder) / "images"
            generate(dataset, images)
        settings = {
            "dataset": str(dataset),
            "validation_share": 0.05,
            "batch_size": batch_size,
            "num_workers": workers,
            "preset": "tiny",
        }
        show_speed(measure_speed(settings, rounds), rounds, settings)
        if updates:
            run = {"output_dir": f"{folder}/run", "length": f"{updates} steps", "warmup": "0 steps"}
            seldom = {"evaluate_every": f"{updates} steps", "checkpoint_every": f"{updates} steps"}
            results = pretrain(build_arguments(PretrainArguments, {**settings, **run, **seldom}))
            console.print(
                f"Training a LocAtViT-tiny at {SIZE}: {results['images_per_second']:.1f} images/s, "
                f"{results['data_wait_share']:.1%} of the time waiting for data"
            )


def generate(folder: Path, count: int) -> None:
    """JPEG files with the sizes, and about the bytes, of photographs: noise at several scales; two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = SIZES[rng.integers(len(SIZES))]
        pixels = np.zeros((height, width, 3))
        for scale in (4, 16, 64, 160):
            grid = max(height * scale // 500, 2), max(width * scale // 500, 2), 3
            noise = Image.fromarray(rng.integers(0, 256, grid, dtype=np.uint8))
            pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / scale**0.35
        pixels = (pixels - pixels.min()) / np.ptp(pixels) * 255
        path = folder / "train" / f"class{number % 2}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=92)


def measure_speed(settings: dict, rounds: int) -> dict[str, list[float]]:
    """Images per second of each, in every round; both start their workers anew, as for an epoch."""
    passes = {"ours": our_pass(settings), "timm": timm_pass(settings)}
    speeds: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for done in range(rounds + 1):  # the first round, which reads from the disk, does not count
        random.Random(done).shuffle(names)
        for name in names:
            gc.collect()
            start = time.perf_counter()
            count = sum(len(pixels) for pixels, _ in passes[name](done))
            speeds[name] += [count / (time.perf_counter() - start)] if done else []
    return speeds


def our_pass(settings: dict) -> Callable:
    """One pass over the folder as `pretrain` reads it."""
    # Without mixing, images are erased where they are read, as by the other loader.
    changed = {"validation_split": "train", "validation_share": None, "mixup": 0.0, "cutmix": 0.0}
    arguments = build_arguments(PretrainArguments, {**settings, **changed})
    train = load_splits(arguments).train
    transform = ClassificationTransform(arguments, SIZE, MEAN, STD)
    samples = TrainingSamples(train, [arguments.image_column, arguments.label_column], transform, seed=0)
    process = SimpleNamespace(process_index=0, num_processes=1)
    length = len(samples) // arguments.batch_size
    return lambda done: create_training_loader(samples, arguments, process, done * length, (done + 1) * length)


def timm_pass(settings: dict) -> Callable:
    """One pass over the folder by timm's loader with its prefetcher, which normalises whole batches."""
    arguments = build_arguments(PretrainArguments, settings)

    def loader(done: int):
        return create_loader(
            create_dataset("", root=f"{settings['dataset']}/train"),
            input_size=(3, SIZE, SIZE),
            batch_size=arguments.batch_size,
            is_training=True,
            scale=tuple(arguments.crop_scale),
            ratio=tuple(arguments.crop_ratio),
            hflip=arguments.horizontal_flip,
            color_jitter=None,
            auto_augment=arguments.auto_augment,
            interpolation="random",
            re_prob=arguments.random_erasing,
            re_mode="pixel",
            mean=tuple(MEAN),
            std=tuple(STD),
            num_workers=arguments.num_workers,
            persistent_workers=arguments.num_workers > 0,  # older versions of timm ask for it without workers too
            device=torch.device("cpu"),
        )

    return loader


def show_speed(speeds: dict[str, list[float]], rounds: int, settings: dict) -> None:
    console.print(
        f"Reading and augmenting at {SIZE} with {settings['num_workers']} workers and batches of "
        f"{settings['batch_size']}: median (quartiles) of {rounds} rounds"
    )
    table = Table()
    for column in ("", "images/s", "ours / timm"):
        table.add_column(column, justify="right" if column else "left")
    low, middle, high = measure.quartiles(measure.paired_ratios(speeds["ours"], speeds["timm"]))
    for name, values in speeds.items():
        first, median, third = measure.quartiles(values)
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})" if name == "ours" else ""
        table.add_row(name, f"{median:.0f} ({first:.0f} to {third:.0f})", ratio)
    console.print(table)


if __name__ == "__main__":
    app()
