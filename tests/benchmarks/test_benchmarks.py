"""The benchmarks measure what they say, at sizes that take no time."""

import json
import math
import sys

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import measure, models, report, run
from benchmarks.measure import Cell
from locatvit_hf.locat import LocAtGaussian
from tests.processes import run_program

TINY = Cell("tiny", 32, 1, "forward", goal=1.5)


@pytest.fixture
def gaussian():
    """Of a grid beyond the distance cap, from weights as if trained."""
    module = LocAtGaussian(8, (3, 3)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module(torch.randn(2, 3, 1 + 30, 8, dtype=torch.float64), (5, 6), num_prefix_tokens=1)


@pytest.mark.parametrize("bias_of", [models.literal_bias, models.separable_bias])
def test_the_formula_written_out_is_our_bias(gaussian, bias_of):
    torch.testing.assert_close(bias_of(gaussian), gaussian.bias(), rtol=1e-12, atol=1e-14)
    coarse = gaussian._replace(block_size=2)
    torch.testing.assert_close(bias_of(coarse), coarse.bias(), rtol=1e-12, atol=1e-14)


def test_models_of_the_formula_compute_ours():
    outputs = []
    for name in ("locatvit", "literal", "separable"):
        torch.manual_seed(0)
        outputs.append(models.MODELS[name]("tiny", 64).eval()(torch.ones(1, 3, 64, 64)).logits)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in models.MODELS if name not in models.GPU_ONLY])
def test_every_model_is_built_and_of_like_size(name):
    model = models.MODELS[name]("tiny", 224)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 5e6 < parameters < 30e6
    assert measure.logits_of(model.eval()(torch.randn(1, 3, 224, 224))).shape == (1, 1000)


def test_gmacs_are_those_of_the_specification():
    assert measure.gmacs("timm-vit", "tiny", 224) == pytest.approx(1.254, abs=1e-3)
    assert measure.gmacs("plain", "tiny", 224) is None


