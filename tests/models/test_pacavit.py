"""The `pacavit` models: clusters, their kinds, heads and attention, and detectors on top of a backbone."""

import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import (
    AttentionInterface,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
)

from locatvit_hf import LocAtViTImageProcessor, PaCaViTConfig, PaCaViTForSemanticSegmentation, PaCaViTModel
from locatvit_hf.modeling_pacavit import PaCaViTCastlingAttention, PaCaViTTeacherDownsampling, assign_patches
from tests.factories import tiny_config, tiny_model
from tests.models.base import ModelTester, assert_reloads, assert_takes_no_mask, assert_trains
from tests.tolerances import assert_same_but_for_rounding

TEACHER = {"clustering_type": "teacher", "num_clusters": [5, 7, 6, 9]}
CASTLING = {"clusterless_attention": "castling"}


class TestPaCaViT(ModelTester):
    family = "pacavit"
    variants = {
        "conv": {},
        "mlp": {"clustering_type": "mlp"},
        "blockwise": {"blockwise_clustering": True, "num_clusters": [5, 7, 6, 4]},
        "teacher": TEACHER,
        "teacher_with_a_gap": {"clustering_type": "teacher", "num_clusters": [0, 7, 0, 9]},
        "castling": CASTLING,
        "no_clusters": {"num_clusters": [0, 0, 0, 0]},
        "layer_scale": {"layer_scale_init_value": 0.1},
        "linear_probe": {"segmentation_head_type": "linear"},
    }
    implementations = ("eager",)  # flex_attention is that of transformers: see below
    tasks_with_attention = ("ForImageClassification", "ForSemanticSegmentation")
    num_merges = (0, 1, 2)
    shallow_fields = {"depths": [1, 1, 1, 1]}
    framework_fields = {}
    presets = (
        ("tiny", {}, 12_200_680),
        ("small", {}, 22_037_704),
        ("base", {}, 46_911_304),
    )
    refused = (
        ({"depths": [2, 2, 2]}, "must have 3 entries"),
        ({"depths": []}, "depths must be at least 1"),
        ({"depths": [2, 0, 2, 2]}, "depths must be at least 1"),
        ({"hidden_sizes": [96, 192, 320, 380]}, "must be divisible by num_attention_heads"),
        ({"hidden_sizes": [95, 192, 320, 384], "num_attention_heads": [1, 4, 8, 16]}, "even number"),
        ({"num_clusters": [100, -1, 100, 0]}, "num_clusters must hold numbers of at least 0"),
        ({"clustering_type": "kmeans"}, "clustering_type must be one of"),
        ({"clusterless_attention": "linear"}, "clusterless_attention must be one of"),
        ({"segmentation_head_type": "upernet"}, "segmentation_head_type must be one of"),
        ({"clustering_type": "teacher", "blockwise_clustering": True}, "blockwise_clustering=False"),
        ({"clustering_type": "teacher", "num_clusters": [0, 0, 0, 0]}, "num_clusters above zero"),
        ({"segmentation_dropout_prob": 1.0}, "segmentation_dropout_prob must be at least 0 and below 1"),
        ({"drop_path_rate": -0.1}, "drop_path_rate must be at least 0"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"num_channels": 0}, "num_channels must be at least 1"),
    )

    def check_padding(self, model, pixel_values, logits):
        """Convolutions pad each map by themselves."""

    def check_outputs(self, body, outputs):
        """Maps are normalized in the trunk."""
        torch.testing.assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)
        torch.testing.assert_close(outputs.last_hidden_state.mean(dim=(2, 3)), outputs.pooler_output)

    def attention_modules(self, model):
        """Castling attention makes no map."""
        modules = super().attention_modules(model)
        return [module for module in modules if not isinstance(module, PaCaViTCastlingAttention)]

    def check_feature_maps(self, variant, backbone, outputs, apply_layernorm):
        assert all(map(torch.equal, outputs.feature_maps, outputs.hidden_states[1:4]))

    def weighted_logits(self, model, outputs, grid):
        """The head reads every stage, and may have a second loss."""
        logits, auxiliary = model.segmentation_head(outputs.hidden_states[1:])
        assert_same_but_for_rounding(logits, outputs.logits)
        if auxiliary is None:
            return {1.0: logits}
        assert_same_but_for_rounding(auxiliary, outputs.auxiliary_logits)
        return {1.0: logits, 0.4: auxiliary}


def build(task="ForImageClassification", implementation=None, **fields):
    return tiny_model("pacavit", task, implementation, **fields)


def test_attention_to_clusters_takes_no_mask():
    assert_takes_no_mask("pacavit")


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


def test_cluster_assignments_are_weights_over_the_patches():
    model = build(blockwise_clustering=True)
    assert model(torch.randn(1, 3, 64, 50)).cluster_assignments is None
    grids = [(16, 13), (16, 13), (8, 7), (4, 4)]
    for task_model in (model, build("ForSemanticSegmentation", blockwise_clustering=True), model.pacavit):
        outputs = task_model(torch.randn(1, 3, 64, 50), output_cluster_assignments=True)
        shapes = [tuple(assignment.shape) for assignment in outputs.cluster_assignments]
        assert shapes == [
            (1, clusters, height * width) for clusters, (height, width) in zip((5, 5, 7, 6), grids, strict=True)
        ]
        for assignment in outputs.cluster_assignments:
            torch.testing.assert_close(assignment.sum(dim=-1), torch.ones(assignment.shape[:2]))


