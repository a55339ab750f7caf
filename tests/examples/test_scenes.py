import numpy as np
import pytest
from sklearn.datasets import load_digits

from examples.digits.scenes import compose_scene, make_scenes, split_digits


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(train_size=24, validation_size=12, seed=5)


def test_same_seed_same_scenes(scenes):
    again, other = make_scenes(24, 12, seed=5), make_scenes(24, 12, seed=6)
    for split in scenes:
        for column in ("image", "segmentation"):
            pairs = zip(scenes[split][column], again[split][column], strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs)
    assert not np.array_equal(scenes["train"][0]["image"], other["train"][0]["image"])


def test_more_scenes_keep_the_first_ones(scenes):
    longer = make_scenes(30, 12, seed=5)
    assert np.array_equal(scenes["train"][23]["image"], longer["train"][23]["image"])


def test_no_digit_is_in_both_splits():
    pools = split_digits(seed=0)
    assert not set(pools["train"]) & set(pools["validation"])
    assert len(pools["train"]) + len(pools["validation"]) == len(load_digits().target)


def test_every_scene_shows_exactly_its_digit(scenes):
    for split in scenes.values():
        for row in split:
            segmentation = np.asarray(row["segmentation"])
            assert row["image"].size == (64, 64) and segmentation.shape == (64, 64)
            assert set(np.unique(segmentation)) == {0, 1 + row["label"]}
            assert 0.01 < (segmentation > 0).mean() < 0.5


def test_fragments_are_background():
    """With every digit blank but those of another class, bright strokes remain and none of them is labelled."""
    digits = load_digits()
    images = digits.images * (digits.target != 4)[:, None, None]
    scenes = (compose_scene(images, digits.target, 64, np.random.default_rng(seed)) for seed in range(60))
    fours = [(image, segmentation) for image, label, segmentation in scenes if label == 4]
    assert fours
    for image, segmentation in fours:
        assert not np.asarray(segmentation).any() and np.asarray(image).max() > 150


def test_scenes_have_a_smallest_size():
    with pytest.raises(ValueError, match="at least 32 pixels"):
        make_scenes(1, 1, image_size=16)
