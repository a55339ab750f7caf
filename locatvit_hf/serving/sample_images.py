"""Images to begin with, which are drawn here: they belong to nobody."""

import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 480, 360


def draw_street(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, WIDTH, 210), fill="#a9d3f0")
    for left, top, color in ((0, 60, "#b5674d"), (110, 100, "#d9b382"), (330, 40, "#8c8f99"), (420, 90, "#c98b6b")):
        draw.rectangle((left, top, left + 105, 215), fill=color)
        for row in range(top + 15, 190, 35):
            for column in range(left + 12, left + 90, 32):
                draw.rectangle((column, row, column + 16, row + 20), fill="#e8f1f5")
    draw.polygon(((0, 215), (WIDTH, 215), (WIDTH, HEIGHT), (0, HEIGHT)), fill="#9b9b9b")
    draw.polygon(((190, 215), (260, 215), (430, HEIGHT), (40, HEIGHT)), fill="#56585c")
    for near in range(4):
        top = 225 + 35 * near
        draw.rectangle((223 - near, top, 228 + near, top + 18), fill="white")
    draw.rounded_rectangle((255, 225, 345, 275), 14, fill="#c8372d")
    draw.rounded_rectangle((270, 205, 330, 240), 12, fill="#7fb2d6")
    for wheel in (275, 325):
        draw.ellipse((wheel - 12, 262, wheel + 12, 286), fill="#222222")
    draw.rectangle((95, 170, 103, 225), fill="#6b4a2f")
    draw.ellipse((65, 105, 135, 180), fill="#3f7d3a")


def draw_meadow(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, WIDTH, HEIGHT), fill="#8cc4ee")
    draw.ellipse((370, 25, 430, 85), fill="#ffd84a")
    draw.ellipse((-120, 170, 300, 520), fill="#6fae55")
    draw.ellipse((170, 200, 640, 560), fill="#5c9b48")
    for x, y in ((70, 225), (360, 235)):
        draw.ellipse((x, y, x + 75, y + 45), fill="#f4f1ea")
        draw.ellipse((x - 22, y - 8, x + 14, y + 24), fill="#3a3430")
        for leg in (14, 52):
            draw.rectangle((x + leg, y + 38, x + leg + 7, y + 60), fill="#3a3430")


def draw_flower(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, WIDTH, HEIGHT), fill="#2f5d3a")
    draw.rectangle((232, 190, 246, HEIGHT), fill="#76b957")
    draw.ellipse((245, 270, 330, 305), fill="#76b957")
    for petal in range(10):
        angle = petal * math.tau / 10
        x, y = 239 + 72 * math.cos(angle), 150 + 72 * math.sin(angle)
        draw.ellipse((x - 38, y - 38, x + 38, y + 38), fill="#f2a7c3" if petal % 2 else "#ec82ad")
    draw.ellipse((195, 106, 283, 194), fill="#f5c542")


DRAWINGS: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "street": draw_street,
    "meadow": draw_meadow,
    "flower": draw_flower,
}


def draw_sample_images(folder: Path) -> list[Path]:
    """Draw the sample images into a folder, and return their paths."""
    paths = []
    for name, draw in DRAWINGS.items():
        image = Image.new("RGB", (WIDTH, HEIGHT))
        draw(ImageDraw.Draw(image))
        paths.append(folder / f"{name}.jpg")
        image.save(paths[-1], quality=90)
    return paths


__all__ = ["draw_sample_images"]
