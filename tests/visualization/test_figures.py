"""The figures: what stands where, and that no text meets another or leaves the figure."""

from itertools import combinations
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from locatvit_hf.utils.colors import label_colors
from locatvit_hf.visualization import figures, legend_figure, read_layers


def texts_of(figure) -> list:
    """All texts that are drawn, each with its box in pixels."""
    found = []
    draw = Text.draw

    def record(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            found.append((text.get_text(), text.get_window_extent(renderer)))

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # settles the layout
    with patch.object(Text, "draw", record):
        canvas.draw()
    return found


def check_texts(figure, inside: bool = True) -> list[str]:
    boxes = texts_of(figure)
    for (first, box), (second, other) in combinations(boxes, 2):
        assert not box.padded(-0.5).overlaps(other.padded(-0.5)), (first, second)
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert not inside or (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height), text
    return [text for text, _ in boxes]


@pytest.fixture
def pair(family, models, pixel_values):
    """The layers of a model, and of the plain one under a long name."""
    long = "a-checkpoint-with-quite-a-long-name-on-the-hub"
    return {name: read_layers(models[key], pixel_values[key]) for name, key in ((family, family), (long, "vit"))}


def test_texts_keep_apart(pair, family, image):
    layers = pair[family]
    index = figures.default_layer(layers)
    queries = [None, *figures.default_queries(layers[index])]
    for figure in (
        figures.attention_figure(image, pair, index, queries),
        figures.similarity_figure(image, pair, index, queries),
    ):
        texts = check_texts(figure)
        assert texts.count("class token") == 2 and sum("row" in text for text in texts) == 6
        assert texts.count("none") == (1 if family in ("locatswin", "pacavit") else 0)
    assert f"layer {len(layers)}" in check_texts(figures.components_figure(image, pair))
    if layers[0].gaussian is not None:
        assert "layer 1, head 1" in check_texts(figures.gaussians_figure(image, layers))
    else:
        with pytest.raises(ValueError, match="no Gaussians"):
            figures.gaussians_figure(image, layers)
    if layers[index].assignment is not None:
        assert sum("cluster" in text for text in check_texts(figures.clusters_figure(image, layers[index]))) == 5


@pytest.mark.parametrize("shape", [(200, 40), (40, 200)])
def test_texts_keep_apart_beside_extreme_images(shape, models, pixel_values, image):
    pair = {"locatvit": read_layers(models["locatvit"], pixel_values["locatvit"])}
    check_texts(figures.attention_figure(image.resize(shape), pair, 0, [None, (0, 0), (2, 3)]))
    check_texts(figures.gaussians_figure(image.resize(shape), pair["locatvit"]))


def test_class_similarity_is_drawn_as_it_is(models, pixel_values):
    found = {name: read_layers(models[name], pixel_values[name]) for name in ("locatvit", "vit")}
    figure = figures.class_similarity_figure(found)
    assert {"locatvit", "vit", "layer"} <= set(check_texts(figure))
    for line, layers in zip(figure.axes[0].lines, found.values(), strict=True):
        medians = [np.median(layer.similarity_map()) for layer in layers]
        np.testing.assert_allclose(line.get_ydata(), medians, rtol=1e-5)


def test_queries_are_asked_at_the_same_place_of_other_grids():
    assert figures.patch_at((1, 2), (4, 4), (4, 4)) == 6
    assert figures.patch_at((3, 3), (4, 4), (8, 16)) == 7 * 16 + 14
    assert figures.patch_at((7, 0), (8, 8), (2, 2)) == 2
    assert figures.patch_at(None, (4, 4), (2, 2)) is None


def test_default_queries_differ(family, models, pixel_values):
    layer = read_layers(models[family], pixel_values[family])[0]
    queries = figures.default_queries(layer)
    assert len(set(queries)) == 3 and all(row < layer.grid[0] and column < layer.grid[1] for row, column in queries)


@pytest.mark.parametrize("number", [1, 11, 150])
def test_the_legend_names_every_label(number):
    names = {label: f"label number {label}" for label in range(number)}
    figure = legend_figure(names, label_colors(number))
    texts = check_texts(figure, inside=False)  # it is saved with a tight box
    assert texts == [f"{label}  {name}" for label, name in names.items()]
    colors = [patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches()]
    np.testing.assert_allclose(colors, label_colors(number) / 255)
