"""Figures for an image: attention, similarity, components, Gaussians and clusters, of one model or of two.

Every function takes the image, of any size, and `models`, the layers of `read_layers` by the name of their model, and
returns a matplotlib figure. A query is (row, column) on the grid of the chosen layer, from 0, or None for the class
token; other grids are asked at the same place of the image.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .activations import Layer
from .attention import draw_attention
from .gaussians import draw_gaussians
from .panels import frame_patch, image_extent

Query = tuple[int, int] | None
Models = dict[str, list[Layer]]

LINE_COLORS = ("#d9480f", "#8a8f98")
MOST_COLUMNS = 6
MOST_HEADS = 4
MOST_ELLIPSES = 49
MOST_CLUSTERS = 12
LONGEST_TITLE = 24
TITLE_SIZE = 9
PANEL_WIDTH = 1.9
"""Inches."""


def default_layer(layers: list[Layer]) -> int:
    """The last layer that has a hundred patches, which a pyramid's last stage has not; else the last of all."""
    fine = [index for index, layer in enumerate(layers) if len(layer.features) >= 100]
    return fine[-1] if fine else len(layers) - 1


def default_queries(layer: Layer, number: int = 3) -> list[tuple[int, int]]:
    """Patches that differ: the one that stands out most from the mean, then always the farthest from those before."""
    features = F.normalize(layer.features, dim=-1)
    distance = 1 - features @ F.normalize(layer.features.mean(dim=0), dim=0)
    chosen: list[int] = []
    for _ in range(min(number, len(features))):
        chosen.append(int(distance.argmax()))
        if len(chosen) == 1:
            distance = torch.full_like(distance, torch.inf)
        distance = torch.minimum(distance, 1 - features @ features[chosen[-1]])
    return [divmod(patch, layer.grid[1]) for patch in chosen]


def patch_at(query: Query, grid: tuple[int, int], target: tuple[int, int]) -> int | None:
    """The patch of the grid `target` at the center of a query on `grid`."""
    if query is None:
        return None
    row, column = (
        min(int((place + 0.5) * there / here), there - 1)
        for place, here, there in zip(query, grid, target, strict=True)
    )
    return row * target[1] + column


def paired_layer(layers: list[Layer], index: int, count: int) -> Layer:
    """The layer at the depth of layer `index` of a model with `count` layers."""
    return layers[round(index * (len(layers) - 1) / max(count - 1, 1))]


def draw_figures(
    image: Image.Image, models: Models, index: int, queries: Sequence[tuple[int, int]]
) -> tuple[dict[str, Figure], list[str]]:
    """Draw all figures that the models have something for.

    Args:
        image: The image.
        models: The layers of one or two models; figures are drawn of what the first one has.
        index: The layer that is asked, from 0.
        queries: Patches; the class token is asked before them where a model has one.

    Returns:
        The figures by name, and a sentence about each thing that the first model does not have.
    """
    (name, ours), missing = next(iter(models.items())), []
    with_class = {model: layers for model, layers in models.items() if len(layers[0].class_features)}
    asked = [*([None] if with_class else []), *queries]
    drawn = {
        "similarity": similarity_figure(image, models, index, asked),
        "components": components_figure(image, models),
    }
    if ours[index].attention is not None:
        drawn["attention"] = attention_figure(image, models, index, asked)
    else:
        missing.append(f"Layer {index + 1} of {name} has no attention maps, so none are drawn.")
    if ours[0].gaussian is not None:
        drawn["gaussians"] = gaussians_figure(image, ours)
    else:
        missing.append(f"{name} has no Gaussians, so none are drawn.")
    if with_class:
        drawn["layers"] = class_similarity_figure(with_class)
    if name not in with_class:
        missing.append(f"{name} has no class token: only its patches are asked.")
    if ours[index].assignment is not None:
        drawn["clusters"] = clusters_figure(image, ours[index])
    return drawn, missing


def attention_figure(image: Image.Image, models: Models, index: int, queries: Sequence[Query]) -> Figure:
    """Attention of layer `index`, mean of its heads: a row for each model, a column for each query."""
    return _query_figure(image, models, index, queries, lambda layer, patch: layer.attention_map(patch), top=None)


def similarity_figure(image: Image.Image, models: Models, index: int, queries: Sequence[Query]) -> Figure:
    """Cosine similarity of the features after layer `index`; colors span 0 to 1."""
    return _query_figure(image, models, index, queries, lambda layer, patch: layer.similarity_map(patch), top=1.0)


def components_figure(image: Image.Image, models: Models) -> Figure:
    """The first three principal components of the features as red, green and blue, layer by layer."""
    columns = [_subsample_evenly(len(layers), MOST_COLUMNS - 1) for layers in models.values()]
    figure, axes = _panels(image, len(models), 1 + max(map(len, columns)))
    for row, (name, layers), chosen in zip(axes, models.items(), columns, strict=True):
        _show(row[0], image, _short(name))
        for ax, layer in zip(row[1:], chosen, strict=False):
            _show(ax, Image.fromarray(layers[layer].principal_colors()), f"layer {layer + 1}", image)
        for ax in row[1 + len(chosen) :]:
            ax.set_axis_off()
    return figure


