"""Uploads to a Hub on this machine, by `push_to_hub`, `locatvit push` and Trainer, and what remote users get of them.

A Hub id is not a folder: transformers checks the imports of every file, caches by commit, and `AutoBackbone` takes ids
only.
"""

import json
import os
import re
import signal
import time
import urllib.request
from pathlib import Path

import pytest

from locatvit_hf.hub.card import Card, Training, dump_card
from tests.processes import start_program, wait_for
from tests.remote.conftest import (
    CODE,
    HERE,
    PUBLISHED,
    Answers,
    AskRemoteUser,
    assert_answer,
    environment_of,
    repositories,
    start,
)

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
]
CHECKS_OF_A_COPY = ["config", "image_processor", "classifier", "segmenter", "backbone", "classification_pipeline"]
CARD = Card(
    title="Tiny",
    datasets=["unknown"],
    weights_license="mit",
    training=Training(program="pretrain", version="0.1.0", updates=10, step=10, batch_size=4, processes=1),
)
FILES = CODE["locatvit"] | PUBLISHED


@pytest.fixture(scope="module")
def seen(exported: Path, hub: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What `uploader.py` saw."""
    machine = tmp_path_factory.mktemp("uploader")
    (machine / "card.yaml").write_text(dump_card(CARD))
    start(machine, hub, HERE / "uploader.py", exported / "locatvit", machine / "answer.json")
    return json.loads((machine / "answer.json").read_text())


@pytest.fixture(scope="module")
def answers(seen: dict[str, object], hub: str, ask_remote_user: AskRemoteUser) -> dict[str, Answers]:
    """What one person gets of all that was uploaded, by where it is."""
    requests = {
        "by push_to_hub": {"models": repositories("tester/locatvit"), "push": "tester/fine-tuned"}
        | {"checks": [*CHECKS, "save_again", "push_again"]},
        # By tag: `main` of the classifier holds other weights by now.
        "by locatvit push": {"models": repositories("tester/pushed"), "revision": "v1", "checks": CHECKS},
        "by Trainer": {"models": {"classifier": "tester/trained", "segmenter": "tester/pushed-segmenter"}}
        | {"checks": ["classifier", "image_processor", "classification_pipeline"]},
    }
    return dict(zip(requests, ask_remote_user(*requests.values(), hub=hub), strict=True))


@pytest.fixture(scope="module")
def answers_of_a_copy(answers: dict[str, Answers], hub: str, ask_remote_user: AskRemoteUser) -> Answers:
    """Another person loads what the first one pushed."""
    return ask_remote_user({"models": repositories("tester/fine-tuned"), "checks": CHECKS_OF_A_COPY}, hub=hub)[0]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("upload", ["by push_to_hub", "by locatvit push"])
def test_a_hub_id_works_without_the_package(
    upload: str, check: str, answers: dict[str, Answers], expected: dict[str, dict[str, object]]
) -> None:
    assert_answer(answers[upload], expected["locatvit"], check)


@pytest.mark.parametrize("check", ["save_again", "push_again"])
def test_a_remote_user_saves_and_pushes(
    check: str, answers: dict[str, Answers], expected: dict[str, dict[str, object]]
) -> None:
    assert_answer(answers["by push_to_hub"], expected["locatvit"], check)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS_OF_A_COPY)
def test_a_repository_pushed_by_a_remote_user_works(
    check: str, answers_of_a_copy: Answers, expected: dict[str, dict[str, object]]
) -> None:
    assert_answer(answers_of_a_copy, expected["locatvit"], check)


def test_pushing_a_model_keeps_the_processor_that_is_there(seen: dict[str, object]) -> None:
    """Pushed on its own before the model, or saved in the folder that is pushed."""
    assert seen["reduces labels"] == {"tester/processor-first": True, "tester/one-folder": True}


def test_trainer_pushes_what_a_remote_user_loads(seen: dict[str, object], answers: dict[str, Answers]) -> None:
    found = answers["by Trainer"]
    assert_answer(found, {"classifier": seen["logits"]}, "classifier")
    assert not any("error" in value for value in found.values()), found
    assert CODE["locatvit"] | {"LICENSE", "README.md", "preprocessor_config.json"} <= set(seen["files of Trainer"])
    assert f"| me/photos | validation | accuracy | {100 * seen['accuracy']:.2f}" in seen["card"]
    assert "2 steps of 2 images, one process" in seen["card"]
    assert 'pipeline("image-classification", "tester/trained", revision="main"' in seen["card"]


def test_a_dry_run_shows_the_files_and_changes_nothing(seen: dict[str, object]) -> None:
    assert seen["dry run"]["status"] == 0, seen["dry run"]
    added = {line.split()[1] for line in seen["dry run"]["text"].splitlines() if line.split()[:1] == ["added"]}
    assert added == FILES
    assert not seen["exists after the dry run"]


def test_a_push_leaves_all_files_in_one_commit_and_a_tag(seen: dict[str, object]) -> None:
    assert seen["push"]["status"] == 0, seen["push"]
    assert set(seen["first"]["files"]) == FILES
    assert seen["first"]["commit"] in seen["push"]["text"]
    assert seen["v1"] == seen["first"]
    assert seen["info"]["status"] == 0, seen["info"]
    assert f'revision="{seen["first"]["commit"]}"' in seen["info"]["text"]


def test_a_second_push_replaces_code_and_weights_and_keeps_the_rest(seen: dict[str, object]) -> None:
    changes, second = seen["second"]["changes"], seen["second"]["files"]
    assert changes["removed"] == ["old.py", "pytorch_model.bin"]
    assert set(second) == FILES | {"figure.png"}
    assert "model.safetensors" in changes["changed"] and CODE["locatvit"] <= set(changes["unchanged"])
    assert second["model.safetensors"] != seen["first"]["files"]["model.safetensors"]
    assert seen["again"]["commit"] == seen["second"]["commit"]
    assert not any(seen["again"]["changes"][kind] for kind in ("added", "changed", "removed"))
    assert seen["branch"]["files"] == second


def test_a_pull_request_leaves_main_alone(seen: dict[str, object]) -> None:
    assert seen["pull request"]["url"].endswith("/tester/pushed-classifier/discussions/1")
    assert seen["pull request"]["main"] == seen["leftovers"]
    assert seen["pull request"]["proposal"]["files"] == seen["second"]["files"]


def test_a_tag_is_not_moved_and_a_public_repository_stays_public(seen: dict[str, object]) -> None:
    assert seen["tag in use"]["status"] == 1
    assert "has a tag v1 already, at " in seen["tag in use"]["text"]
    assert seen["private"]["status"] == 0 and seen["is private"], seen["private"]
    assert seen["public"]["status"] == 1
    assert "exists and is public" in seen["public"]["text"]


def test_info_names_what_was_changed_on_the_hub_and_runs_nothing(seen: dict[str, object]) -> None:
    changed = seen["changed"]
    assert "locat.py differs from that of locatvit-hf 0.1.0." in changed["alarms"]
    assert any(alarm.startswith("model.safetensors is not what was published") for alarm in changed["alarms"])
    assert "+open(" in changed["diffs"]["locat.py"]
    assert changed["parameters"] > 0
    assert not changed["ran"]
    assert "locat.py" in changed["downloaded"] and "model.safetensors" not in changed["downloaded"]


TROUBLE = """
import json, os, sys
from pathlib import Path
from locatvit_hf.hub import hub_api
from locatvit_hf.hub.audit import inspect
from locatvit_hf.hub.push import upload

folder, answer, *steps = sys.argv[1:]
hub_api.RETRY_DELAYS = (0.01, 0.01, 0.01)
seen = {}
for step in steps:
    name, repository, token, failures = step.split("|")
    hub_api.huggingface_hub.utils.get_session().put(os.environ["HF_ENDPOINT"] + "/loopback/failures", content=failures)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    lines = []
    try:
        act = inspect if name.startswith("info") else lambda name, report: upload(Path(folder), name, report=report)
        found = act(repository, report=lines.append)
        seen[name] = {"commit": found.commit, "lines": lines}
    except hub_api.HubError as error:
        seen[name] = {"error": str(error), "lines": lines}
    try:
        seen[name]["files"] = sorted(hub_api.read_snapshot(repository, None, lines.append).files)
    except hub_api.HubError as error:
        seen[name]["files"] = str(error)
Path(answer).write_text(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def trouble(seen: dict[str, object], hub: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What became of uploads that were killed, met a Hub in trouble, or were not allowed, one after the other."""
    folder, machine = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("uploader")
    (folder / "model.safetensors").write_bytes(os.urandom(1 << 20))
    (folder / "README.md").write_text("# A model\n")
    program = f"import sys; sys.path.insert(0, {str(HERE.parents[1])!r})\n{TROUBLE}"
    command = ["-c", program, folder, machine / "answer.json"]

    def failing(request: str, status: int | None, times: int = 99) -> str:
        return json.dumps([{"request": request, "status": status, "times": times}])

    # Killed while the weights are on their way.
    hangs = f"kill|tester/cut|hf_loopback|{failing('PUT /lfs/.*', None)}"
    process = start_program(*command, hangs, folder=machine, environment=environment_of(machine, hub))
    try:
        deadline = time.monotonic() + 120
        while not read(f"{hub}/loopback/requests")[-1].startswith("PUT /lfs/"):
            assert time.monotonic() < deadline, "The upload did not get to the weights."
            time.sleep(0.1)
    finally:
        os.kill(process, signal.SIGKILL)
        assert wait_for(process) == -signal.SIGKILL
    after_the_kill = read(f"{hub}/api/models/tester/cut")["siblings"]

    commit = "POST /api/models/tester/{}/commit/main"
    steps = [
        "repeat|tester/cut|hf_loopback|[]",
        f"busy|tester/busy|hf_loopback|{failing(commit.format('busy'), 503, 2)}",
        f"down|tester/down|hf_loopback|{failing(commit.format('down'), 500)}",
        "reader|tester/cut2|hf_reader|[]",
        "nobody|tester/nobody||[]",
        "info of nobody|tester/pushed-segmenter||[]",
        "info of nothing|tester/nothing|hf_loopback|[]",
    ]
    start(machine, hub, *command, *steps)
    return json.loads((machine / "answer.json").read_text()) | {"after the kill": after_the_kill}


def read(address: str) -> object:
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)


def test_an_upload_that_was_killed_is_invisible_and_can_be_repeated(trouble: dict[str, object]) -> None:
    assert trouble["after the kill"] == []
    assert trouble["repeat"]["files"] == ["README.md", "model.safetensors"]


def test_a_busy_hub_is_asked_again(trouble: dict[str, object]) -> None:
    assert trouble["busy"]["files"] == ["README.md", "model.safetensors"]
    again = "The Hub answered 503 (Asked to fail) for tester/busy. Trying again in 0.01 s."
    assert trouble["busy"]["lines"] == [again] * 2


def test_a_hub_that_stays_down_is_one_sentence_and_no_change(trouble: dict[str, object]) -> None:
    assert trouble["down"]["error"] == "The Hub answered 500 (Asked to fail) for tester/down."
    assert len(trouble["down"]["lines"]) == 3
    assert trouble["down"]["files"] == []


def test_a_token_that_may_not_write_is_refused_in_a_sentence(trouble: dict[str, object]) -> None:
    assert re.fullmatch(r"Your token may not write to tester/cut2 \(403\): .*\.", trouble["reader"]["error"])


def test_without_a_token_the_message_says_what_to_do(trouble: dict[str, object]) -> None:
    assert trouble["nobody"]["error"] == "You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN."
    assert trouble["info of nobody"]["error"] == (
        "There is no repository tester/pushed-segmenter on the Hub, or it is private and you are not logged in: "
        "run `hf auth login`, or set HF_TOKEN."
    )
    assert trouble["info of nothing"]["error"] == (
        "There is no repository tester/nothing on the Hub, or it is private and your token may not read it."
    )
