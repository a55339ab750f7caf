"""Small detectors."""

import torch
from transformers import AutoBackbone, AutoConfig

from locatvit_hf.detection import Detector, DetectorSettings, pyramid_config
from tests.tolerances import assert_same_but_for_rounding

CATEGORIES = [{"id": 3, "name": "box"}, {"id": 8, "name": "disc"}]
ENCODERS = {
    "pacavit": {
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "num_clusters": [4, 4, 4, 0],
    },
    "locatswin": {
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "image_size": 64,
        "window_size": 2,
    },
    "locatvit": {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    },
}


def small_detector(family: str = "pacavit", **settings) -> Detector:
    """A detector of boxes and discs with random weights; settings: fields of `DetectorSettings`."""
    torch.manual_seed(0)
    config = pyramid_config(AutoConfig.for_model(family, **ENCODERS[family]))
    small = {"pyramid_channels": 8, "anchor_scale": 4, "test_shortest_side": 64, "longest_side": 96}
    return Detector(AutoBackbone.from_config(config), CATEGORIES, DetectorSettings(**{**small, **settings}))


def assert_same_objects(found: dict, expected: dict) -> None:
    """The same objects; a pixel at the edge of a mask may fall on either side of it."""
    assert found["labels"].equal(expected["labels"])
    for name in ("boxes", "scores"):
        assert_same_but_for_rounding(found[name], expected[name])
    assert (found["masks"] == expected["masks"]).float().mean() > 0.999