def gaussians_figure(image: Image.Image, layers: list[Layer]) -> Figure:
    """Ellipses at one standard deviation, a row for each head and a column for each layer, of up to 49 patches.

    Raises:
        ValueError: The model has no Gaussians.
    """
    found = [(index, layer.gaussian) for index, layer in enumerate(layers) if layer.gaussian is not None]
    if not found:
        raise ValueError("The model has no Gaussians: it was built with use_gaussian=False.")
    shown = [found[index] for index in _subsample_evenly(len(found), 4)]
    heads = _subsample_evenly(min(gaussian.amplitude.shape[1] for _, gaussian in shown), MOST_HEADS)
    drawn_patches = [_every_few(gaussian.grid) for _, gaussian in shown]
    amplitudes = torch.cat(
        [g.amplitude[0][heads][:, patches].flatten() for (_, g), patches in zip(shown, drawn_patches, strict=True)]
    )
    limits = (0.0, float(amplitudes.quantile(0.95)))  # a few strong ones would leave the rest in one color
    figure, axes = _panels(image, len(heads), len(shown), extra_width=0.7)
    for row, head in zip(axes, heads, strict=True):
        for ax, (index, gaussian), patches in zip(row, shown, drawn_patches, strict=True):
            drawn = draw_gaussians(ax, image, gaussian, head=head, patches=patches, amplitude_range=limits)
            ax.set_title(f"layer {index + 1}, head {head + 1}", fontsize=TITLE_SIZE)
    figure.colorbar(drawn, ax=axes, shrink=0.7, extend="max", label="amplitude α")
    return figure


def class_similarity_figure(models: Models) -> Figure:
    """How similar patches are to the class token, layer by layer: the median, and 80 % of the patches around it.

    Where the line rises to 1, the patches have collapsed into the class token.
    """
    figure = Figure(figsize=(5.4, 3.0), layout="constrained")
    axes = figure.subplots()
    for color, (name, layers) in zip(LINE_COLORS, models.items(), strict=False):
        low, middle, high = class_similarity(layers).T
        depth = np.arange(1, len(layers) + 1)
        axes.fill_between(depth, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(depth, middle, color=color, marker="o", markersize=3.5, label=_short(name, 40))
    axes.set(xlabel="layer", ylabel="cosine similarity", title="patches and the class token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    return figure


def class_similarity(layers: list[Layer]) -> np.ndarray:
    """(layers, 3): the 10th, 50th and 90th percentile of the patches' similarity to the class token."""
    return np.stack([np.percentile(layer.similarity_map(), [10, 50, 90]) for layer in layers])


def clusters_figure(image: Image.Image, layer: Layer, number: int = MOST_CLUSTERS) -> Figure:
    """Which patches make up the clusters that get most attention.

    Raises:
        ValueError: The layer has no clusters.
    """
    if layer.assignment is None or layer.attention is None:
        raise ValueError("This layer has no clusters.")
    received = layer.attention.mean(dim=(0, 1))
    chosen = received.argsort(descending=True, stable=True)[: min(number, len(received))].tolist()
    columns = min(4, len(chosen))
    figure, axes = _panels(image, -(-len(chosen) // columns), columns)
    for ax in axes.flat[len(chosen) :]:
        ax.set_axis_off()
    for ax, cluster in zip(axes.flat, chosen, strict=False):
        draw_attention(ax, image, layer.assignment[cluster].reshape(layer.grid).numpy())
        ax.set_title(f"cluster {cluster + 1}: {received[cluster]:.0%}", fontsize=TITLE_SIZE)
    return figure


def _query_figure(image, models: Models, index: int, queries: Sequence[Query], read, top: float | None) -> Figure:
    count = len(next(iter(models.values())))
    grid = next(iter(models.values()))[index].grid
    figure, axes = _panels(image, len(models), 1 + len(queries))
    for row, (name, layers) in zip(axes, models.items(), strict=True):
        layer = paired_layer(layers, index, count)
        _show(row[0], image, _short(name))
        for ax, query in zip(row[1:], queries, strict=True):
            title = "class token" if query is None else f"row {query[0] + 1}, column {query[1] + 1}"
            ax.set_title(title, fontsize=TITLE_SIZE)
            patch = patch_at(query, grid, layer.grid)
            try:
                draw_attention(ax, image, read(layer, patch), patch, top=top)
            except ValueError:  # the baseline may lack what the model has
                ax.text(0.5, 0.5, "none", ha="center", va="center", transform=ax.transAxes, color="gray")
                ax.set_axis_off()
            if patch is not None:
                frame_patch(row[0], image, patch, layer.grid)
    return figure


def _panels(image: Image.Image, rows: int, columns: int, extra_width: float = 0.0) -> tuple[Figure, np.ndarray]:
    """A figure of panels with the shape of the image, and a line of text above each."""
    height = PANEL_WIDTH * min(max(image.height / image.width, 0.2), 3)
    size = (columns * PANEL_WIDTH + extra_width + 0.1, rows * (height + 0.28) + 0.1)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def _show(axes: Axes, image: Image.Image, title: str, place: Image.Image | None = None) -> None:
    """An image with its title, stretched to the place of another."""
    place = place or image
    axes.imshow(image, extent=image_extent(place), interpolation="nearest" if place is not image else None)
    axes.set_title(title, fontsize=TITLE_SIZE)
    axes.set_axis_off()


def _subsample_evenly(length: int, most: int) -> list[int]:
    """At most so many indices into a sequence, evenly from its first to its last."""
    return sorted({round(index) for index in np.linspace(0, length - 1, min(most, length))})


def _every_few(grid: tuple[int, int]) -> list[int]:
    """Patches on a regular lattice of at most `MOST_ELLIPSES`."""
    step = 1
    while -(-grid[0] // step) * -(-grid[1] // step) > MOST_ELLIPSES:
        step += 1
    rows, columns = (range((side - 1) % step // 2, side, step) for side in grid)
    return [row * grid[1] + column for row in rows for column in columns]


def _short(name: str, longest: int = LONGEST_TITLE) -> str:
    return name if len(name) <= longest else name[: longest // 2] + "…" + name[-(longest - longest // 2 - 1) :]
