"""Files of strangers that are wrong on purpose end in one sentence, within bounds, and nothing in them is executed."""

from pathlib import Path

import pytest

from tests.processes import run_program

ROOT = Path(__file__).resolve().parents[1]
# A few of each kind; `make test-slow` tries all.
CHOSEN = [
    "config.json: num_hidden_layers 1000000000000000000",
    "config.json: id2label {'0': 'a', '999999999'",
    "config.json: architectures [3]",
    "config.json: nested",
    "preprocessor_config.json: size {'shortest_edge': 1000000000}",
    "preprocessor_config.json: image_mean []",
    "weights: a negative offset",
    "weights: an index with a list",
    "pickle: code as weights, by torch True",
    "recipe: an alias of itself",
    "recipe: extends itself",
    "args.yaml: deep",
    "COCO: a polygon with coordinates of a billion",
    "file '[/b]'",
]


def answers(*names: str) -> str:
    """What `python -m tests.hostile` says of the cases of these names, or of all; `--first` for one command of each."""
    finished = run_program("-m", "tests.hostile", *names, folder=ROOT)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_few_wrong_inputs_end_in_a_sentence():
    assert answers("--first", *CHOSEN).startswith("0 answers of ")


@pytest.mark.slow
def test_hundreds_of_wrong_inputs_end_in_a_sentence():
    said = answers()
    assert said.startswith("0 answers of ") and int(said.split()[3]) >= 200, said
