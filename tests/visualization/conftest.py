"""A tiny model of each family, with weights that make maps of many values."""

import numpy as np
import pytest
import torch
from PIL import Image

from locatvit_hf import (
    LocAtJumboConfig,
    LocAtJumboModel,
    LocAtSwinConfig,
    LocAtSwinModel,
    LocAtViTConfig,
    LocAtViTImageProcessor,
    LocAtViTModel,
    PaCaViTConfig,
    PaCaViTModel,
)

VIT = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_register_tokens": 2}
FAMILIES = {
    "locatvit": (LocAtViTModel, LocAtViTConfig, VIT),
    "vit": (LocAtViTModel, LocAtViTConfig, {**VIT, "use_gaussian": False, "use_refinement": False}),
    "locatjumbo": (
        LocAtJumboModel,
        LocAtJumboConfig,
        {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "locatswin": (
        LocAtSwinModel,
        LocAtSwinConfig,
        {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 5},
    ),
    "pacavit": (
        PaCaViTModel,
        PaCaViTConfig,
        {
            "hidden_sizes": [8] * 4,
            "num_attention_heads": [2] * 4,
            "depths": [1, 1, 2, 1],
            "num_clusters": [5, 5, 5, 0],
        },
    ),
}


@pytest.fixture(scope="session")
def models() -> dict:
    """Models by family; "vit" is a `locatvit` without Gaussians."""
    built = {}
    for name, (model_class, config_class, options) in FAMILIES.items():
        torch.manual_seed(0)
        built[name] = model_class(config_class(image_size=64, initializer_range=0.4, **options)).eval()
    return built


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def image() -> Image.Image:
    """48 rows, 88 columns: neither square nor a multiple of every window."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 11, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((88, 48), Image.Resampling.NEAREST)


@pytest.fixture(scope="session")
def pixel_values(models, image) -> dict[str, torch.Tensor]:
    """The image as each model is given it."""
    return {
        name: LocAtViTImageProcessor.from_model_config(
            model.config, segmentation=True, size={"shortest_edge": 48, "longest_edge": 200}
        )(image, return_tensors="pt")["pixel_values"]
        for name, model in models.items()
    }
