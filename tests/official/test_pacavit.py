"""The tests of transformers for models and backbones, on the `pacavit` family.

Replaced are the two tests of shapes that assume one grid and full attention: `test_attention_outputs` and
`test_hidden_states_output`. Ours (`ShapeTests`) ask for the same, with the shapes of clusters and stages.
"""

import unittest

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
from tests.official.adjustments import BareTrainingTests, EmbeddingTests, ShapeTests, register_names
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


class PaCaViTModelTest(EmbeddingTests, BareTrainingTests, ShapeTests, ModelTesterMixin, unittest.TestCase):
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

    def expected_attentions(self, config: PaCaViTConfig) -> list[tuple[int, ...]]:
        """(batch, heads, patches, clusters) of each layer."""
        return [(self.model_tester.batch_size, 2, *shape) for shape in self.model_tester.attended]

    def expected_hidden_states(self, config: PaCaViTConfig) -> list[tuple[int, ...]]:
        """The maps of the stem and of each stage, (batch, channels, height, width)."""
        batch = self.model_tester.batch_size
        return [(batch, 16, 8, 8), (batch, 16, 8, 8), (batch, 32, 4, 4)]


class TeacherModelTest(PaCaViTModelTest):
    model_tester_class = TeacherModelTester


class BlockwiseMlpModelTest(PaCaViTModelTest):
    model_tester_class = BlockwiseMlpModelTester


class PaCaViTBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (PaCaViTBackbone,)
    config_class = PaCaViTConfig

    def setUp(self) -> None:
        self.model_tester = PaCaViTModelTester(self)
