import random

import numpy as np
import pytest
import torch
from PIL import Image

from training.augmentation import (
    ClassificationAugmentation,
    ClassificationTransform,
    SegmentationAugmentation,
    SegmentationTransform,
    classification_objective,
    read_labels,
)
from training.data import sample_randomness

MEAN = STD = [0.5, 0.5, 0.5]


@pytest.mark.parametrize("seed", range(12))
def test_image_and_mask_move_together(seed):
    """One white pixel carries the only label: wherever the label lands, the image is white."""
    pixels, classes = np.zeros((32, 40, 3), np.uint8), np.zeros((32, 40), np.uint8)
    row, column = np.random.default_rng(seed).integers(8, 24, 2)
    pixels[row, column], classes[row, column] = 255, 1
    settings = SegmentationAugmentation(
        resize=64, scale=[0.9, 1.6], crop_size=80, photometric_distortion=0.0, max_class_share=1.0
    )
    transform = SegmentationTransform(settings, num_labels=2, mean=MEAN, std=STD)
    with sample_randomness(seed):
        image, labels = transform(Image.fromarray(pixels), Image.fromarray(classes))

    assert image.shape == (3, 80, 80) and labels.shape == (80, 80) and labels.dtype == torch.int64
    assert set(labels.unique().tolist()) <= {0, 1, 255}
    brightness = image.mean(dim=0) * (labels != 255) + 1  # the padding is mean grey
    if not (labels == 1).any():
        assert brightness[labels == 0].max() < 0.6  # cut off in both
        return
    rows, columns = torch.nonzero(labels == 1, as_tuple=True)
    center = torch.stack([rows.float().mean(), columns.float().mean()])
    weight = brightness * (labels != 255)
    positions = torch.stack(torch.meshgrid(torch.arange(80.0), torch.arange(80.0), indexing="ij"))
    brightest = (positions * weight).sum(dim=(1, 2)) / weight.sum()
    assert (center - brightest).abs().max() <= 1.0


def test_randomness_belongs_to_the_sample():
    settings = ClassificationAugmentation()
    transform = ClassificationTransform(settings, 32, MEAN, STD)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))

    def augment(*key):
        with sample_randomness(*key):
            return transform(image, 0)[0]

    first = augment(0, 1, 2)
    torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(first, augment(0, 1, 2))
    assert not torch.equal(first, augment(0, 2, 2)) and not torch.equal(first, augment(0, 1, 3))


def test_randomness_outside_is_untouched():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with sample_randomness(5):
        torch.rand(7), np.random.rand(7), random.random()
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_crops_avoid_a_single_class():
    classes = np.zeros((40, 40), np.uint8)
    classes[:20] = 1
    settings = SegmentationAugmentation(resize=40, scale=[1.0, 1.0], crop_size=16, photometric_distortion=0.0)
    transform = SegmentationTransform(settings, num_labels=2, mean=MEAN, std=STD)
    image, label_map = Image.new("RGB", (40, 40)), Image.fromarray(classes)
    shares = []
    for seed in range(20):
        with sample_randomness(seed):
            shares.append(transform(image, label_map)[1].float().mean().item())
    assert np.mean([0.25 <= share <= 0.75 for share in shares]) > 0.8


def test_labels_are_reduced_and_checked():
    label_map = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8))
    image = Image.new("RGB", (2, 2))
    assert read_labels(image, label_map, 2, reduce_labels=True).tolist() == [[255, 0], [1, 255]]
    with pytest.raises(ValueError, match="outside the 2 classes"):
        read_labels(image, label_map, 2, reduce_labels=False)
    with pytest.raises(ValueError, match="label map is"):
        read_labels(Image.new("RGB", (3, 2)), label_map, 3, reduce_labels=False)


def test_mixing_keeps_every_target_a_distribution():
    mix, criterion = classification_objective(ClassificationAugmentation(), num_labels=5)
    images, targets = mix(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert images.shape == (4, 3, 8, 8)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    assert criterion(torch.zeros(4, 5), targets).item() == pytest.approx(np.log(5), rel=1e-5)
