"""How the `locatvit` models behave: back-ends, sizes, masks, losses, heads, backbone, compilers."""

import copy
import inspect
import threading
import warnings

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from locatvit_hf import (
    LocAtViTBackbone,
    LocAtViTConfig,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
    LocAtViTModel,
)
from locatvit_hf.attention_locat import eager_attention_forward
from locatvit_hf.modeling_locatvit import ALL_ATTENTION_FUNCTIONS
from tests.tolerances import assert_same_but_for_rounding

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_labels": 5,
}
VARIANTS = {
    "vit": {"use_gaussian": False, "use_refinement": False},
    "locatvit": {},
    "registers": {"num_register_tokens": 3, "prefix_position_embeddings": False},
    "rope": {"position_embedding_type": "rope_mixed", "layer_scale_init_value": 0.1},
    "no_positions": {"position_embedding_type": "none"},
    "mean": {"pooling": "mean", "use_class_token": False, "num_register_tokens": 1},
    "mean_with_class_token": {"pooling": "mean"},
    "mean_of_normed": {"pooling": "mean", "norm_before_pooling": True, "use_class_token": False},
    "rectangular": {"image_size": [32, 48], "patch_size": [8, 4]},
    "coarse": {"coarse_training": True},
}


def build(model_class=LocAtViTForImageClassification, implementation=None, **overrides):
    """A small model in evaluation mode with trained-like weights: nothing is zero, no Gaussian is at its start."""
    torch.manual_seed(0)
    model = model_class._from_config(LocAtViTConfig(**{**SMALL, **overrides}), attn_implementation=implementation)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.5 if "gaussian" in name else 0.1)
    return model.eval()


def with_implementation(model, implementation):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(implementation)
    return twin


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_back_ends_agree_in_values_and_gradients(variant, implementation):
    reference = build(implementation="sdpa", **VARIANTS[variant]).double()
    other = with_implementation(reference, implementation)
    pixel_values = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = reference(pixel_values).logits, other(pixel_values).logits
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for model in (reference, other):
        model.train()(pixel_values, labels=torch.tensor([0, 3])).loss.backward()
    for (name, parameter), twin in zip(reference.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(twin.grad, parameter.grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_set_attn_implementation_decides_what_runs(implementation, monkeypatch):
    called = []
    for name in ("eager", "sdpa", "flex_attention"):
        function = ALL_ATTENTION_FUNCTIONS[name]

        def spy(*args, name=name, function=function, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, spy)
    model = build(implementation="eager" if implementation == "sdpa" else "sdpa")
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert called == [implementation] * 4


def test_a_back_end_that_would_drop_the_gaussian_is_refused():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("swallows_gaussians", sdpa_attention_forward)
    model = build()
    model.set_attn_implementation("swallows_gaussians")
    message = r"not known to add the Gaussian.*use one of eager, flex_attention, .*sdpa"
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError):
        build(implementation="flash_attention_2")


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (64, 40), (33, 70), (5, 3)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_image_size_pads_right_and_bottom(variant, size):
    model = build(**VARIANTS[variant])
    pixel_values = torch.randn(2, 3, *size)
    patch_height, patch_width = model.config.patch_shape
    padded = nn.functional.pad(pixel_values, (0, -size[1] % patch_width, 0, -size[0] % patch_height))
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, model(padded).logits)
        one_by_one = torch.cat([model(image[None]).logits for image in pixel_values])
        assert_same_but_for_rounding(model(pixel_values).logits, one_by_one)


def test_two_threads_run_one_model_at_two_sizes():
    model = build()
    inputs = [torch.randn(1, 3, 32, 32), torch.randn(1, 3, 64, 48)]
    with torch.no_grad():
        expected = [model(pixel_values).logits for pixel_values in inputs]
    failures = []

    def run(index):
        with torch.no_grad():
            for _ in range(30):
                if not torch.allclose(model(inputs[index]).logits, expected[index], atol=1e-5):
                    failures.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_outputs_are_taken_where_the_documentation_says():
    model = build(implementation="eager")
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = model.locatvit(pixel_values, output_hidden_states=True, output_attentions=True)
        assert len(outputs.hidden_states) == 5
        torch.testing.assert_close(model.locatvit.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)
        torch.testing.assert_close(model.classifier(outputs.pooler_output), model(pixel_values).logits)
        torch.testing.assert_close(model.locatvit.pool(outputs.last_hidden_state), outputs.pooler_output)
    assert not torch.allclose(outputs.pooler_output, outputs.last_hidden_state[:, 0])  # the refinement did something
    assert len(outputs.attentions) == 4
    assert outputs.attentions[0].shape == (2, 2, 17, 17)


