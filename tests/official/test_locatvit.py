"""The tests of transformers for models and backbones, on the `locatvit` family."""

import unittest

from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

from locatvit_hf import (
    LocAtViTBackbone,
    LocAtViTConfig,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
    LocAtViTModel,
)
from tests.official.adjustments import BareTrainingTests, EmbeddingTests, register_names
from tests.official.vision_model_tester import VisionModelTester

register_names(
    "locatvit",
    AutoModel="LocAtViTModel",
    AutoModelForImageClassification="LocAtViTForImageClassification",
    AutoModelForSemanticSegmentation="LocAtViTForSemanticSegmentation",
    AutoBackbone="LocAtViTBackbone",
)


class LocAtViTModelTester(VisionModelTester):
    config_class = LocAtViTConfig
    config_fields = {"segmentation_hidden_size": 16}


class RopeRegistersModelTester(LocAtViTModelTester):
    """RoPE-ViT with registers and layer scale, the options that own parameters of their own."""

    num_prefix_tokens = 3
    config_fields = LocAtViTModelTester.config_fields | {
        "position_embedding_type": "rope_mixed",
        "num_register_tokens": 2,
        "layer_scale_init_value": 1e-1,
    }


class MeanPoolingModelTester(LocAtViTModelTester):
    """No class token, mean pooling: the final norm sits after the pooling."""

    num_prefix_tokens = 0
    config_fields = LocAtViTModelTester.config_fields | {"use_class_token": False, "pooling": "mean"}


class BaselineModelTester(LocAtViTModelTester):
    """The plain ViT that the same code is with both ideas switched off."""

    config_fields = LocAtViTModelTester.config_fields | {"use_gaussian": False, "use_refinement": False}


class LocAtViTModelTest(EmbeddingTests, BareTrainingTests, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        LocAtViTModel,
        LocAtViTForImageClassification,
        LocAtViTForSemanticSegmentation,
        LocAtViTBackbone,
    )
    model_tester_class = LocAtViTModelTester
    test_resize_embeddings = False  # those of text
    # Without it the library would take a file that bears no year for an old one and excuse it from the test.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(self, config_class=LocAtViTConfig, has_text_modality=False, hidden_size=36)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class RopeRegistersModelTest(LocAtViTModelTest):
    model_tester_class = RopeRegistersModelTester


class MeanPoolingModelTest(LocAtViTModelTest):
    model_tester_class = MeanPoolingModelTester


class BaselineModelTest(LocAtViTModelTest):
    model_tester_class = BaselineModelTester


class LocAtViTBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (LocAtViTBackbone,)
    config_class = LocAtViTConfig

    def setUp(self) -> None:
        self.model_tester = LocAtViTModelTester(self)
