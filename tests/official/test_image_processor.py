"""The tests of transformers for image processors, on the one processor of all families."""

import unittest

import numpy as np
from PIL import Image
from transformers_tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)

from locatvit_hf import LocAtViTImageProcessor


class LocAtViTImageProcessingTester(ImageProcessingTester):
    """A classification processor: shortest edge, then a centre crop."""

    def __init__(self, parent: unittest.TestCase, **kwargs: object) -> None:
        kwargs.setdefault("size", {"shortest_edge": 20})
        kwargs.setdefault("crop_size", {"height": 18, "width": 18})
        kwargs.setdefault("image_mean", [0.5, 0.4, 0.3])
        kwargs.setdefault("image_std", [0.5, 0.6, 0.7])
        self.num_labels = 5
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self) -> dict[str, type]:
        # transformers looks its own processors up by the name of the test's folder.
        return {"torchvision": LocAtViTImageProcessor}

    def prepare_semantic_segmentation_inputs_ade20k(self, batched: bool = False) -> tuple[object, object]:
        # The library downloads two photographs; noise of the same kind serves without a network.
        generator = np.random.default_rng(0)
        images = [Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)) for _ in range(2)]
        maps = [Image.fromarray(generator.integers(0, 151, (60, 80), dtype=np.uint8)) for _ in range(2)]
        return (images, maps) if batched else (images[0], maps[0])

    def prepare_post_process_semantic_segmentation_inputs(self) -> tuple[dict[str, object], dict[str, int]]:
        # The library takes the map's size from size["height"]; ours is given by its shortest edge.
        size, self.size = self.size, {"height": 18, "width": 18}
        try:
            return super().prepare_post_process_semantic_segmentation_inputs()
        finally:
            self.size = size


class LocAtViTImageProcessingTest(
    ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase
):
    image_processor_tester_class = LocAtViTImageProcessingTester
    # A dtype switches the library's test of casting on.
    test_cast_dtype = True


class SegmentationProcessingTester(LocAtViTImageProcessingTester):
    """A segmentation processor: both sides resized to multiples of the patch, nothing cropped."""

    def __init__(self, parent: unittest.TestCase) -> None:
        super().__init__(
            parent,
            size={"height": 16, "width": 24},
            crop_size=None,
            do_center_crop=False,
            size_divisor=8,
            do_reduce_labels=True,
        )


class SegmentationProcessingTest(LocAtViTImageProcessingTest):
    image_processor_tester_class = SegmentationProcessingTester