def test_attention_maps_include_the_gaussian():
    model = build(implementation="eager")
    pixel_values = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        with_gaussian = model(pixel_values, output_attentions=True).attentions[0]
        gaussian = {}
        layer = model.locatvit.layers[0].attention
        hook = layer.gaussian.register_forward_hook(lambda module, inputs, output: gaussian.update(value=output))
        model(pixel_values)
        hook.remove()
        layer.gaussian = None
        without = model(pixel_values, output_attentions=True).attentions[0]
    expected = (without.log() + gaussian["value"].bias()).softmax(dim=-1)
    torch.testing.assert_close(with_gaussian, expected, rtol=1e-4, atol=1e-5)


class TestAttentionMask:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
    @pytest.mark.parametrize("variant", ["locatvit", "vit", "mean"])
    def test_every_form_means_the_same(self, implementation, variant):
        model = build(implementation=implementation, **VARIANTS[variant])
        pixel_values = torch.randn(2, 3, 32, 32)
        tokens = 16 + model.config.num_prefix_tokens
        keep = torch.ones(2, tokens, dtype=torch.bool)
        keep[0, 3:9] = False
        keep[1, -4:] = False
        additive = torch.zeros(2, 1, 1, tokens).masked_fill(~keep[:, None, None], float("-inf"))
        body = model.locatvit
        with torch.no_grad():
            expected = body(pixel_values, attention_mask=keep).last_hidden_state
            pooled = body(pixel_values, attention_mask=keep).pooler_output
            other = body(pixel_values, attention_mask=keep[:, None, None]).pooler_output
            torch.testing.assert_close(other, pooled)
            for mask in (
                keep.long(),
                keep.float(),
                keep[:, None, None],
                additive,
                additive.expand(2, 2, tokens, tokens),
            ):
                assert_same_but_for_rounding(body(pixel_values, attention_mask=mask).last_hidden_state, expected)
            assert not torch.allclose(body(pixel_values).last_hidden_state, expected)

    @pytest.mark.parametrize("variant", ["locatvit", "mean"])
    def test_masked_patches_have_no_influence(self, variant):
        model = build(**VARIANTS[variant])
        pixel_values = torch.randn(1, 3, 32, 32)
        changed = pixel_values.clone()
        changed[..., :8, 24:] += 5.0  # patch (0, 3)
        keep = torch.ones(1, 16 + model.config.num_prefix_tokens, dtype=torch.bool)
        keep[0, model.config.num_prefix_tokens + 3] = False
        with torch.no_grad():
            expected = model(pixel_values, attention_mask=keep).logits
            assert_same_but_for_rounding(model(changed, attention_mask=keep).logits, expected)
            assert not torch.allclose(model(changed).logits, model(pixel_values).logits, atol=1e-3)

    def test_floats_of_two_axes_mark_tokens_and_those_of_four_add_up(self):
        model, pixel_values = build(), torch.randn(2, 3, 32, 32)
        keep = torch.ones(2, 17)
        keep[:, 5] = 0
        with torch.no_grad():
            expected = model(pixel_values, attention_mask=keep.bool()).logits
            added = (1 - keep[:, None, None]) * -1e4
            assert model(pixel_values, attention_mask=keep).logits.equal(expected)
            assert_same_but_for_rounding(model(pixel_values, attention_mask=added).logits, expected)
            for ambiguous in (torch.zeros(1, 17), torch.zeros(17, 17)):
                with pytest.raises(ValueError, match="attention_mask must be"):
                    model(pixel_values, attention_mask=ambiguous)

    def test_half_precision_pools_large_patches_under_a_mask(self):
        model = build(LocAtViTModel, pooling="mean").half()
        tokens = torch.full((1, 17, model.config.hidden_size), 10000.0, dtype=torch.float16)
        keep = torch.zeros(1, 1, 1, 17, dtype=torch.float16)
        with torch.no_grad():
            torch.testing.assert_close(model.pool(tokens, keep), model.pool(tokens))

    def test_half_precision_written_out_stays_finite_without_keys(self):
        query = torch.full((1, 1, 3, 4), 10.0, dtype=torch.float16)
        mask = torch.full((1, 1, 1, 3), torch.finfo(torch.float16).min, dtype=torch.float16)
        output, _ = eager_attention_forward(torch.nn.Identity(), query, -query, query, mask, scaling=1.0)
        assert output.isfinite().all()

    def test_dropout_of_positions_needs_positions(self):
        pixel_values = torch.randn(2, 3, 32, 32)
        for kind, dropped in (("learned", True), ("none", False)):
            model = build(LocAtViTModel, position_embedding_type=kind, hidden_dropout_prob=0.5).train()
            embedded = model.embeddings(pixel_values, (4, 4))
            assert bool((embedded[:, 1:] == 0).any()) is dropped

    def test_a_row_without_keys_stays_finite(self):
        model = build()
        with torch.no_grad():
            mask = torch.zeros(1, 17, dtype=torch.bool)
            assert model(torch.randn(1, 3, 32, 32), attention_mask=mask).logits.isfinite().all()

    @pytest.mark.parametrize("shape", [(3, 1, 17, 17), (2, 3, 17, 17)])
    def test_other_batches_and_heads_are_one_sentence(self, shape):
        with pytest.raises(ValueError, match=r"attention_mask must be"):
            build()(torch.randn(2, 3, 32, 32), attention_mask=torch.zeros(shape))

    def test_another_shape_is_one_sentence(self):
        with pytest.raises(ValueError, match=r"attention_mask must be .*\(1, 17\).* got \(1, 16\)"):
            build()(torch.randn(1, 3, 32, 32), attention_mask=torch.ones(1, 16))


