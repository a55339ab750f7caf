"""The page that the demo ends with, as HTML and as Markdown: numbers, curves and pictures."""

import base64
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
import transformers
from datasets import Dataset, load_from_disk
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from examples.digits.scenes import PIXEL_LABELS
from locatvit_hf import LocAtViTForImageClassification, LocAtViTImageProcessor
from locatvit_hf.utils.colors import label_colors
from locatvit_hf.visualization import (
    attention_map,
    draw_attention,
    draw_gaussians,
    draw_legend,
    draw_segmentation,
    read_attentions,
    read_gaussians,
)
from training.metrics import load_metric

TITLES = {"vit": "ViT", "locatvit": "LocAtViT"}
LINE_COLORS = {"vit": "#8a8f98", "locatvit": "#d9480f"}
SHOWN_SCENES = 6
STYLE = {"font.size": 9, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}


def write_page(folder: Path, scenes: Path, runs: Path, predictions: Path) -> None:
    """Write `index.html` (self-contained), `report.md` and `figures/` into a folder.

    Args:
        scenes: saved `DatasetDict`; the pictures show its split `validation`.
        runs: holds `pretrain/NAME` and `segment/NAME`, as the two programs leave them.
        predictions: holds `NAME.npz` of the fresh process.
    """
    transformers.logging.disable_progress_bar()
    held_out = load_from_disk(str(scenes))["validation"]
    results = {
        (program, name): json.loads((runs / program / name / "all_results.json").read_text())
        for program in ("pretrain", "segment")
        for name in TITLES
    }
    predicted = {name: np.load(predictions / f"{name}.npz") for name in TITLES}
    models = {
        name: LocAtViTForImageClassification.from_pretrained(runs / "pretrain" / name / "model") for name in TITLES
    }
    processor = LocAtViTImageProcessor.from_pretrained(runs / "pretrain" / "locatvit" / "model")

    figures = folder / "figures"
    figures.mkdir()
    shown = _varied_scenes(held_out)
    with plt.rc_context(STYLE):
        _save(_curves(results), figures / "curves.png")
        _save(
            _segmentations(held_out.select(shown), {n: p["maps"][shown] for n, p in predicted.items()}),
            figures / "segmentation.png",
        )
        _save(_attentions(held_out[shown[0]], models, processor), figures / "attention.png")
        _save(_gaussians(held_out[shown[0]]["image"], models["locatvit"], processor), figures / "gaussians.png")

    first = results["pretrain", "locatvit"]
    content = {
        "rows": [_row(name, held_out, predicted[name], results) for name in TITLES],
        "train_scenes": first["num_train_images"],
        "validation_scenes": first["num_validation_images"],
        "image_size": held_out[0]["image"].width,
        "epochs": first["validation_curve"][-1]["epoch"],
        "segment_epochs": results["segment", "locatvit"]["validation_curve"][-1]["epoch"],
        "grid": models["locatvit"].config.native_grid,
        "num_layers": models["locatvit"].config.num_hidden_layers,
    }
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for template, target, picture in (
        ("page.html.jinja", "index.html", _inline),
        ("page.md.jinja", "report.md", lambda path: f"figures/{path.name}"),
    ):
        pictures = {path.stem: picture(path) for path in figures.glob("*.png")}
        text = templates.get_template(template).render(**content, pictures=pictures)
        (folder / target).write_text(text, encoding="utf-8")


def _row(name: str, held_out: Dataset, predicted: dict[str, np.ndarray], results: dict) -> dict:
    """One line of the table, from what the pipelines of the fresh process said."""
    accuracy = load_metric("accuracy").compute(predictions=predicted["labels"], references=held_out["label"])
    truth = [np.asarray(label_map) for label_map in held_out["segmentation"]]
    iou = load_metric("mean_iou", num_labels=len(PIXEL_LABELS)).compute(predictions=predicted["maps"], references=truth)
    run = results["pretrain", name]
    return {
        "title": TITLES[name],
        "parameters": run["parameters"],
        "accuracy": accuracy["accuracy"],
        "mean_iou": iou["mean_iou"],
        "digit_iou": float(np.nanmean(iou["per_category_iou"][1:])),
        "images_per_second": run["images_per_second"],
    }


def _varied_scenes(held_out: Dataset) -> list[int]:
    """The first held-out scenes of different classes: chosen before anything is predicted."""
    chosen: dict[int, int] = {}
    for index, label in enumerate(held_out["label"]):
        chosen.setdefault(label, index)
    return sorted(chosen.values())[:SHOWN_SCENES]


