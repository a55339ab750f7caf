"""What only the `pacavit` models have: clusters, their kinds and heads, and variants that the bench does not build.

`test_every_architecture.py` has the plain model and the one with a teacher.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from locatvit_hf import (
    LocAtViTImageProcessor,
    PaCaViTBackbone,
    PaCaViTConfig,
    PaCaViTForImageClassification,
    PaCaViTForSemanticSegmentation,
    PaCaViTModel,
)
from locatvit_hf.modeling_pacavit import PaCaViTCastlingAttention, PaCaViTTeacherDownsampling, assign_patches
from tests.tolerances import assert_same_but_for_rounding

SMALL = {
    "image_size": 64,
    "hidden_sizes": [16, 24, 40, 48],
    "depths": [2, 1, 2, 1],
    "num_attention_heads": [1, 2, 2, 3],
    "num_clusters": [5, 7, 6, 0],
    "num_labels": 5,
    "segmentation_hidden_size": 16,
    "teacher_depths": [1, 1, 1, 1],
}
VARIANTS = {
    "conv": {},
    "mlp": {"clustering_type": "mlp"},
    "blockwise": {"blockwise_clustering": True, "num_clusters": [5, 7, 6, 4]},
    "teacher": {"clustering_type": "teacher", "num_clusters": [5, 7, 6, 9]},
    "teacher_with_a_gap": {"clustering_type": "teacher", "num_clusters": [0, 7, 0, 9]},
    "castling": {"clusterless_attention": "castling"},
    "no_clusters": {"num_clusters": [0, 0, 0, 0]},
    "layer_scale": {"layer_scale_init_value": 0.1},
    "linear_probe": {"segmentation_head_type": "linear"},
}
OTHERS = [variant for variant in VARIANTS if variant not in ("conv", "teacher")]
ALL_CLASSES = (PaCaViTModel, PaCaViTForImageClassification, PaCaViTForSemanticSegmentation, PaCaViTBackbone)


def build(model_class=PaCaViTForImageClassification, implementation=None, **overrides):
    """A small model in evaluation mode with trained-like weights."""
    torch.manual_seed(0)
    model = model_class._from_config(PaCaViTConfig(**{**SMALL, **overrides}), attn_implementation=implementation)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    return model.eval()


def first_tensor(output):
    first = output[0]
    return first[-1] if isinstance(first, tuple) else first


@pytest.mark.parametrize("variant", OTHERS)
@pytest.mark.parametrize("model_class", [PaCaViTForImageClassification, PaCaViTForSemanticSegmentation])
def test_backends_agree(variant, model_class):
    model = build(model_class, "sdpa", **VARIANTS[variant]).double()
    pixel_values = torch.randn(2, 3, 64, 50, dtype=torch.float64)
    with torch.no_grad():
        expected = model(pixel_values).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(pixel_values).logits, expected, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_flex_attention_of_transformers_agrees():
    """It compiles a kernel for every shape, which takes minutes on CPU."""
    model = build(implementation="sdpa")
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-5, atol=1e-5)


def test_every_attention_function_of_transformers_is_open():
    """A stand-in records what it is given, as kernels that need a GPU would be."""
    calls = []

    def stand_in(module, query, key, value, attention_mask, scaling, **kwargs):
        calls.append((module.is_causal, attention_mask, query.shape[-1], set(kwargs)))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    model = build(implementation="sdpa")
    pixel_values = torch.randn(1, 3, 64, 64)
    AttentionInterface.register("stand_in", stand_in)
    with torch.no_grad():
        expected = model(pixel_values).logits
        model.set_attn_implementation("stand_in")
        torch.testing.assert_close(model(pixel_values).logits, expected)
    assert len(calls) == sum(model.config.depths)
    assert all(not causal and mask is None and "gaussian" not in names for causal, mask, _, names in calls)


@pytest.mark.parametrize("variant", OTHERS)
@pytest.mark.parametrize("size", [(1, 1), (97, 130)])
def test_any_image_size(variant, size):
    height, width = size
    cells = -(-height // 4), -(-width // 4)
    pixel_values = torch.randn(2, 3, height, width)
    with torch.no_grad():
        assert build(**VARIANTS[variant])(pixel_values).logits.isfinite().all()
        logits = build(PaCaViTForSemanticSegmentation, **VARIANTS[variant])(pixel_values).logits
    assert logits.shape == (2, 5, *cells) and logits.isfinite().all()


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("variant", OTHERS)
def test_saving_and_loading(model_class, variant, tmp_path):
    model = build(model_class, num_channels=1, **VARIANTS[variant])
    model.save_pretrained(tmp_path)
    reloaded = model_class.from_pretrained(tmp_path).eval()
    pixel_values = torch.randn(2, 1, 40, 33)
    with torch.no_grad():
        assert_same_but_for_rounding(first_tensor(reloaded(pixel_values)), first_tensor(model(pixel_values)))
    assert {name for name, _ in reloaded.named_buffers() if "running" not in name and "tracked" not in name} == set()


def test_cluster_assignments_are_weights_over_the_patches():
    model = build(blockwise_clustering=True)
    assert model(torch.randn(1, 3, 64, 50)).cluster_assignments is None
    grids = [(16, 13), (16, 13), (8, 7), (4, 4), (4, 4)]
    for task_model in (model, build(PaCaViTForSemanticSegmentation, blockwise_clustering=True), model.pacavit):
        outputs = task_model(torch.randn(1, 3, 64, 50), output_cluster_assignments=True)
        shapes = [tuple(assignment.shape) for assignment in outputs.cluster_assignments]
        assert shapes == [
            (1, clusters, height * width) for clusters, (height, width) in zip((5, 5, 7, 6, 6), grids, strict=True)
        ]
        for assignment in outputs.cluster_assignments:
            torch.testing.assert_close(assignment.sum(dim=-1), torch.ones(assignment.shape[:2]))


@pytest.mark.parametrize("variant", ["conv", "mlp", "teacher"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_nothing_of_the_size_of_patches_times_patches_exists(variant, training, implementation):
    """Neither forward nor backward, in stages with clusters."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return output

    model = build(implementation=implementation, **{**VARIANTS[variant], "num_clusters": [5, 7, 6, 9]}).train(training)
    side = 224
    with Largest() as largest:
        logits = model(torch.randn(1, 3, side, side)).logits
        if training:
            logits.sum().backward()
    patches = (side // 4) ** 2
    # The largest tensor is the inside of the first MLP, linear in the patches; an attention map has patches ** 2.
    assert largest.numel <= max(4 * 16 * patches, 3 * side**2) < patches**2


def test_half_precision_keeps_small_weights():
    """Uniform weights over a million patches are below the smallest half-precision number."""
    assignment = assign_patches(torch.zeros(1, 1, 1024, 1024, dtype=torch.float16))
    torch.testing.assert_close(assignment.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("variant", OTHERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(variant, dtype):
    for model_class in (PaCaViTForImageClassification, PaCaViTForSemanticSegmentation):
        model = build(model_class, **VARIANTS[variant]).to(dtype)
        with torch.no_grad():
            logits = model(torch.randn(1, 3, 64, 50)).logits
        assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_castling_attention_against_its_equations(training):
    """Castling-ViT, section 3, written out for one query at a time: no matrix product, no shared code."""
    config = PaCaViTConfig(**{**SMALL, "clusterless_attention": "castling"})
    torch.manual_seed(0)
    module = PaCaViTCastlingAttention(config, 3).double().train(training)
    grid, heads, channels = (3, 4), 3, 48 // 3
    tokens = torch.randn(2, 12, 48, dtype=torch.float64)
    observed, weights, assignment = module(tokens, None, grid)
    assert weights is None and assignment is None

    expected = torch.zeros(2, 12, heads, channels, dtype=torch.float64)
    split = lambda states: states.reshape(2, 12, heads, channels)  # noqa: E731
    query, key, value = (split(layer(tokens)) for layer in (module.q_proj, module.k_proj, module.v_proj))
    kernel = module.local_mixing.weight
    for b in range(2):
        for h in range(heads):
            q, k, v = query[b, :, h], key[b, :, h], value[b, :, h]
            for i in range(12):
                output = v[i] / 2
                for j in range(12):
                    output = output + (q[i] / q[i].norm()).dot(k[j] / k[j].norm()) * v[j] / math.pi
                if training:
                    softmax = torch.softmax(torch.stack([q[i].dot(k[j]) / math.sqrt(channels) for j in range(12)]), 0)
                    for j in range(12):
                        if softmax[j] > 0.02:
                            output = output + softmax[j] * v[j]
                output = output / output.norm()
                row, column = divmod(i, grid[1])
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        y, x = row + dy, column + dx
                        if 0 <= y < grid[0] and 0 <= x < grid[1]:
                            output = output + kernel[h, 0, dy + 1, dx + 1] * v[y * grid[1] + x]
                expected[b, i, h] = output
    torch.testing.assert_close(observed, module.o_proj(expected.flatten(2)), rtol=0, atol=1e-10)


def test_castling_stands_in_the_stages_without_clusters():
    model = build(clusterless_attention="castling", num_clusters=[5, 0, 6, 0])
    kinds = [isinstance(stage.layers[0].attention, PaCaViTCastlingAttention) for stage in model.pacavit.stages]
    assert kinds == [False, True, False, True]


def test_teachers_blur_is_binomial_with_zeros_around():
    module = PaCaViTTeacherDownsampling(2, 3).double().eval()
    feature_map = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    blurred = torch.zeros_like(feature_map)
    padded = F.pad(feature_map, (1, 1, 1, 1))
    for y, weight_y in enumerate((1, 2, 1)):
        for x, weight_x in enumerate((1, 2, 1)):
            blurred += weight_y * weight_x / 16 * padded[..., y : y + 5, x : x + 6]
    torch.testing.assert_close(module(feature_map), module.norm(F.gelu(module.projection(blurred))))


def test_linear_probe_is_one_linear_map_of_all_stages():
    model = build(PaCaViTForSemanticSegmentation, segmentation_head_type="linear")
    outputs = model(torch.randn(2, 3, 97, 64), output_hidden_states=True)
    maps = outputs.hidden_states[1:]
    resized = [F.interpolate(m, size=maps[0].shape[-2:], mode="bilinear", align_corners=False) for m in maps]
    classifiers = model.segmentation_head.classifiers
    weight = torch.cat([classifier.weight for classifier in classifiers], dim=1)
    assert_same_but_for_rounding(outputs.logits, F.conv2d(torch.cat(resized, dim=1), weight, classifiers[0].bias))
    assert outputs.auxiliary_logits is None


def test_more_clusters_than_in_pretraining(tmp_path):
    build().save_pretrained(tmp_path)
    clusters = [20, 20, 20, 0]
    model, report = PaCaViTForSemanticSegmentation.from_pretrained(
        tmp_path, num_clusters=clusters, ignore_mismatched_sizes=True, output_loading_info=True
    )
    new = {name.removeprefix("pacavit.") for name, *_ in report["mismatched_keys"]}
    assert new == {f"stages.{stage}.layers.0.attention.clustering.clusters.weight" for stage in range(3)}
    outputs = model(torch.randn(1, 3, 64, 64), output_cluster_assignments=True)
    assert [assignment.shape[1] for assignment in outputs.cluster_assignments] == clusters[:3]


@pytest.mark.parametrize("variant", ["blockwise", "castling"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(variant, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = build(PaCaViTForSemanticSegmentation, segmentation_dropout_prob=0.0, **VARIANTS[variant])
        model.double().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        generator = torch.Generator().manual_seed(0)
        pixel_values = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
        model(pixel_values, labels=torch.randint(0, 5, (2, 64, 64), generator=generator)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-7, atol=1e-9, msg=name)


COMPILED = [
    *((variant, PaCaViTForImageClassification) for variant in OTHERS),
    *((variant, PaCaViTForSemanticSegmentation) for variant in VARIANTS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "model_class"), COMPILED)
def test_one_graph_compiles(variant, model_class):
    torch.compiler.reset()
    model = build(model_class, segmentation_dropout_prob=0.0, depths=[2, 1, 1, 1], **VARIANTS[variant])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_same_but_for_rounding(compiled(pixel_values).logits, model(pixel_values).logits)
    labels = torch.randint(0, 5, (2, 64, 64)) if model_class is PaCaViTForSemanticSegmentation else torch.tensor([1, 2])
    model.train()
    compiled(pixel_values, labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


@pytest.mark.parametrize(
    ("variant", "model_class"),
    [
        ("castling", PaCaViTForImageClassification),
        ("teacher", PaCaViTForSemanticSegmentation),
    ],
)
def test_one_export_serves_every_size(variant, model_class):
    model = Logits(build(model_class, depths=[2, 1, 1, 1], **VARIANTS[variant]))
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    # A side of one patch in the last stage is specialised by torch.export: 33 pixels and more share a graph.
    exported = torch.export.export(model, (torch.randn(2, 3, 40, 56),), dynamic_shapes=(sizes,)).module()
    for size in ((40, 56), (64, 64), (128, 96), (33, 70), (97, 130)):
        pixel_values = torch.randn(2, 3, *size)
        assert_same_but_for_rounding(exported(pixel_values), model(pixel_values))


def test_initial_weights_follow_the_reference():
    model = PaCaViTForSemanticSegmentation(PaCaViTConfig.from_preset("tiny_teacher", num_labels=150))
    head, stage = model.segmentation_head, model.pacavit.stages[0]
    clustered = PaCaViTModel(PaCaViTConfig()).stages[0].layers[0].attention.clustering
    for weight, std in (
        (model.pacavit.embeddings.patch_embeddings.weight, math.sqrt(2 / (9 * 48))),
        (stage.layers[0].attention.q_proj.weight, 0.02),
        (stage.layers[0].mlp.depthwise.weight, math.sqrt(2 / 9)),
        (clustered.depthwise.weight, math.sqrt(2 / 49)),
        (head.query.projection.weight, math.sqrt(2 / 256)),
        (head.classifier.weight, 0.01),
        (head.clusters.weight, 1 / math.sqrt(3 * 256)),
        (head.key.weight, 1 / math.sqrt(3 * 1024)),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("variant", ["conv", "teacher"])
def test_layer_decay_reaches_every_parameter_in_order(variant):
    model = build(**VARIANTS[variant])
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    stages = model.pacavit.stages
    layers = [layer.attention.q_proj.weight for stage in stages for layer in stage.layers]
    ordered = [model.pacavit.embeddings.patch_embeddings.weight, *layers, model.classifier.weight]
    assert [scale[id(parameter)] for parameter in ordered] == [0.5**depth for depth in range(7, -1, -1)]
    assert scale[id(stages[1].downsampling.projection.weight)] == scale[id(layers[2])]
    if model.pacavit.teacher is not None:
        assert scale[id(model.pacavit.teacher.clusterings[1].clusters.weight)] == scale[id(layers[2])]


def test_processors_of_a_config():
    config = PaCaViTConfig.from_preset("tiny", image_size=512)
    processor = LocAtViTImageProcessor.from_model_config(config, segmentation=True)
    assert processor.size_divisor == 32
    assert LocAtViTImageProcessor.from_model_config(PaCaViTConfig()).size.shortest_edge == 248


def test_an_unknown_preset_is_one_sentence():
    with pytest.raises(ValueError, match="There is no preset 'huge'"):
        PaCaViTConfig.from_preset("huge")
