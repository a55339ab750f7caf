"""`benchmarks.gpu_check`, rehearsed: every phase runs, a wrong kernel is found out, a deadline leaves whole results."""

import contextlib
import copy
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import cells, lanes, verdict
from benchmarks.gpu_check.correctness import attention_formula, check
from locatvit_hf import triton_locat

# What the machine with the GPU may lack.
ABSENT = ("accelerate", "av", "datasets", "evaluate", "gradio", "matplotlib", "peft", "rich", "typer")


@pytest.fixture(scope="module")
def rehearsal(repository_root, tmp_path_factory):
    """Standard output and the stored results of one rehearsal, without the packages that it must do without."""
    folder = tmp_path_factory.mktemp("rehearsal")
    hide = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"  # importing any of them raises ImportError
    (folder / "sitecustomize.py").write_text(hide)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", "--seed", "0", "--output", str(folder)],
        cwd=repository_root,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "gpu_check.json").read_text()), (folder / "gpu_check.md").read_text()


needs_triton = pytest.mark.skipif(triton_locat.triton is None, reason="there is none for macOS")


@needs_triton
def test_every_phase_has_results(rehearsal):
    output, results, page = rehearsal
    phases = results["phases"]
    assert list(phases) == ["device", "drill", "correctness", "speed", "families", "profile"]
    for name, phase in phases.items():
        states = {cell["state"] for cell in phase["cells"].values()}
        assert phase["cells"] and (name == "drill" or states == {"measured"}), phase
    for cell in phases["correctness"]["cells"].values():
        assert cell["same_bits"] and len(cell["errors"]) == 6
        assert all(0 <= error["ours"] <= error["limit"] for error in cell["errors"].values())
    for cell in phases["families"]["cells"].values():
        assert all(record["finite"] for record in cell["contenders"].values())
    [profile] = phases["profile"]["cells"].values()
    assert all(record["kernels"][0]["ms"] > 0 for record in profile["contenders"].values())
    assert results["device"]["triton"] and results["rehearsal"]
    assert output.index("Verdict") < output.index("default of sdpa on CUDA")
    assert "| float32 | 1x1 heads of 32" in page and "## step tiny 32, batch 1, bfloat16" in page


@needs_triton
def test_races_pair_the_rounds_and_name_who_could_not_run(rehearsal):
    _, results, _ = rehearsal
    for cell in results["phases"]["speed"]["cells"].values():
        assert "'sdpa' instead" in cell["contenders"]["flex"]["missing"]  # on a processor it has no backward pass
        racers = {name: record for name, record in cell["contenders"].items() if name not in ("flex", "formula")}
        for part in racers["written"]["parts"]:
            rounds = {len(record["parts"][part]["seconds"]) for record in racers.values()}
            assert len(rounds) == 1 and min(rounds) >= 3
            assert all(record["parts"][part]["finite"] for record in racers.values())
    assert set(verdict.cells_of(results, "speed")["attention tiny 32"]["contenders"]) == set(cells.CONTENDERS)


@needs_triton
def test_what_goes_wrong_in_one_cell_stays_there(rehearsal):
    drill = rehearsal[1]["phases"]["drill"]["cells"]
    whys = {name: cell.get("why") for name, cell in drill.items()}
    assert whys["hangs"] == "it took longer than 0.5 s"
    assert whys["dies"] == "its process ended by SIGKILL"
    assert whys["raises"] == whys["poisons"] == "RuntimeError: as the drill wants it"
    assert drill["succeeds"]["state"] == "measured"
    for how in ("dies", "poisons"):
        race = drill[f"{how} in a race"]
        assert race["state"] == "measured"
        assert "missing" in race["contenders"]["second"]
        assert all(race["contenders"][name]["parts"] for name in ("first", "third"))


# ------------------------------------------------------------------------------------------------------ a wrong kernel
CASE = cells.Case("x", "float32", (4, 5), prefix=2, head_dim=32, batch=1, heads=2, block=2)


def exact(query, key, value, gaussian, scaling):
    return attention_formula(query, key, value, gaussian, scaling)


def without_blocks(query, key, value, gaussian, scaling):
    return attention_formula(query, key, value, gaussian._replace(block_size=1), scaling)


def with_a_bonus_for_prefix_tokens(query, key, value, gaussian, scaling):
    bias = gaussian.bias()
    bias[..., 0] += 0.01
    return ((query @ key.mT * scaling + bias).softmax(-1) @ value).transpose(1, 2)


