"""Class maps of whole images: windows, mirrored images, scales, and images of many sizes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from locatvit_hf import (
    LocAtViTImageProcessor,
)
from locatvit_hf.inference import InferenceArguments, Segmenter
from locatvit_hf.inference import segmenter as segmenter_module
from locatvit_hf.inference.segmenter import upsampled_argmax
from tests.factories import SMALLEST, model_class, tiny_config
from tests.tolerances import assert_same_but_for_rounding, assert_same_labels
from training.data.label_maps import LabelArguments, LabelReader
from training.tasks.segmentation.evaluation import SegmentationCollator, evaluate

SIZE = {"shortest_edge": 24, "longest_edge": 96}


def build(kind: str):
    """(model, processor) with random weights that tell the classes apart."""
    torch.manual_seed(0)
    family = "pacavit" if kind == "pacavit" else "locatvit"
    fields = {"segmentation_hidden_size": 8, "initializer_range": 0.5, **SMALLEST[family]}
    if kind == "pacavit":
        fields["segmentation_head_type"] = "linear"
    else:
        fields |= {"num_hidden_layers": 4, "feature_pyramid": kind == "upernet"}
    config, options = tiny_config(family, **fields), {}
    if kind == "upernet":
        upernet = UperNetConfig(backbone_config=config, num_labels=5, hidden_size=8, auxiliary_channels=8)
        model, options = UperNetForSemanticSegmentation(upernet), {"output_stride": [1, 1]}
    else:
        model = model_class(family, "ForSemanticSegmentation")(config)
    processor = LocAtViTImageProcessor.from_model_config(config, segmentation=True, size=SIZE, **options)
    return model.eval(), processor


@pytest.fixture(scope="module", params=["locatvit", "pacavit", "upernet"])
def segmenter(request):
    return build(request.param)


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def segment_image(model, processor, image: Image.Image, arguments: InferenceArguments | None = None) -> torch.Tensor:
    (class_map,) = Segmenter(model, processor, arguments)([image])
    return torch.from_numpy(class_map)


def scores(segmenter, image: Image.Image, size: dict = SIZE) -> torch.Tensor:
    """Logits at the size of the image, as the pipeline makes them."""
    model, processor = segmenter
    with torch.no_grad():
        outputs = model(**processor(image, size=size, return_tensors="pt"))
    return processor.post_process_semantic_segmentation(
        outputs, target_sizes=[(image.height, image.width)], size=size, return_segmentation_scores=True
    )[0]["segmentation_scores"]


def test_whole_image_is_what_the_pipeline_gives(segmenter):
    image = make_image(43, 31)
    found = segment_image(*segmenter, image)
    assert_same_labels(found, scores(segmenter, image).argmax(dim=0))
    assert found.shape == (31, 43) and len(found.unique()) > 1


def test_a_window_that_covers_the_image_changes_nothing(segmenter):
    image = make_image(43, 31)
    sliding = InferenceArguments(inference="sliding", window_size=96, window_stride=32)
    assert_same_labels(segment_image(*segmenter, image, sliding), segment_image(*segmenter, image))


def test_windows_average_their_logits():
    """Against a sum over pixels, window by window, for a model whose cells are single pixels."""
    model, processor = segmenter = build("upernet")
    image = make_image(60, 28)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    (height, width), window, total, count = pixels.shape[-2:], 16, 0.0, 0.0
    assert (height, width) == (24, 52)
    for top in (0, 8):  # strides of 10 start on multiples of 4 pixels; the last windows end with the image
        for left in (0, 8, 20, 28, 36):
            with torch.no_grad():
                logits = model(pixel_values=pixels[:, :, top : top + window, left : left + window]).logits
            margins = (left, width - left - window, top, height - top - window)
            total, count = total + F.pad(logits, margins), count + F.pad(torch.ones_like(logits), margins)
    assert count.min() >= 1 and count.max() > 1
    sliding = InferenceArguments(inference="sliding", window_size=window, window_stride=10)
    assert_same_but_for_rounding(Segmenter(model, processor, sliding).compute_logits(pixels), total / count)
    found = segment_image(*segmenter, image, sliding)
    assert_same_labels(found, F.interpolate(total / count, (28, 60), mode="bilinear")[0].argmax(dim=0))
    assert not torch.equal(found, segment_image(*segmenter, image))


def test_windows_bound_what_the_model_sees(segmenter):
    model, processor = segmenter
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(tuple(options["pixel_values"].shape)), with_kwargs=True
    )
    segment_image(model, processor, make_image(400, 50), InferenceArguments(inference="sliding", window_size=32))
    handle.remove()
    assert len(seen) >= 3 and all(batch == 1 and max(sides) <= 32 for batch, _, *sides in seen)


def test_views_average_their_probabilities(segmenter):
    image = make_image(43, 31)
    probabilities = 0.0
    for scale in (1.0, 1.5):
        size = {side: round(scale * pixels) for side, pixels in SIZE.items()}
        probabilities = probabilities + scores(segmenter, image, size).softmax(dim=0)
        mirrored = scores(segmenter, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), size)
        probabilities = probabilities + mirrored.flip(-1).softmax(dim=0)
    found = segment_image(*segmenter, image, InferenceArguments(test_flip=True, test_scales=[1.0, 1.5]))
    # Mirroring before or after an antialiased resize differs by rounding to 8 bits.
    assert (found == probabilities.argmax(dim=0)).float().mean() > 0.98


def test_flip_is_undone():
    """A mirrored image gives the mirrored map, exactly, when both views count."""
    segmenter, image = build("pacavit"), make_image(64, 32)
    flip = InferenceArguments(test_flip=True)
    mirrored = segment_image(*segmenter, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flip)
    assert (mirrored.flip(-1) == segment_image(*segmenter, image, flip)).float().mean() > 0.98


def test_metrics_do_not_depend_on_the_batch(segmenter):
    """Images of three sizes, alone and together: the same counts, at the labels' own sizes and by class name."""
    model, processor = segmenter
    rng = np.random.default_rng(0)
    sizes = [(43, 31), (30, 52), (43, 31), (30, 52), (25, 25)]
    rows = []
    for index, (width, height) in enumerate(sizes):
        label_map = rng.choice([0, 1, 3, 255], (height, width)).astype(np.uint8)
        rows.append((make_image(width, height, index), Image.fromarray(label_map)))
    arguments = InferenceArguments()
    collate = SegmentationCollator(processor, LabelReader(LabelArguments(), 5), arguments)
    results = []
    for batches in ([rows], [[row] for row in rows]):
        loader = [collate(batch) for batch in batches]
        results.append(evaluate(Segmenter(model, processor, arguments), loader, Accelerator()))
    # Rounding decides where two classes tie.
    assert results[0]["mean_iou"] == pytest.approx(results[1]["mean_iou"], abs=2e-3)
    assert list(results[0]["per_category_iou"]) == [f"LABEL_{index}" for index in range(5)]

    right = counted = 0
    for image, label_map in rows:
        labels = torch.from_numpy(np.array(label_map).astype(np.int64))
        found = scores(segmenter, image).argmax(dim=0)
        right, counted = right + (found == labels).sum().item(), counted + (labels != 255).sum().item()
    assert results[1]["overall_accuracy"] == pytest.approx(right / counted, abs=2e-3)


