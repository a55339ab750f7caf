"""A class has one color, wherever it is drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from locatvit_hf.inference.outputs import OutputFolder
from locatvit_hf.serving.predictor import Predictor
from locatvit_hf.utils.colors import class_colors, label_colors
from training.engine.plotting import draw_batch

LABELS = np.array([[0, 0, 1, 1], [2, 2, 2, 3]], np.uint8).repeat(32, 0).repeat(32, 1)
CORNERS = {0: (0, 0), 1: (0, 127), 2: (63, 0), 3: (63, 127)}


class Answer:
    """Stands for a segmenter."""

    def __init__(self, id2label: dict[int, str]):
        self.id2label = id2label

    def __call__(self, pictures: list[Image.Image]) -> list[np.ndarray]:
        return [LABELS] * len(pictures)


@pytest.mark.parametrize("first", ["background", "Background", "road"])
def test_the_command_line_the_page_and_trackers_agree(first, tmp_path):
    id2label = {0: first, 1: "car", 2: "tree", 3: "sky"}
    colors = class_colors(id2label)
    is_background = first != "road"
    assert (colors[0].max() == 0) == is_background and len({tuple(color) for color in colors}) == 4
    black = Image.new("RGB", (128, 64))

    output = OutputFolder(tmp_path / "masks", id2label, {})
    written = json.loads((tmp_path / "masks" / "labels.json").read_text())["labels"]
    assert [bytes.fromhex(label["color"][1:]) for label in written] == [bytes(color) for color in colors]
    overlay = np.asarray(output.overlay(black, LABELS))

    predictor = Predictor.__new__(Predictor)
    predictor.segmenter = Answer(id2label)
    shown, legend = predictor.segment(black)
    assert np.array_equal(np.asarray(shown), overlay)
    assert all(f"rgb{tuple(map(int, color))}" in legend for color in colors)

    batch = torch.zeros(1, 3, 64, 128), torch.from_numpy(LABELS)[None].long()
    drawn = np.asarray(draw_batch(batch, [0.0] * 3, [1.0] * 3, id2label))[2:66, 2:130]  # without the sheet's border
    for label, corner in CORNERS.items():
        for picture, opacity in ((overlay, 0.75), (drawn, 0.6)):
            np.testing.assert_allclose(picture[corner], opacity * colors[label], atol=1)


def test_colors_do_not_depend_on_the_number_of_classes():
    assert np.array_equal(label_colors(150)[:7], label_colors(7))
    with pytest.raises(ValueError, match="at least one label"):
        class_colors({})
