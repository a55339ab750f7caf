"""Blockwise attention on CPU against the formula written out, for every way that blocks can fall."""

import pytest
import torch
from torch import nn

from locatvit_hf import LocAtViTConfig, LocAtViTForImageClassification, blockwise_locat
from locatvit_hf.attention_locat import eager_attention_forward
from locatvit_hf.blockwise_locat import BlockwiseAttention, blockwise_attention_forward
from locatvit_hf.locat import Gaussian, LocAtGaussian
from tests.tolerances import assert_same_but_for_rounding, rounding


@pytest.fixture
def blocks_of(monkeypatch):
    """Sets how many logits a block holds, and lets no size be too small for blocks."""

    def set_block(logits):
        monkeypatch.setattr(blockwise_locat, "BLOCK_LOGITS", logits)
        monkeypatch.setattr(blockwise_locat, "FEWEST_BLOCKWISE_LOGITS", 0)

    return set_block


def inputs(batch, heads, grid, prefix, head_dim, dtype=torch.float64):
    """Query, key and value as views of projections, and a Gaussian with trained-like weights."""
    tokens = prefix + grid[0] * grid[1]
    projected = [torch.randn(batch, tokens, heads, head_dim, dtype=dtype, requires_grad=True) for _ in range(3)]
    module = LocAtGaussian(head_dim, grid).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return projected, module


@pytest.mark.parametrize(
    ("batch", "heads", "grid", "prefix", "block_logits"),
    [
        (2, 3, (4, 5), 1, 10**6),  # a sample at once
        (1, 4, (3, 3), 1, 250),  # two heads at once
        (2, 3, (4, 5), 3, 100),  # a few queries at once
        (1, 2, (3, 4), 5, 1),  # a query at once, some of them prefix tokens
        (2, 2, (5, 2), 0, 40),
        (1, 1, (1, 1), 6, 20),
    ],
)
def test_values_and_gradients_are_those_of_the_formula(blocks_of, batch, heads, grid, prefix, block_logits):
    blocks_of(block_logits)
    projected, module = inputs(batch, heads, grid, prefix, 8)
    weight = torch.randn_like(projected[0])
    results = []
    for attend in (blockwise_attention_forward, eager_attention_forward):
        query, key, value = (states.transpose(1, 2) for states in projected)
        output, _ = attend(nn.Identity(), query, key, value, None, 0.3, gaussian=module(query, grid, prefix))
        if attend is blockwise_attention_forward:
            assert "Blockwise" in output.grad_fn.name()
        gradients = torch.autograd.grad((output * weight).sum(), [*projected, *module.parameters()])
        results.append([output, *gradients])
    for blockwise, expected in zip(*results, strict=True):
        torch.testing.assert_close(blockwise, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [-1e3, 1e3])
def test_logits_beyond_the_range_of_exponentials(blocks_of, shift, dtype):
    """Where no exponential of a query's logits is a number, or none is above zero."""
    blocks_of(200)
    (query, key, value), module = inputs(2, 2, (3, 4), 1, 8, dtype)
    with torch.no_grad():
        query[:, ::3, :, 0], key[..., 0] = shift, 1.0
    results = []
    for attend in (blockwise_attention_forward, eager_attention_forward):
        states = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output, _ = attend(nn.Identity(), *states, None, 1.0, gaussian=module(query.transpose(1, 2), (3, 4), 1))
        results.append([output, *torch.autograd.grad(output.square().sum(), [query, key, value])])
    for blockwise, expected in zip(*results, strict=True):
        assert blockwise.isfinite().all()
        # A logit is a sum of 8 terms of up to 1000; what it is off by, its exponential is off by relatively.
        assert_same_but_for_rounding(blockwise, expected, terms=8 * 1000)


def test_large_sums_times_large_values_stay_finite(blocks_of):
    blocks_of(10**6)
    states = torch.full((1, 1, 256, 1), 79.0**0.5)
    gaussian = Gaussian(torch.full((1, 1, 256, 2), 10.0), torch.full((1, 1, 256), 1e-3), (16, 16), 0, 225.0)
    output, _ = blockwise_attention_forward(
        nn.Identity(), states, states, torch.full_like(states, 100.0), None, 1.0, gaussian=gaussian
    )
    # A sum of 256 weights times values, divided by the sum of the weights.
    torch.testing.assert_close(output, torch.full((1, 256, 1, 1), 100.0), rtol=rounding(2 * 256), atol=0)


def test_gradcheck(blocks_of):
    blocks_of(30)
    (query, key, value), module = inputs(1, 2, (2, 3), 1, 4)
    gaussian = module(query.transpose(1, 2), (2, 3), 1)
    scalars = [tensor.detach().requires_grad_() for tensor in (gaussian.inverse_variance, gaussian.amplitude)]

    def attend(query, key, value, *scalars):
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        read = gaussian._replace(inverse_variance=scalars[0], amplitude=scalars[1])
        return BlockwiseAttention.apply(query, key, value, *scalars, read, 0.5)

    assert torch.autograd.gradcheck(attend, (query, key, value, *scalars))
    assert torch.autograd.gradgradcheck(attend, (query, key, value, *scalars))


def test_a_gradient_penalty_is_that_of_the_formula(blocks_of):
    """Asked for the inputs alone, autograd passes by a function that refuses a second derivative, without a word."""
    blocks_of(30)
    (query, key, value), module = inputs(1, 2, (2, 3), 1, 4)
    penalties = []
    for attend in (blockwise_attention_forward, eager_attention_forward):
        states = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        output, _ = attend(nn.Identity(), *states, None, 0.5, gaussian=module(states[0], (2, 3), 1))
        (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
        penalties.append([gradient, *torch.autograd.grad(gradient.square().sum(), [query, *module.parameters()])])
    for blockwise, expected in zip(*penalties, strict=True):
        torch.testing.assert_close(blockwise, expected, rtol=1e-10, atol=1e-12)


def test_it_is_chosen_where_it_pays_and_leaves_the_model_as_it_is():
    config = LocAtViTConfig(image_size=128, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LocAtViTForImageClassification(config).double()
    for module in model.modules():
        if isinstance(module, LocAtGaussian):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.5)
    pixel_values, labels = torch.randn(2, 3, 128, 128, dtype=torch.float64), torch.tensor([0, 1])
    gradients = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(pixel_values, labels=labels).loss.backward()
        gradients[implementation] = [parameter.grad.clone() for parameter in model.parameters()]
    for blockwise, expected in zip(gradients["sdpa"], gradients["eager"], strict=True):
        torch.testing.assert_close(blockwise, expected, rtol=1e-9, atol=1e-12)
    assert blockwise_locat.runs_blockwise(torch.empty(1, 3, 197, 64))
    assert not blockwise_locat.runs_blockwise(torch.empty(1, 3, 50, 64))
    assert blockwise_locat.runs_blockwise(torch.empty(16, 3, 50, 64))
    assert not blockwise_locat.runs_blockwise(torch.empty(1, 3, 197, 64, dtype=torch.bfloat16))