def test_rounds_pair_every_model_with_the_reference():
    calls = []
    seconds = measure.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, budget=1e-9)
    assert [len(values) for values in seconds.values()] == [measure.MIN_ROUNDS] * 3
    rounds = [calls[first : first + 3] for first in range(0, len(calls), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    # The second round is twice as slow for both; the ratio does not see it.
    assert measure.paired_ratios([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert measure.interleave({}, budget=1.0) == {}


def test_quartiles_and_growth():
    assert measure.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert measure.quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert measure.growth_exponent([224, 512, 1024], [3 * size**2 for size in (224, 512, 1024)]) == pytest.approx(1)
    assert measure.growth_exponent([224, 512, 1024], [size**4 for size in (224, 512, 1024)]) == pytest.approx(2)


@pytest.mark.parametrize("mode", ["forward", "train", "attention"])
def test_a_cell_is_measured(mode):
    cell = Cell("tiny", 64, 1, mode)
    ours = report.OURS.get(mode, "locatvit")
    records = measure.measure_cell(cell, [cell.reference, ours, "literal"], budget=5.0, with_memory=False)
    for record in records.values():
        assert record["finite"] and len(record["seconds"]) >= measure.MIN_ROUNDS and min(record["seconds"]) > 0
    assert len({len(record["seconds"]) for record in records.values()}) == 1


def test_what_cannot_be_measured_says_why_and_stops_nothing(monkeypatch):
    def allocate(scale, image_size):
        return torch.nn.Linear(10**8, 10**8)

    monkeypatch.setitem(models.MODELS, "hf-vit", allocate)
    records = measure.measure_cell(TINY, ["timm-vit", "hf-vit"], budget=1.0, with_memory=False)
    assert records["hf-vit"]["missing"] == measure.OUT_OF_MEMORY and "seconds" in records["timm-vit"]
    records = measure.measure_cell(TINY, ["timm-vit", "baseline"], budget=1e-9, with_memory=False)
    assert records["baseline"]["missing"] == measure.OVER_BUDGET and "seconds" in records["timm-vit"]


RESIDENT = """
import torch
from benchmarks.measure import give_back_freed_memory, keep_freed_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

keep_freed_memory()
tensors = [torch.ones(2**24) for _ in range(4)]  # 64 MiB each
before = resident()
tensors.clear()
kept = resident()
give_back_freed_memory()
print(before - kept, kept - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc alone")
def test_freed_memory_is_kept_until_it_is_given_back():
    run = run_program("-c", RESIDENT, folder=report.ROOT)
    assert run.returncode == 0, run.stderr
    freed, given_back = map(float, run.stdout.split())
    assert freed < 20 and given_back > 200


def test_memory_of_the_formula_is_larger_than_ours():
    cell = Cell("tiny", 384, 1, "attention")
    ours, literal = measure.memory_of(cell, "locat"), measure.memory_of(cell, "literal")
    squares = 3 * (384 // 16) ** 4 * 4  # bytes of one (heads, patches, patches)
    assert literal["step_bytes"] > 3 * squares and literal["step_bytes"] > 2 * ours["step_bytes"]
    assert literal["peak_bytes"] > literal["step_bytes"]


def test_the_profile_of_a_goal_names_what_differs_from_the_reference(monkeypatch):
    # Without a clock: on a busy machine the first call of a model may exceed any budget.
    monkeypatch.setattr(measure, "interleave", lambda steps, *budget: {name: [1.0] for name in steps})
    cell = Cell("tiny", 224, 1, "forward", goal=1.05)
    records = measure.measure_cell(cell, ["timm-vit", "locatvit", "baseline"], budget=math.inf, with_memory=False)
    assert "operators" not in records["baseline"]
    rows = report.operator_rows({**vars(cell), "reference": "timm-vit", "models": records}, most=1000)
    times = {name: [float(number) for number in numbers] for name, *numbers in rows}
    reference, ours, difference = times["BlockwiseAttention"]
    assert reference == 0.0 and ours == difference > 0.0
    assert report.operator_rows({**vars(TINY), "reference": "timm-vit", "models": {}}) == []


def test_suites_put_goals_first():
    cells = measure.cells_of("cpu")
    assert [cell.goal for cell in cells[:5]] == [1.05, 1.10, 1.03, 1.10, 1.20]
    assert {cell.image_size for cell in cells} == set(measure.SIZES)
    assert {cell.dtype for cell in measure.cells_of("gpu")} == {"bfloat16", "float16", "float32"}
    for suite in ("cpu", "gpu", "growth"):
        names = [cell.name for cell in measure.cells_of(suite)]
        assert len(set(names)) == len(names)
        assert all(cell.candidates(suite)[0] == cell.reference for cell in measure.cells_of(suite))
    with pytest.raises(ValueError, match="no suite 'tpu'"):
        measure.cells_of("tpu")


def example(suite="cpu"):
    """Results as `run.py` stores them, of made-up times."""
    names = {"timm-vit": 1.0, "locatvit": 1.25, "literal": 2.5, "pacavit": 3.0, "hf-pvtv2": 4.0}
    records = {
        name: {"seconds": [time, 2 * time, time], "parameters": 10**6, "gmacs": time, "step_bytes": int(time * 4e6)}
        for name, time in names.items()
    }
    records["hf-segformer"] = {"missing": "over the budget"}
    cells = [
        {**vars(cell), "name": cell.name, "reference": cell.reference, "commit": "abc", "models": records}
        for cell in (TINY, Cell("tiny", 64, 1, "forward"))
    ]
    cells.append(
        {**vars(Cell("base", 32, 1, "train", goal=1.1)), "reference": "timm-vit", "models": {}, "missing": "no"}
    )
    startup = {"import": {"torch": [1.0, 2.0, 3.0]}}
    return {"suite": suite, "command": "…", "hardware": report.hardware(), "cells": cells, "startup": startup}


def test_report_names_the_machine_goals_ratios_and_gaps(tmp_path):
    report.write(example(), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert all(fact in text for fact in ("- cpu: ", "- threads: ", "- torch: ", "- commit: "))
    assert "| tiny 32, batch 1, forward | 1.50 | 1.25 (1.25–1.25) | yes | not measured |" in text
    assert "| base 32, batch 1, train | 1.10 | not measured |  |" in text
    assert "| tiny 32, batch 1, forward | 2.00 (2.00–2.00) | 0.50 |" in text  # against the formula
    assert "not measured: over the budget" in text and "| import, torch | 2.00 (1.50–2.50) |" in text
    assert "| base 32, batch 1, train | no |" in text
    assert json.loads((tmp_path / "results.json").read_text())["cells"][0]["models"]["literal"]["gmacs"] == 2.5
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "results.png"}


def test_report_of_growth_prints_the_exponent():
    text = report.markdown(example("growth"))
    assert "| pacavit, forward | 32, 64 | 0.00 | 0.00 |" in text


def test_command_line_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(run.app, ["--suite", "gpu", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "no CUDA device" in done.output and (tmp_path / "gpu-none" / "results.md").exists()


def test_command_line_measures_what_is_selected_and_keeps_the_rest(tmp_path, monkeypatch):
    cells = [TINY, Cell("tiny", 48, 1, "forward")]
    monkeypatch.setattr(measure, "cells_of", lambda suite: cells)
    monkeypatch.setattr(report, "host_kind", lambda suite: "here")
    common = ["--models", "locatvit", "--budget", "0.5", "--no-memory", "--no-startup", "--output", str(tmp_path)]
    for arguments in (["--sizes", "32"], ["--only", "48", "--update"]):
        done = CliRunner().invoke(run.app, [*common, *arguments])
        assert done.exit_code == 0, done.output
        stored = json.loads((tmp_path / "cpu-here" / "results.json").read_text())["cells"]
        assert list(stored[0]["models"]) == ["timm-vit", "locatvit"]
        assert bool(stored[1]["models"]) == ("--update" in arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--models", "resnet"], "No model 'resnet'"),
        (["--suite", "tpu"], "no suite 'tpu'"),
        (["--sizes", "big"], "must be numbers"),
        (["--only", "("], "a pattern"),
        (["--only", "tiny-17"], "No cell matches"),
        (["--budget", "0"], "above 0"),
    ],
)
def test_command_line_refuses_in_one_sentence(arguments, sentence):
    done = CliRunner().invoke(run.app, arguments)
    assert done.exit_code == 1 and sentence in done.output and "Traceback" not in done.output
