"""The runs of the experiment: which there are, and what is stored of each."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPES = Path(__file__).parent / "recipes"
RESULTS = Path(__file__).parent / "results"
COST = RESULTS / "cost.json"

# Recipe -> what tables call the model, in their order.
MODELS = {
    "vit": "ViT",
    "gaussian": "ViT + Gaussian",
    "refinement": "ViT + refinement",
    "locatvit": "LocAtViT",
    "regvit": "RegViT",
    "locat_regvit": "LocAt-RegViT",
    "mean_pooling": "ViT, mean pooling",
    "no_position": "ViT, no position embedding",
    "locat_no_position": "LocAtViT, no position embedding",
    "pacavit": "PaCa-ViT",
}
# In the order in which they are trained: the comparison that matters first, then one of each, then what is left.
PLAN = [
    *[(model, seed) for seed in (0, 1, 2) for model in ("vit", "locatvit")],
    *[(model, 0) for model in MODELS if model not in ("vit", "locatvit")],
    *[(model, seed) for seed in (1, 2) for model in ("gaussian", "refinement")],
]


@dataclass(frozen=True)
class Run:
    """A finished run as `experiments/locality/results/MODEL-SEED.json` stores it, see `experiments.locality.run`."""

    model: str
    seed: int
    content: dict[str, Any]

    @property
    def name(self) -> str:
        """As the file is called."""
        return run_name(self.model, self.seed)


def run_name(model: str, seed: int) -> str:
    """As the file and the folder of a run are called."""
    return f"{model}-{seed}"


def load_runs(folder: Path = RESULTS) -> list[Run]:
    """All finished runs, in the order of the tables and of their seeds."""
    planned = [(model, seed) for model in MODELS for seed in sorted({s for m, s in PLAN if m == model})]
    files = [(model, seed, folder / f"{run_name(model, seed)}.json") for model, seed in planned]
    return [Run(model, seed, json.loads(file.read_text("utf-8"))) for model, seed, file in files if file.is_file()]
