"""The same by Hub id, through a Hub on this machine: pushing, loading, pushing again what a stranger loaded.

A Hub id is not a folder: transformers checks the imports of every file, caches by commit, and `AutoBackbone` takes ids
only.
"""

import sys
from pathlib import Path

import pytest

from tests.remote.conftest import HERE, Answers, AskStranger, assert_answer, start

CHECKS = [
    "config",
    "image_processor",
    "label_maps",
    "model",
    "classifier",
    "segmenter",
    "new_segmentation_head",
    "backbone",
    "classification_pipeline",
    "segmentation_pipeline",
    "features_pipeline",
    "save_again",
    "push_again",
]
CHECKS_OF_A_COPY = ["config", "image_processor", "classifier", "segmenter", "backbone", "classification_pipeline"]


@pytest.fixture(scope="module")
def answers(exported: Path, hub: str, ask_stranger: AskStranger, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    machine = tmp_path_factory.mktemp("author")
    start([sys.executable, HERE / "publisher.py", exported, "tester/locatvit"], machine, hub)
    models = {name: f"tester/locatvit-{name}" for name in ("classifier", "segmenter")}
    return ask_stranger(CHECKS, models, push="tester/fine-tuned", hub=hub)


@pytest.fixture(scope="module")
def answers_of_a_copy(answers: Answers, hub: str, ask_stranger: AskStranger) -> Answers:
    """Another person loads what the first one pushed."""
    models = {name: f"tester/fine-tuned-{name}" for name in ("classifier", "segmenter")}
    return ask_stranger(CHECKS_OF_A_COPY, models, hub=hub)


@pytest.mark.parametrize("check", CHECKS)
def test_hub_id_works_without_the_package(check: str, answers: Answers, expected: dict[str, object]) -> None:
    assert_answer(answers, expected, check)


@pytest.mark.parametrize("check", CHECKS_OF_A_COPY)
def test_repository_pushed_by_a_stranger_works(
    check: str, answers_of_a_copy: Answers, expected: dict[str, object]
) -> None:
    assert_answer(answers_of_a_copy, expected, check)
