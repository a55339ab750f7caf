"""How far every patch's Gaussian reaches, and how strong it is."""

import torch
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from PIL import Image
from transformers import PreTrainedModel

from ..locat import Gaussian, LocAtGaussian
from .panels import image_extent


@torch.no_grad()
def read_gaussians(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[Gaussian]:
    """Read the Gaussians that the layers predict for a batch of images.

    Args:
        model: The model, which is left as it was.
        pixel_values: Prepared images (batch, channels, height, width).

    Returns:
        Their Gaussians, first layer first.

    Raises:
        ValueError: The model has no Gaussians.
    """
    predictors = [module for module in model.modules() if isinstance(module, LocAtGaussian)]
    if not predictors:
        raise ValueError("The model has no Gaussians: it was built with use_gaussian=False.")
    found: list[Gaussian] = []
    hooks = [predictor.register_forward_hook(lambda *call: found.append(call[2])) for predictor in predictors]
    training = model.training
    try:
        model.eval()(pixel_values=pixel_values)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def draw_gaussians(
    axes: Axes,
    image: Image.Image,
    gaussian: Gaussian,
    head: int = 0,
    patches: list[int] | None = None,
    colormap: str = "plasma",
    amplitude_range: tuple[float, float] | None = None,
) -> EllipseCollection:
    """Draw the Gaussians of the first image of a batch: one ellipse per patch, at one standard deviation.

    Args:
        axes: Where to draw.
        image: The image, of any size.
        gaussian: One entry of `read_gaussians`.
        head: Which head.
        patches: Indices into the row-major grid; None for all.
        colormap: The colors of the amplitude.
        amplitude_range: The amplitudes at the ends of the colors; None for those of this drawing.

    Returns:
        The ellipses, from which a color bar can be made.
    """
    height, width = gaussian.grid
    chosen = torch.arange(height * width) if patches is None else torch.as_tensor(patches)
    # Variance along (rows, columns) in patches squared; the prediction holds its inverse.
    deviations = gaussian.inverse_variance[0, head].float().cpu()[chosen].rsqrt()
    amplitudes = gaussian.amplitude[0, head].float().cpu()[chosen]
    patch_height, patch_width = image.height / height, image.width / width
    centers = torch.stack(
        [(chosen % width + 0.5) * patch_width - 0.5, (chosen // width + 0.5) * patch_height - 0.5], dim=1
    )
    extent = image_extent(image)
    axes.imshow(image.convert("L"), cmap="gray", vmin=-120, vmax=320, extent=extent)
    ellipses = EllipseCollection(
        widths=(2 * deviations[:, 1] * patch_width).numpy(),
        heights=(2 * deviations[:, 0] * patch_height).numpy(),
        angles=torch.zeros(len(chosen)).numpy(),
        units="xy",
        offsets=centers.numpy(),
        offset_transform=axes.transData,
        facecolors="none",
        linewidths=1.6,
        cmap=colormap,
        array=amplitudes.numpy(),
    )
    ellipses.set_clim(*(amplitude_range or (None, None)))
    axes.add_collection(ellipses)
    axes.plot(*centers.numpy().T, ".", color="white", markersize=2.5)
    axes.set(xlim=extent[:2], ylim=extent[2:])
    axes.set_axis_off()
    return ellipses