class TestLosses:
    def test_soft_labels_leave_the_config_alone(self):
        model = build()
        logits = model(pixel_values := torch.randn(2, 3, 32, 32)).logits
        soft = torch.rand(2, 5).softmax(dim=-1)
        expected = -(soft * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
        torch.testing.assert_close(model(pixel_values, labels=soft).loss, expected)
        assert model.config.problem_type is None

    def test_class_ids_multi_label_and_regression(self):
        pixel_values = torch.randn(2, 3, 32, 32)
        model = build()
        logits, labels = model(pixel_values).logits, torch.tensor([1, 4])
        expected = -logits.log_softmax(dim=-1)[range(2), labels].mean()
        torch.testing.assert_close(model(pixel_values, labels=labels).loss, expected)
        model.config.problem_type = "multi_label_classification"
        targets = torch.tensor([[0.0, 1, 1, 0, 0], [1, 0, 0, 0, 1]])
        expected = nn.functional.binary_cross_entropy_with_logits(logits, targets)
        torch.testing.assert_close(model(pixel_values, labels=targets).loss, expected)
        single = build(num_labels=1)
        expected = (single(pixel_values).logits[:, 0] - torch.tensor([0.5, 2.0])).square().mean()
        torch.testing.assert_close(single(pixel_values, labels=torch.tensor([0.5, 2.0])).loss, expected)

    @pytest.mark.parametrize("size", [(32, 32), (30, 21), (40, 64)])
    def test_segmentation_is_averaged_over_valid_pixels_and_cuts_padding_off(self, size):
        model = build(LocAtViTForSemanticSegmentation)
        pixel_values = torch.randn(2, 3, *size)
        labels = torch.randint(0, 5, (2, *size))
        labels[:, : size[0] // 2] = 255
        outputs = model(pixel_values, labels=labels)
        padded = [side * 8 for side in outputs.logits.shape[-2:]]
        full = nn.functional.interpolate(outputs.logits, size=padded, mode="bilinear")[..., : size[0], : size[1]]
        valid = labels != 255
        picked = full.log_softmax(dim=1).permute(0, 2, 3, 1)[valid]
        expected = -picked[range(len(picked)), labels[valid]].mean()
        torch.testing.assert_close(outputs.loss, expected)

    def test_a_map_without_valid_pixels_costs_nothing(self):
        model = build(LocAtViTForSemanticSegmentation)
        loss = model(torch.randn(1, 3, 32, 32), labels=torch.full((1, 32, 32), 255)).loss
        assert loss.item() == 0.0

    @pytest.mark.parametrize(
        ("model_class", "labels", "message"),
        [
            (LocAtViTForImageClassification, torch.tensor([5]), r"class id 5, but the model has 5 classes \(0 to 4\)"),
            (LocAtViTForImageClassification, torch.rand(1, 4), r"Soft labels must be \(1, 5\)"),
            (LocAtViTForSemanticSegmentation, torch.full((1, 32, 32), 7), "class id 7, but the model has 5 classes"),
            (LocAtViTForSemanticSegmentation, torch.zeros(1, 16, 16).long(), "one map of its image's size"),
            (LocAtViTForSemanticSegmentation, torch.zeros(2, 32, 32).long(), "one map of its image's size"),
            (LocAtViTForSemanticSegmentation, torch.zeros(1, 30, 32).long(), "one map of its image's size"),
            (LocAtViTForSemanticSegmentation, torch.zeros(1, 1, 32, 32).long(), "one map of its image's size"),
        ],
    )
    def test_wrong_labels_are_one_sentence(self, model_class, labels, message):
        with pytest.raises(ValueError, match=message):
            build(model_class)(torch.randn(1, 3, 32, 32), labels=labels)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_integers_of_any_width_are_labels(self, dtype):
        pixel_values = torch.randn(1, 3, 32, 32)
        segmenter, classifier = build(LocAtViTForSemanticSegmentation).double(), build().double()
        for model, labels in ((segmenter, torch.randint(0, 5, (1, 32, 32))), (classifier, torch.tensor([3]))):
            loss = model(pixel_values.double(), labels=labels.to(dtype)).loss
            assert loss.dtype == torch.float64
            torch.testing.assert_close(loss, model(pixel_values.double(), labels=labels).loss)

    def test_losses_are_means_for_the_trainer(self):
        assert LocAtViTForImageClassification.accepts_loss_kwargs is False
        assert LocAtViTForSemanticSegmentation.accepts_loss_kwargs is False


class TestSegmentation:
    def test_head_reads_the_last_layer_before_the_norm(self):
        model = build(LocAtViTForSemanticSegmentation, num_register_tokens=2)
        pixel_values = torch.randn(1, 3, 32, 48)
        with torch.no_grad():
            outputs = model(pixel_values, output_hidden_states=True)
            features = outputs.hidden_states[-1][:, 3:].transpose(1, 2).reshape(1, 32, 4, 6)
            assert_same_but_for_rounding(model.segmentation_head(features), outputs.logits)
            assert model(pixel_values).hidden_states is None

    def test_frozen_backbone_stays_in_evaluation_mode(self):
        model = build(LocAtViTForSemanticSegmentation, drop_path_rate=0.5, hidden_dropout_prob=0.5)
        model.freeze_backbone()
        model.train()
        assert model.segmentation_head.training and not model.locatvit.training
        pixel_values = torch.randn(2, 3, 32, 32)
        outputs = model(pixel_values, labels=torch.zeros(2, 32, 32).long())
        torch.testing.assert_close(model(pixel_values).logits, outputs.logits)
        outputs.loss.backward()
        assert all(parameter.grad is None for parameter in model.locatvit.parameters())
        assert all(parameter.grad is not None for parameter in model.segmentation_head.parameters())

    def test_every_trained_parameter_gets_a_gradient(self):
        model = build(LocAtViTForSemanticSegmentation).train()
        model(torch.randn(2, 3, 32, 32), labels=torch.zeros(2, 32, 32).long()).loss.backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


class TestBackbone:
    @pytest.mark.parametrize("apply_layernorm", [True, False])
    def test_maps_of_chosen_stages(self, apply_layernorm):
        backbone = build(LocAtViTBackbone, out_indices=[1, 4], num_register_tokens=2, apply_layernorm=apply_layernorm)
        pixel_values = torch.randn(2, 3, 32, 40)
        with torch.no_grad():
            outputs = backbone(pixel_values, output_hidden_states=True)
        assert [tuple(m.shape) for m in outputs.feature_maps] == [(2, 32, 4, 5)] * 2
        assert backbone.channels == [32, 32]
        for feature_map, index in zip(outputs.feature_maps, (1, 4), strict=True):
            expected = outputs.hidden_states[index]
            if apply_layernorm:
                expected = backbone.locatvit.layernorm(expected)
            torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), expected[:, 3:])

    def test_tokens_keep_the_class_token_first(self):
        backbone = build(LocAtViTBackbone, num_register_tokens=2, reshape_hidden_states=False)
        with torch.no_grad():
            outputs = backbone(torch.randn(1, 3, 32, 40), output_hidden_states=True)
        normed = backbone.locatvit.layernorm(outputs.hidden_states[-1])
        expected = torch.cat([normed[:, :1], normed[:, 3:]], dim=1)
        torch.testing.assert_close(outputs.feature_maps[0], expected)

    def test_pyramid_has_four_strides(self):
        backbone = build(LocAtViTBackbone, feature_pyramid=True, patch_size=16, image_size=64)
        maps = backbone(torch.randn(1, 3, 64, 96)).feature_maps
        assert [tuple(m.shape[-2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]

    def test_a_classifier_checkpoint_loads_into_the_backbone(self, tmp_path):
        classifier = build()
        classifier.save_pretrained(tmp_path)
        backbone = LocAtViTBackbone.from_pretrained(tmp_path, out_indices=[2, 4])
        pixel_values = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            expected = classifier.locatvit(pixel_values).last_hidden_state[:, 1:]
            actual = backbone(pixel_values).feature_maps[-1].flatten(2).transpose(1, 2)
        torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("framework", ["upernet", "mask2former", "dpt"])
    def test_dense_prediction_frameworks_train_on_it(self, framework):
        import transformers

        pyramid = {"feature_pyramid": True} if framework != "dpt" else {"reshape_hidden_states": False}
        config = LocAtViTConfig(**{**SMALL, "patch_size": 16, "image_size": 64, **pyramid}, out_indices=[1, 2, 3, 4])
        pixel_values = torch.randn(2, 3, 64, 64)
        if framework == "upernet":
            framework_config = transformers.UperNetConfig(
                backbone_config=config, hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=32,
                auxiliary_channels=8, num_labels=5,
            )  # fmt: skip
            model = transformers.UperNetForSemanticSegmentation(framework_config)
            loss = model(pixel_values, labels=torch.zeros(2, 64, 64).long()).loss
        elif framework == "dpt":
            framework_config = transformers.DPTConfig(
                backbone_config=config, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, num_labels=5,
                reassemble_factors=[4, 2, 1, 0.5], hidden_size=32, num_attention_heads=2,
            )  # fmt: skip
            model = transformers.DPTForDepthEstimation(framework_config)  # takes no labels
            loss = model(pixel_values).predicted_depth.square().mean()
        else:
            framework_config = transformers.Mask2FormerConfig(
                backbone_config=config, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=4,
                encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
                num_attention_heads=2, num_labels=5, train_num_points=16,
            )  # fmt: skip
            model = transformers.Mask2FormerForUniversalSegmentation(framework_config)
            targets = {"mask_labels": [torch.ones(1, 64, 64)] * 2, "class_labels": [torch.tensor([1])] * 2}
            loss = model(pixel_values, **targets).loss.mean()
        loss.backward()
        assert loss.isfinite()
        backbone = next(module for module in model.modules() if isinstance(module, LocAtViTBackbone))
        missing = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing


class TestContractOfTimm:
    def test_layer_decay_reaches_every_parameter_once(self):
        from timm.optim import param_groups_layer_decay

        model = build(num_register_tokens=1)
        groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        scale = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert len(scale) == len(names)
        assert scale["locatvit.embeddings.position_embeddings"] == (0.5**5, 0.0)
        assert scale["locatvit.layers.0.attention.q_proj.weight"] == (0.5**4, 0.05)
        assert scale["locatvit.layers.3.attention.gaussian.variance.weight"] == (0.5, 0.05)
        assert scale["locatvit.embeddings.register_tokens"][1] == 0.05  # as in the reference
        assert scale["classifier.weight"] == (1.0, 0.05)

    def test_the_bare_model_has_names_without_prefix(self):
        model = build(LocAtViTModel, position_embedding_type="rope_mixed")
        assert model.no_weight_decay() == {"embeddings.cls_token", "rope.frequencies"}
        assert model.group_matcher()["stem"] == "^(?:embeddings|rope)"


@pytest.mark.parametrize("model_class", [LocAtViTForImageClassification, LocAtViTForSemanticSegmentation])
def test_heads_name_the_mask_that_a_trainer_may_pass_on(model_class):
    model, pixel_values = build(model_class), torch.randn(2, 3, 32, 32)
    assert list(inspect.signature(model.forward).parameters)[:3] == ["pixel_values", "labels", "attention_mask"]
    tokens = model.locatvit(pixel_values).last_hidden_state.shape[1]
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[:, -1] = False
    with torch.no_grad():
        masked, by_name = model(pixel_values, None, mask).logits, model(pixel_values, attention_mask=mask).logits
        assert masked.equal(by_name) and not masked.equal(model(pixel_values).logits)


class TestCompilers:
    @pytest.mark.parametrize("variant", ["locatvit", "rope", "coarse"])
    def test_one_graph_in_training_and_inference(self, variant):
        torch.compiler.reset()  # other tests compiled the same functions, at other sizes
        model = build(**VARIANTS[variant]).double()
        twin = copy.deepcopy(model)
        pixel_values, labels = torch.randn(2, 3, 32, 40, dtype=torch.float64), torch.tensor([0, 4])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(pixel_values).logits, twin(pixel_values).logits)
        model.train(), twin.train()
        compiled(pixel_values, labels=labels).loss.backward()
        twin(pixel_values, labels=labels).loss.backward()
        for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad)

    def test_a_dynamic_graph_is_not_compiled_again_for_every_size(self):
        torch.compiler.reset()
        model, counter = build().eval(), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
        graphs = []
        for size in ((32, 40), (48, 32), (24, 64), (30, 50)):
            pixel_values = torch.randn(2, 3, *size)
            with torch.inference_mode():
                assert_same_but_for_rounding(compiled(pixel_values).logits, model(pixel_values).logits)
            graphs.append(counter.frame_count)
        assert graphs[1] == graphs[-1]

    @pytest.mark.parametrize("variant", ["locatvit", "rope"])
    def test_one_exported_graph_serves_every_size(self, variant):
        model = build(**VARIANTS[variant])
        dynamic = torch.export.Dim.DYNAMIC
        with torch.no_grad():
            program = torch.export.export(
                model,
                (torch.randn(2, 3, 40, 56),),
                dynamic_shapes={"pixel_values": {0: dynamic, 2: dynamic, 3: dynamic}},
                strict=False,
            )
            for size in [(40, 56), (32, 32), (32, 40), (128, 128), (33, 70)]:
                pixel_values = torch.randn(3, 3, *size)
                assert_same_but_for_rounding(program.module()(pixel_values).logits, model(pixel_values).logits)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("variant", ["locatvit", "rope", "coarse"])
    def test_half_precision_is_finite(self, dtype, variant):
        model = build(**VARIANTS[variant])
        expected = model(pixel_values := torch.randn(1, 3, 96, 96)).logits
        model = model.to(dtype).train()
        outputs = model(pixel_values.to(dtype), labels=torch.tensor([1]))
        outputs.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        if variant != "coarse":
            torch.testing.assert_close(outputs.logits.float(), expected, rtol=0.1, atol=0.1)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_changes_nothing(self, use_reentrant):
        model = build().double().train()
        pixel_values, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 4])
        model(pixel_values, labels=labels).loss.backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch notes that no input requires a gradient
            model(pixel_values.requires_grad_(), labels=labels).loss.backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 33}, "hidden_size=33 must be divisible by num_attention_heads=2"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"patch_size": 0}, "patch_size must be at least 1 pixel"),
        ({"image_size": [32, -8]}, "image_size must be at least 1 pixel"),
        ({"image_size": [32, 32, 32]}, "one number or"),
        ({"image_size": 4}, "smaller than one patch"),
        ({"num_register_tokens": -1}, "num_register_tokens must not be negative"),
        ({"pooling": "max"}, "pooling must be 'cls' or 'mean'"),
        ({"use_class_token": False}, "pooling='cls' needs use_class_token=True"),
        ({"position_embedding_type": "sinus"}, "position_embedding_type must be"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must be at least 0 and below 1"),
        ({"feature_pyramid": True, "out_indices": [1, 2]}, "feature_pyramid=True needs four"),
        ({"feature_pyramid": True, "num_hidden_layers": 2}, "feature_pyramid=True needs at least 3 layers"),
        ({"crop_pct": 0}, "crop_pct must be above 0"),
        ({"num_labels": -1}, "num_labels must not be negative"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std must be one number, or one for each of the 3 channels, above 0"),
        ({"num_channels": 4, "image_mean": [0.1, 0.2, 0.3]}, "image_mean must be one number, or one for each of the 4"),
        ({"hidden_act": "geluu"}, "hidden_act='geluu' is not an activation"),
        ({"problem_type": "guess"}, "problem_type"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps must not be negative"),
        ({"initializer_range": 0}, "initializer_range must be above 0"),
        ({"rope_temperature": 0}, "rope_temperature must be above 0"),
    ],
)
def test_bad_configurations_are_one_sentence(overrides, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        LocAtViTConfig(**{**SMALL, **overrides})


def test_presets():
    sizes = {"tiny": 5_719_756, "small": 22_053_004, "base": 86_569_996}
    for name, parameters in sizes.items():
        with torch.device("meta"):
            model = LocAtViTForImageClassification(LocAtViTConfig.from_preset(name, num_labels=1000))
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    with pytest.raises(ValueError, match="no preset 'huge'"):
        LocAtViTConfig.from_preset("huge")


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 0, 8), "holds no pixels"), ((1, 1, 32, 32), r"\(batch, 3, height, width\)"), ((3, 32, 32), "must be")],
)
def test_bad_images_are_one_sentence(shape, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(shape))


