"""Detectors: where they read maps and draw masks, and what a saved one answers."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from locatvit_hf.detection import load_detector
from locatvit_hf.detection.heads import PyramidRoIAlign, paste_masks
from tests.detection.detectors import ENCODERS, assert_same_objects, small_detector


def test_a_saved_detector_answers_the_same(tmp_path):
    detector = small_detector(score_threshold=0.0, max_detections=10).eval()
    detector.save_pretrained(tmp_path / "saved")
    reloaded = load_detector(tmp_path / "saved")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    expected, observed = detector.detect(image), reloaded.detect(image)
    assert len(expected["boxes"]) == 10
    assert_same_objects(observed, expected)
    image.save(tmp_path / "image.png")
    assert_same_objects(reloaded.detect(tmp_path / "image.png"), expected)
    weights = detector.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in reloaded.state_dict().items())
    (tmp_path / "saved" / "detector.json").unlink()
    with pytest.raises(ValueError, match="is not a detector"):
        load_detector(tmp_path / "saved")


def test_regions_are_read_at_the_centers_of_cells():
    """Over a map that holds the place of each cell, a region averages to its own center."""
    stride = 8
    centers = stride * (torch.arange(20.0) + 0.5)
    maps = {"0": torch.stack(torch.meshgrid(centers, centers, indexing="ij"))[None].expand(2, -1, -1, -1)}
    maps |= {str(level): torch.zeros(2, 2, 4, 4) for level in (1, 2, 3)}
    boxes = [
        torch.tensor([[20.0, 30.0, 90.0, 71.0], [40.5, 33.0, 47.0, 60.0]]),
        torch.tensor([[24.0, 24.0, 100.0, 99.0]]),
    ]
    middle = torch.cat([torch.stack([(b[:, 1] + b[:, 3]) / 2, (b[:, 0] + b[:, 2]) / 2], 1) for b in boxes])
    shapes = [(160, 160)] * 2
    pooled = PyramidRoIAlign(7, stride, aligned=True)(maps, boxes, shapes)
    assert pooled.shape == (3, 2, 7, 7)
    torch.testing.assert_close(pooled.mean(dim=(2, 3)), middle, rtol=0, atol=1e-3)
    # As torchvision does it, half a cell beside; a region narrower than a cell is widened.
    old = PyramidRoIAlign(7, stride, aligned=False)(maps, boxes, shapes).mean(dim=(2, 3))
    torch.testing.assert_close(old[[0, 2]], middle[[0, 2]] + stride / 2, rtol=0, atol=1e-3)


def test_regions_of_every_size_come_from_their_map():
    """The side at which a region goes to the next map, as in the feature pyramid's paper: 112, 224, 448 pixels."""
    maps = {str(level): torch.full((1, 1, 256 >> level, 256 >> level), float(level)) for level in range(4)}
    sides = torch.tensor([8.0, 111, 113, 223, 225, 447, 449, 900])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], 1)
    pooled = PyramidRoIAlign(7, 4, aligned=True)(maps, [boxes], [(1024, 1024)])
    assert pooled[:, 0, 3, 3].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a & b).sum() / (a | b).sum()).item()


def test_masks_are_learned_and_drawn_where_objects_are(monkeypatch):
    """What the mask head is to predict, drawn into the image again, is the mask itself."""
    targets = []
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def record(logits, target, **options):
        targets.append(target)
        return loss(logits, target, **options)

    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy_with_logits", record)
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    disc = ((rows - 30.3) / 9) ** 2 + ((columns - 25.6) / 12) ** 2 <= 1
    box = torch.tensor([[13.6, 21.3, 37.6, 39.3]])
    target = {"boxes": box, "labels": torch.tensor([0]), "masks": disc[None].to(torch.uint8)}
    agreement = {}
    for aligned in (True, False):
        detector = small_detector(roi_aligned=aligned).train()
        detector.model.roi_heads.select_training_samples = lambda *_: (
            [box],
            [torch.tensor([0])],
            [torch.tensor([1])],
            [torch.zeros(1, 4)],
        )
        detector([torch.rand(3, 64, 64)], [target])
        (mask,) = [target for target in targets if target.ndim == 3]
        found = [{"boxes": box, "masks": mask[None]}]
        (pasted,) = detector.model.transform.eval().postprocess(found, [(64, 64)], [(64, 64)])
        agreement[aligned] = overlap(pasted["masks"][0], disc)
        targets.clear()
    assert agreement[True] > 0.99 and agreement[False] < 0.95


def test_masks_are_drawn_to_a_fraction_of_a_pixel():
    """Full masks cover the pixels whose centers lie in their boxes, cut at the edge of the image."""
    boxes = torch.tensor([[2.4, 3.0, 7.6, 5.4], [-5.0, -5.0, 3.0, 2.0], [8.0, 8.0, 30.0, 30.0], [4.6, 4.6, 5.4, 5.4]])
    pasted = paste_masks(torch.ones(4, 1, 28, 28), boxes, (12, 10))
    assert pasted.shape == (4, 12, 10)
    expected = torch.zeros(4, 12, 10, dtype=torch.bool)
    expected[0, 3:5, 2:8] = expected[1, :2, :3] = expected[2, 8:, 8:] = True
    assert torch.equal(pasted, expected)
    half = torch.zeros(1, 1, 28, 28)
    half[..., :14] = 1
    assert (
        paste_masks(half, torch.tensor([[0.0, 0.0, 10.0, 12.0]]), (12, 10))[0].sum(dim=0).tolist() == [12] * 5 + [0] * 5
    )


