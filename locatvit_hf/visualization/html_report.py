"""One HTML file in which a reader points at patches of an image; it needs neither another file nor a network."""

import base64
import io
import json
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import colormaps
from PIL import Image

from .activations import Layer
from .figures import Models, class_similarity

LARGEST_IMAGE = 960
"""Pixels of the longer side."""

# Of the features, from which the page takes similarities: so many principal directions, fewer for many patches.
MOST_DIRECTIONS, FEWEST_DIRECTIONS, MOST_FEATURES = 64, 16, 200_000
LARGEST_REPORT = 4_700_000
"""Characters; those of the template are not counted."""


def build_report(title: str, image: Image.Image, models: Models, index: int, query: tuple[int, int] | None) -> str:
    """Build the report, one page of HTML.

    Attention is stored in 255 steps below the maximum of each query. There is room for about 5 MB: the mean of the
    heads goes first, then each head, from the last layer to the first; where one is missing the page says so.

    Args:
        title: The heading.
        image: The image, of any size.
        models: The layers of one or two models, from `read_layers`, by the name of the model.
        index: The layer that the page opens with, from 0.
        query: The patch (row, column) that it opens with, from 0, or None for the class token.

    Returns:
        The text of the page.
    """
    packed = {name: [_pack_layer(layer) for layer in layers] for name, layers in models.items()}
    encoded_image = _pack_image(image)
    room = LARGEST_REPORT - len(encoded_image) - len(json.dumps(packed))
    for separate in (False, True):
        # From the last layer to the first, all models in turn.
        for depth in range(max(map(len, models.values())), 0, -1):
            for name, layers in models.items():
                if depth <= len(layers) and layers[depth - 1].attention is not None:
                    attention = _pack_attention(layers[depth - 1], separate)
                    size = sum(len(array["data"]) for array in attention.values() if array)
                    previous = packed[name][depth - 1]
                    freed = sum(len(previous[key]["data"]) for key in attention if previous.get(key))
                    if size - freed <= room and (not separate or "attention" in previous):
                        room -= size - freed
                        previous.update(attention)
    grid = next(iter(models.values()))[index].grid
    content = {
        "image": encoded_image,
        "size": image.size,
        "colors": _pack((np.array(colormaps["inferno"].resampled(256).colors)[:, :3] * 255).round().astype(np.uint8)),
        "models": [
            {
                "name": name,
                "layers": packed[name],
                "classSimilarity": class_similarity(layers).round(4).tolist() if _has_class(layers) else None,
            }
            for name, layers in models.items()
        ],
        "layer": index,
        "query": None if query is None else [(query[0] + 0.5) / grid[0], (query[1] + 0.5) / grid[1]],
    }
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    return templates.get_template("html_report.html.jinja").render(title=title, content=content)


def _has_class(layers: list[Layer]) -> bool:
    return all(len(layer.class_features) for layer in layers)


def _pack_layer(layer: Layer) -> dict:
    """All but the attention maps of patches."""
    features = F.normalize(layer.features, dim=-1)
    class_features = F.normalize(layer.class_features, dim=-1).mean(dim=0, keepdim=True)[: len(layer.class_features)]
    number = min(max(MOST_FEATURES // len(features), FEWEST_DIRECTIONS), MOST_DIRECTIONS)
    if features.shape[1] > number:
        _, _, directions = torch.linalg.svd(torch.cat([features, class_features]), full_matrices=False)
        directions = directions[:number].T
        features, class_features = features @ directions, class_features @ directions
    packed = {
        "grid": layer.grid,
        "numHeads": layer.num_heads,
        "features": _pack_signed(features),
        "classFeatures": _pack_signed(class_features) if len(class_features) else None,
        "components": _pack(layer.principal_colors()),
    }
    if layer.class_attention is not None:
        packed.update(_pack_rows("classAttention", _with_mean(layer.class_attention, True)))
    if layer.gaussian is not None:
        deviations = layer.gaussian.inverse_variance[0].rsqrt()  # (heads, patches, 2), rows and columns
        values = torch.cat([deviations, layer.gaussian.amplitude[0][..., None]], dim=-1)
        # Ten bits of the mantissa, as float16 has, in a type that every browser reads; the zeros compress to nothing.
        packed["gaussian"] = _pack((values.contiguous().numpy().view(np.uint32) & 0xFFFFE000).view(np.float32))
    return packed


def _pack_attention(layer: Layer, separate: bool) -> dict:
    """The mean of the heads, and with `separate` each of them."""
    packed = _pack_rows("attention", _with_mean(layer.attention, separate))
    if layer.key_patches is not None:
        packed["keyPatches"] = _pack(layer.key_patches.numpy().astype(np.int16))
    if layer.assignment is not None:
        packed.update(_pack_rows("assignment", layer.assignment))
    return packed


def _with_mean(weights: torch.Tensor, separate: bool) -> torch.Tensor:
    mean = weights.mean(dim=0, keepdim=True)
    return torch.cat([mean, weights]) if separate else mean


def _pack_rows(name: str, weights: torch.Tensor) -> dict:
    """Weights (…, keys) in 255 steps below the maximum of each row, which stands beside them."""
    largest = weights.amax(dim=-1, keepdim=True).clamp(min=1e-12)
    steps = (255 * weights / largest).round().to(torch.uint8)
    return {name: _pack(steps.numpy()), f"{name}Largest": _pack(largest[..., 0].numpy().astype(np.float32))}


def _pack_signed(values: torch.Tensor) -> dict:
    """Values within 1 of zero in steps of 1/127."""
    return _pack((127 * values).round().clamp(-127, 127).to(torch.int8).numpy())


def _pack(array: np.ndarray) -> dict:
    """An array, little-endian, compressed and written in base 64."""
    array = np.ascontiguousarray(array)
    data = zlib.compress(array.astype(array.dtype.newbyteorder("<")).tobytes(), 9)
    return {"type": array.dtype.name, "shape": array.shape, "data": base64.b64encode(data).decode()}


def _pack_image(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE))
    encoded = io.BytesIO()
    image.save(encoded, format="jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"
