"""Label maps of every kind, and the joint augmentation of the recipe beside `test_augmentation.py`."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import sample_randomness
from training.data.images import decode_image
from training.data.label_maps import LabelArguments, LabelReader
from training.engine.arguments import build_arguments
from training.tasks.segmentation.augmentation import (
    SegmentationAugmentation,
    SegmentationTransform,
    TorchvisionDistortion,
)

IDS = np.array([[0, 1, 2], [3, 255, 1]])


def read(label_map: Image.Image, num_labels: int | None = 4, **settings) -> list:
    image = Image.new("RGB", label_map.size)
    return LabelReader(build_arguments(LabelArguments, settings), num_labels)(image, label_map).tolist()


def palette(ids: np.ndarray, colors: list) -> Image.Image:
    image = Image.fromarray(ids.astype(np.uint8)).convert("P")
    image.putdata(ids.flatten().tolist())
    image.putpalette([channel for color in colors for channel in color] + [0] * (768 - 3 * len(colors)))
    return image


def sixteen_bit_png(ids: np.ndarray, path) -> Image.Image:
    """A PNG of 16 bits, written by hand so that no library decides how it is stored."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in ids)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *ids.shape[::-1], 16, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in [*chunks, (b"IEND", b"")]:
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(data)
    return Image.open(path)


def test_ids_of_every_depth_are_read_as_they_are(tmp_path):
    assert read(Image.fromarray(IDS.astype(np.uint8))) == IDS.tolist()
    assert read(Image.fromarray(IDS.astype(np.int32))) == IDS.tolist()
    assert read(palette(IDS, [(9, 9, 9), (200, 0, 0), (0, 200, 0), (1, 2, 3)])) == IDS.tolist()
    assert read(sixteen_bit_png(IDS, tmp_path / "ids.png")) == IDS.tolist()
    large = np.array([[300, 40000], [65535, 7]])
    mapping = {300: 0, 40000: 1, 65535: 2}
    assert read(sixteen_bit_png(large, tmp_path / "large.png"), 3, label_mapping=mapping) == [[0, 1], [2, 255]]
    assert read(Image.fromarray(np.array([[True, False]]))) == [[1, 0]]


def test_ids_are_mapped_to_classes(tmp_path):
    label_map = Image.fromarray(IDS.astype(np.uint8))
    assert read(label_map, 2, label_mapping={1: 0, 3: 1, 2: 1}) == [[255, 0, 1], [1, 255, 0]]
    assert read(label_map, 2, label_mapping={"1": 0, 255: 1, 2: None}) == [[255, 0, 255], [255, 1, 0]]
    (tmp_path / "mapping.json").write_text(json.dumps({"1": 0, "3": 1}))
    assert read(label_map, 2, label_mapping=str(tmp_path / "mapping.json")) == [[255, 0, 255], [1, 255, 0]]


def test_colours_are_mapped_to_classes():
    colors = [(0, 0, 0), (128, 64, 128), (70, 70, 70), (1, 2, 3)]
    mapping = {"#804080": 0, "#464646": 1}
    expected = [[255, 0, 1], [255, 255, 0]]
    painted = Image.fromarray(np.array(colors, np.uint8)[np.where(IDS == 255, 3, IDS)])
    assert read(painted, 2, label_mapping=mapping) == expected
    assert read(painted.convert("RGBA"), 2, label_mapping=mapping) == expected
    assert read(palette(IDS, colors), 2, label_mapping=mapping) == expected


def test_colors_of_three_digits_are_those_of_six():
    painted = Image.fromarray(np.array([[(255, 255, 255), (0xFF, 0x88, 0), (0, 0, 0)]], np.uint8))
    for white, orange in (("#fff", "#f80"), ("#FFFFFF", "#FF8800")):
        assert read(painted, 2, label_mapping={white: 1, orange: 0}) == [[1, 0, 255]]


def test_whole_numbers_of_floating_point_are_ids():
    assert read(Image.fromarray(IDS.astype(np.float32))) == IDS.tolist()


