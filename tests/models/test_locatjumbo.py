"""The `locatjumbo` models: jumbo tokens and the start of their classifier."""

import pytest
import torch

from locatvit_hf import LocAtJumboConfig, LocAtJumboForImageClassification, LocAtJumboModel
from tests.factories import PLAIN, tiny_config
from tests.models.base import ModelTester


class TestLocAtJumbo(ModelTester):
    family = "locatjumbo"
    variants = {"locatjumbo": {}, "jumbo": PLAIN, "coarse": {"coarse_training": True}}
    presets = (
        ("tiny", {}, 17_351_500),
        ("tiny", PLAIN, 17_348_776),
        ("base", {}, 260_498_956),
        ("base", PLAIN, 260_495_080),
    )
    refused = (
        ({"num_jumbo_tokens": 0}, "num_jumbo_tokens must be at least 1"),
        ({"hidden_size": 33}, "hidden_size=33 must be divisible by num_attention_heads=2"),
        ({"image_size": 4}, "smaller than one patch"),
        ({"feature_pyramid": True, "out_indices": [1, 2]}, "feature_pyramid=True needs four"),
    )

    def check_outputs(self, body, outputs):
        """The jumbo tokens are normalized as one."""
        torch.testing.assert_close(body.pool(outputs.last_hidden_state), outputs.pooler_output)


@pytest.mark.parametrize("num_labels", [1, 2, 7, 100, 1000, 10450])
def test_the_classifier_starts_from_the_prior_of_its_class_count(num_labels):
    model = LocAtJumboForImageClassification(tiny_config("locatjumbo", num_labels=num_labels))
    assert model.classifier.weight.eq(0).all()
    logit = model(torch.randn(1, 3, 32, 32)).logits[0, 0].item()
    rounded = {1: 0.0, 2: 0.0, 100: -4.6, 1000: -6.9, 10450: -9.25}  # the reference writes the last three out
    assert logit == pytest.approx(rounded.get(num_labels, -1.7917595), abs=0.01)


def test_initial_weights_follow_the_reference():
    jumbo = LocAtJumboModel(LocAtJumboConfig(image_size=64, hidden_size=192, num_hidden_layers=2))
    assert 5e-7 < jumbo.embeddings.jumbo_tokens.std().item() < 2e-6
    assert jumbo.embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.1)
    assert jumbo.layers[0].layer_scale3.scale.eq(1e-4).all()
