import colorsys
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from training.data import sample_randomness
from training.data.label_maps import LabelArguments, LabelReader, resize_labels
from training.evaluation.hummingbird import JointTransform
from training.tasks.classification import ClassificationAugmentation, ClassificationTransform, classification_objective
from training.tasks.segmentation.augmentation import (
    PhotometricDistortion,
    RandomCropOfClasses,
    SegmentationAugmentation,
    SegmentationTransform,
)

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
    brightness = image.mean(dim=0) * (labels != 255) + 1  # the padding is mean gray
    if not (labels == 1).any():
        assert brightness[labels == 0].max() < 0.6  # cut off in both
        return
    rows, columns = torch.nonzero(labels == 1, as_tuple=True)
    center = torch.stack([rows.float().mean(), columns.float().mean()])
    weight = brightness * (labels != 255)
    positions = torch.stack(torch.meshgrid(torch.arange(80.0), torch.arange(80.0), indexing="ij"))
    brightest = (positions * weight).sum(dim=(1, 2)) / weight.sum()
    assert (center - brightest).abs().max() <= 1.0


@pytest.mark.parametrize(("width", "side"), [(512, 64), (250, 188), (64, 64), (32, 64)])
def test_labels_lie_on_their_image_after_resizing(width, side):
    """Both are resized around pixel centers; half a pixel to one side is what `tv_tensors.Mask` would give."""
    arguments = SegmentationAugmentation(
        resize=side, max_resize=4096, scale=[1, 1], crop_size=side, max_class_share=1.0, horizontal_flip=0.0,
        photometric_distortion=0.0,
    )  # fmt: skip
    segment = SegmentationTransform(arguments, 2, [0.0] * 3, [1.0] * 3)
    config = SimpleNamespace(image_size=side, num_channels=3, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    retrieve = JointTransform(config, LabelReader(LabelArguments(), 2), 0, 0, augment=False)
    for transform in (segment, lambda *row: retrieve(*row, 0)):
        shifts = []
        for edge in range(width // 4, 3 * width // 4, width // 70 or 3):
            pixels, classes = np.zeros((4, width, 3), np.uint8), np.zeros((4, width), np.uint8)
            pixels[:, edge:], classes[:, edge:] = 255, 1
            pixels, classes = (np.repeat(a, width // 4, axis=0) for a in (pixels, classes))
            image, labels = transform(Image.fromarray(pixels), Image.fromarray(classes))
            shifts.append(float(image[0, side // 2].sum() - labels[side // 2].float().sum()))
        assert abs(np.mean(shifts)) < 0.2 and max(map(abs, shifts)) < 0.6


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
    assert LabelReader(LabelArguments(reduce_labels=True), 2)(image, label_map).tolist() == [[255, 0], [1, 255]]
    with pytest.raises(ValueError, match="outside the 2 classes"):
        LabelReader(LabelArguments(), 2)(image, label_map)
    with pytest.raises(ValueError, match="label map is"):
        LabelReader(LabelArguments(), 3)(Image.new("RGB", (3, 2)), label_map)


def test_mixing_keeps_every_target_a_distribution():
    mix, criterion = classification_objective(ClassificationAugmentation(), num_labels=5)
    images, targets = mix(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert images.shape == (4, 3, 8, 8)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    assert criterion(torch.zeros(4, 5), targets).item() == pytest.approx(np.log(5), rel=1e-5)


@pytest.mark.parametrize("mixing", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}])
def test_images_are_erased_after_they_are_mixed(mixing):
    """The noise in a rectangle is neither blended with another image nor cut out with it."""
    settings = ClassificationAugmentation(random_erasing=1.0, auto_augment=None, **mixing)
    single = ClassificationTransform(settings, 32, MEAN, STD)(Image.new("RGB", (32, 32), (255, 255, 255)), 0)[0]
    torch.testing.assert_close(single, torch.ones(3, 32, 32))
    mix, _ = classification_objective(settings, num_labels=2)
    for seed in range(5):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        images, _ = mix(torch.full((8, 3, 32, 32), 100.0), torch.arange(8) % 2)
        for image in images:
            noise = (image != 100).any(dim=0)
            rows, columns = noise.any(dim=1).nonzero()[:, 0], noise.any(dim=0).nonzero()[:, 0]
            area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            assert noise.sum() == area and 0.01 < area / 32**2 < 0.4  # one whole rectangle
            values = image[:, noise]
            assert abs(values.mean()) < 0.5 and 0.6 < values.std() < 1.4


def test_without_mixing_an_image_is_erased_in_its_own_sample():
    """There its randomness does not depend on how a batch is divided."""
    settings = ClassificationAugmentation(random_erasing=1.0, mixup=0.0, cutmix=0.0, auto_augment=None)
    transform = ClassificationTransform(settings, 32, MEAN, STD)
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    with sample_randomness(0, 0):
        first = transform(white, 0)[0]
    with sample_randomness(0, 0):
        again = transform(white, 0)[0]
    assert (first != 1).any() and (first == 1).any() and torch.equal(first, again)
    images = torch.full((4, 3, 8, 8), 100.0)
    assert torch.equal(classification_objective(settings, 5)[0](images.clone(), torch.arange(4))[0], images)


def test_distortion_is_that_of_mmsegmentation():
    distort, unchanged = PhotometricDistortion(), dict.fromkeys(("brightness", "contrast", "saturation", "hue"))
    unchanged["contrast_last"] = True
    pixels = tv_tensors.Image(torch.tensor([[200, 250], [100, 250], [50, 250]], dtype=torch.uint8)[..., None])

    def first(**changes):
        return distort.transform(pixels, {**unchanged, **changes})[:, :, 0].T.tolist()

    assert first() == [[200, 100, 50], [250, 250, 250]]
    assert first(brightness=20.0) == [[220, 120, 70], [255, 255, 255]]  # added, and cut off at white
    assert first(brightness=-60.0)[0] == [140, 40, 0]
    assert first(contrast=0.5) == [[100, 50, 25], [125, 125, 125]]  # times, not around the mean
    assert first(contrast=1.5, brightness=-50.0)[0] == [225, 75, 0]
    hue, saturation, value = colorsys.rgb_to_hsv(200, 100, 50)
    for factor in (0.5, 1.2, 1.5):
        expected = colorsys.hsv_to_rgb(hue, min(saturation * factor, 1), value)
        assert first(saturation=factor) == [pytest.approx(expected, abs=1), [250, 250, 250]]
    for turn in (-0.1, 0.1):
        assert first(hue=turn)[0] == pytest.approx(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), abs=1.5)
    labels = tv_tensors.Mask(torch.arange(4).reshape(2, 2))
    assert torch.equal(distort.transform(labels, {**unchanged, "brightness": 9.0}), labels)

    torch.manual_seed(0)
    drawn = [distort.make_params([]) for _ in range(2000)]
    for name, (low, high) in {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5)}.items():
        values = [params[name] for params in drawn if params[name] is not None]
        assert 900 < len(values) < 1100  # half, within four standard deviations
        assert low <= min(values) < low + (high - low) / 50 and high - (high - low) / 50 < max(values) <= high
    hues = [params["hue"] for params in drawn if params["hue"] is not None]
    assert -0.1 <= min(hues) < -0.095 and 0.095 < max(hues) <= 0.1
    assert 900 < sum(params["contrast_last"] for params in drawn) < 1100


def test_small_crops_are_padded_with_zeros_right_and_below():
    settings = SegmentationAugmentation(resize=20, scale=[0.5, 0.9], crop_size=24, photometric_distortion=1.0)
    transform = SegmentationTransform(settings, num_labels=2, mean=[0.3, 0.4, 0.5], std=[0.2, 0.2, 0.2])
    noise = Image.fromarray(np.random.default_rng(0).integers(90, 256, (20, 28, 3), dtype=np.uint8))
    sizes = set()
    for seed in range(10):
        with sample_randomness(seed):
            pixels, labels = transform(noise, Image.new("L", noise.size))
        assert pixels.shape == (3, 24, 24) and labels.shape == (24, 24)
        inside = labels == 0
        height, width = int(inside[:, 0].sum()), int(inside[0].sum())
        assert inside[:height, :width].all() and inside.sum() == height * width and height < 24
        assert (labels[~inside] == 255).all() and (pixels[:, ~inside] == 0).all()
        assert (pixels[:, inside] != 0).float().mean() > 0.9
        sizes.add((height, width))
    assert len(sizes) > 3


def test_crops_are_drawn_ten_times_more():
    """As in mmsegmentation: the last of eleven draws is not looked at."""
    crop = RandomCropOfClasses(4, max_class_share=0.75)
    draws = []
    crop._draw = lambda height, width: draws.append(1) or {"top": 0, "left": 0, "height": 4, "width": 4}
    crop.make_params([tv_tensors.Mask(torch.zeros(8, 8, dtype=torch.int64))])
    assert len(draws) == 11
    crop.make_params([tv_tensors.Mask(torch.arange(64).reshape(8, 8) % 2)])
    assert len(draws) == 12


@pytest.mark.parametrize(("interpolation", "shift"), [("nearest-exact", 0.0), ("nearest", 0.5)])
def test_labels_lie_on_their_image_or_as_in_opencv(interpolation, shift):
    """Of an image made eight times smaller, where the labels begin beside the brightness."""
    settings = SegmentationAugmentation(
        resize=16, max_resize=999, scale=[1, 1], crop_size=16, max_class_share=1.0, horizontal_flip=0.0,
        photometric_distortion=0.0, label_interpolation=interpolation,
    )  # fmt: skip
    transform = SegmentationTransform(settings, 2, [0.0] * 3, [1.0] * 3)
    shifts = []
    for edge in range(32, 96, 3):
        pixels, labels = np.zeros((128, 128, 3), np.uint8), np.zeros((128, 128), np.uint8)
        pixels[:, edge:], labels[:, edge:] = 255, 1
        image, label_map = transform(Image.fromarray(pixels), Image.fromarray(labels))
        shifts.append((image[0, 8].sum() - label_map[8].sum()).item())
    assert np.mean(shifts) == pytest.approx(shift, abs=0.12)
    assert set(resize_labels(torch.tensor([[0, 7], [255, 3]]), (5, 9), interpolation).unique().tolist()) == {
        0,
        3,
        7,
        255,
    }


def test_the_style_of_stored_runs_stays():
    """The numbers are those of commit 8c89ef6: means of the channels, and pixels of each label."""
    settings = SegmentationAugmentation(
        resize=40, scale=[0.5, 1.0], crop_size=32, photometric_distortion=1.0, augmentation_style="torchvision",
        label_interpolation="nearest",
    )  # fmt: skip
    transform = SegmentationTransform(settings, 3, [0.5] * 3, [0.25] * 3)
    y, x = np.mgrid[:50, :70]
    image = Image.fromarray(np.stack([3 * x, 4 * y, 2 * (x + y)], -1).astype(np.uint8))
    labels = Image.fromarray((x // 25).astype(np.uint8))
    for seed, means, counts in (
        (0, [-0.272, -0.353, -0.077], [264, 242, 176, 342]),
        (1, [-0.595, -0.659, -0.454], [416, 576, 32, 0]),
        (2, [-0.908, -0.688, -0.500], [480, 512, 32, 0]),
    ):
        with sample_randomness(seed):
            pixels, classes = transform(image, labels)
        assert [int((classes == label).sum()) for label in (0, 1, 2, 255)] == counts
        # A level of 255 is 0.016 here; colors are rounded to levels in several steps.
        assert pixels.mean(dim=(1, 2)).tolist() == pytest.approx(means, abs=0.008)
