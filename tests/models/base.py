"""The tester of models: what every family does, checked for every variant of its configuration.

A new family is a row of `tests/factories.py` and a class here below a `ModelTester`, in a file of its own::

    class TestLocAtJumbo(ModelTester):
        family = "locatjumbo"
        variants = {"locatjumbo": {}, "jumbo": PLAIN}

What only one family has is tested in its file, stored values in `test_golden*.py`, and remote code in `tests/remote`.
"""

import copy
import inspect
import json
import pickle
import warnings

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from timm.optim import param_groups_layer_decay
from torch import nn

from locatvit_hf import LocAtViTImageProcessor
from locatvit_hf.visualization import read_layers
from tests.factories import model_class, tiny_config, tiny_model
from tests.tolerances import assert_same_but_for_rounding

SIZES = [(64, 64), (40, 72), (33, 70), (97, 130), (5, 3), (1, 1)]
TASKS = ("Model", "ForImageClassification", "ForSemanticSegmentation", "Backbone")
# Tests with these markers run for the first variant of a family in `make test`, and for the others in `make test-all`.
FIRST_VARIANT = {"compile", "export", "framework", "family"}
HEADS = pytest.mark.parametrize(
    "task", ["ForImageClassification", pytest.param("ForSemanticSegmentation", marks=pytest.mark.slow)]
)