def _curves(results: dict) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
    panels = (
        ("pretrain", "train_curve", "loss", "training loss"),
        ("pretrain", "validation_curve", "accuracy", "held-out accuracy"),
        ("segment", "validation_curve", "mean_iou", "held-out mIoU of the probe"),
    )
    for ax, (program, curve, value, title) in zip(axes, panels, strict=True):
        for name, label in TITLES.items():
            points = results[program, name][curve]
            style = {"marker": "o", "markersize": 3} if curve == "validation_curve" else {}
            ax.plot(
                [p["epoch"] for p in points], [p[value] for p in points], color=LINE_COLORS[name], label=label, **style
            )
        ax.set(title=title, xlabel="epoch")
        ax.set_xlim(left=0)
        if value != "loss":
            ax.set_ylim(bottom=0)
        ax.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    return figure


def _segmentations(scenes: Dataset, maps: dict[str, np.ndarray]) -> Figure:
    colors = label_colors(len(PIXEL_LABELS), background=0)
    figure = plt.figure(figsize=(1.5 * len(scenes), 6.4), layout="constrained")
    pictures, legend = figure.subfigures(2, 1, height_ratios=[6, 0.4])
    axes = pictures.subplots(2 + len(maps), len(scenes), squeeze=False)
    for column, scene in enumerate(scenes):
        axes[0, column].imshow(scene["image"])
        axes[0, column].set_axis_off()
        rows = [np.asarray(scene["segmentation"]), *(maps[name][column] for name in TITLES)]
        for ax, label_map in zip(axes[1:, column], rows, strict=True):
            draw_segmentation(ax, scene["image"], label_map, colors, background=0)
    for ax, title in zip(axes[:, 0], ("scene", "truth", *TITLES.values()), strict=True):
        _name_row(ax, title)
    draw_legend(legend.subplots(), dict(enumerate(PIXEL_LABELS)), colors, labels=list(range(1, len(PIXEL_LABELS))))
    return figure


def _attentions(scene: dict, models: dict, processor: LocAtViTImageProcessor) -> Figure:
    image, config = scene["image"], models["locatvit"].config
    grid, prefix = config.native_grid, config.num_prefix_tokens
    queries = _three_patches(np.asarray(scene["image"].convert("L")), np.asarray(scene["segmentation"]), grid)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    figure, axes = plt.subplots(len(models), 5, figsize=(9, 3.9), layout="constrained")
    for row, (name, model) in zip(axes, models.items(), strict=True):
        attention = read_attentions(model, pixel_values)[-1]
        row[0].imshow(image)
        row[0].set_axis_off()
        draw_attention(row[1], image, attention_map(attention, 0, grid, prefix))
        for ax, query in zip(row[2:], queries.values(), strict=True):
            draw_attention(ax, image, attention_map(attention, prefix + query, grid, prefix), query)
        _name_row(row[0], TITLES[name])
    for ax, title in zip(axes[0], ("scene", "CLS", *queries), strict=True):
        ax.set_title(title, fontsize=9)
    return figure


def _gaussians(image: Image.Image, model: LocAtViTForImageClassification, processor: LocAtViTImageProcessor) -> Figure:
    layers = read_gaussians(model, processor(image, return_tensors="pt")["pixel_values"])
    heads, (height, width) = layers[0].amplitude.shape[1], layers[0].grid
    every_other = [row * width + column for row in range(1, height, 2) for column in range(1, width, 2)]
    amplitudes = torch.stack([layer.amplitude[0][:, every_other] for layer in layers])
    limits = (0.0, float(amplitudes.quantile(0.95)))  # a few strong ones would leave the rest in one colour
    figure, axes = plt.subplots(
        heads, len(layers), figsize=(2.2 * len(layers) + 0.6, 2.3 * heads), layout="constrained", squeeze=False
    )
    for layer, gaussian in enumerate(layers):
        for head in range(heads):
            drawn = draw_gaussians(
                axes[head, layer], image, gaussian, head=head, patches=every_other, amplitude_range=limits
            )
        axes[0, layer].set_title(f"layer {layer + 1}", fontsize=9)
    for head in range(heads):
        _name_row(axes[head, 0], f"head {head + 1}")
    figure.colorbar(drawn, ax=axes, shrink=0.6, extend="max", label="amplitude α")
    return figure


def _three_patches(brightness: np.ndarray, segmentation: np.ndarray, grid: tuple[int, int]) -> dict[str, int]:
    """The patch with most of a digit, the brightest one with none (a fragment), and the darkest one (background)."""
    height, width = segmentation.shape[0] // grid[0], segmentation.shape[1] // grid[1]

    def patches(values: np.ndarray) -> np.ndarray:
        return values.reshape(grid[0], height, grid[1], width).mean(axis=(1, 3)).ravel()

    digit, light = patches((segmentation > 0).astype(float)), patches(brightness)
    return {
        "a patch of the digit": int(digit.argmax()),
        "of a fragment": int(np.where(digit > 0, -1.0, light).argmax()),
        "of the background": int(np.where(digit > 0, np.inf, light).argmin()),
    }


def _name_row(ax, title: str) -> None:
    ax.text(-0.06, 0.5, title, rotation=90, ha="right", va="center", transform=ax.transAxes)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
