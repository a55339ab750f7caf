import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from locatvit_hf import LocAtViTConfig, LocAtViTForImageClassification
from locatvit_hf.utils.colors import label_colors, overlay_segmentation
from locatvit_hf.visualization import (
    attention_map,
    draw_attention,
    draw_gaussians,
    draw_legend,
    draw_segmentation,
    read_attentions,
    read_gaussians,
)

GRID = (3, 5)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LocAtViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_register_tokens=1
    )
    return LocAtViTForImageClassification(config)


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    figure.canvas.draw()
    plt.close(figure)


def test_attention_is_read_without_a_trace(model):
    model.train()
    attentions = read_attentions(model, torch.randn(1, 3, 24, 40))
    assert [attention.shape for attention in attentions] == [(1, 2, 17, 17)] * 2
    torch.testing.assert_close(attentions[0].sum(dim=-1), torch.ones(1, 2, 17))
    assert model.training and model.config._attn_implementation == "sdpa"


def test_attention_map_picks_the_patch(axes, image):
    attention = torch.zeros(1, 2, 17, 17)
    attention[0, 0, 0, 2 + 7] = 1.0
    heat = attention_map(attention, query=0, grid=GRID, num_prefix_tokens=2)
    assert heat.shape == GRID and heat[1, 2] == 0.5 and heat.sum() == 0.5
    assert attention_map(attention, 0, GRID, 2, head=1).sum() == 0
    with pytest.raises(ValueError, match="does not fit"):
        attention_map(attention, 0, (4, 4), 2)
    draw_attention(axes, image, heat, query=7)
    (frame,) = axes.patches
    assert frame.get_xy() == (2 * 8 - 0.5, 1 * 8 - 0.5)


def test_gaussians_are_drawn_where_they_are(axes, model, image):
    layers = read_gaussians(model, torch.randn(1, 3, 24, 40))
    assert [gaussian.grid for gaussian in layers] == [GRID, GRID]
    gaussian = layers[0]
    ellipses = draw_gaussians(axes, image, gaussian, head=1, patches=[0, 7])
    np.testing.assert_allclose(ellipses.get_offsets(), [[3.5, 3.5], [19.5, 11.5]])
    deviation = gaussian.inverse_variance[0, 1, 7].rsqrt() * 8
    assert ellipses.get_heights()[1] == pytest.approx(2 * deviation[0].item(), rel=1e-5)
    assert ellipses.get_widths()[1] == pytest.approx(2 * deviation[1].item(), rel=1e-5)
    np.testing.assert_allclose(ellipses.get_array(), gaussian.amplitude[0, 1, [0, 7]].detach())


def test_a_baseline_has_no_gaussians():
    config = LocAtViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, use_gaussian=False
    )
    with pytest.raises(ValueError, match="has no Gaussians"):
        read_gaussians(LocAtViTForImageClassification(config), torch.randn(1, 3, 16, 16))


def test_segmentation_overlay(axes, image):
    colors = label_colors(4, background=0)
    assert colors.shape == (4, 3) and colors.dtype == np.uint8 and len({tuple(color) for color in colors}) == 4
    classes = np.zeros((24, 40), np.uint8)
    classes[2, 3], classes[4, 5] = 2, 255
    overlay = np.asarray(overlay_segmentation(image, classes, colors, opacity=1.0, background=0))
    assert (overlay[2, 3] == colors[2]).all() and (overlay[4, 5] == 128).all()
    assert overlay[0, 0].max() == overlay[0, 0].min()  # background shows the grayed image
    with pytest.raises(ValueError, match="does not fit"):
        overlay_segmentation(image, classes[:5], colors)
    draw_segmentation(axes, image, classes, colors, background=0)
    draw_legend(axes, {0: "nothing", 1: "a", 2: "b", 3: "c"}, colors, labels=[1, 2])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
