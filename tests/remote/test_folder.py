"""Exported folders on a machine without the package: `trust_remote_code=True`, the Auto classes and the pipelines."""

import shutil
from pathlib import Path

import pytest

from tests.factories import FAMILIES
from tests.remote.conftest import CODE, Answers, AskRemoteUser, assert_answer, folders

CHECKS = [
    "image_processor",
    "model",
    "classifier",
    "segmenter",
    "classification_pipeline",
    "segmentation_pipeline",
    "features_pipeline",
]
CHECKS_OF_LOCATVIT = [*CHECKS, "config", "label_maps", "new_segmentation_head", "save_again"]
CHECKS_OF_A_COPY = ["config", *CHECKS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def answers(exported: Path, saved: Path, ask_remote_user: AskRemoteUser) -> dict[str, Answers]:
    """By family, all in one process."""
    requests = [
        {"models": folders(exported / family), "target": str(saved)}
        | {"checks": CHECKS_OF_LOCATVIT if family == "locatvit" else CHECKS}
        for family in FAMILIES
    ]
    return dict(zip(FAMILIES, ask_remote_user(*requests), strict=True))


@pytest.fixture(scope="module")
def answers_of_a_copy(
    answers: dict[str, Answers], saved: Path, ask_remote_user: AskRemoteUser, tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """Another person loads what the first one saved, from another place."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "models"
    shutil.move(saved, elsewhere)
    return ask_remote_user({"models": folders(elsewhere), "checks": CHECKS_OF_A_COPY})[0]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_works_without_the_package(
    family: str, check: str, answers: dict[str, Answers], expected: dict[str, dict[str, object]]
) -> None:
    assert_answer(answers[family], expected[family], check)


@pytest.mark.parametrize("check", [check for check in CHECKS_OF_LOCATVIT if check not in CHECKS])
def test_a_folder_gives_configurations_label_maps_and_new_heads(
    check: str, answers: dict[str, Answers], expected: dict[str, dict[str, object]]
) -> None:
    assert_answer(answers["locatvit"], expected["locatvit"], check)


@pytest.mark.parametrize("check", CHECKS_OF_A_COPY)
def test_a_folder_saved_by_a_remote_user_works_elsewhere(
    check: str, answers_of_a_copy: Answers, expected: dict[str, dict[str, object]]
) -> None:
    assert_answer(answers_of_a_copy, expected["locatvit"], check)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_holds_the_code_of_its_classes_and_no_other(
    family: str, exported: Path, repository_root: Path
) -> None:
    """The Python files beside the weights are the package's own, byte by byte."""
    for folder in map(Path, folders(exported / family).values()):
        code = {path.name: path.read_bytes() for path in folder.glob("*.py")}
        assert code.keys() == CODE[family]
        for name, content in code.items():
            assert content == (repository_root / "locatvit_hf" / name).read_bytes(), name
