"""The image processor: values of every kind of image, label maps that keep their ids, masks that land in place."""

import base64
import io
import time
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional as tvF
from transformers import pipeline
from transformers.image_utils import ChannelDimension
from transformers.modeling_outputs import SemanticSegmenterOutput

from locatvit_hf import LocAtViTConfig, LocAtViTForSemanticSegmentation, LocAtViTImageProcessor


def plain(**kwargs):
    """A processor that neither resizes nor normalises: what comes out is what the image holds, in [0, 1]."""
    arguments = {"do_resize": False, "do_center_crop": False, "do_normalize": False, **kwargs}
    return LocAtViTImageProcessor(**arguments)


def values(image, **kwargs):
    return plain(**kwargs)(image, return_tensors="pt")["pixel_values"][0]


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


class TestImageModes:
    """By value, not only by shape."""

    @pytest.mark.parametrize(
        ("mode", "array"),
        [
            ("L", RAMP),
            ("I;16", RAMP.astype(np.uint16) * 257),
            ("I", RAMP.astype(np.int32) * 257),
            ("I", RAMP.astype(np.int32)),
            ("F", RAMP.astype(np.float32) / 255),
            ("F", RAMP.astype(np.float32)),
        ],
    )
    def test_grey_images_keep_their_ramp(self, mode, array):
        image = PIL.Image.fromarray(array)
        assert image.mode == mode
        expected = torch.from_numpy(RAMP / 255).float().expand(3, 16, 16)
        torch.testing.assert_close(values(image), expected, atol=1e-6, rtol=0)

    def test_sixteen_bit_files_and_arrays(self, tmp_path):
        array = RAMP.astype(np.uint16) * 257
        PIL.Image.fromarray(array).save(tmp_path / "deep.png")
        expected = torch.from_numpy(RAMP / 255).float().expand(3, 16, 16)
        torch.testing.assert_close(values(PIL.Image.open(tmp_path / "deep.png")), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(values(array), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(values(torch.from_numpy(array)), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(values(str(tmp_path / "deep.png")), expected, atol=1e-6, rtol=0)

    def test_either_order_of_bytes_and_of_rows(self, tmp_path):
        """As ImageJ writes TIFF, and as OpenCV reverses channels."""
        array = RAMP.astype(np.uint16) * 257
        expected = torch.from_numpy(RAMP / 255).float().expand(3, 16, 16)
        PIL.Image.frombytes("I;16B", (16, 16), array.astype(">u2").tobytes()).save(tmp_path / "deep.tif")
        with PIL.Image.open(tmp_path / "deep.tif") as image:
            assert image.mode == "I;16B"
            torch.testing.assert_close(values(image), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(values(array.astype(">u2")), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(values(array[::-1]), expected.flip(1), atol=1e-6, rtol=0)
        colors = np.stack([RAMP, RAMP, 0 * RAMP], -1)
        torch.testing.assert_close(values(colors[..., ::-1])[2], expected[0], atol=1e-6, rtol=0)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_transparency_is_composited_on_white(self, mode):
        image = PIL.Image.new("RGBA", (4, 2), (255, 0, 0, 255))
        image.putpixel((1, 0), (0, 0, 255, 0))
        image.putpixel((2, 0), (0, 0, 0, 128))
        if mode == "P":
            image.putpixel((2, 0), (255, 0, 0, 255))
            image = image.quantize(8)
            assert image.mode == "P" and "transparency" not in image.info
            image = image.convert("RGBA").convert("PA") if image.palette.mode == "RGBA" else image
        else:
            image = image.convert(mode)
        result = values(image)
        torch.testing.assert_close(result[:, 0, 1], torch.ones(3), atol=0.01, rtol=0)
        if mode != "P":
            torch.testing.assert_close(result[:, 0, 2], torch.full((3,), 127 / 255), atol=0.01, rtol=0)
        if mode == "RGBA":
            torch.testing.assert_close(result[:, 1, 0], torch.tensor([1.0, 0, 0]))

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ([0, 0.5, 1, np.nan], [0, 128, 255, 0]),
            ([0, 0.5, 1, np.inf], [0, 128, 255, 255]),
            ([0, 0.5, 1, -np.inf], [0, 128, 255, 0]),
            ([0, 0.5, 1.0001], [0, 127, 255]),
            ([0, 0.6, 1.2], [0, 127, 255]),  # reflectances
            ([0, 100, 255.3], [0, 100, 255]),
            ([-1, 0, 1], [0, 128, 255]),
            ([-0.5, 0, 1], [64, 128, 255]),
            ([-0.01, 0.5, 1], [0, 128, 255]),  # what bicubic resampling leaves below zero
            ([-30, -15, 0], [0, 128, 255]),  # decibels
            ([0, 32768, 65535], [0, 128, 255]),
            ([0, 0, 0], [0, 0, 0]),
        ],
    )
    def test_floats_are_scaled_by_what_they_hold(self, given, expected):
        image = PIL.Image.fromarray(np.array([given], np.float32))
        assert (values(image)[0, 0] * 255).round().tolist() == expected

    @pytest.mark.parametrize("kind", ["image", "array"])
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ([0, 128, 255], [0, 128, 255]),
            ([0, 128, 256], [0, 128, 255]),
            ([0, 1024, 4095], [0, 64, 255]),
            ([0, 257, 32896], [0, 1, 128]),  # sixteen bits, not all of them used
            ([0, 50000, 100000], [0, 128, 255]),
            ([-1000, 0, 1000], [0, 128, 255]),
        ],
    )
    def test_wide_integers_are_scaled_by_what_they_hold(self, given, expected, kind):
        array = np.array([given], np.int32)
        image = PIL.Image.fromarray(array) if kind == "image" else array
        assert (values(image)[0, 0] * 255).round().tolist() == expected

    def test_values_that_are_not_finite_are_refused_where_nothing_else_is_there(self):
        with pytest.raises(ValueError, match="no finite value"):
            values(PIL.Image.fromarray(np.full((2, 2), np.nan, np.float32)))
        with pytest.raises(ValueError, match="not finite"):
            values(np.full((2, 2, 3), np.nan, np.float32))

    def test_floats_that_are_scaled_already_are_named(self):
        array = np.linspace(0, 1, 192, dtype=np.float32).reshape(8, 8, 3)
        with pytest.warns(UserWarning, match=r"between 0 and 1.*do_rescale=False"):
            values(array)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert values(array, do_rescale=False).max() == 1
            values(array * 255)
            values(np.zeros((8, 8, 3), np.float32))
            values(array > 0.5)

    @pytest.mark.parametrize("start", ["", "data:image/png;base64,"])
    def test_images_in_base64(self, start):
        file = io.BytesIO()
        PIL.Image.fromarray(RAMP).save(file, format="PNG")
        text = start + base64.b64encode(file.getvalue()).decode()
        expected = torch.from_numpy(RAMP / 255).float().expand(3, 16, 16)
        torch.testing.assert_close(values(text), expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        "text", ["data:image/png", "data:image/png;base64,AAAA", "iVBORw0KGgo" * 1000, "nowhere.png"]
    )
    def test_text_that_is_no_image_is_a_short_sentence(self, text):
        with pytest.raises(ValueError, match=r"^There is no image file \S.*\.$") as caught:
            LocAtViTImageProcessor()(text)
        assert len(str(caught.value)) < 120
        assert caught.value.__suppress_context__

    def test_palette_and_bilevel_images_show_their_colours(self):
        palette = PIL.Image.new("P", (2, 1))
        palette.putpalette([10, 20, 30, 200, 100, 50])
        palette.putpixel((1, 0), 1)
        expected = torch.tensor([[10, 200], [20, 100], [30, 50]]) / 255
        torch.testing.assert_close(values(palette)[:, 0], expected)
        bilevel = PIL.Image.new("1", (2, 1))
        bilevel.putpixel((1, 0), 1)
        torch.testing.assert_close(values(bilevel)[:, 0], torch.tensor([[0.0, 1.0]]).expand(3, 2))

    def test_one_channel_models_get_grey_images(self):
        config = LocAtViTConfig(num_channels=1, image_size=16, patch_size=8)
        processor = LocAtViTImageProcessor.from_model_config(config)
        red = PIL.Image.new("RGB", (32, 32), (255, 0, 0))
        result = processor(red, return_tensors="pt")["pixel_values"]
        assert result.shape == (1, 1, 16, 16)
        torch.testing.assert_close(result.mean(), torch.tensor(76 / 255 * 2 - 1), atol=0.01, rtol=0)

    def test_arrays_of_bools_and_wide_integers(self):
        expected = torch.from_numpy(RAMP / 255).float().expand(3, 16, 16)
        torch.testing.assert_close(values(RAMP.astype(np.int32) * 257), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(values(RAMP.astype(np.int64)), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(values(RAMP > 100), torch.from_numpy(RAMP > 100).float().expand(3, 16, 16))

    def test_premultiplied_transparency(self):
        image = PIL.Image.new("RGBA", (2, 1), (200, 100, 0, 255))
        image.putpixel((1, 0), (0, 0, 0, 0))
        expected = torch.tensor([[200, 255], [100, 255], [0, 255]]) / 255
        torch.testing.assert_close(values(image.convert("RGBa"))[:, 0], expected, atol=0.01, rtol=0)
        torch.testing.assert_close(values(image.convert("LA").convert("La"))[0, 0, 1], torch.tensor(1.0))

    def test_no_images_and_no_file_are_one_sentence(self):
        with pytest.raises(ValueError, match="the list is empty"):
            LocAtViTImageProcessor()([])
        with pytest.raises(ValueError, match=r"There is no image file nowhere\.png"):
            LocAtViTImageProcessor()("nowhere.png")

    @pytest.mark.parametrize("image", [np.zeros((0, 4, 3), np.uint8), PIL.Image.new("RGB", (0, 4))])
    def test_an_image_without_pixels_is_one_sentence(self, image):
        with pytest.raises(ValueError, match=r"pixels"):
            LocAtViTImageProcessor()(image)

    @pytest.mark.parametrize(
        ("shape", "options", "remedy"),
        [
            ((2, 16, 16), {}, "give one or three of them"),
            ((16, 16, 2), {}, "give one or three of them"),
            ((2, 16, 3), {"input_data_format": "channels_first"}, "give one or three of them"),
            ((3, 16, 2), {"input_data_format": ChannelDimension.LAST}, "give one or three of them"),
            ((5, 16, 16), {"do_convert_rgb": False}, "name their axis with input_data_format"),
        ],
    )
    @pytest.mark.parametrize("make", [np.zeros, torch.zeros])
    def test_channels_that_make_no_color_are_one_sentence(self, shape, options, remedy, make):
        said = rf"An image of shape \({', '.join(map(str, shape))}\) does not have 1, 3 or 4 channels: {remedy}\.$"
        with pytest.raises(ValueError, match=said):
            plain(**options)(make(shape))
        five = np.full((5, 16, 16), 255, np.uint8)
        assert values(five, do_convert_rgb=False, input_data_format="channels_first").shape == (5, 16, 16)

    def test_signed_bytes_are_one_sentence(self):
        with pytest.raises(ValueError, match="int8 does not say which of its values is black: give uint8"):
            values(RAMP.view(np.int8))


def test_evaluation_transform_equals_timms():
    from timm.data import create_transform

    rng = np.random.default_rng(0)
    smooth = PIL.Image.fromarray(rng.integers(0, 255, (12, 17, 3), dtype=np.uint8)).resize(
        (340, 260), PIL.Image.BICUBIC
    )
    transform = create_transform(224, interpolation="bicubic", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
    processor = LocAtViTImageProcessor.from_model_config(LocAtViTConfig())
    ours = processor(smooth, return_tensors="pt")["pixel_values"][0]
    difference = (ours - transform(smooth)).abs()
    assert difference.max() < 0.0175 and difference.mean() < 1e-3  # one level of 8 bits is 0.0157


class TestLongImages:
    """Of an image that is resized to many times the length of its crop, only the middle is."""

    @pytest.mark.parametrize("shape", [(3, 401), (3, 400), (500, 5)])
    def test_the_crop_is_that_of_the_whole_resized_image(self, shape):
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        long = torch.from_numpy(pixels).permute(2, 0, 1)
        factor = 248 / min(shape)
        size = [248 if side == min(shape) else int(side * factor) for side in shape]
        whole = tvF.center_crop(
            tvF.resize(long, size, interpolation=tvF.InterpolationMode.BICUBIC, antialias=True), [224, 224]
        )
        found = values(PIL.Image.fromarray(pixels), do_resize=True, do_center_crop=True) * 255
        # The scales differ by less than a tenth of a pixel at the edge of the crop, and an edge of 255 levels is as
        # wide as `factor` pixels. Each of the two passes of a resize is rounded to a level.
        difference = (found - whole).abs()
        assert difference.max() <= 2 + 0.1 * 1.5 * 255 / factor and difference.mean() < 0.2

    def test_label_maps_stay_with_their_image(self):
        pixels = np.repeat(np.arange(500) % 2 * np.uint8(255), 2).reshape(500, 2, 1).repeat(3, 2)
        processor = plain(do_resize=True, do_center_crop=True, resample=0)
        inputs = processor(pixels, (pixels[..., 0] > 0).astype(np.uint8), return_tensors="pt")
        assert (inputs["labels"][0] == inputs["pixel_values"][0, 0]).float().mean() > 0.99

    def test_a_line_takes_neither_time_nor_memory(self):
        began = time.perf_counter()
        pixel_values = LocAtViTImageProcessor()(PIL.Image.new("RGB", (20_000, 1)), return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (1, 3, 224, 224)
        assert time.perf_counter() - began < 5  # a minute, where memory suffices, of all pixels


class TestLabelMaps:
    def segmentation_processor(self, **kwargs):
        config = LocAtViTConfig(image_size=64, patch_size=16)
        return LocAtViTImageProcessor.from_model_config(config, segmentation=True, **kwargs)

    @pytest.mark.parametrize("kind", ["L", "P", "I;16", "array", "uint16", "tensor"])
    def test_ids_survive_resizing(self, kind):
        array = np.random.default_rng(0).choice([0, 7, 100, 255], size=(90, 120)).astype(np.uint8)
        image = PIL.Image.new("RGB", (120, 90))
        if kind == "L":
            labels = PIL.Image.fromarray(array)
        elif kind == "P":
            labels = PIL.Image.fromarray(array).convert("P")
            labels.putpalette(list(range(256)) * 3)
        elif kind == "I;16":
            labels = PIL.Image.fromarray(array.astype(np.uint16))
        elif kind == "tensor":
            labels = torch.from_numpy(array).long()
        else:
            labels = array if kind == "array" else array.astype(np.uint16)
        result = self.segmentation_processor()(image, labels, return_tensors="pt")
        assert result["pixel_values"].shape == (1, 3, 64, 80)
        assert result["labels"].dtype == torch.int64 and result["labels"].shape == (1, 64, 80)
        assert set(result["labels"].unique().tolist()) == {0, 7, 100, 255}

    def test_sixteen_bits_are_unsigned_and_fractions_are_refused(self):
        image, ids = PIL.Image.new("RGB", (64, 64)), np.full((64, 64), 40000, np.uint16)
        for labels in (ids, ids.astype(">u2")[:, ::-1], PIL.Image.fromarray(ids)):
            assert self.segmentation_processor()(image, labels, return_tensors="pt")["labels"].eq(40000).all()
        with pytest.raises(ValueError, match="map 0 holds fractions"):
            self.segmentation_processor()(image, np.full((64, 64), 0.5, np.float32))

    @pytest.mark.parametrize("reduce", [True, False])
    def test_reduce_labels(self, reduce):
        array = np.array([[0, 1], [150, 255]], dtype=np.uint8).repeat(32, 0).repeat(32, 1)
        processor = self.segmentation_processor(do_reduce_labels=reduce)
        labels = processor(np.zeros((64, 64, 3), np.uint8), array, return_tensors="pt")["labels"][0]
        corners = labels[::63, ::63].tolist()
        assert corners == ([[255, 0], [149, 255]] if reduce else [[0, 1], [150, 255]])

    def test_padding_has_the_label_that_the_loss_of_the_model_leaves_out(self, tmp_path):
        config = LocAtViTConfig(image_size=64, patch_size=16, semantic_loss_ignore_index=-100)
        LocAtViTImageProcessor.from_model_config(config, segmentation=True, do_reduce_labels=True).save_pretrained(
            tmp_path
        )
        processor = LocAtViTImageProcessor.from_pretrained(tmp_path)
        images, maps = zip(
            *((np.zeros((*size, 3), np.uint8), np.full(size, 3, np.uint8)) for size in ((64, 64), (64, 96))),
            strict=True,
        )
        maps[0][:32], maps[1][:32] = 0, 255
        labels = processor(list(images), list(maps), return_tensors="pt")["labels"]
        assert labels[0, :, 64:].eq(-100).all()  # padding
        assert labels[:, :32].eq(-100).all() and labels[0, 32:, :64].eq(2).all() and labels[1, 32:].eq(2).all()

    def test_image_and_map_move_together(self):
        image = np.zeros((90, 130, 3), np.uint8)
        image[30:50, 80:110] = 255
        result = self.segmentation_processor()(image, (image[..., 0] > 0).astype(np.uint8), return_tensors="pt")
        bright = result["pixel_values"][0, 0] > 0
        assert (bright != result["labels"][0].bool()).float().mean() < 0.01

    def test_images_of_different_sizes_are_padded_to_one_batch(self):
        images = [np.full((64, 100, 3), 255, np.uint8), np.full((100, 64, 3), 255, np.uint8)]
        maps = [np.ones((64, 100), np.uint8), np.ones((100, 64), np.uint8)]
        result = self.segmentation_processor()(images, maps, return_tensors="pt")
        assert result["pixel_values"].shape == (2, 3, 96, 96)
        assert result["labels"].shape == (2, 96, 96)
        assert result["pixel_values"][0, :, 64:].eq(0).all() and result["labels"][0, 64:].eq(255).all()
        assert result["pixel_values"][1, :, :, 64:].eq(0).all() and result["labels"][1, :, 64:].eq(255).all()
        assert result["labels"][0, :64].eq(1).all() and result["labels"][1, :, :64].eq(1).all()

    @pytest.mark.parametrize("shape", [(64, 63), (1, 2, 64, 64)])
    def test_a_map_of_another_size_is_one_sentence(self, shape):
        with pytest.raises(ValueError):
            self.segmentation_processor()(np.zeros((64, 64, 3), np.uint8), [np.zeros(shape, np.uint8)])

    def test_the_sentence_names_both_sizes(self):
        with pytest.raises(ValueError, match=r"map 0 has shape \(1, 64, 63\), but its image is 64 x 64 pixels"):
            self.segmentation_processor()(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 63), np.uint8))


class BrightPatches(LocAtViTForSemanticSegmentation):
    """A segmenter whose answer is known: class 1 where a patch is bright. Only its logits are made up."""

    def forward(self, pixel_values, **kwargs):
        logits = super().forward(pixel_values, **kwargs).logits
        height, width = logits.shape[-2:]
        padded = nn.functional.pad(
            pixel_values, (0, width * 8 - pixel_values.shape[-1], 0, height * 8 - pixel_values.shape[-2])
        )
        bright = nn.functional.avg_pool2d(padded, 8).mean(dim=1)
        return SemanticSegmenterOutput(logits=torch.stack([-bright, bright], dim=1))


@pytest.fixture(scope="module")
def bright_patches():
    config = LocAtViTConfig(
        image_size=256, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=2,
        id2label={0: "dark", 1: "bright"},
    )  # fmt: skip
    return BrightPatches(config).eval()


def square_scene(height, width):
    """An image with a bright off-centre square, and the square as a mask."""
    mask = np.zeros((height, width), dtype=bool)
    mask[height // 8 : height // 8 + height // 3, width * 5 // 8 : width * 5 // 8 + height // 3] = True
    return PIL.Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)), mask


def intersection_over_union(a, b):
    return (a & b).sum() / (a | b).sum()


class TestMasksLandWhereThingsAre:
    @pytest.mark.parametrize("size", [(360, 480), (100, 205), (480, 360), (64, 64)])
    def test_through_the_pipeline(self, bright_patches, size):
        processor = LocAtViTImageProcessor.from_model_config(bright_patches.config, segmentation=True)
        segment = pipeline("image-segmentation", model=bright_patches, image_processor=processor)
        image, mask = square_scene(*size)
        found = {result["label"]: np.array(result["mask"]) > 0 for result in segment(image)}
        assert found["bright"].shape == size
        assert intersection_over_union(found["bright"], mask) > 0.85
        assert not (found["bright"] & found["dark"]).any()

    def test_images_of_different_sizes_in_one_batch(self, bright_patches):
        processor = LocAtViTImageProcessor.from_model_config(bright_patches.config, segmentation=True)
        sizes = [(360, 480), (100, 205), (300, 200)]
        scenes = [square_scene(*size) for size in sizes]
        inputs = processor([image for image, _ in scenes], return_tensors="pt")
        with torch.no_grad():
            maps = processor.post_process_semantic_segmentation(bright_patches(**inputs), sizes)
        for (_, mask), found in zip(scenes, maps, strict=True):
            assert found.shape == mask.shape
            assert intersection_over_union(found.numpy() == 1, mask) > 0.85

    def test_images_that_the_model_pads_itself(self, bright_patches):
        processor = LocAtViTImageProcessor.from_model_config(bright_patches.config, segmentation=True, do_resize=False)
        image, mask = square_scene(101, 205)
        with torch.no_grad():
            outputs = bright_patches(**processor(image, return_tensors="pt"))
        (found,) = processor.post_process_semantic_segmentation(outputs, [(101, 205)])
        assert intersection_over_union(found.numpy() == 1, mask) > 0.85

    @pytest.mark.parametrize("size", [(256, 256), (300, 360), (360, 300)])
    def test_a_centre_crop_is_laid_back_in_the_centre(self, bright_patches, size):
        processor = LocAtViTImageProcessor.from_model_config(bright_patches.config)
        mask = np.zeros(size, dtype=bool)
        mask[size[0] // 3 : size[0] // 2, size[1] // 2 : size[1] * 2 // 3] = True
        image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
        with torch.no_grad():
            outputs = bright_patches(**processor(image, return_tensors="pt"))
        (found,) = processor.post_process_semantic_segmentation(outputs, [size])
        assert intersection_over_union(found.numpy() == 1, mask) > 0.8

    @pytest.mark.parametrize("prepared", [{"do_resize": False}, {"size": {"height": 448, "width": 448}}])
    def test_images_prepared_with_other_arguments(self, bright_patches, prepared):
        processor = LocAtViTImageProcessor.from_model_config(bright_patches.config, segmentation=True)
        sizes = [(200, 280), (104, 205)]
        scenes = [square_scene(*size) for size in sizes]
        with torch.no_grad():
            outputs = bright_patches(**processor([image for image, _ in scenes], return_tensors="pt", **prepared))
        maps = processor.post_process_semantic_segmentation(outputs, sizes, **prepared)
        for (_, mask), found in zip(scenes, maps, strict=True):
            assert intersection_over_union(found.numpy() == 1, mask) > 0.85

    def test_batches_padded_to_a_fixed_size_and_images_taken_out_of_a_batch(self, bright_patches):
        pad = {"do_pad": True, "pad_size": {"height": 960, "width": 960}}
        processor = LocAtViTImageProcessor.from_model_config(bright_patches.config, segmentation=True, **pad)
        sizes = [(360, 480), (100, 205)]
        scenes = [square_scene(*size) for size in sizes]
        inputs = processor([image for image, _ in scenes], return_tensors="pt")
        assert inputs["pixel_values"].shape == (2, 3, 960, 960)
        with torch.no_grad():
            logits = bright_patches(**inputs).logits
        for index, (_, mask) in enumerate(scenes):
            alone = SemanticSegmenterOutput(logits=logits[index : index + 1])
            (found,) = processor.post_process_semantic_segmentation(alone, sizes[index : index + 1])
            assert intersection_over_union(found.numpy() == 1, mask) > 0.85

    def test_logits_of_another_size_are_one_sentence(self, bright_patches):
        processor = LocAtViTImageProcessor.from_model_config(bright_patches.config, segmentation=True)
        with pytest.raises(ValueError, match=r"have 8 x 8 cells, but an image of 256 x 256 pixels needs 32 x 32"):
            processor.post_process_semantic_segmentation(bright_patches(torch.zeros(1, 3, 64, 64)), [(64, 64)])

    def test_without_target_sizes_maps_have_the_size_of_the_logits(self, bright_patches):
        processor = LocAtViTImageProcessor.from_model_config(bright_patches.config, segmentation=True)
        maps = processor.post_process_semantic_segmentation(bright_patches(torch.zeros(2, 3, 64, 40)))
        assert [tuple(m.shape) for m in maps] == [(8, 5)] * 2

    def test_a_wrong_number_of_sizes_is_one_sentence(self, bright_patches):
        processor = LocAtViTImageProcessor.from_model_config(bright_patches.config, segmentation=True)
        with pytest.raises(ValueError, match="1 images in the outputs but 2 target_sizes"):
            processor.post_process_semantic_segmentation(bright_patches(torch.zeros(1, 3, 64, 40)), [(64, 40)] * 2)


def test_saved_models_bring_their_processor(tmp_path):
    config = LocAtViTConfig(
        image_size=48, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], crop_pct=0.96,
    )  # fmt: skip
    LocAtViTForSemanticSegmentation(config).save_pretrained(tmp_path)
    processor = LocAtViTImageProcessor.from_pretrained(tmp_path)
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert processor.size_divisor == 8 and not processor.do_center_crop

    # A folder that has a processor keeps it.
    LocAtViTImageProcessor.from_model_config(config, image_mean=[0.9] * 3).save_pretrained(tmp_path)
    LocAtViTForSemanticSegmentation(config).save_pretrained(tmp_path)
    assert list(LocAtViTImageProcessor.from_pretrained(tmp_path).image_mean) == [0.9] * 3
