"""The tests of transformers for models and backbones, on the `pacavit` family.

Replaced are the two tests of shapes that assume one grid and full attention: `test_attention_outputs` and
`test_hidden_states_output`. Ours ask for the same, with the shapes of clusters and stages.
"""

import copy
import unittest

import torch
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

from locatvit_hf import (
    PaCaViTBackbone,
    PaCaViTConfig,
    PaCaViTForImageClassification,
    PaCaViTForSemanticSegmentation,
    PaCaViTModel,
)
from tests.official.adjustments import BareTrainingTests, EmbeddingTests, register_names
from tests.official.vision_model_tester import VisionModelTester

register_names(
    "pacavit",
    AutoModel="PaCaViTModel",
    AutoModelForImageClassification="PaCaViTForImageClassification",
    AutoModelForSemanticSegmentation="PaCaViTForSemanticSegmentation",
    AutoBackbone="PaCaViTBackbone",
)


class PaCaViTModelTester(VisionModelTester):
    config_class = PaCaViTConfig
    hidden_sizes = (16, 32)
    hidden_size = 32
    embedding_dim = 8  # the first of the two convolutions that embed patches has half the channels
    num_hidden_layers = 2
    num_prefix_tokens = 0
    clusters = (5, 0)
    # Clusters or patches that the patches of each layer attend to, and the patches.
    attended = ((64, 5), (64, 5), (16, 16))
    config_fields: dict[str, object] = {}

    def __init__(self, parent: object) -> None:
        super().__init__(parent)
        self.seq_length = (self.image_size // 8) ** 2

    def get_config(self) -> PaCaViTConfig:
        fields = {
            "image_size": self.image_size,
            "num_channels": self.num_channels,
            "num_labels": self.num_labels,
            "hidden_sizes": self.hidden_sizes,
            "depths": (2, 1),
            "num_attention_heads": (2, 2),
            "num_clusters": self.clusters,
            "teacher_depths": (1, 1),
            "segmentation_hidden_size": 16,
            "segmentation_dropout_prob": 0.0,
        }
        return PaCaViTConfig(**fields | self.config_fields)


class TeacherModelTester(PaCaViTModelTester):
    """Clusters of the ConvMixer, in every stage."""

    clusters = (5, 3)
    attended = ((64, 5), (64, 5), (16, 3))
    config_fields = {"clustering_type": "teacher"}


class BlockwiseMlpModelTester(PaCaViTModelTester):
    """MLP clustering in every layer, layer scale, and a linear probe for a segmentation head."""

    config_fields = {
        "clustering_type": "mlp",
        "blockwise_clustering": True,
        "layer_scale_init_value": 0.1,
        "segmentation_head_type": "linear",
    }


class PaCaViTModelTest(EmbeddingTests, BareTrainingTests, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        PaCaViTModel,
        PaCaViTForImageClassification,
        PaCaViTForSemanticSegmentation,
        PaCaViTBackbone,
    )
    model_tester_class = PaCaViTModelTester
    # Token embeddings of text models: there are none to resize.
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self, config_class=PaCaViTConfig, has_text_modality=False, hidden_sizes=[8, 16, 24, 32]
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_attention_outputs(self) -> None:
        """One map for each layer, (batch, heads, patches, clusters), rows adding up to one, asked for in any way."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        expected = [(self.model_tester.batch_size, 2, *shape) for shape in self.model_tester.attended]
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
        """The maps of the stem and of each stage, (batch, channels, height, width), asked for in any way."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        batch = self.model_tester.batch_size
        expected = [(batch, 16, 8, 8), (batch, 16, 8, 8), (batch, 32, 4, 4)]
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


class TeacherModelTest(PaCaViTModelTest):
    model_tester_class = TeacherModelTester


class BlockwiseMlpModelTest(PaCaViTModelTest):
    model_tester_class = BlockwiseMlpModelTester


class PaCaViTBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (PaCaViTBackbone,)
    config_class = PaCaViTConfig

    def setUp(self) -> None:
        self.model_tester = PaCaViTModelTester(self)
