"""The `locatswin` models: windows and their shifts."""

import pytest
import torch

from locatvit_hf import LocAtSwinConfig, LocAtSwinModel
from tests.factories import PLAIN
from tests.models.base import HEADS, ModelTester, assert_takes_no_mask
from tests.tolerances import assert_same_but_for_rounding


class TestLocAtSwin(ModelTester):
    family = "locatswin"
    variants = {
        "locatswin": {},
        "swin": PLAIN,
        "rectangular": {"image_size": [48, 64], "window_size": [2, 3]},
    }
    num_merges = (0, 1, 2)
    presets = (
        ("tiny", {}, 28_289_542),
        ("tiny", PLAIN, 28_288_354),
        ("base", {}, 87_770_600),
        ("base", PLAIN, 87_768_224),
    )
    shallow_fields = {"depths": [2, 1], "num_heads": [1, 2]}  # windows, shifted windows, merging
    framework_fields = {"depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
    refused = (
        ({"out_features": []}, "out_features is empty"),
        ({"num_heads": [1, 2]}, r"num_heads=\[1, 2\] must hold one entry for each stage"),
        ({"num_heads": [3, 2, 4]}, "16 channels cannot be divided among num_heads=3"),
        ({"depths": [2, 0, 2]}, "depths must be at least 1"),
        ({"window_size": 0}, "window_size must be at least 1 patch on each side"),
        ({"image_size": 12}, "image_size=12 is smaller than one patch of the last map, 16 x 16 pixels"),
        ({"mlp_ratio": 0.0}, "leaves the MLP without channels"),
        ({"embed_dim": -4}, "embed_dim must be at least 1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1"),
    )

    @pytest.mark.export
    @HEADS
    def test_one_exported_graph_serves_every_size(self, variant, task):
        """How often a window fits is part of the graph: torch guards the size, so each size has a graph of its own."""
        model, pixel_values = self.build(variant, task, **self.shallow_fields), torch.randn(2, 3, 40, 56)
        program = torch.export.export(model, (pixel_values,), strict=False)
        assert_same_but_for_rounding(program.module()(pixel_values).logits, model(pixel_values).logits)


def test_attention_inside_windows_takes_no_mask():
    assert_takes_no_mask("locatswin")


def test_windows_and_shifts_are_decided_once_at_the_native_size():
    config = LocAtSwinConfig.from_preset("tiny")
    assert config.windows == [((7, 7), (3, 3))] * 3 + [((7, 7), (0, 0))]
    config = LocAtSwinConfig.from_preset("tiny", image_size=[224, 384])
    assert config.windows[-1] == ((7, 7), (0, 3))
    config = LocAtSwinConfig.from_preset("tiny", image_size=128)
    assert config.windows[-2:] == [((7, 7), (3, 3)), ((4, 4), (0, 0))]


def test_initial_weights_follow_the_reference():
    swin = LocAtSwinModel(LocAtSwinConfig(depths=[1, 1], num_heads=[3, 6]))
    table = swin.stages[0].layers[0].attention.relative_position_bias_table
    assert table.std().item() == pytest.approx(0.02, rel=0.15)
    assert swin.stages[1].downsample.reduction.weight.std().item() == pytest.approx(0.02, rel=0.05)
