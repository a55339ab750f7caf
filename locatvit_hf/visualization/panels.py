"""What all drawings over an image share: the place of the image on its axes, and the frame of a patch."""

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

FRAME_COLOR = "#35d0ff"


def image_extent(image: Image.Image) -> tuple[float, float, float, float]:
    """The `extent` of matplotlib's `imshow` that gives each pixel of an image a side of 1, the first one around 0."""
    return -0.5, image.width - 0.5, image.height - 0.5, -0.5


def frame_patch(axes: Axes, image: Image.Image, patch: int, grid: tuple[int, int]) -> None:
    """Frame a patch, an index into the row-major grid of (height, width) patches."""
    height, width = image.height / grid[0], image.width / grid[1]
    row, column = divmod(patch, grid[1])
    corner = (column * width - 0.5, row * height - 0.5)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=FRAME_COLOR, linewidth=1.8))
