"""The tests of transformers for models and backbones, on the `locatswin` family.

Replaced are the two tests of shapes that assume one grid and full attention: `test_attention_outputs` and
`test_hidden_states_output`. Ours (`ShapeTests`) ask for the same, with the shapes of windows and stages.
"""

import unittest

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
from tests.official.adjustments import BareTrainingTests, EmbeddingTests, ShapeTests, register_names
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


class LocAtSwinModelTest(EmbeddingTests, BareTrainingTests, ShapeTests, ModelTesterMixin, unittest.TestCase):
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

    def expected_attentions(self, config: LocAtSwinConfig) -> list[tuple[int, ...]]:
        """(batch * windows, heads, area, area) of each layer; maps of 16 and 8 patches in windows of 3."""
        shapes = []
        for grid, depth, heads in zip((16, 8), config.depths, config.num_heads, strict=True):
            shapes += [(self.model_tester.batch_size * (-(-grid // 3)) ** 2, heads, 9, 9)] * depth
        return shapes

    def expected_hidden_states(self, config: LocAtSwinConfig) -> list[tuple[int, ...]]:
        """(batch, patches, channels) of the embeddings and of each stage."""
        batch = self.model_tester.batch_size
        return [(batch, 256, 16), (batch, 256, 16), (batch, 64, 32)]


class BaselineModelTest(LocAtSwinModelTest):
    model_tester_class = BaselineModelTester


class LocAtSwinBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (LocAtSwinBackbone,)
    config_class = LocAtSwinConfig

    def setUp(self) -> None:
        self.model_tester = LocAtSwinModelTester(self)
