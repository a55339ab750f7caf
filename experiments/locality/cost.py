"""What training costs, relative to ViT: `python -m experiments.locality.cost`, a few minutes on a quiet machine.

One training step of every model on the recipe's batch size, in one process and interleaved: what slows the machine down
slows all of them down. Reading data is left out; it is the same for all models.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.measure import interleave, paired_ratios, quartiles
from benchmarks.report import hardware
from locatvit_hf.cli.console import friendly_errors
from locatvit_hf.utils.io import write_json
from training.engine.arguments import build_arguments, load_recipe
from training.engine.optimization import create_optimizer
from training.evaluation.results import versions
from training.pretrain import PretrainArguments, build_model

from .runs import COST, MODELS, RECIPES

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@friendly_errors
def main(
    budget: Annotated[float, typer.Option(help="Seconds of measurement.")] = 300,
    output: Annotated[Path, typer.Option(help="JSON file of the result.")] = COST,
) -> None:
    """Time a training step of every model and store its share of the ViT's."""
    torch.set_num_threads(1)  # as the runs are trained
    steps = {name: build_step(name) for name in MODELS}
    for step in steps.values():
        step()
    seconds = interleave(steps, budget)
    ratios = {name: quartiles(paired_ratios(times, seconds["vit"])) for name, times in seconds.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        output,
        {
            "ratios": {name: [round(value, 4) for value in found] for name, found in ratios.items()},
            "seconds": {name: [round(value, 4) for value in times] for name, times in seconds.items()},
            "environment": {**hardware(), **versions()},
        },
    )
    table = Table("model", "training step, of the ViT's", "quartiles")
    for name, (low, middle, high) in ratios.items():
        table.add_row(MODELS[name], f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(table)


def build_step(name: str):
    """A function that makes one update of a model, as the recipe of that name says, on a batch of noise."""
    arguments = build_arguments(PretrainArguments, load_recipe(RECIPES / "pretrain" / f"{name}.yaml"))
    torch.manual_seed(arguments.seed)
    model = build_model(arguments, arguments.label_names).train()
    optimizer = create_optimizer(model, arguments)
    size = model.config.image_size
    pixels = torch.randn(arguments.batch_size, model.config.num_channels, size, size)
    labels = torch.randint(model.num_labels, (arguments.batch_size,))
    criterion = nn.CrossEntropyLoss(label_smoothing=arguments.label_smoothing)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(pixel_values=pixels).logits, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), arguments.max_gradient_norm)
        optimizer.step()

    return step


if __name__ == "__main__":
    app()
