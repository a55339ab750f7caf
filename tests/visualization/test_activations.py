"""What is read from the layers, against what the models themselves return."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from locatvit_hf.visualization import read_attentions, read_gaussians, read_layers


def test_every_layer_is_read_and_the_model_is_left_as_it_was(family, models, pixel_values):
    model = models[family]
    before = model.config._attn_implementation
    layers = read_layers(model, pixel_values[family])
    assert len(layers) == sum(getattr(model.config, "depths", [model.config.num_hidden_layers]))
    for layer in layers:
        patches = layer.grid[0] * layer.grid[1]
        assert layer.features.shape[0] == patches and layer.attention.shape[1] == patches
        assert (layer.gaussian is not None) == (family not in ("vit", "pacavit"))
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.modules() if module is not model)


@pytest.mark.parametrize("family", ["locatvit", "vit", "locatjumbo"])
def test_global_attention_and_features_are_those_of_the_model(family, models, pixel_values):
    model, pixels = models[family], pixel_values[family]
    prefix, classes = model.config.num_prefix_tokens, getattr(model.config, "num_jumbo_tokens", 1)
    attentions = read_attentions(model, pixels)
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
    for layer, attention, state in zip(read_layers(model, pixels), attentions, states, strict=True):
        np.testing.assert_allclose(layer.attention_map(7, head=1).ravel(), attention[0, 1, prefix + 7, prefix:])
        of_class = attention[0, :, :classes, prefix:].mean(dim=(0, 1))
        np.testing.assert_allclose(layer.attention_map().ravel(), of_class, rtol=1e-5)
        torch.testing.assert_close(layer.features, state[0, prefix:], rtol=1e-3, atol=1e-4)
        similarity = F.cosine_similarity(layer.features, layer.features[7:8])
        np.testing.assert_allclose(layer.similarity_map(7).ravel(), similarity, atol=1e-5)
        expected = F.cosine_similarity(layer.features[:, None], state[0, None, :classes], dim=-1).mean(dim=1)
        np.testing.assert_allclose(layer.similarity_map().ravel(), expected, atol=1e-3)


def test_attention_in_windows_lies_where_the_patches_are(models, pixel_values):
    """Each query and each key is looked up by arithmetic in the windows that the model returns."""
    model, pixels = models["locatswin"], pixel_values["locatswin"]
    attentions, gaussians = read_attentions(model, pixels), read_gaussians(model, pixels)
    modules = [layer for stage in model.stages for layer in stage.layers]
    assert any(any(module.shift) for module in modules)
    padded_somewhere = False
    for layer, module, attention, gaussian in zip(
        read_layers(model, pixels), modules, attentions, gaussians, strict=True
    ):
        (height, width), window, shift = layer.grid, module.window, module.shift
        padded_somewhere |= height % window[0] > 0
        windows_in_a_row = -(-width // window[1])

        def locate(patch, width=width, height=height, window=window, shift=shift, count=windows_in_a_row):
            row, column = (patch // width - shift[0]) % height, (patch % width - shift[1]) % width
            place = row % window[0] * window[1] + column % window[1]
            return row // window[0] * count + column // window[1], place

        for query in (0, width - 1, height * width // 2 + 3, height * width - 1):
            of_query, place = locate(query)
            expected = np.zeros(height * width)
            for key in range(height * width):
                of_key, key_place = locate(key)
                if of_key == of_query:
                    expected[key] = attention[of_query, 1, place, key_place]
            np.testing.assert_allclose(layer.attention_map(query, head=1).ravel(), expected, atol=1e-7)
            for name in ("amplitude", "inverse_variance"):
                laid_out, own = getattr(layer.gaussian, name), getattr(gaussian, name)
                torch.testing.assert_close(laid_out[0, 1, query], own[of_query, 1, place])
    assert padded_somewhere


def test_attention_to_clusters_is_handed_on_to_their_patches(models, pixel_values):
    model, pixels = models["pacavit"], pixel_values["pacavit"]
    with torch.no_grad():
        assignments = model(pixel_values=pixels, output_cluster_assignments=True).cluster_assignments
    attentions = read_attentions(model, pixels)
    layers = read_layers(model, pixels)
    clustered = [layer for layer in layers if layer.assignment is not None]
    assert len(clustered) == 4 and layers[-1].assignment is None
    own = [torch.equal(layer.assignment, assignments[0][0]) for layer in clustered]
    assert own[0] and not own[-1]
    layer, attention = layers[0], attentions[0]
    np.testing.assert_allclose(
        layer.attention_map(7, head=0).ravel(), attention[0, 0, 7] @ assignments[0][0], rtol=1e-5
    )
    for layer in layers:
        assert layer.attention_map(0).sum() == pytest.approx(1, abs=1e-4)


def test_components_are_the_principal_ones(models, pixel_values):
    layer = read_layers(models["locatvit"], pixel_values["locatvit"])[-1]
    colors = layer.principal_colors()
    centered = (layer.features - layer.features.mean(dim=0)).numpy()
    _, vectors = np.linalg.eigh(centered.T @ centered)
    assert colors.shape == (*layer.grid, 3) and colors.dtype == np.uint8
    for channel in range(3):
        component = centered @ vectors[:, -1 - channel]
        correlation = np.corrcoef(component, colors[..., channel].ravel())[0, 1]
        assert abs(correlation) > 0.98  # but for what the percentiles cut off
        assert colors[..., channel].min() == 0 and colors[..., channel].max() == 255


def test_refusals(models, pixel_values):
    with pytest.raises(ValueError, match="one image at a time"):
        read_layers(models["vit"], torch.zeros(2, 3, 48, 88))
    with pytest.raises(ValueError, match="not a model of this package"):
        read_layers(torch.nn.Linear(2, 2), torch.zeros(1, 3, 8, 8))
    layer = read_layers(models["locatswin"], pixel_values["locatswin"])[0]
    with pytest.raises(ValueError, match="class token"):
        layer.attention_map()
    with pytest.raises(ValueError, match="class token"):
        layer.similarity_map()
