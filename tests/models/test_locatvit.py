"""The `locatvit` models: the contract of every model, and what stands in shared code, tested on them alone.

That is: which attention runs, masks, losses, refused configurations.
"""

import inspect
import threading

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from locatvit_hf import (
    LocAtViTBackbone,
    LocAtViTConfig,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
)
from locatvit_hf.attention_locat import eager_attention_forward
from locatvit_hf.modeling_locatvit import ALL_ATTENTION_FUNCTIONS
from tests.factories import PLAIN, tiny_config, tiny_model
from tests.models.base import ModelTester, assert_trains
from tests.tolerances import assert_same_but_for_rounding

MEAN = {"pooling": "mean", "use_class_token": False, "num_register_tokens": 1}


class TestLocAtViT(ModelTester):
    family = "locatvit"
    variants = {
        "locatvit": {},
        "vit": PLAIN,
        "registers": {"num_register_tokens": 3, "prefix_position_embeddings": False},
        "rope": {"position_embedding_type": "rope_mixed", "layer_scale_init_value": 0.1},
        "no_positions": {"position_embedding_type": "none"},
        "mean": MEAN,
        "mean_with_class_token": {"pooling": "mean"},
        "mean_of_normed": {"pooling": "mean", "norm_before_pooling": True, "use_class_token": False},
        "rectangular": {"image_size": [32, 48], "patch_size": [8, 4]},
        "coarse": {"coarse_training": True},
    }
    presets = (("tiny", {}, 5_719_756), ("small", {}, 22_053_004), ("base", {}, 86_569_996))
    refused = (
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
        ({"out_indices": []}, "out_indices is empty: name at least one stage, from stem to stage4"),
    )

    def check_outputs(self, body, outputs):
        """Where the norm comes after averaging, hidden states are not normalized."""
        if body.config.normalizes_tokens:
            super().check_outputs(body, outputs)
        else:
            torch.testing.assert_close(body.pool(outputs.last_hidden_state), outputs.pooler_output)
            torch.testing.assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)


def build(task="ForImageClassification", implementation=None, **fields):
    return tiny_model("locatvit", task, implementation, **fields)


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


class TestAttentionMask:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
    @pytest.mark.parametrize("fields", [{}, PLAIN, MEAN])
    def test_every_form_means_the_same(self, implementation, fields):
        model = build(implementation=implementation, **fields)
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

    @pytest.mark.parametrize("fields", [{}, MEAN])
    def test_masked_patches_have_no_influence(self, fields):
        model = build(**fields)
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
        model = build("Model", pooling="mean").half()
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
            model = build("Model", position_embedding_type=kind, hidden_dropout_prob=0.5).train()
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

    @pytest.mark.parametrize(
        ("task", "labels", "message"),
        [
            ("ForImageClassification", torch.tensor([5]), r"class id 5, but the model has 5 classes \(0 to 4\)"),
            ("ForImageClassification", torch.rand(1, 4), r"Soft labels must be \(1, 5\)"),
            ("ForSemanticSegmentation", torch.full((1, 32, 32), 7), "class id 7, but the model has 5 classes"),
            ("ForSemanticSegmentation", torch.zeros(1, 16, 16).long(), "one map of its image's size"),
            ("ForSemanticSegmentation", torch.zeros(2, 32, 32).long(), "one map of its image's size"),
            ("ForSemanticSegmentation", torch.zeros(1, 30, 32).long(), "one map of its image's size"),
            ("ForSemanticSegmentation", torch.zeros(1, 1, 32, 32).long(), "one map of its image's size"),
        ],
    )
    def test_wrong_labels_are_one_sentence(self, task, labels, message):
        with pytest.raises(ValueError, match=message):
            build(task)(torch.randn(1, 3, 32, 32), labels=labels)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_integers_of_any_width_are_labels(self, dtype):
        pixel_values = torch.randn(1, 3, 32, 32)
        segmenter, classifier = build("ForSemanticSegmentation").double(), build().double()
        for model, labels in ((segmenter, torch.randint(0, 5, (1, 32, 32))), (classifier, torch.tensor([3]))):
            loss = model(pixel_values.double(), labels=labels.to(dtype)).loss
            assert loss.dtype == torch.float64
            torch.testing.assert_close(loss, model(pixel_values.double(), labels=labels).loss)

    def test_losses_are_means_for_the_trainer(self):
        assert LocAtViTForImageClassification.accepts_loss_kwargs is False
        assert LocAtViTForSemanticSegmentation.accepts_loss_kwargs is False


class TestBackbone:
    def test_tokens_keep_the_class_token_first(self):
        backbone = build("Backbone", num_register_tokens=2, reshape_hidden_states=False)
        with torch.no_grad():
            outputs = backbone(torch.randn(1, 3, 32, 40), output_hidden_states=True)
        normed = backbone.locatvit.layernorm(outputs.hidden_states[-1])
        expected = torch.cat([normed[:, :1], normed[:, 3:]], dim=1)
        torch.testing.assert_close(outputs.feature_maps[0], expected)

    def test_pyramid_has_four_strides(self):
        backbone = build("Backbone", feature_pyramid=True, patch_size=16, image_size=64)
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

    @pytest.mark.framework
    def test_a_framework_reads_tokens(self):
        """DPT takes tokens, the class token first, and makes maps of them."""
        config = tiny_config(
            "locatvit", image_size=64, patch_size=16, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
        )
        framework_config = transformers.DPTConfig(
            backbone_config=config, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, num_labels=5,
            reassemble_factors=[4, 2, 1, 0.5], hidden_size=32, num_attention_heads=2,
        )  # fmt: skip
        model = transformers.DPTForDepthEstimation(framework_config)  # takes no labels
        assert_trains(model, model(torch.randn(2, 3, 64, 64)).predicted_depth.square().mean())


def test_the_bare_model_has_names_without_prefix():
    model = build("Model", position_embedding_type="rope_mixed")
    assert model.no_weight_decay() == {"embeddings.cls_token", "rope.frequencies"}
    assert model.group_matcher()["stem"] == "^(?:embeddings|rope)"


@pytest.mark.parametrize("task", ["ForImageClassification", "ForSemanticSegmentation"])
def test_heads_name_the_mask_that_a_trainer_may_pass_on(task):
    model, pixel_values = build(task), torch.randn(2, 3, 32, 32)
    assert list(inspect.signature(model.forward).parameters)[:3] == ["pixel_values", "labels", "attention_mask"]
    tokens = model.locatvit(pixel_values).last_hidden_state.shape[1]
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[:, -1] = False
    with torch.no_grad():
        masked, by_name = model(pixel_values, None, mask).logits, model(pixel_values, attention_mask=mask).logits
        assert masked.equal(by_name) and not masked.equal(model(pixel_values).logits)


@pytest.mark.compile
def test_a_dynamic_graph_is_not_compiled_again_for_every_size():
    torch.compiler.reset()
    model, counter = build(num_hidden_layers=1), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    graphs = []
    for size in ((32, 40), (48, 32), (24, 64), (30, 50)):
        pixel_values = torch.randn(2, 3, *size)
        with torch.inference_mode():
            assert_same_but_for_rounding(compiled(pixel_values).logits, model(pixel_values).logits)
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1]


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
