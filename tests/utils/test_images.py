"""Which files of a folder are images, and what is said of the others and of files that cannot be read."""

import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from locatvit_hf.utils.images import (
    SUFFIXES,
    CorruptImageError,
    list_files,
    list_images,
    open_image,
    orientation_of,
    read_image,
    stem_of,
)
from tests.large_images import png_bomb


def save(path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path, **options)
    return path


def test_hidden_and_system_files_are_ignored(tmp_path):
    for name in ("a.jpg", "B.JPG", "inner/c.avif", "._a.jpg", ".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg"):
        save(tmp_path / name)
    for name in ("Thumbs.db", ".DS_Store", "inner/desktop.ini"):
        (tmp_path / name).write_bytes(b"")
    save(tmp_path / "__MACOSX" / "inner" / "c.png")
    found = list_images(tmp_path)
    assert found.images == ["B.JPG", "a.jpg", "inner/c.avif"] and found.remarks == []


def test_what_is_left_out_is_counted_and_named(tmp_path):
    save(tmp_path / "a.png")
    for name in ("n1.txt", "n2.txt", "n3.csv", "sub/n4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b.mp4").write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = list_images(tmp_path, also={".mp4"})
    assert found.images == ["a.png", "b.mp4"]
    assert found.remarks == [
        "Left out 4 files that are not images: n1.txt, n2.txt, n3.csv, ….",
        "Left out 1 link that leads nowhere: gone.png.",
    ]


def test_heic_says_what_to_install(tmp_path, monkeypatch):
    """Also where pillow-heif is installed."""
    monkeypatch.setattr("locatvit_hf.utils.images.SUFFIXES", SUFFIXES - {".heic", ".heif", ".hif"})
    monkeypatch.setattr("locatvit_hf.utils.images.HEIC_SUFFIXES", {".heic", ".heif", ".hif"})
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    assert list_images(tmp_path).remarks == [
        "Left out 1 HEIC image: IMG_1.HEIC; pip install pillow-heif lets them be read."
    ]
    if not {".heic"} & SUFFIXES:
        with pytest.raises(CorruptImageError, match=r"IMG_1.HEIC is a HEIC image: pip install pillow-heif"):
            read_image(tmp_path / "IMG_1.HEIC")


def test_links_are_followed_and_loops_are_not(tmp_path):
    save(tmp_path / "store" / "cat" / "a.jpg")
    root = tmp_path / "root"
    save(root / "ant" / "b.jpg")
    (root / "cat").symlink_to(tmp_path / "store" / "cat")
    (root / "again").symlink_to(tmp_path / "store" / "cat")  # twice is no loop
    (root / "c.jpg").symlink_to(tmp_path / "store" / "cat" / "a.jpg")
    (tmp_path / "store" / "cat" / "back").symlink_to(root)
    (root / "ant" / "up").symlink_to(root / "ant")
    found = list_files(root)
    assert found.files == ["again/a.jpg", "ant/b.jpg", "c.jpg", "cat/a.jpg"]
    assert found.loops == ["again/back", "ant/up", "cat/back"] and found.broken_links == []
    assert "Left out 3 links to folders in which they are themselves: again/back" in list_images(root).remarks[0]


@pytest.mark.skipif(os.name == "nt", reason="names of Windows are Unicode")
def test_names_of_any_encoding_are_text(tmp_path):
    save(tmp_path / "caf\u0065\u0301.jpg")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes((tmp_path / "caf\u0065\u0301.jpg").read_bytes())
    (tmp_path / os.fsdecode(b"\xe9t\xe9.txt")).write_bytes(b"")
    found = list_images(tmp_path)
    assert [stem_of(name) for name in found.images] == ["café", "café"]
    assert found.remarks == ["Left out 1 file that is not an image: été.txt."]
    with pytest.raises(FileNotFoundError, match=r"no image file .*été\.jpg"):
        read_image(tmp_path / os.fsdecode(b"\xe9t\xe9.jpg"))


def test_photos_of_two_lenses_are_images(tmp_path):
    path = save(tmp_path / "a.mpo", format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 6), "red")])
    assert list_images(tmp_path).images == ["a.mpo"] and read_image(path).size == (8, 6)


def with_orientation(orientation: int, format: str = "JPEG") -> bytes:
    """20 x 10 pixels, white at the left."""
    image, exif, file = Image.new("RGB", (20, 10)), Image.Exif(), io.BytesIO()
    image.paste((255, 255, 255), (0, 0, 5, 10))
    exif[0x0112] = orientation
    image.save(file, format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))
    return file.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_turned_once(format):
    """White is at the left in the file; orientation 6 puts the left of the file at the top."""
    image = read_image(io.BytesIO(with_orientation(6, format)), "a")
    assert image.size == (10, 20) and image.getpixel((5, 2))[0] > 200 > image.getpixel((5, 17))[0]


def test_damaged_exif_around_good_pixels_turns_nothing():
    content = with_orientation(6)
    start = content.index(b"Exif\0\0") + 6
    damaged = content[:start] + b"\xff" * 8 + content[start + 8 :]
    image = read_image(io.BytesIO(damaged), "a")
    assert image.size == (20, 10) and orientation_of(image) == 1


def damaged_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, "PNG")
    content = file.getvalue()
    chunk = b"pHYs" + bytes(9)
    return content[:33] + struct.pack(">I", 9) + chunk + struct.pack(">I", zlib.crc32(chunk) ^ 1) + content[33:]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "a is empty."),
        (b"no image", "a is not an image file of a known format."),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a is text in HTML or XML, not an image."),
        (damaged_png(), "a is a PNG file with a damaged header."),
        (with_orientation(1)[:400], "a cannot be decoded: "),
    ],
)
def test_why_a_file_is_not_read(content, reason):
    with pytest.raises(CorruptImageError) as caught:
        read_image(io.BytesIO(content), "a")
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value)


def test_one_limit_of_pixels(tmp_path, monkeypatch):
    """Ours, whatever Pillow's own is, which stays as it was."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = save(tmp_path / "a.png")
    for name in ("a.tif", "a.gif", "a.png"):
        assert read_image(save(tmp_path / name)).size == (8, 6) and Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(CorruptImageError, match=r"a.png has 4.8e-05 megapixels, more than the 4e-05 that max_megapix"):
        read_image(path, max_megapixels=4e-5)
    assert open_image(path, 48e-6).size == (8, 6)
    with pytest.raises(CorruptImageError, match="has 400 megapixels, more than the 179 that max_megapixels allows"):
        open_image(io.BytesIO(png_bomb(20_000)))


def test_an_icon_is_not_decoded_beyond_the_limit():
    """Pillow decodes icons when it opens them; the header names 256 pixels at most."""
    content = png_bomb()
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(content), 22) + content
    with pytest.raises(CorruptImageError, match=r"^cannot be decoded: Image size .900000000 pixels"):
        open_image(io.BytesIO(icon))
    file = io.BytesIO()
    Image.new("RGBA", (32, 32), "red").save(file, "ICO")
    assert read_image(file, "a").getpixel((9, 9)) == (255, 0, 0)
