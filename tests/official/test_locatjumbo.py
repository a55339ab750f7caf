"""The tests of transformers for models and backbones, on the `locatjumbo` family."""

import unittest

from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

from locatvit_hf import (
    LocAtJumboBackbone,
    LocAtJumboConfig,
    LocAtJumboForImageClassification,
    LocAtJumboForSemanticSegmentation,
    LocAtJumboModel,
)
from tests.official.adjustments import BareTrainingTests, EmbeddingTests, register_names
from tests.official.vision_model_tester import VisionModelTester

register_names(
    "locatjumbo",
    AutoModel="LocAtJumboModel",
    AutoModelForImageClassification="LocAtJumboForImageClassification",
    AutoModelForSemanticSegmentation="LocAtJumboForSemanticSegmentation",
    AutoBackbone="LocAtJumboBackbone",
)


class LocAtJumboModelTester(VisionModelTester):
    config_class = LocAtJumboConfig
    num_prefix_tokens = 3
    config_fields = {"segmentation_hidden_size": 16, "num_jumbo_tokens": 3, "layer_scale_init_value": 0.1}


class BaselineModelTester(LocAtJumboModelTester):
    """The plain Jumbo that the same code is with both ideas switched off."""

    config_fields = LocAtJumboModelTester.config_fields | {"use_gaussian": False, "use_refinement": False}


class LocAtJumboModelTest(EmbeddingTests, BareTrainingTests, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        LocAtJumboModel,
        LocAtJumboForImageClassification,
        LocAtJumboForSemanticSegmentation,
        LocAtJumboBackbone,
    )
    model_tester_class = LocAtJumboModelTester
    # Token embeddings of text models: there are none to resize.
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(self, config_class=LocAtJumboConfig, has_text_modality=False, hidden_size=36)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class BaselineModelTest(LocAtJumboModelTest):
    model_tester_class = BaselineModelTester


class LocAtJumboBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (LocAtJumboBackbone,)
    config_class = LocAtJumboConfig

    def setUp(self) -> None:
        self.model_tester = LocAtJumboModelTester(self)
