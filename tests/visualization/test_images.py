"""What is read as an image, and names that look like formulas."""

import io

import numpy as np
import pytest
from PIL import Image

from locatvit_hf.utils.colors import label_colors
from locatvit_hf.utils.images import SUFFIXES, CorruptImageError, read_image
from locatvit_hf.visualization import legend_figure


def test_nothing_is_handed_to_another_program(tmp_path):
    disguised = tmp_path / "image.png"
    disguised.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\n")
    with pytest.raises(CorruptImageError, match="not an image file of a known format"):
        read_image(disguised)
    assert {".png", ".jpg", ".webp", ".tif"} <= SUFFIXES and not {".eps", ".ps", ".wmf"} & SUFFIXES


def test_a_legend_shows_names_as_they_are():
    names = {0: r"a $\frac{ b$", 1: "5$"}
    figure = legend_figure(names, label_colors(2))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    assert np.asarray(Image.open(drawn)).std() > 0