def test_sixteen_bits_in_either_order_of_bytes_are_ids(tmp_path):
    ids = np.array([[0, 3], [40000, 255]], np.uint16)
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        Image.frombytes(mode, (2, 2), ids.astype(order).tobytes()).save(tmp_path / "map.tif")
        with Image.open(tmp_path / "map.tif") as label_map:
            assert label_map.mode == mode and read(label_map, label_mapping={0: 0, 3: 1, 40000: 2}) == [
                [0, 1],
                [2, 255],
            ]


def nan_map() -> Image.Image:
    return Image.fromarray(np.array([[0, np.nan]], np.float32))


@pytest.mark.parametrize(
    ("label_map", "settings", "message"),
    [
        (Image.new("L", (3, 2)), {"label_mapping": {"#ffffffff": 0}}, "'#ffffffff': colors have three or six"),
        (Image.new("L", (3, 2)), {"label_mapping": {"#ffff": 0}}, "'#ffff': colors have three or six"),
        (Image.new("L", (3, 2)), {"label_mapping": {"#fff": 0, "#FFFFFF": 1}}, "maps #FFFFFF to 0 and to 1"),
        (Image.new("L", (3, 2)), {"label_mapping": {0: 1.5}}, "maps 0 to 1.5, but a class is a whole number"),
        (Image.new("L", (3, 2)), {"label_mapping": {0: -1}}, "maps 0 to -1, but a class is a whole number"),
        (Image.new("L", (3, 2)), {"label_mapping": {-1: 0}}, "'-1': ids are whole numbers"),
        (Image.new("L", (3, 2)), {"label_mapping": {0: True}}, "maps 0 to True"),
        (Image.new("F", (3, 2), 0.5), {}, "holds fractions or no numbers"),
        (nan_map(), {}, "holds fractions or no numbers"),
        (Image.new("RGB", (3, 2)), {}, "one class id per pixel, but this one is an RGB image.*label_mapping"),
        (Image.new("LA", (3, 2)), {}, "an LA image"),
        (Image.new("L", (3, 2), 4), {}, "from 4 to 4, outside the 4 classes; see --label_names"),
        (Image.new("L", (3, 2)), {"reduce_labels": True, "label_mapping": {0: 1}}, "not both"),
        (Image.new("L", (3, 2)), {"label_mapping": {0: 9}}, "outside the 4 classes"),
        (Image.new("L", (3, 2)), {"label_mapping": {"sky": 0}}, "must map ids, or colors"),
        (Image.new("L", (3, 2)), {"label_mapping": {"#102030": 0, 1: 1}}, "must map ids, or colors"),
        (Image.new("L", (3, 2)), {"label_mapping": "nowhere.json"}, "nowhere.json is not a JSON file"),
    ],
)
def test_bad_maps_are_one_sentence(label_map, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(label_map, **settings)
    assert "\n" not in str(caught.value)


def photo(height: int, width: int, orientation: int) -> tuple[Image.Image, Image.Image]:
    """White and of class 1 in a quarter of the stored pixels; the photo as training reads it, the map as it is."""
    labels = np.zeros((height, width), np.uint8)
    labels[: height // 2, : width // 2] = 1
    image, file = Image.fromarray(labels * 255).convert("RGB"), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(file, "JPEG", exif=exif, quality=95)
    return decode_image(file.getvalue(), rgb=True), Image.fromarray(labels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_maps_of_stored_pixels_are_turned_with_their_image(orientation, size):
    image, label_map = photo(*size, orientation)
    labels = LabelReader(LabelArguments(label_orientation="stored"), 2)(image, label_map).numpy()
    assert ((np.asarray(image)[..., 0] > 127) == (labels == 1)).mean() > 0.98
    turned = Image.fromarray(labels.astype(np.uint8))
    assert (LabelReader(LabelArguments(label_orientation="turned"), 2)(image, turned).numpy() == labels).all()


def test_a_map_of_the_unturned_size_names_exif():
    image, label_map = photo(24, 40, 6)
    for settings, other in (({}, "stored"), ({"label_orientation": "turned"}, "stored")):
        with pytest.raises(ValueError, match=rf"40 x 24 .* its image 24 x 40 after the turn that its EXIF.* {other}\."):
            LabelReader(LabelArguments(**settings), 2)(image, label_map)
    turned = label_map.transpose(Image.Transpose.ROTATE_270)
    with pytest.raises(ValueError, match=r"EXIF orientation asks for: give --label_orientation turned\."):
        LabelReader(LabelArguments(label_orientation="stored"), 2)(image, turned)


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="at least two classes"):
        LabelReader(LabelArguments(), 1)


def test_more_classes_than_labels_are_refused():
    with pytest.raises(ValueError, match="at most 255 classes, not 300"):
        LabelReader(LabelArguments(), 300)


def corners(size: tuple[int, int], **settings) -> list[tuple[int, int]]:
    """(height, width) that images of `size` (width, height) are scaled to over many draws: the extent of the labels."""
    defaults = {"photometric_distortion": 0.0, "max_class_share": 1.0, "horizontal_flip": 0.0}
    arguments = build_arguments(SegmentationAugmentation, {**defaults, **settings})
    transform = SegmentationTransform(arguments, 2, [0.5] * 3, [0.5] * 3)
    extents = []
    for seed in range(30):
        with sample_randomness(seed):
            labels = transform(Image.new("RGB", size), Image.new("L", size))[1]
        rows, columns = torch.nonzero(labels == 0, as_tuple=True)
        extents.append((int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1))
    return extents


def test_scale_is_of_the_short_or_the_long_side():
    """ADE20K: within 2048 x 512; PASCAL-Context: within 520 x 520, in small: 104 and 26."""
    wide = corners((60, 20), resize=26, max_resize=104, crop_size=200)
    assert min(height for height, _ in wide) in range(13, 18) and max(height for height, _ in wide) in range(46, 53)
    assert all(abs(width - 3 * height) <= 3 for height, width in wide)
    # One side of 60 must fit into 26, so that the short side is about 9 at scale 1.
    boxed = corners((60, 20), resize=26, max_resize=26, crop_size=60)
    assert max(width for _, width in boxed) in range(46, 53) and min(width for _, width in boxed) in range(13, 18)
    assert len(set(wide)) > 10


def test_the_distortion_of_stored_runs_keeps_channels_in_place():
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    pixels[0] = 200
    distort = TorchvisionDistortion(hue=(0.0, 0.0), p=1.0)
    distorted = torch.stack([distort(pixels) for _ in range(20)])
    assert (distorted[:, 0] > distorted[:, 1]).all() and (distorted[:, 0] > distorted[:, 2]).all()
    assert len(distorted.flatten(1).unique(dim=0)) > 10


def test_training_reads_images_as_the_processor_does():
    """16 bits are scaled to 8, not cut off, and transparency is white."""
    settings = SegmentationAugmentation(resize=4, scale=[1.0, 1.0], crop_size=4, photometric_distortion=0.0)
    transform = SegmentationTransform(settings, 2, [0.0] * 3, [1.0] * 3)
    label_map = Image.new("L", (4, 4))
    deep = transform(Image.fromarray(np.full((4, 4), 0x8000, np.uint16)), label_map)[0]
    torch.testing.assert_close(deep, torch.full((3, 4, 4), 128 / 255))
    clear = transform(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), label_map)[0]
    torch.testing.assert_close(clear, torch.ones(3, 4, 4))
    gray = SegmentationTransform(settings, 2, [0.5], [0.5])(Image.new("L", (4, 4), 255), label_map)[0]
    torch.testing.assert_close(gray, torch.ones(1, 4, 4), atol=0.01, rtol=0)


def test_impossible_scales_are_refused():
    with pytest.raises(ValueError, match=r"scale must be \[smallest, largest\]"):
        SegmentationTransform(SegmentationAugmentation(scale=[2.0, 0.5]), 1, [0.5] * 3, [0.5] * 3)
