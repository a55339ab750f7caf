"""Losses, gradients and weights that are not finite: what ends, what is kept, and where the same command goes on."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from tests.training.conftest import SMALL_MODEL
from tests.training.programs import spoiled
from training.engine.arguments import build_arguments
from training.engine.checkpoints import list_checkpoints, write_manifest
from training.engine.finite import are_finite, first_not_finite, gradient_norm, scale_gradients
from training.pretrain import PretrainArguments
from training.pretrain import main as pretrain
from training.tasks import classification as task


@pytest.fixture(scope="module")
def settings(pretrain_settings) -> dict:
    return {**pretrain_settings, "length": "6 steps", "warmup": "0 steps", "evaluate_every": "3 steps"}


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> Path:
    """The output folder of a run without a fault."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run({**settings, "keep_checkpoints": 3}, output)
    return output


def run(settings: dict, output: Path) -> dict:
    return pretrain(build_arguments(PretrainArguments, {**settings, "output_dir": str(output)}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def steps(output: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(output / "checkpoints")]


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 5.0), (2, None)])
def test_a_spoiled_gradient_ends_the_run_before_the_weights_move(
    settings, undisturbed, tmp_path, monkeypatch, accumulation, clip
):
    """The loss is finite; the same command then goes on as if nothing had been."""
    settings = {**settings, "gradient_accumulation_steps": accumulation, "max_gradient_norm": clip}
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        fault = spoiled(task.classification_objective, lambda call: call == 3 * accumulation + 1)
        patch.setattr(task, "classification_objective", fault)
        with pytest.raises(ValueError, match="The norm of the gradients became nan") as caught:
            run(settings, output)
    message, last = str(caught.value), output / "checkpoints" / "step_00000003"
    assert "\n" not in message and "at step 4, although the loss is 0." in message
    assert f"The newest checkpoint is {last}, whose weights are finite: the same command goes on there." in message
    assert "first in locatvit." in message and f"its batch is in {output / 'not_finite'}" in message
    assert steps(output) == [2, 3] and are_finite(weights(last).values())
    (file,) = (output / "not_finite").iterdir()
    assert len(torch.load(file, weights_only=False)["batches"]) == accumulation

    results = run(settings, output)
    assert results["updates"] == 6 and all(point["grad_norm"] > 0 for point in results["train_curve"])
    if accumulation == 1:
        expected = json.loads((undisturbed / "all_results.json").read_text())
        losses = [[point["loss"] for point in content["train_curve"]] for content in (results, expected)]
        assert losses[0] == losses[1]
        after, before = weights(output / "model"), weights(undisturbed / "model")
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_first_step_has_no_checkpoint_to_go_back_to(settings, tmp_path, monkeypatch):
    fault = spoiled(task.classification_objective, lambda call: True)
    monkeypatch.setattr(task, "classification_objective", fault)
    with pytest.raises(ValueError, match="There is no checkpoint yet, so the same command starts anew"):
        run(settings, tmp_path / "run")
    assert steps(tmp_path / "run") == []


def test_weights_that_are_not_finite_are_not_kept(settings, tmp_path, monkeypatch):
    """Loss and gradients are finite, and so are the weights until they move."""
    create = task.create_optimizer

    def create_failing_optimizer(*arguments):
        optimizer = create(*arguments)
        parameter = optimizer.param_groups[0]["params"][0]
        optimizer.register_step_post_hook(lambda *_: parameter.data.fill_(math.inf))
        return optimizer

    monkeypatch.setattr(task, "create_optimizer", create_failing_optimizer)
    message = r"The weights are not finite after step 1 \(first in locatvit.*\), so they were not kept"
    with pytest.raises(ValueError, match=message) as caught:
        run({**settings, "evaluate_every": "1 steps"}, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert steps(tmp_path / "run") == [] and not (tmp_path / "run" / "model").exists()


def spoil_checkpoint(folder: Path) -> None:
    content = weights(folder)
    name = next(name for name in content if name.endswith("up_proj.weight"))
    content[name][0, 0] = math.nan
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder)


