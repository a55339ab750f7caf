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


KEEP_A_PROCESSOR = """
import sys
from pathlib import Path
from locatvit_hf import LocAtViTForSemanticSegmentation, LocAtViTImageProcessor

folder, work = map(Path, sys.argv[1:])
model = LocAtViTForSemanticSegmentation.from_pretrained(folder / "segmenter")
processor = LocAtViTImageProcessor.from_model_config(model.config, segmentation=True, do_reduce_labels=True)
processor.push_to_hub("tester/processor-first")
model.push_to_hub("tester/processor-first")
processor.save_pretrained(work)
model.save_pretrained(work, push_to_hub=True, repo_id="tester/one-folder")
for name in ("processor-first", "one-folder"):
    pushed = LocAtViTImageProcessor.from_pretrained(f"tester/{name}")
    assert pushed.do_reduce_labels, name
    LocAtViTForSemanticSegmentation.from_pretrained(f"tester/{name}")
"""


def test_pushing_a_model_keeps_the_processor_that_is_there(exported: Path, hub: str, tmp_path: Path) -> None:
    repository = HERE.parents[1]
    (tmp_path / "author").mkdir()
    program = f"import sys; sys.path.insert(0, {str(repository)!r})" + KEEP_A_PROCESSOR
    start([sys.executable, "-c", program, exported, tmp_path / "work"], tmp_path / "author", hub)
