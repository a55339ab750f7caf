"""Who takes part: our models, those of timm and of transformers of like size, and the formula written out.

All have random weights, three channels, 1000 classes and no stochastic depth; none is downloaded.
"""

import functools
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from locatvit_hf import (
    LocAtSwinConfig,
    LocAtSwinForImageClassification,
    LocAtViTConfig,
    LocAtViTForImageClassification,
    PaCaViTConfig,
    PaCaViTForImageClassification,
)
from locatvit_hf.locat import Gaussian
from locatvit_hf.modeling_locatvit import ALL_ATTENTION_FUNCTIONS

REFERENCE = "timm-vit"  # every time is divided by that of timm's plain ViT
ATTENTION_REFERENCE = "plain"  # and of attention alone, by that of SDPA without any bias
PLAIN = {"use_gaussian": False, "use_refinement": False}


# ------------------------------------------------------------------------------------------------ the formula, naively
@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)  # what is kept must serve training too
def negative_half_distances(grid: tuple[int, int], cap: float, block: int, dtype, device) -> torch.Tensor:
    """(patches, patches, 2): -D / 2 along rows and columns, in patches squared; kept, as no model recomputes it."""
    height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack([rows.flatten(), columns.flatten()], dim=-1) // block * block
    squared = (positions[:, None] - positions[None, :]).square().to(device=device, dtype=dtype)
    return -0.5 * squared.clamp(max=cap)


def distances_of(gaussian: Gaussian) -> torch.Tensor:
    like = gaussian.inverse_variance
    return negative_half_distances(gaussian.grid, gaussian.distance_cap, gaussian.block_size, like.dtype, like.device)


def literal_bias(gaussian: Gaussian) -> torch.Tensor:
    """a_p * exp(-(Dy / (Vy + eps) + Dx / (Vx + eps)) / 2), term by term, through (batch, heads, N, N, 2)."""
    variance = 1.0 / gaussian.inverse_variance
    exponent = (distances_of(gaussian) / variance[:, :, :, None, :]).sum(dim=-1)
    bias = gaussian.amplitude[..., None] * torch.exp(exponent)
    return F.pad(bias, (gaussian.num_prefix_tokens, 0, gaussian.num_prefix_tokens, 0))


def separable_bias(gaussian: Gaussian) -> torch.Tensor:
    """The same as the outer product of one factor an axis, padded to (batch, heads, tokens, tokens)."""
    width = gaussian.grid[1]
    distances, precision = distances_of(gaussian), gaussian.inverse_variance
    rows = gaussian.amplitude[..., None] * torch.exp(precision[..., :1] * distances[:, ::width, 0])
    columns = torch.exp(precision[..., 1:] * distances[:, :width, 1])
    patches = (rows[..., :, None] * columns[..., None, :]).flatten(-2)
    return F.pad(patches, (gaussian.num_prefix_tokens, 0, gaussian.num_prefix_tokens, 0))


def through_sdpa(bias_of: Callable[[Gaussian], torch.Tensor]) -> Callable:
    """An attention function that adds a bias as the mask of PyTorch's attention."""

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, gaussian=None, **kwargs):
        bias = bias_of(gaussian).to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling).transpose(1, 2), None

    return attend


def plain_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, gaussian=None, **kwargs):
    """No bias at all; on a GPU the flash kernel in half precision, where float32 has only the efficient one."""
    if query.device.type != "cuda":
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if query.dtype == torch.float32 else SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS["written"] = through_sdpa(Gaussian.bias)  # what "sdpa" does where nothing better is known
ALL_ATTENTION_FUNCTIONS["literal"] = through_sdpa(literal_bias)
ALL_ATTENTION_FUNCTIONS["separable"] = through_sdpa(separable_bias)
# Attention alone: name of the entry, None for no bias. "sdpa" is what our models use unless told otherwise.
ATTENTION = {
    "plain": None,
    "locat": "sdpa",
    "locat-fused": "locat_fused",
    "locat-flex": "flex_attention",
    "locat-written": "written",
    "separable": "separable",
    "literal": "literal",
}


def attention_function(name: str) -> Callable:
    """The function behind a name of `ATTENTION`. Raises RuntimeError where this version of the package has none."""
    entry = ATTENTION[name]
    if entry is None:
        return plain_attention
    if entry not in ALL_ATTENTION_FUNCTIONS:
        raise RuntimeError(f"there is no attn_implementation={entry!r}")
    return ALL_ATTENTION_FUNCTIONS[entry]