def test_windows_see_the_image_at_its_own_size(segmenter):
    (model, processor), image = segmenter, make_image(50, 37)

    def in_windows(size: int) -> np.ndarray:
        arguments = InferenceArguments(inference="sliding", window_size=size)
        return Segmenter(model, processor, arguments, native_size=True)([image])[0]

    found = in_windows(64)
    with torch.no_grad():
        outputs = model(**processor(image, do_resize=False, return_tensors="pt"))
    expected = processor.post_process_semantic_segmentation(outputs, target_sizes=[(37, 50)], do_resize=False)[0]
    assert found.shape == (37, 50) and np.mean(found == expected.numpy()) > 0.999
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape), with_kwargs=True
    )
    found = in_windows(32)
    hook.remove()
    assert found.shape == (37, 50) and len(seen) > 1 and all(max(shape[-2:]) <= 32 for shape in seen)


def test_images_of_many_sizes_do_not_depend_on_their_batch(segmenter):
    images = [make_image(20 + 7 * (index % 3), 24, index) for index in range(6)]
    segmenter = Segmenter(*segmenter)
    together = segmenter(images)
    for image, found in zip(images, together, strict=True):
        assert_same_labels(segmenter([image])[0], found)
        assert found.shape == (image.height, image.width)


@pytest.mark.parametrize("size", [(9, 31), (64, 5), (4, 6), (1, 1)])
def test_strips_are_upsampled_as_the_whole(size, monkeypatch):
    logits = torch.randn(7, 4, 6)
    expected = torch.nn.functional.interpolate(logits[None], size=size, mode="bilinear")[0].argmax(dim=0)
    for scores in (1, 1000, 2**24):
        monkeypatch.setattr(segmenter_module, "SCORES_AT_ONCE", scores)
        assert (upsampled_argmax([logits], size) == expected).float().mean() > 0.99


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inference": "sliding", "window_size": 30}, "a window must be a multiple of 4 pixels, not 30"),
        (
            {"inference": "sliding", "window_size": 32, "window_stride": 40},
            "window_stride must be from 1 to the 32 pixels of a window",
        ),
        ({"test_scales": []}, "test_scales must be numbers above 0"),
        ({"test_scales": [0]}, "test_scales must be numbers above 0"),
    ],
)
def test_impossible_inference_is_one_sentence(settings, message):
    model, processor = build("locatvit")
    for use in (
        lambda: segment_image(model, processor, make_image(20, 20), InferenceArguments(**settings)),
        lambda: SegmentationCollator(processor, LabelReader(LabelArguments(), 5), InferenceArguments(**settings)),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"inference": "sliding", "test_flip": True}])
def test_native_size_takes_windows_alone(settings):
    with pytest.raises(ValueError, match="are segmented in windows, at one scale and without a flip"):
        Segmenter(*build("locatvit"), InferenceArguments(**settings), native_size=True)


def test_a_processor_that_crops_is_refused():
    model, _ = build("locatvit")
    with pytest.raises(ValueError, match="does not keep whole images"):
        segment_image(model, LocAtViTImageProcessor.from_model_config(model.config), make_image(20, 20))
