"""The tests of transformers for models and backbones, on the `locatswin` family.

Replaced are the two tests of shapes that assume one grid and full attention: `test_attention_outputs` and
`test_hidden_states_output`. Ours ask for the same, with the shapes of windows and stages.
"""

import copy
import unittest

import torch
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

from locatvit_hf import (
    LocAtSwinBackbone,
    LocAtSwinConfig,
    LocAtSwinForImageClassification,
    LocAtSwinForSemanticSegmentation,
    LocAtSwinModel,
)
from tests.official.adjustments import BareTrainingTests, EmbeddingTests, register_names
from tests.official.vision_model_tester import VisionModelTester

register_names(
    "locatswin",
    AutoModel="LocAtSwinModel",
    AutoModelForImageClassification="LocAtSwinForImageClassification",
    AutoModelForSemanticSegmentation="LocAtSwinForSemanticSegmentation",
    AutoBackbone="LocAtSwinBackbone",
)


class LocAtSwinModelTester(VisionModelTester):
    config_class = LocAtSwinConfig
    patch_size = 2
    embed_dim = 16
    depths = (2, 2)
    num_heads = (2, 4)
    window_size = 3
    num_hidden_layers = 2
    hidden_size = 32
    num_prefix_tokens = 0
    config_fields = {"segmentation_hidden_size": 16, "drop_path_rate": 0.0}

    def __init__(self, parent: object) -> None:
        super().__init__(parent)
        self.seq_length = (self.image_size // self.patch_size // 2) ** 2

    @property
    def embedding_dim(self) -> int:
        return self.embed_dim

    def get_config(self) -> LocAtSwinConfig:
        fields = {
            name: getattr(self, name)
            for name in (
                *("image_size", "patch_size", "num_channels", "num_labels"),
                *("embed_dim", "depths", "num_heads", "window_size"),
            )
        }
        return LocAtSwinConfig(**fields | self.config_fields)


class BaselineModelTester(LocAtSwinModelTester):
    """The plain Swin that the same code is with both ideas switched off."""

    config_fields = LocAtSwinModelTester.config_fields | {"use_gaussian": False, "use_refinement": False}


class LocAtSwinModelTest(EmbeddingTests, BareTrainingTests, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        LocAtSwinModel,
        LocAtSwinForImageClassification,
        LocAtSwinForSemanticSegmentation,
        LocAtSwinBackbone,
    )
    model_tester_class = LocAtSwinModelTester
    # Token embeddings of text models: there are none to resize.
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self,
            config_class=LocAtSwinConfig,
            has_text_modality=False,
            embed_dim=36,
            common_properties=["image_size", "patch_size", "num_channels"],
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_attention_outputs(self) -> None:
        """One map for each layer, (batch * windows, heads, area, area), rows adding up to one, asked for in any way."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        grids = [16, 8]
        expected = []
        for stage, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
            windows = (-(-grids[stage] // 3)) ** 2
            expected += [(self.model_tester.batch_size * windows, heads, 9, 9)] * depth
        for model_class in self.all_model_classes:
            asked = model_class(copy.deepcopy(config)).eval()
            configured = copy.deepcopy(config)
            configured.output_attentions = True
            by_config = model_class(configured).eval()
            with torch.no_grad():
                self.assertIsNone(asked(**inputs).attentions)
                both = asked(**inputs, output_attentions=True, output_hidden_states=True)
                all_attentions = asked(**inputs, output_attentions=True).attentions, by_config(**inputs).attentions
            self.assertEqual(len(both.hidden_states), config.num_hidden_layers + 1)
            for attentions in (*all_attentions, both.attentions):
                self.assertEqual([tuple(attention.shape) for attention in attentions], expected)
                for attention in attentions:
                    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))

    def test_hidden_states_output(self) -> None:
        """The embeddings and the output of each stage, (batch, patches, channels), asked for in any way."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        batch = self.model_tester.batch_size
        expected = [(batch, 256, 16), (batch, 256, 16), (batch, 64, 32)]
        for model_class in self.all_model_classes:
            asked = model_class(copy.deepcopy(config)).eval()
            configured = copy.deepcopy(config)
            configured.output_hidden_states = True
            by_config = model_class(configured).eval()
            with torch.no_grad():
                self.assertIsNone(asked(**inputs).hidden_states)
                outputs = asked(**inputs, output_hidden_states=True), by_config(**inputs)
            for output in outputs:
                self.assertEqual([tuple(states.shape) for states in output.hidden_states], expected)


class BaselineModelTest(LocAtSwinModelTest):
    model_tester_class = BaselineModelTester


class LocAtSwinBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (LocAtSwinBackbone,)
    config_class = LocAtSwinConfig

    def setUp(self) -> None:
        self.model_tester = LocAtSwinModelTester(self)