# ------------------------------------------------------------------------------------------------------------- models
def locatvit(scale: str, image_size: int, attention: str = "sdpa", **overrides) -> nn.Module:
    """Built for 224 pixels, as timm's is, whatever the image: position embeddings are resampled in both."""
    if attention not in ALL_ATTENTION_FUNCTIONS:
        raise RuntimeError(f"there is no attn_implementation={attention!r}")
    model = LocAtViTForImageClassification(LocAtViTConfig.from_preset(scale, num_labels=1000, **overrides))
    model.config._attn_implementation = attention  # the setter knows only names that transformers registered
    return model


def locatswin(scale: str, image_size: int, **overrides) -> nn.Module:
    config = LocAtSwinConfig.from_preset(scale, num_labels=1000, drop_path_rate=0.0, **overrides)
    return LocAtSwinForImageClassification(config)


def pacavit(scale: str, image_size: int) -> nn.Module:
    return PaCaViTForImageClassification(PaCaViTConfig.from_preset(scale, num_labels=1000))


def timm_vit(scale: str, image_size: int) -> nn.Module:
    return timm.create_model(f"vit_{scale}_patch16_224", dynamic_img_size=True)


def timm_swin(scale: str, image_size: int) -> nn.Module:
    return timm.create_model(f"swin_{scale}_patch4_window7_224", img_size=image_size, drop_path_rate=0.0)


def hf_vit(scale: str, image_size: int) -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(**hf_sizes(scale), image_size=image_size, patch_size=16, num_labels=1000)
    )


def hf_dinov2(scale: str, image_size: int) -> nn.Module:
    """With patches of 16 pixels, not its usual 14, so that it has as many tokens as the others."""
    config = hf.Dinov2Config(**hf_sizes(scale), image_size=image_size, patch_size=16, num_labels=1000)
    return hf.Dinov2ForImageClassification(config)


def hf_sizes(scale: str) -> dict[str, int]:
    preset = LocAtViTConfig.from_preset(scale)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(preset, name) for name in names}
    return {**sizes, "intermediate_size": 4 * sizes["hidden_size"]}


def hf_swin(scale: str, image_size: int) -> nn.Module:
    preset = LocAtSwinConfig.from_preset(scale)
    sizes = {"embed_dim": preset.embed_dim, "depths": list(preset.depths), "num_heads": list(preset.num_heads)}
    return hf.SwinForImageClassification(
        hf.SwinConfig(**sizes, image_size=image_size, drop_path_rate=0.0, num_labels=1000)
    )


# PVTv2 and SegFormer: b1 (14 million parameters) is as large as PaCa-ViT tiny, b5 (82 million) as a ViT-Base.
PYRAMID = {"tiny": ([2, 2, 2, 2], [8, 8, 4, 4]), "base": ([3, 6, 40, 3], [4, 4, 4, 4])}


def hf_pvtv2(scale: str, image_size: int) -> nn.Module:
    depths, mlp_ratios = PYRAMID[scale]
    sizes = {"depths": depths, "mlp_ratios": mlp_ratios, "hidden_sizes": [64, 128, 320, 512]}
    return hf.PvtV2ForImageClassification(hf.PvtV2Config(**sizes, image_size=image_size, num_labels=1000))


def hf_segformer(scale: str, image_size: int) -> nn.Module:
    sizes = {"depths": PYRAMID[scale][0], "hidden_sizes": [64, 128, 320, 512]}
    return hf.SegformerForImageClassification(hf.SegformerConfig(**sizes, drop_path_rate=0.0, num_labels=1000))


MODELS: dict[str, Callable[[str, int], nn.Module]] = {
    "timm-vit": timm_vit,
    "locatvit": locatvit,
    "baseline": functools.partial(locatvit, **PLAIN),
    "locatvit-fused": functools.partial(locatvit, attention="locat_fused"),
    "locatvit-flex": functools.partial(locatvit, attention="flex_attention"),
    "locatvit-written": functools.partial(locatvit, attention="written"),
    "separable": functools.partial(locatvit, attention="separable"),
    "literal": functools.partial(locatvit, attention="literal"),
    "hf-vit": hf_vit,
    "hf-dinov2": hf_dinov2,
    "timm-swin": timm_swin,
    "hf-swin": hf_swin,
    "locatswin": locatswin,
    "swin-baseline": functools.partial(locatswin, **PLAIN),
    "pacavit": pacavit,
    "hf-pvtv2": hf_pvtv2,
    "hf-segformer": hf_segformer,
}
GPU_ONLY = {
    *("locatvit-fused", "locatvit-flex", "locatvit-written"),
    *("locat-fused", "locat-flex", "locat-written"),
}