def test_initial_weights_follow_the_reference():
    torch.manual_seed(0)
    model = LocAtViTForImageClassification(LocAtViTConfig.from_preset("tiny", num_hidden_layers=2, num_labels=10))
    body = model.locatvit
    assert body.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert body.embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.05)
    assert body.embeddings.cls_token.abs().max().item() < 1e-5
    bound = body.embeddings.patch_embeddings.weight.abs().max().item()
    assert bound == pytest.approx((3 * 16**2) ** -0.5, rel=0.01)
    assert body.layers[0].attention.gaussian.variance.bias.eq(0).all()

    rope = LocAtViTConfig.from_preset("tiny", position_embedding_type="rope_mixed", layer_scale_init_value=1e-5)
    model = LocAtViTForImageClassification(rope)
    frequencies = model.locatvit.rope.frequencies
    magnitude = frequencies.square().sum(dim=0).sqrt()
    expected = 10 ** (-4 * torch.arange(16) / 64)
    torch.testing.assert_close(magnitude, torch.cat([expected, expected]).expand_as(magnitude))
    first, second = frequencies[..., :16], frequencies[..., 16:]
    torch.testing.assert_close((first * second).sum(dim=0), torch.zeros_like(first[0]), atol=1e-6, rtol=0)
    deepest = model.locatvit.layers[11].mlp.down_proj.weight.std().item()
    assert deepest == pytest.approx(0.02 / 24**0.5, rel=0.05)
    assert model.locatvit.layers[0].layer_scale1.scale.eq(1e-5).all()
