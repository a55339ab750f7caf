"""An exported folder on a machine without the package: `trust_remote_code=True`, the Auto classes and the pipelines."""

import shutil
from pathlib import Path

import pytest

from tests.remote.conftest import Answers, AskStranger, assert_answer

CHECKS = [
    "config",
    "image_processor",
    "label_maps",
    "model",
    "classifier",
    "segmenter",
    "new_segmentation_head",
    "classification_pipeline",
    "segmentation_pipeline",
    "features_pipeline",
    "save_again",
]
CHECKS_OF_A_COPY = [
    "config",
    "image_processor",
    "classifier",
    "segmenter",
    "segmentation_pipeline",
    "features_pipeline",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def answers(exported: Path, saved: Path, ask_stranger: AskStranger) -> Answers:
    models = {name: str(exported / name) for name in ("classifier", "segmenter")}
    return ask_stranger(CHECKS, models, target=saved)


@pytest.fixture(scope="module")
def answers_of_a_copy(
    answers: Answers, saved: Path, ask_stranger: AskStranger, tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """Another person loads what the first one saved, from another place."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "models"
    shutil.move(saved, elsewhere)
    return ask_stranger(CHECKS_OF_A_COPY, {name: str(elsewhere / name) for name in ("classifier", "segmenter")})


@pytest.mark.parametrize("check", CHECKS)
def test_folder_works_without_the_package(check: str, answers: Answers, expected: dict[str, object]) -> None:
    assert_answer(answers, expected, check)


@pytest.mark.parametrize("check", CHECKS_OF_A_COPY)
def test_folder_saved_by_a_stranger_works_elsewhere(
    check: str, answers_of_a_copy: Answers, expected: dict[str, object]
) -> None:
    assert_answer(answers_of_a_copy, expected, check)


def test_folder_holds_what_travels_and_nothing_else(exported: Path, repository_root: Path) -> None:
    """The Python files beside the weights are the package's own, byte by byte, and none is missing."""
    for name in ("classifier", "segmenter"):
        travelled = {path.name: path.read_bytes() for path in (exported / name).glob("*.py")}
        assert {"configuration_locatvit.py", "modeling_locatvit.py", "image_processing_locatvit.py"} <= travelled.keys()
        assert "__init__.py" not in travelled
        for file_name, content in travelled.items():
            assert content == (repository_root / "locatvit_hf" / file_name).read_bytes(), file_name
