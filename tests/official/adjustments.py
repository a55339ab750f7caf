"""All that differs from the test-suite of transformers, each difference with its reason and an equally strict test.

transformers knows the classes of its own models by name. `register_names` adds ours to those lists, as a model inside
the library would, so that the library's own tests choose the right labels for a head and pass over what they pass over
for every vision model. `test_training` and the three `test_training_gradient_checkpointing*` look at heads only: a
bare model and a backbone have no loss. Those four are therefore not overridden; `BareTrainingTests` trains what they
leave out.

One test is overridden: `test_model_get_set_embeddings` asks for an `nn.Embedding`, which a vision model does not have.
"""

import copy
import itertools

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

NAME_LISTS = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForSemanticSegmentation": modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    "AutoBackbone": modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
}


def register_names(model_type: str, **class_names: str) -> None:
    """Tell the tests of transformers which task each of our classes is for.

    Args:
        model_type: `config.model_type` of the family.
        class_names: The class of each Auto class, by name: `AutoModel="LocAtViTModel"`.
    """
    for auto_class, class_name in class_names.items():
        NAME_LISTS[auto_class][model_type] = class_name


class EmbeddingTests:
    """Instead of "is an nn.Embedding": is the module that embeds, can be replaced, and the model uses the new one."""

    def test_model_get_set_embeddings(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(copy.deepcopy(config)).eval()
            embeddings = model.get_input_embeddings()
            self.assertIsInstance(embeddings, nn.Module)
            self.assertEqual(embeddings.weight.shape[:2], (self.model_tester.embedding_dim, config.num_channels))
            with torch.no_grad():
                for parameter in model.parameters():
                    if not parameter.any():  # a fresh Jumbo classifier answers the same to everything
                        parameter.normal_()
                before = _first_tensor(model(**inputs))
                replacement = copy.deepcopy(embeddings)
                replacement.weight.mul_(-1)
                model.set_input_embeddings(replacement)
                self.assertIs(model.get_input_embeddings(), replacement)
                after = _first_tensor(model(**inputs))
            self.assertFalse(torch.allclose(before, after), f"{model_class.__name__} ignores its new embeddings")
            self.assertIsNone(model.get_output_embeddings())


class BareTrainingTests:
    """What `test_training*` passes over: the classes without a loss, trained on the mean square of what they return.

    As the library does for heads: every parameter that takes part receives a gradient, and gradient checkpointing,
    reentrant or not, changes none of them.
    """

    def test_training_without_head(self) -> None:
        for model_class in self._bare_classes():
            self._gradients(model_class)

    def test_training_gradient_checkpointing_without_head(self) -> None:
        for model_class, reentrant in itertools.product(self._bare_classes(), (False, True)):
            with self.subTest(f"{model_class.__name__}, use_reentrant={reentrant}"):
                expected = self._gradients(model_class)
                observed = self._gradients(model_class, use_reentrant=reentrant)
                for name, gradient in expected.items():
                    torch.testing.assert_close(observed[name], gradient, atol=1e-5, rtol=1e-4, msg=name)

    def _bare_classes(self) -> list[type[nn.Module]]:
        bare = {*NAME_LISTS["AutoModel"].values(), *NAME_LISTS["AutoBackbone"].values()}
        return [model_class for model_class in self.all_model_classes if model_class.__name__ in bare]

    def _gradients(self, model_class: type[nn.Module], **checkpointing: bool) -> dict[str, torch.Tensor]:
        """The gradient of every trainable parameter after one backward pass."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        torch.manual_seed(0)
        model = model_class(config).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
        generator = torch.Generator().manual_seed(0)
        pixel_values = torch.rand(inputs["pixel_values"].shape, generator=generator)
        outputs = model(pixel_values=pixel_values).to_tuple()
        outputs = [output if isinstance(output, tuple) else (output,) for output in outputs]
        sum(tensor.square().mean() for tensor in itertools.chain(*outputs)).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        missing = [name for name, gradient in gradients.items() if gradient is None]
        self.assertEqual(missing, [], f"{model_class.__name__} leaves trainable parameters without a gradient")
        return gradients


class ShapeTests:
    """The library's tests of the shapes of attentions and hidden states, for tokens that do not meet on one grid.

    A family says `expected_attentions` and `expected_hidden_states`: the shapes, in the order of layers and stages.
    """

    def test_attention_outputs(self) -> None:
        """A map for each layer, whose rows add up to one, asked for in any way, also beside hidden states."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        for model_class in self.all_model_classes:
            asked, by_config = self._recorded("attentions", model_class, config, inputs)
            with torch.no_grad():
                model = model_class(copy.deepcopy(config)).eval()
                both = model(**inputs, output_attentions=True, output_hidden_states=True)
            self.assertEqual(len(both.hidden_states), config.num_hidden_layers + 1)
            for attentions in (asked, by_config, both.attentions):
                shapes = [tuple(attention.shape) for attention in attentions]
                self.assertEqual(shapes, self.expected_attentions(config))
                for attention in attentions:
                    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))

    def test_hidden_states_output(self) -> None:
        """The embeddings and the output of each stage, asked for in any way."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            for hidden_states in self._recorded("hidden_states", model_class, config, inputs):
                shapes = [tuple(states.shape) for states in hidden_states]
                self.assertEqual(shapes, self.expected_hidden_states(config))

    def _recorded(self, name: str, model_class: type[nn.Module], config: PreTrainedConfig, inputs: dict) -> tuple:
        """What a model records under `name`: asked by an argument, and by its config. Unasked it is nothing."""
        asked = model_class(copy.deepcopy(config)).eval()
        configured = copy.deepcopy(config)
        setattr(configured, f"output_{name}", True)
        by_config = model_class(configured).eval()
        with torch.no_grad():
            self.assertIsNone(getattr(asked(**inputs), name))
            outputs = asked(**inputs, **{f"output_{name}": True}), by_config(**inputs)
        return tuple(getattr(output, name) for output in outputs)


def _first_tensor(outputs: object) -> torch.Tensor:
    """The first tensor of a model output: the tokens, the logits or the last feature map."""
    first = outputs.to_tuple()[0]
    return first[-1] if isinstance(first, tuple) else first