def test_checkpoints_with_weights_that_are_not_finite_are_set_aside(settings, undisturbed, tmp_path, capsys):
    """Earlier versions wrote such; the same command goes on from the last good one."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    settings = {**settings, "keep_checkpoints": 3}
    for step in (5, 6):
        spoil_checkpoint(output / "checkpoints" / f"step_{step:08d}")
    results = run(settings, output)
    printed = capsys.readouterr().out
    assert "step_00000006 holds weights that are not finite: it is now not_finite_step_00000006" in printed
    assert "step_00000004 goes on" in printed and "Continuing at step 4 of 6" in printed
    expected = json.loads((undisturbed / "all_results.json").read_text())
    assert results["metrics"] == expected["metrics"] and steps(output)[-3:] == [4, 5, 6]
    assert are_finite(weights(output / "checkpoints" / "step_00000006").values())

    left = list_checkpoints(output / "checkpoints")
    for folder in left:
        spoil_checkpoint(folder)
    with pytest.raises(ValueError, match="holds finite weights: --overwrite the run"):
        run(settings, output)
    assert list_checkpoints(output / "checkpoints") == left


class ScalingAccelerator(Accelerator):
    """The loss scaler of fp16 on CPU, where accelerate has none; it computes in float32."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=4.0), True

    mixed_precision = "fp16"

    def autocast(self, *arguments, **options):
        return torch.autocast("cpu", enabled=False)


def test_steps_that_the_loss_scaler_skips_do_not_end_a_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("training.engine.distributed.Accelerator", ScalingAccelerator)
    objective = task.classification_objective
    settings = {**settings, "ema_decay": None}
    monkeypatch.setattr(task, "classification_objective", spoiled(objective, lambda call: call in (2, 3)))
    results = run(settings, tmp_path / "skipped")
    assert results["updates"] == 6 and results["num_skipped_steps"] == 2
    assert [point["skipped_steps"] for point in results["train_curve"]] == [0, 1, 2, 2, 2, 2]
    norms = [math.isfinite(point["grad_norm"]) for point in results["train_curve"]]
    assert norms == [True, False, False, True, True, True]
    first = weights(tmp_path / "skipped" / "model")
    assert are_finite(first.values())

    monkeypatch.setattr(task, "classification_objective", spoiled(objective, lambda call: call > 2))
    monkeypatch.setattr("training.engine.guard.MAX_SKIPPED_IN_A_ROW", 4)
    with pytest.raises(ValueError, match=r"at step 6, .* in the 4 steps up to this one, at every loss scale"):
        run(settings, tmp_path / "never")


def test_gradients_are_clipped_to_their_norm(settings, tmp_path):
    """One step of plain SGD at learning rate 1 is as long as the clipped gradient."""
    settings = {**settings, "model": SMALL_MODEL, "optimizer": "momentum", "optimizer_options": {"momentum": 0.0}}
    settings |= {"learning_rate": 1.0, "weight_decay": 0.0, "ema_decay": None, "length": "1 steps"}
    ends = {}
    for clip in (0.01, 0.03):
        results = run({**settings, "max_gradient_norm": clip}, tmp_path / str(clip))
        assert results["train_curve"][0]["grad_norm"] > clip
        ends[clip] = weights(tmp_path / str(clip) / "model")
    moved = torch.cat([(ends[0.03][name] - ends[0.01][name]).flatten() for name in ends[0.01]])
    # Each of less than 1e4 weights, none above 1, is rounded to 6e-8 of itself: 1e-5 together, of 0.02.
    assert moved.norm().item() == pytest.approx(0.02, rel=2e-3)


def test_norms_of_gradients():
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 4, 5)]
    assert gradient_norm(parameters, torch.device("cpu")).item() == 0
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0, 0]), torch.full((4,), -2.0)
    assert gradient_norm(parameters, torch.device("cpu")).item() == pytest.approx(5)
    scale_gradients(parameters, 0.5)
    assert gradient_norm(parameters, torch.device("cpu")).item() == pytest.approx(2.5)
    named = [("first", torch.ones(2)), ("second", torch.tensor([0.0, -math.inf])), ("third", torch.tensor([math.nan]))]
    assert first_not_finite(named) == "second" and first_not_finite(named[:1]) is None
    assert are_finite([torch.full((2,), 3e38), torch.zeros(0), torch.ones(2, dtype=torch.int64)])