def in_few_bits(query, key, value, gaussian, scaling):
    """As in TF32, which has ten bits of fraction."""
    cut = (query.detach().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return attention_formula(query + (cut - query).detach(), key, value, gaussian, scaling)


def half_written(query, key, value, gaussian, scaling):
    output = torch.empty(query.transpose(1, 2).shape)
    output[:, ::2] = attention_formula(query, key, value, gaussian, scaling)[:, ::2]
    return output


def never_the_same(query, key, value, gaussian, scaling):
    return attention_formula(query, key, value, gaussian, scaling) * (1 + 1e-7 * torch.rand(()))


def without_a_gradient(query, key, value, gaussian, scaling):
    gaussian = gaussian._replace(amplitude=gaussian.amplitude.detach() + 0.0 * gaussian.amplitude)
    return attention_formula(query, key, value, gaussian, scaling)


def test_the_formula_itself_passes():
    record = check(CASE, "cpu", exact)
    assert record["passed"] and record["same_bits"], record


@pytest.mark.parametrize(
    "wrong",
    (without_blocks, with_a_bonus_for_prefix_tokens, in_few_bits, half_written, never_the_same, without_a_gradient),
)
def test_a_wrong_kernel_is_found_out_and_never_the_default(wrong):
    record = check(CASE, "cpu", wrong)
    assert not record["passed"]
    results = example(fused=0.5)
    assert verdict.decide(results)["default"] == "fused"
    results["phases"]["correctness"]["cells"]["fused"].update(record, state="failed")
    decision = verdict.decide(results)
    assert decision["default"] == "flex" and "Not fused: failed fused." in decision["reasons"]


def test_poisoned_memory_is_as_before_afterwards():
    check(CASE, "cpu", exact)
    assert not torch.are_deterministic_algorithms_enabled()


# --------------------------------------------------------------------------------------------------------- the decision
def example(fused, flex=0.8, written=1.0):
    """Results in which everything passed, with these times of a step; None for one that took part in no round."""
    cases = {
        name: {"cell": asdict(cells.Case(name, "float32", (2, 2), attention=name)), "state": "measured"}
        for name in ("fused", "flex")
    }
    times = {"written": written, "fused": fused, "flex": flex}
    contenders = {
        name: {"parts": {"step": {"seconds": [time, 1.1 * time, time, 0.9 * time]}}} if time else {}
        for name, time in times.items()
    }
    steps = {
        f"step {size}": {
            "cell": asdict(cells.Speed(f"step {size}", "step", "tiny", size, 1, cells.CONTENDERS, deciding=size > 224)),
            "contenders": copy.deepcopy(contenders),
            "state": "measured",
        }
        for size in (224, 512, 1024)
    }
    trained = {"contenders": {"locat_fused": {"finite": True}, "flex_attention": {"finite": True}}, "state": "measured"}
    return {
        "phases": {
            "correctness": {"cells": cases},
            "speed": {"cells": steps},
            "families": {"cells": {"locatvit": {"cell": {}, **trained}}},
        }
    }


def seconds_of(results, name, contender):
    return results["phases"]["speed"]["cells"][name]["contenders"][contender]["parts"]["step"]


def test_the_fastest_that_is_right_is_the_default():
    assert verdict.decide(example(fused=0.5))["default"] == "fused"
    assert verdict.decide(example(fused=0.9))["default"] == "flex"
    assert verdict.decide(example(fused=1.2, flex=1.1))["default"] == "written"


def test_every_deciding_step_counts_and_no_other():
    results = example(fused=0.5)
    seconds_of(results, "step 224", "fused")["seconds"] = [9.0] * 4
    assert verdict.decide(results)["default"] == "fused"
    seconds_of(results, "step 1024", "fused")["seconds"] = [0.5, 0.5, 9.0, 9.0]  # faster in half of the rounds
    decision = verdict.decide(results)
    assert decision["default"] == "flex" and any("step 1024" in reason for reason in decision["reasons"])


def test_what_was_not_measured_speaks_for_nobody():
    for change in (
        lambda results: results["phases"]["correctness"]["cells"]["fused"].update(state="not measured"),
        lambda results: results["phases"]["correctness"]["cells"].pop("fused"),
        lambda results: seconds_of(results, "step 512", "fused").pop("seconds"),
        lambda results: results["phases"]["families"]["cells"]["locatvit"]["contenders"].update(
            locat_fused={"finite": False}
        ),
    ):
        results = example(fused=0.5)
        change(results)
        assert verdict.decide(results)["default"] == "flex"
    results = example(fused=0.5, flex=None)
    assert verdict.decide(results)["default"] == "written"  # there was no time for flex
    for cell in results["phases"]["speed"]["cells"].values():
        cell["contenders"]["flex"] = {"missing": "out of memory"}
    assert verdict.decide(results)["default"] == "fused"
    assert verdict.decide({"phases": {}})["default"] == "written"


def test_the_profile_is_of_the_worst_step():
    results = example(fused=0.9, flex=0.8)
    seconds_of(results, "step 512", "written")["seconds"] = [0.1] * 4
    profile = verdict.slowest(results)
    assert (profile.cell.name, profile.contenders) == ("step 512", ("fused", "written"))
    assert verdict.slowest({"phases": {}}) is None


# ------------------------------------------------------------------------------------------------------------ the plan
def test_the_cases_cover_what_the_kernel_takes():
    cases = [case for case in cells.correctness_cases(0) if case.attention == "fused"]
    values = {
        "head_dim": cells.HEAD_SIZES,
        "prefix": cells.PREFIXES,
        "cap": cells.CAPS,
        "layout": cells.LAYOUTS,
        "block": (1, 2),
    }
    for dtype in cells.DTYPES:
        for name, wanted in values.items():
            assert set(wanted) <= {getattr(case, name) for case in cases if case.dtype == dtype}, (dtype, name)
    assert {case.grid for case in cases} >= set(cells.GRIDS)
    assert any(case.compiled for case in cases) and any(case.gradient == "sum" for case in cases)
    names = [case.name for case in cells.correctness_cases(0)]
    assert len(set(names)) == len(names)
    assert cells.correctness_cases(0) != cells.correctness_cases(1)


def test_the_plan_fits_its_time_and_decides_at_both_sizes():
    plan = cells.phases(0)
    assert [phase.name for phase in plan] == ["device", "correctness", "speed", "families", "profile"]
    assert sum(phase.reserve for phase in plan) <= 60 * command.FULL
    deciding = [(cell.scale, cell.image_size) for cell in plan[2].cells if cell.deciding]
    assert set(deciding) == {(scale, size) for scale in ("tiny", "base") for size in (512, 1024)}
    assert plan[2].cells[: len(deciding)] == [cell for cell in plan[2].cells if cell.deciding]  # first of all
    assert {cell.family for cell in plan[3].cells} == {"locatvit", "locatjumbo", "locatswin", "pacavit"}


# -------------------------------------------------------------------------------------------------------- the deadline
def test_a_deadline_of_almost_nothing_leaves_whole_results(tmp_path, monkeypatch, capsys):
    for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):  # which the command sets; restored afterwards
        monkeypatch.setenv(name, os.environ.get(name, ""))
    assert command.main(["--rehearse", "--minutes", "0.0001", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    found = [cell for phase in results["phases"].values() for cell in phase["cells"].values()]
    assert {(cell["state"], cell["why"]) for cell in found} == {("not measured", "out of time")}
    assert results["decision"]["default"] == "written"
    assert "not measured" in capsys.readouterr().out
    assert "Correctness: float32 | not measured | out of time" in (tmp_path / "gpu_check.md").read_text()


def test_a_deadline_in_the_middle_keeps_what_is_known(monkeypatch):
    def hang(connection, rehearsal):
        connection.recv()
        connection.send(("partial", {"contenders": {"first": {"parts": {}}}, "at_work": "second"}))
        time.sleep(60)

    monkeypatch.setattr(lanes, "serve", hang)
    stored = {}
    phase = cells.Phase(
        "drill", "Drill", [cells.Drill("one", "hangs", ("first", "second")), cells.Drill("two", "hangs")]
    )
    start = time.monotonic()
    lanes.work_off(phase, start + 0.5, multiprocessing.get_context("fork"), True, stored.__setitem__)
    assert time.monotonic() - start < 10 and not multiprocessing.active_children()
    assert {name: (cell["state"], cell["why"]) for name, cell in stored.items()} == {
        "one": ("not measured", "out of time"),
        "two": ("not measured", "out of time"),
    }
    assert stored["one"]["contenders"] == {"first": {"parts": {}}}


def test_wrong_options_are_refused_in_one_sentence(capsys):
    with contextlib.suppress(SystemExit):
        command.main(["--minutes", "0"])
    assert "--minutes must be above 0." in capsys.readouterr().err
