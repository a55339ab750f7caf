"""A PaCa-ViT backbone inside the dense-prediction frameworks of transformers, and inside torchvision's Mask R-CNN.

Each takes a training step with finite loss in which every parameter of the backbone gets a gradient, and the assembled
model, saved and loaded, gives the same outputs.
"""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from locatvit_hf import PaCaViTBackbone, PaCaViTConfig
from tests.tolerances import assert_same_but_for_rounding

VARIANTS = {
    "conv": {},
    "teacher": {"clustering_type": "teacher", "num_clusters": [5, 7, 6, 9], "teacher_depths": [1, 1, 1, 1]},
}
HEIGHT, WIDTH = 96, 70
ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def backbone_config(variant, out_features=ALL_STAGES):
    fields = {
        "hidden_sizes": [16, 24, 40, 48],
        "depths": [1, 2, 2, 1],
        "num_attention_heads": [2, 3, 5, 6],
        "num_clusters": [5, 7, 6, 0],
        "out_features": list(out_features),
    }
    return PaCaViTConfig(**{**fields, **VARIANTS[variant]})


def pixels(batch=2):
    return torch.randn(batch, 3, HEIGHT, WIDTH)


def assert_trains(model, backbone, loss):
    """A step of an optimiser changes every parameter of the backbone."""
    assert torch.isfinite(loss)
    loss.backward()
    trainable = {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trainable
    assert [name for name, parameter in trainable.items() if parameter.grad is None] == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainable.values())
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()


def assert_reloads(model, folder, inputs, read):
    """Saved and loaded, the model gives equal outputs. `read` takes the tensor out of an output."""
    model.save_pretrained(folder)
    reloaded = type(model).from_pretrained(folder)
    with torch.no_grad():
        expected, observed = (read(network.eval()(**inputs)) for network in (model, reloaded))
    assert_same_but_for_rounding(observed, expected)


def test_strides_and_channels(variant):
    backbone = PaCaViTBackbone(backbone_config(variant, ["stem", *ALL_STAGES])).eval()
    feature_maps = backbone(torch.randn(1, 3, 97, 130)).feature_maps
    assert backbone.channels == [16, 16, 24, 40, 48]
    assert [tuple(feature_map.shape[1:]) for feature_map in feature_maps] == [
        (16, 25, 33),
        (16, 25, 33),
        (24, 13, 17),
        (40, 7, 9),
        (48, 4, 5),
    ]


def test_upernet(variant, tmp_path):
    config = UperNetConfig(
        backbone_config=backbone_config(variant),
        hidden_size=16,
        auxiliary_in_channels=40,
        auxiliary_channels=8,
        num_labels=5,
    )
    model = UperNetForSemanticSegmentation(config).train()
    inputs = {"pixel_values": pixels()}
    labels = torch.randint(0, 5, (2, HEIGHT, WIDTH))
    assert_trains(model, model.backbone, model(**inputs, labels=labels).loss)
    assert model(**inputs).logits.shape == (2, 5, HEIGHT, WIDTH)
    assert_reloads(model, tmp_path, inputs, lambda outputs: outputs.logits)


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_mask2former(variant, task, tmp_path):
    config = Mask2FormerConfig(
        backbone_config=backbone_config(variant),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        train_num_points=64,
        num_labels=4,
    )
    model = Mask2FormerForUniversalSegmentation(config).train()
    inputs = {"pixel_values": pixels()}
    # Semantic: one mask for each class that an image shows. Instance: several masks of one class.
    classes = [[0, 1, 3], [2]] if task == "semantic" else [[1, 1, 2], [3, 3]]
    targets = {
        "mask_labels": [(torch.rand(len(ids), HEIGHT, WIDTH) > 0.7).float() for ids in classes],
        "class_labels": [torch.tensor(ids) for ids in classes],
    }
    backbone = model.model.pixel_level_module.encoder
    assert_trains(model, backbone, model(**inputs, **targets).loss.squeeze())
    assert_reloads(model, tmp_path, inputs, lambda outputs: outputs.masks_queries_logits)


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


@pytest.mark.parametrize(
    ("model_class", "config_class", "stages"),
    [
        (DetrForObjectDetection, DetrConfig, ["stage4"]),
        (DeformableDetrForObjectDetection, DeformableDetrConfig, ["stage2", "stage3", "stage4"]),
    ],
    ids=["detr", "deformable_detr"],
)
def test_detr(variant, model_class, config_class, stages, tmp_path):
    model = model_class(config_class(backbone_config=backbone_config(variant, stages), **DETR)).train()
    inputs = {"pixel_values": pixels(), "pixel_mask": torch.ones(2, HEIGHT, WIDTH, dtype=torch.long)}
    (backbone,) = {module for module in model.modules() if isinstance(module, PaCaViTBackbone)}
    assert_trains(model, backbone, model(**inputs, labels=detection_targets()).loss)
    assert_reloads(model, tmp_path, inputs, lambda outputs: outputs.pred_boxes)


class PyramidBackbone(nn.Module):
    """The backbone that torchvision's detectors take: five maps of equal channels, by name."""

    def __init__(self, config, channels=16):
        super().__init__()
        self.backbone = PaCaViTBackbone(config)
        self.pyramid = FeaturePyramidNetwork(self.backbone.channels, channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images):
        return self.pyramid(OrderedDict(enumerate(self.backbone(images).feature_maps)))


def mask_rcnn(variant):
    """Mask R-CNN as in the paper, anchors of one size a level at strides 4 to 64; images are smaller, boxes fewer."""
    levels = list(range(4))
    return MaskRCNN(
        PyramidBackbone(backbone_config(variant)),
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


def test_mask_rcnn(variant, tmp_path):
    model = mask_rcnn(variant).train()
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
    assert_trains(model, model.backbone.backbone, sum(losses.values()))

    torch.save(model.state_dict(), tmp_path / "model.pt")
    reloaded = mask_rcnn(variant)
    reloaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    with torch.no_grad():
        expected, observed = model.eval()(images), reloaded.eval()(images)
    for ours, theirs in zip(expected, observed, strict=True):
        assert len(ours["boxes"]) > 0
        assert ours["labels"].equal(theirs["labels"])
        for name in ("boxes", "scores", "masks"):
            assert_same_but_for_rounding(ours[name], theirs[name])