def test_a_detector_without_the_option_keeps_its_function(tmp_path):
    """One that was trained with torchvision's own heads: as these, from a folder that does not name how it reads."""
    detector = small_detector(roi_aligned=False, score_threshold=0.0, max_detections=10).eval()
    detector.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "detector.json").read_text())
    for name in (
        "roi_aligned",
        "train_proposals",
        "train_proposals_per_level",
        "test_proposals",
        "test_proposals_per_level",
    ):
        del content["settings"][name]
    (tmp_path / "detector.json").write_text(json.dumps(content))
    loaded = load_detector(tmp_path)
    assert not loaded.settings.roi_aligned and loaded.settings.train_proposals == 2000

    heads, channels = detector.model.roi_heads, 8
    pools = [MultiScaleRoIAlign(["0", "1", "2", "3"], side, 0) for side in (7, 14)]
    for pool, ours in zip(pools, (heads.box_roi_pool, heads.mask_roi_pool), strict=True):
        pool.scales, pool.map_levels = ours.scales, ours.map_levels
    theirs = MaskRCNN(
        detector.model.backbone,
        rpn_anchor_generator=detector.model.rpn.anchor_generator,
        box_roi_pool=pools[0],
        box_head=TwoMLPHead(channels * 7**2, 4 * channels),
        box_predictor=FastRCNNPredictor(4 * channels, 3),
        mask_roi_pool=pools[1],
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
        mask_predictor=MaskRCNNPredictor(channels, channels, 3),
        box_score_thresh=0.0,
        box_detections_per_img=10,
        min_size=64,
        max_size=96,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    theirs.load_state_dict(loaded.model.state_dict())
    image = torch.rand(3, 64, 80)
    with torch.no_grad():
        (expected,), (found,) = theirs.eval()([image]), loaded([image])
    assert len(found["boxes"]) == 10
    assert_same_objects(found, {**expected, "labels": expected["labels"] - 1, "masks": expected["masks"][:, 0] > 0.5})
    with torch.no_grad():
        (other,) = small_detector(score_threshold=0.0, max_detections=10).eval()([image])
    assert not torch.allclose(other["scores"], found["scores"], atol=1e-4)  # the default reads elsewhere

    target = {"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    target["masks"] = torch.zeros(1, 64, 80, dtype=torch.uint8)
    target["masks"][0, 6:50, 4:40] = 1
    theirs.transform, losses = loaded.model.transform, []  # theirs draws a size at random
    for model, labels in ((theirs, torch.tensor([2])), (loaded, target["labels"])):
        torch.manual_seed(5)
        losses.append(model.train()([image.clone()], [{**target, "labels": labels}]))
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_are_exact_in_mixed_precision(dtype):
    """Half precision leaves 8 or 11 bits: pixels beside, at the far side of an image."""
    detector, regions = small_detector(score_threshold=0.0), []
    detector.model.roi_heads.register_forward_pre_hook(lambda _, inputs: regions.extend(inputs[1]))
    target = {"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 64, 80, dtype=torch.uint8)
    with torch.autocast("cpu", dtype), torch.no_grad():
        losses = detector.train()([torch.rand(3, 64, 80)], [target])
        (found,) = detector.eval()([torch.rand(3, 64, 80)])
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert len(regions) == 2
    for boxes in (*regions, found["boxes"]):
        assert boxes.dtype == torch.float32 and not torch.equal(boxes, boxes.to(dtype).float())


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("masks", [True, False])
def test_every_encoder_learns(family, masks):
    """One step of the loss reaches every trainable parameter, whatever strides the encoder has by itself."""
    detector = small_detector(family, masks=masks)
    strides = [64 // level.shape[-1] for level in detector.encoder(torch.zeros(1, 3, 64, 64)).feature_maps]
    assert strides == [4, 8, 16, 32]
    anchors = detector.model.rpn.anchor_generator.sizes
    assert [size for (size,) in anchors] == [16, 32, 64, 128, 256]

    boxes, labels = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 8.0, 60.0, 30.0]]), torch.tensor([0, 1])
    target = {"boxes": boxes, "labels": labels}
    if masks:
        target["masks"] = torch.zeros(2, 64, 64, dtype=torch.uint8)
        target["masks"][0, 6:50, 4:40] = target["masks"][1, 8:30, 20:60] = 1
    nothing = {name: value[:0] for name, value in target.items()}
    losses = detector.train()([torch.rand(3, 64, 64), torch.rand(3, 48, 64)], [target, copy.deepcopy(nothing)])
    assert ("loss_mask" in losses) == masks
    sum(losses.values()).backward()
    without = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