@pytest.mark.parametrize("fields", [{}, {"clustering_type": "mlp"}, TEACHER])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_nothing_of_the_size_of_patches_times_patches_exists(fields, training, implementation):
    """Neither forward nor backward, in stages with clusters."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return output

    model = build(implementation=implementation, **{**fields, "num_clusters": [5, 7, 6, 9]}).train(training)
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


@pytest.mark.parametrize("training", [False, True])
def test_castling_attention_against_its_equations(training):
    """Castling-ViT, section 3, written out for one query at a time: no matrix product, no shared code."""
    config = tiny_config("pacavit", **CASTLING)
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
    model = build("ForSemanticSegmentation", segmentation_head_type="linear")
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


def test_layer_decay_counts_merging_and_teachers_with_the_next_layer():
    model = build(**TEACHER)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    stages, teacher = model.pacavit.stages, model.pacavit.teacher
    for weight in (stages[1].downsampling.projection.weight, teacher.clusterings[1].clusters.weight):
        assert scale[id(weight)] == scale[id(stages[1].layers[0].attention.q_proj.weight)]


def test_processors_of_a_config():
    config = PaCaViTConfig.from_preset("tiny", image_size=512)
    processor = LocAtViTImageProcessor.from_model_config(config, segmentation=True)
    assert processor.size_divisor == 32
    assert LocAtViTImageProcessor.from_model_config(PaCaViTConfig()).size.shortest_edge == 248


def test_strides_and_channels_of_every_stage():
    backbone = build("Backbone", out_features=["stem", *ALL_STAGES])
    sizes = [(25, 33), (25, 33), (13, 17), (7, 9), (4, 5)]
    assert backbone.channels == [16, 16, 24, 40, 48]
    maps = backbone(torch.randn(1, 3, 97, 130)).feature_maps
    assert [tuple(m.shape[1:]) for m in maps] == [(c, *size) for c, size in zip(backbone.channels, sizes, strict=True)]


# ------------------------------------------------------------------------------------------------------------ detectors
HEIGHT, WIDTH = 96, 70
ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture(params=[{}, pytest.param(TEACHER, marks=pytest.mark.slow)], ids=["conv", "teacher"])
def fields(request):
    return request.param


def detection_targets():
    return [
        {"class_labels": torch.tensor(ids), "boxes": torch.tensor(boxes)}
        for ids, boxes in (([1, 3], [[0.5, 0.5, 0.4, 0.3], [0.2, 0.3, 0.2, 0.2]]), ([0], [[0.6, 0.4, 0.5, 0.5]]))
    ]


DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "num_labels": 4,
}


@pytest.mark.framework
@pytest.mark.parametrize(
    ("model_class", "config_class", "stages"),
    [
        (DetrForObjectDetection, DetrConfig, ["stage4"]),
        (DeformableDetrForObjectDetection, DeformableDetrConfig, ["stage2", "stage3", "stage4"]),
    ],
    ids=["detr", "deformable_detr"],
)
def test_detr(fields, model_class, config_class, stages, tmp_path):
    model = model_class(
        config_class(backbone_config=tiny_config("pacavit", **fields, out_features=stages), **DETR)
    ).train()
    inputs = {
        "pixel_values": torch.randn(2, 3, HEIGHT, WIDTH),
        "pixel_mask": torch.ones(2, HEIGHT, WIDTH, dtype=torch.long),
    }
    assert_trains(model, model(**inputs, labels=detection_targets()).loss)
    assert_reloads(model, tmp_path, inputs, "pred_boxes")


class PyramidBackbone(nn.Module):
    """The backbone that torchvision's detectors take: five maps of equal channels, by name."""

    def __init__(self, fields, channels=16):
        super().__init__()
        self.backbone = build("Backbone", out_features=ALL_STAGES, **fields)
        self.pyramid = FeaturePyramidNetwork(self.backbone.channels, channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images):
        return self.pyramid(OrderedDict(enumerate(self.backbone(images).feature_maps)))


def mask_rcnn(fields):
    """Mask R-CNN as in the paper, anchors of one size a level at strides 4 to 64; images are smaller, boxes fewer."""
    levels = list(range(4))
    return MaskRCNN(
        PyramidBackbone(fields),
        num_classes=4,
        min_size=HEIGHT,
        max_size=160,
        rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=0),
        mask_roi_pool=MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=0),
        rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=20,
        box_detections_per_img=5,
        # An untrained model scores nothing highly; detections are wanted to compare.
        box_score_thresh=0.0,
    )


@pytest.mark.framework
def test_mask_rcnn(fields, tmp_path):
    model = mask_rcnn(fields).train()
    images = [torch.rand(3, HEIGHT, WIDTH), torch.rand(3, 80, 120)]  # one batch, two sizes
    targets = []
    for image in images:
        height, width = image.shape[1:]
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        boxes = torch.tensor([[5.0, 8.0, 40.0, 60.0], [30.0, 20.0, width - 4.0, height - 6.0]])
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks})
    losses = model(images, targets)
    assert set(losses) == {
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
        "loss_objectness",
        "loss_rpn_box_reg",
    }
    assert_trains(model, sum(losses.values()))

    torch.save(model.state_dict(), tmp_path / "model.pt")
    reloaded = mask_rcnn(fields)
    reloaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    with torch.no_grad():
        expected, observed = model.eval()(images), reloaded.eval()(images)
    for ours, theirs in zip(expected, observed, strict=True):
        assert len(ours["boxes"]) > 0
        assert ours["labels"].equal(theirs["labels"])
        for name in ("boxes", "scores", "masks"):
            assert_same_but_for_rounding(ours[name], theirs[name])