class ModelTester:
    """Inherit, and name a family and variants of its configuration. What differs is overridden by its name.

    Attributes:
        family: A row of `tests/factories.py`.
        variants: Fields of a configuration by name. The first one stands for the family in what is expensive, and in
            what no field of a variant changes.
        implementations: Attention back-ends that must agree with sdpa, also in gradients.
        tasks_with_attention: For which to compare them; the heads of most families do not attend.
        num_merges: How often the stages 1 to 3 have halved the grid.
        shallow_fields: Fields of a model whose stages have as few layers as show all of them, for compilers.
        framework_fields: Fields that give a backbone four maps of strides 4 to 32.
        presets: Names of presets, fields that differ, and how many parameters a classifier of 1000 classes has then.
        refused: Fields that make no configuration, each with a part of the sentence that says why.
    """

    family: str
    variants: dict[str, dict] = {"plain": {}}
    implementations = ("eager", "flex_attention")
    tasks_with_attention = ("ForImageClassification",)
    num_merges = (0, 0, 0)
    presets: tuple[tuple[str, dict, int], ...]
    refused: tuple[tuple[dict, str], ...]
    shallow_fields = {"num_hidden_layers": 1}
    framework_fields = {"num_hidden_layers": 4, "patch_size": 16, "image_size": 64, "feature_pyramid": True}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "variant" in metafunc.fixturenames:
            once = FIRST_VARIANT & {mark.name for mark in metafunc.definition.iter_markers()}
            later = [pytest.mark.slow] if once else []
            params = [pytest.param(name, marks=later if index else []) for index, name in enumerate(self.variants)]
            metafunc.parametrize("variant", params)
        if "refused" in metafunc.fixturenames:
            metafunc.parametrize(("refused", "message"), self.refused)

    def build(self, variant, task="ForImageClassification", implementation=None, **fields):
        return tiny_model(self.family, task, implementation, **{**self.variants[variant], **fields})

    # ------------------------------------------------------------------------------------------- values and gradients
    def test_attention_implementations_agree_in_values_and_gradients(self, variant):
        pixel_values = torch.randn(2, 3, 40, 24, dtype=torch.float64)
        for task in self.tasks_with_attention:
            labels = torch.tensor([0, 3]) if task == "ForImageClassification" else torch.randint(0, 5, (2, 40, 24))
            reference = self.build(variant, task, "sdpa").double()
            with torch.no_grad():
                logits = reference(pixel_values).logits
            reference.train()(pixel_values, labels=labels).loss.backward()
            for implementation in self.implementations:
                model = self.build(variant, task, implementation).double()
                with torch.no_grad():
                    torch.testing.assert_close(model(pixel_values).logits, logits, rtol=1e-9, atol=1e-9)
                model.train()(pixel_values, labels=labels).loss.backward()
                assert_same_gradients(model, reference)

    def test_any_image_size(self, variant):
        """Each image of a batch for itself; as many cells in a segmentation as cover it."""
        model, segmenter = self.build(variant), self.build(variant, "ForSemanticSegmentation")
        for size in SIZES:
            pixel_values = torch.randn(2, 3, *size)
            with torch.no_grad():
                logits = model(pixel_values).logits
                self.check_padding(model, pixel_values, logits)
                one_by_one = torch.cat([model(image[None]).logits for image in pixel_values])
                maps = segmenter(pixel_values).logits
            assert_same_but_for_rounding(logits, one_by_one)
            assert maps.shape == (2, 5, *cells_of(size, segmenter.config.output_stride)) and maps.isfinite().all()

    def check_padding(self, model, pixel_values, logits):
        """An image that is no whole number of patches counts as if padded with zeros at its right and bottom."""
        (patch_height, patch_width), (height, width) = model.config.patch_shape, pixel_values.shape[-2:]
        padded = nn.functional.pad(pixel_values, (0, -width % patch_width, 0, -height % patch_height))
        torch.testing.assert_close(model(padded).logits, logits)

    def test_one_channel(self, variant):
        model = self.build(variant, num_channels=1)
        assert model(torch.randn(1, 1, 32, 32)).logits.shape == (1, 5)
        processor = LocAtViTImageProcessor.from_model_config(model.config)
        inputs = processor(torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8), return_tensors="pt")
        assert model(**inputs).logits.shape == (1, 5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_finite(self, variant, dtype):
        pixel_values = torch.randn(1, 3, 64, 50)
        for task, labels in (
            ("ForImageClassification", torch.tensor([1])),
            ("ForSemanticSegmentation", torch.zeros(1, 64, 50).long()),
        ):
            model = self.build(variant, task)
            expected = model(pixel_values).logits
            model = model.to(dtype)
            logits = model(pixel_values.to(dtype)).logits
            assert logits.dtype == dtype
            torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
            model.train()(pixel_values.to(dtype), labels=labels).loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_changes_nothing(self, variant, use_reentrant):
        twins = [self.build(variant).double().train() for _ in range(2)]
        pixel_values, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 4])
        twins[1].gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch notes that no input requires a gradient
            for model in twins:
                model(pixel_values.requires_grad_(), labels=labels).loss.backward()
        assert_same_gradients(*twins)

    def test_every_trained_parameter_gets_a_gradient(self, variant):
        for task, labels in (
            ("ForSemanticSegmentation", torch.zeros(2, 64, 64).long()),
            ("ForImageClassification", torch.tensor([0, 1])),
        ):
            model = self.build(variant, task).train()
            model(torch.randn(2, 3, 64, 64), labels=labels).loss.backward()
            assert not without_gradient(model)

    def test_layer_decay_reaches_every_parameter_once(self, variant):
        """As timm groups them; embeddings learn slowest, and tables, norms and biases do not decay."""
        model = self.build(variant)
        groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert found.keys() == trained
        assert found["classifier.weight"] == (1.0, 0.05)
        in_layers = [scale for name, (scale, _) in found.items() if name.endswith(".attention.q_proj.weight")]
        layers = len(in_layers)
        assert sorted(in_layers) == [0.5**depth for depth in range(layers, 0, -1)]
        assert {scale for scale, _ in found.values()} == {0.5**depth for depth in range(layers + 2)}
        tables = ("relative_position_bias_table", "position_embeddings", "cls_token", "jumbo_tokens", "frequencies")
        for name, (scale, decay) in found.items():
            assert (decay == 0.0) == (name.endswith((*tables, "bias", "scale")) or "norm" in name), name
            if "embeddings." in name:
                assert scale == 0.5 ** (layers + 1)
            if "jumbo_mlp" in name or "layernorm" in name:  # with the last layer
                assert scale == 0.5

    # -------------------------------------------------------------------------------------------- saving and pipelines
    @pytest.mark.parametrize("task", TASKS)
    def test_saving_and_loading(self, variant, task, tmp_path):
        model = self.build(variant, task)
        model.save_pretrained(tmp_path)
        auto_class = getattr(transformers, f"Auto{'Model' if task.startswith('For') else ''}{task}")
        loaded = auto_class if task != "Backbone" else type(model)  # AutoBackbone asks the Hub about local folders
        loaded = loaded.from_pretrained(tmp_path).eval()
        assert type(loaded) is type(model)
        pixel_values = torch.randn(1, 3, 40, 72)
        with torch.no_grad():
            for ours, theirs in zip(model(pixel_values).to_tuple(), loaded(pixel_values).to_tuple(), strict=True):
                assert_same_but_for_rounding(theirs, ours)
        assert {name for name, _ in loaded.named_buffers() if "running" not in name and "tracked" not in name} == set()
        files = {file.name for file in tmp_path.iterdir()}
        auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        assert len(auto_map) == 5
        assert {f"{reference.split('.')[0]}.py" for reference in auto_map.values()} < files
        assert "preprocessor_config.json" in files

    @pytest.mark.family
    def test_copies_and_pickles_answer_as_the_model(self, variant):
        """Also those of a model that has recorded outputs, by hooks that no pickle holds, and been looked into."""
        pixel_values = torch.randn(1, 3, 64, 40)
        for task in TASKS:
            model = self.build(variant, task)
            with torch.no_grad():
                expected = recorded_tensors(model(pixel_values, output_hidden_states=True))
                read_layers(model, pixel_values)
                for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                    observed = recorded_tensors(twin(pixel_values, output_hidden_states=True))
                    assert_same_but_for_rounding(observed, expected)
                    assert twin.training is model.training and twin.config == model.config
                again = recorded_tensors(model(pixel_values, output_hidden_states=True))
            assert len(again) == len(expected) > 3

    @pytest.mark.family
    def test_pipelines(self, variant):
        """From an image to answers, prepared by the processor of the configuration."""
        image = Image.effect_noise((60, 40), 64).convert("RGB")
        model = self.build(variant)
        processor = LocAtViTImageProcessor.from_model_config(model.config)
        with torch.no_grad():
            outputs = model.base_model(processor(image, return_tensors="pt").pixel_values)
            scores = model.classifier(outputs.pooler_output)[0].softmax(dim=-1)
        answers = transformers.pipeline("image-classification", model=model, image_processor=processor)(image, top_k=5)
        assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(
            {label: scores[index].item() for index, label in model.config.id2label.items()}, abs=1e-5
        )
        extract = transformers.pipeline("image-feature-extraction", model=model.base_model, image_processor=processor)
        assert_same_but_for_rounding(torch.tensor(extract(image, pool=True)), outputs.pooler_output)

        model = self.build(variant, "ForSemanticSegmentation")
        processor = LocAtViTImageProcessor.from_model_config(model.config, segmentation=True)
        segments = transformers.pipeline("image-segmentation", model=model, image_processor=processor)(image)
        assert all(segment["mask"].size == image.size for segment in segments)
        assert sum(segment["mask"].histogram()[255] for segment in segments) == 60 * 40

    # --------------------------------------------------------------------------------------------------------- outputs
    def test_outputs_are_taken_where_the_documentation_says(self, variant):
        model = self.build(variant)
        pixel_values = torch.randn(2, 3, 64, 40)
        with torch.no_grad():
            outputs = model.base_model(pixel_values, output_hidden_states=True)
            torch.testing.assert_close(model.classifier(outputs.pooler_output), model(pixel_values).logits)
            assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
            self.check_outputs(model.base_model, outputs)

    def check_outputs(self, body, outputs):
        torch.testing.assert_close(body.pool(outputs.last_hidden_state), outputs.pooler_output)
        torch.testing.assert_close(body.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)

    def test_attention_maps_are_distributions_and_include_the_gaussian(self, variant):
        model = self.build(variant, implementation="eager")
        pixel_values = torch.randn(1, 3, 64, 40)
        with torch.no_grad():
            maps = model(pixel_values, output_attentions=True).attentions
            for attention in maps:
                torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))
            modules = self.attention_modules(model)
            assert len(maps) == len(modules)
            if getattr(model.config, "use_gaussian", False):
                seen = []
                hook = modules[0].gaussian.register_forward_hook(lambda *hooked: seen.append(hooked[-1]))
                model(pixel_values)
                hook.remove()
                modules[0].gaussian = None
                without = model(pixel_values, output_attentions=True).attentions[0]
                expected = (without.log() + seen[0].bias()).softmax(dim=-1)
                torch.testing.assert_close(maps[0], expected, rtol=1e-4, atol=1e-5)

    def test_bad_configurations_are_one_sentence(self, refused, message):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            tiny_config(self.family, **refused)

    def attention_modules(self, model):
        """Those that make maps."""
        return [module for module in model.modules() if hasattr(module, "o_proj")]

    def test_presets_have_the_papers_parameter_counts(self):
        config_class = model_class(self.family, "Config")
        for name, fields, parameters in self.presets:
            with torch.device("meta"):
                config = config_class.from_preset(name, num_labels=1000, **fields)
                model = model_class(self.family)(config)
            assert sum(parameter.numel() for parameter in model.parameters()) == parameters, name
        with pytest.raises(ValueError, match="no preset 'huge'"):
            config_class.from_preset("huge")

    def test_bad_images_are_one_sentence(self):
        for shape, message in (
            ((1, 3, 0, 8), "holds no pixels"),
            ((1, 1, 32, 32), r"\(batch, 3, height, width\)"),
            ((3, 32, 32), "must be"),
        ):
            with pytest.raises(ValueError, match=message):
                tiny_model(self.family)(torch.zeros(shape))

    # ---------------------------------------------------------------------------------------------------- segmentation
    def test_segmentation_logits_cover_the_padded_image_and_the_loss_cuts_it_off(self, variant):
        model = self.build(variant, "ForSemanticSegmentation")
        stride = model.config.output_stride
        for size in SIZES[:-1]:
            pixel_values, labels = torch.randn(2, 3, *size), torch.randint(0, 5, (2, *size))
            labels[:, : size[0] // 2] = 255
            outputs = model(pixel_values, labels=labels, output_hidden_states=True)
            grid = cells_of(size, stride)
            padded = [cells * cell for cells, cell in zip(grid, stride, strict=True)]
            expected = 0.0
            for weight, scores in self.weighted_logits(model, outputs, grid).items():
                full = nn.functional.interpolate(scores, size=padded, mode="bilinear")[..., : size[0], : size[1]]
                expected += weight * nn.functional.cross_entropy(full, labels, ignore_index=255)
            torch.testing.assert_close(outputs.loss, expected)
        assert model(pixel_values, labels=torch.full_like(labels, 255)).loss == 0

    def weighted_logits(self, model, outputs, grid):
        """Logits by their weight in the loss, made by the head from the last hidden states before the norm."""
        last = outputs.hidden_states[-1]
        features = last[:, last.shape[1] - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
        assert_same_but_for_rounding(model.segmentation_head(features), outputs.logits)
        return {1.0: outputs.logits}

    def test_frozen_backbone_stays_in_evaluation_mode(self, variant):
        model = self.build(variant, "ForSemanticSegmentation", drop_path_rate=0.5, hidden_dropout_prob=0.5)
        model.freeze_backbone()
        model.train()
        before = copy.deepcopy(model.base_model.state_dict())
        pixel_values = torch.randn(2, 3, 32, 32)
        outputs = model(pixel_values, labels=torch.zeros(2, 32, 32).long())
        torch.testing.assert_close(model(pixel_values).logits, outputs.logits)
        outputs.loss.backward()
        assert all(parameter.grad is None for parameter in model.base_model.parameters())
        assert all(parameter.grad is not None for parameter in model.segmentation_head.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_model.state_dict().items())
        assert model.segmentation_head.training and not model.base_model.training

    def test_masks_land_where_things_are(self, variant):
        """The processor's sizes are whole cells, and a map of the right class at one cell comes back at its place."""
        model = self.build(variant, "ForSemanticSegmentation")
        processor = LocAtViTImageProcessor.from_model_config(model.config, segmentation=True)
        stride = model.config.output_stride
        for size in ((360, 480), (100, 205)):
            inputs = processor(torch.zeros(3, *size, dtype=torch.uint8), return_tensors="pt")
            height, width = inputs["pixel_values"].shape[-2:]
            assert height % stride[0] == 0 and width % stride[1] == 0
            with torch.no_grad():
                outputs = model(**inputs)
            outputs.logits.zero_()
            rows, columns = outputs.logits.shape[-2:]
            outputs.logits[0, 1, rows // 2, columns // 2] = 10.0
            mask = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]
            where = mask.nonzero().float().mean(dim=0)
            expected = [(rows // 2 + 0.5) * size[0] / rows, (columns // 2 + 0.5) * size[1] / columns]
            assert abs(where[0] - expected[0]) < 1.5 and abs(where[1] - expected[1]) < 1.5

    # ------------------------------------------------------------------------------------------------------- backbones
    @pytest.mark.parametrize("apply_layernorm", [True, False])
    def test_backbone_maps_have_their_channels_and_strides(self, variant, apply_layernorm):
        backbone = self.build(variant, "Backbone", out_indices=[1, 2, 3], apply_layernorm=apply_layernorm)
        with torch.no_grad():
            outputs = backbone(torch.randn(2, 3, 64, 40), output_hidden_states=True)
        strides = [[patch * 2**merges for patch in backbone.config.patch_shape] for merges in self.num_merges]
        assert [tuple(feature_map.shape) for feature_map in outputs.feature_maps] == [
            (2, channels, *cells_of((64, 40), stride))
            for channels, stride in zip(backbone.channels, strides, strict=True)
        ]
        self.check_feature_maps(variant, backbone, outputs, apply_layernorm)

    def check_feature_maps(self, variant, backbone, outputs, apply_layernorm):
        if not apply_layernorm:
            for feature_map, tokens in zip(outputs.feature_maps, outputs.hidden_states[1:4], strict=True):
                flat = feature_map.flatten(2).transpose(1, 2)
                torch.testing.assert_close(flat, tokens[:, tokens.shape[1] - flat.shape[1] :])
        backbone = self.build(variant, "Backbone", out_indices=[1, 2, 3], reshape_hidden_states=False)
        assert all(feature_map.ndim == 3 for feature_map in backbone(torch.randn(2, 3, 64, 40)).feature_maps)

    def test_a_backbone_of_no_stage_is_refused_later_too(self):
        config = tiny_config(self.family)
        for name in ("out_indices", "out_features"):
            with pytest.raises(ValueError, match=f"{name} is empty"):
                setattr(config, name, [])
        assert config.out_features == config.stage_names[-1:]

    @pytest.mark.framework
    @pytest.mark.parametrize("framework", ["upernet", "mask2former"])
    def test_dense_prediction_frameworks_train_on_it(self, variant, framework, tmp_path):
        fields = {"out_indices": [1, 2, 3, 4], **self.framework_fields}
        config = tiny_config(self.family, **{**self.variants[variant], **fields})
        channels = self.build(variant, "Backbone", **fields).channels[2]
        inputs = {"pixel_values": torch.randn(2, 3, 64, 64)}
        if framework == "upernet":
            framework_config = transformers.UperNetConfig(
                backbone_config=config, hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=channels,
                auxiliary_channels=8, num_labels=5,
            )  # fmt: skip
            model = transformers.UperNetForSemanticSegmentation(framework_config)
            targets, read = {"labels": torch.zeros(2, 64, 64).long()}, "logits"
        else:
            framework_config = transformers.Mask2FormerConfig(
                backbone_config=config, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=4,
                encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
                num_attention_heads=2, num_labels=5, train_num_points=16,
            )  # fmt: skip
            model = transformers.Mask2FormerForUniversalSegmentation(framework_config)
            masks = [torch.ones(1, 64, 64), torch.rand(2, 64, 64).round()]  # of classes, and of things of one class
            targets = {"mask_labels": masks, "class_labels": [torch.tensor([1]), torch.tensor([3, 3])]}
            read = "masks_queries_logits"
        assert_trains(model, model.train()(**inputs, **targets).loss)
        assert_reloads(model, tmp_path, inputs, read)

    # ------------------------------------------------------------------------------------------------------- compilers
    @pytest.mark.compile
    @HEADS
    def test_one_graph_in_training_and_inference(self, variant, task):
        torch.compiler.reset()  # other models were compiled from the same functions
        model, twin = (self.build(variant, task, **self.shallow_fields).double() for _ in range(2))
        pixel_values = torch.randn(2, 3, 64, 40, dtype=torch.float64)
        labels = torch.tensor([0, 4]) if task == "ForImageClassification" else torch.randint(0, 5, (2, 64, 40))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(pixel_values).logits, twin(pixel_values).logits)
        model.train(), twin.train()
        compiled(pixel_values, labels=labels).loss.backward()
        twin(pixel_values, labels=labels).loss.backward()
        assert_same_gradients(model, twin, rtol=1e-7, atol=1e-7)

    @pytest.mark.export
    @HEADS
    def test_one_exported_graph_serves_every_size(self, variant, task):
        model = self.build(variant, task, **self.shallow_fields)
        dynamic = torch.export.Dim.DYNAMIC
        with torch.no_grad():
            program = torch.export.export(
                model,
                (torch.randn(2, 3, 40, 56),),
                dynamic_shapes={"pixel_values": {0: dynamic, 2: dynamic, 3: dynamic}},
                strict=False,
            ).module()
            # Where patches are merged to 32 pixels, torch.export specializes a side of one patch.
            for size in [(40, 56), (64, 64), (48, 40), (128, 128), (33, 70)]:
                pixel_values = torch.randn(3, 3, *size)
                assert_same_but_for_rounding(program(pixel_values).logits, model(pixel_values).logits)

    @pytest.mark.export
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_a_torchscript_trace_serves_sizes_and_orientations_that_it_has_not_seen(self, variant):
        """While torch.jit.trace records, every size is a tensor; OpenVINO and Core ML convert what it records."""
        model = self.build(variant, **self.shallow_fields)
        with torch.no_grad(), torch.jit.optimized_execution(False):
            traced = torch.jit.trace(model, torch.randn(2, 3, 32, 48), strict=False, check_trace=False)
            for shape in ((2, 3, 32, 48), (1, 3, 64, 32)):
                pixel_values = torch.randn(shape)
                logits = model(pixel_values).logits
                torch.testing.assert_close(traced(pixel_values)["logits"], logits, rtol=1e-4, atol=1e-5)


def assert_takes_no_mask(family):
    """Attention inside windows or to clusters has no place for a mask of patches."""
    model, pixel_values = tiny_model(family), torch.zeros(1, 3, 32, 32)
    assert "attention_mask" not in inspect.signature(model.forward).parameters
    model(pixel_values, attention_mask=None)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        model(pixel_values, attention_mask=torch.ones(1, 64))


def recorded_tensors(outputs):
    """All tensors of an output, with those of its tuples."""
    found = [value if isinstance(value, tuple) else (value,) for value in outputs.values()]
    return [tensor for tensors in found for tensor in tensors]


def cells_of(size, stride):
    """(rows, columns) of cells that cover an image."""
    return tuple(-(-side // cell) for side, cell in zip(size, stride, strict=True))


def without_gradient(model):
    """Names of trained parameters that a loss did not reach."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]


def assert_same_gradients(model, reference, rtol=1e-7, atol=1e-9):
    for (name, parameter), twin in zip(model.named_parameters(), reference.parameters(), strict=True):
        if twin.grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, twin.grad, rtol=rtol, atol=atol, msg=name)


def assert_trains(model, loss):
    """A finite loss reaches every parameter of the backbone inside a model, and an optimizer takes a step."""
    assert loss.isfinite().all()
    loss.mean().backward()
    backbone = next(module for module in model.modules() if type(module).__name__.endswith("Backbone"))
    assert not without_gradient(backbone)
    assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters() if parameter.requires_grad)
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()


def assert_reloads(model, folder, inputs, read):
    """Saved and loaded, a model gives the same. `read` names the output to compare."""
    model.save_pretrained(folder)
    reloaded = type(model).from_pretrained(folder)
    with torch.no_grad():
        expected, observed = (getattr(network.eval()(**inputs), read) for network in (model, reloaded))
    assert_same_but_for_rounding(observed, expected)
