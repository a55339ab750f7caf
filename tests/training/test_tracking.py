import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from locatvit_hf import LocAtViTConfig, LocAtViTForImageClassification
from tests.training.conftest import SMALL_MODEL
from training.engine.arguments import build_arguments
from training.engine.plotting import draw_batch, tile
from training.engine.settings import RunArguments
from training.engine.tracking import GaussianReader, Trackers
from training.pretrain import PretrainArguments
from training.pretrain import main as pretrain


@pytest.fixture(scope="module")
def tracked(pretrain_settings, tmp_path_factory):
    """What TensorBoard reads of one run, and the run's results."""
    output = tmp_path_factory.mktemp("tracked") / "run"
    settings = {**pretrain_settings, "length": "8 steps", "evaluate_every": "4 steps", "trackers": ["tensorboard"]}
    results = pretrain(build_arguments(PretrainArguments, {**settings, "output_dir": str(output)}))
    events = EventAccumulator(str(output / "locatvit-hf"))
    events.Reload()
    return events, results


def test_runs_in_folders_of_one_name_are_different_runs(tmp_path, monkeypatch):
    started = []
    accelerator = SimpleNamespace(trackers=[], init_trackers=lambda project, init_kwargs: started.append(init_kwargs))
    arguments = RunArguments(trackers=["wandb", "trackio"])
    monkeypatch.chdir(tmp_path)
    for folder in ("seed0/run", "seed1/run", "./seed0/run"):
        Trackers(accelerator, arguments, Path(folder), 0)
    for tracker, key in (("wandb", "id"), ("trackio", "name")):
        first, second, again = (options[tracker][key] for options in started)
        assert first == again != second and first.startswith("run-")


def test_curves_reach_the_tracker(tracked):
    events, results = tracked
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 9))
    assert [event.value for event in losses] == pytest.approx([point["loss"] for point in results["train_curve"]])
    expected = {"train/learning_rate", "train/grad_norm", "train/images_per_second", "train/data_wait_share"}
    assert expected <= set(events.Tags()["scalars"])
    accuracy = events.Scalars("validation/accuracy")
    assert [(event.step, event.value) for event in accuracy] == [
        (point["step"], pytest.approx(point["accuracy"])) for point in results["validation_curve"]
    ]


def test_gaussians_of_every_layer_reach_the_tracker(tracked):
    events, _ = tracked
    for layer in (1, 2):
        for name in ("variance_rows", "variance_columns", "amplitude"):
            values = events.Scalars(f"gaussians/layer_{layer}/{name}")
            assert [event.step for event in values] == [4, 8] and all(event.value > 0 for event in values)


def test_examples_reach_the_tracker(tracked):
    events, _ = tracked
    pictures = events.Images("examples")
    assert [picture.step for picture in pictures] == [4, 8] and pictures[0].width > 200


def test_fresh_gaussians_have_the_width_they_start_with():
    """At zero logits the variance is 1, the amplitude ln 2; 0.1 is added to the variance before it is inverted."""
    model = LocAtViTForImageClassification(LocAtViTConfig(**SMALL_MODEL))
    for name, parameter in model.named_parameters():
        if ".gaussian." in name:
            torch.nn.init.zeros_(parameter)
    reader = GaussianReader(model)
    pixel_values = torch.rand(2, 3, 16, 16)
    model.train()(pixel_values=pixel_values)
    assert reader.take() == {}
    model.eval()(pixel_values=pixel_values)
    found = reader.take()
    assert found["layer_1/variance_rows"] == found["layer_2/variance_columns"] == pytest.approx(1.1, rel=1e-5)
    assert found["layer_2/amplitude"] == pytest.approx(math.log(2), rel=1e-5)


def test_batches_of_every_program_are_drawn():
    images, names = torch.zeros(4, 3, 16, 16), {0: "cat", 1: "dog"}
    statistics = [0.5] * 3, [0.25] * 3, names
    plain = draw_batch([images, torch.tensor([0, 1, 0, 1])], *statistics)
    mixed = draw_batch([images, torch.full((4, 2), 0.5)], *statistics)
    assert plain.size == mixed.size and plain.tobytes() != mixed.tobytes()
    maps = torch.zeros(4, 16, 16, dtype=torch.int64)
    maps[:, 4:8, 4:8] = 1
    masked = draw_batch([images, maps], *statistics)
    assert len(masked.getcolors(10_000)) > len(draw_batch([images], *statistics).getcolors(10_000))
    boxes = [{"boxes": torch.tensor([[2.0, 2.0, 9.0, 9.0]])}, {"boxes": torch.zeros(0, 4)}]
    assert draw_batch([[torch.zeros(3, 16, 20), torch.zeros(3, 30, 16)], boxes], *statistics).width > 16
    crops = draw_batch([[images, torch.zeros(8, 3, 8, 8)]], *statistics)  # of two sizes, without labels
    assert crops.width > 16
    with pytest.raises(ValueError, match="no image"):
        tile([])
    assert tile([Image.new("RGB", (10, 20)), Image.new("RGB", (30, 10))], columns=1).size == (34, 38)
