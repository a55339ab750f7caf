"""The Gaussian and the refinement against the formulas of the paper, written out in the slowest possible way."""

import math

import pytest
import torch
from torch import nn

from locatvit_hf.locat import LocAtGaussian, refine
from tests.tolerances import assert_same_but_for_rounding


def literal_bias(module, query, grid, native_grid, num_prefix_tokens):
    """The bias one entry at a time in float64, straight from the equations."""
    batch, heads, tokens, _ = query.shape
    longest = max(native_grid)
    largest = longest**2
    shift = math.log(largest - 1) if largest > 2 else 0.0
    epsilon = 0.1
    while 0.5 * (longest - 1) ** 2 / epsilon**2 > 32500:
        epsilon *= 2
    cap = min((longest - 1) ** 2, 13100)
    positions = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    bias = torch.zeros(batch, heads, tokens, tokens, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for p, (row, column) in enumerate(positions):
                q = query[b, h, num_prefix_tokens + p]
                variance = largest * torch.sigmoid(module.variance(q) - shift)
                if tuple(grid) != tuple(native_grid):
                    variance = variance * min(grid) / min(native_grid)
                amplitude = torch.log1p(module.amplitude(q).exp()).item()
                for t, (other_row, other_column) in enumerate(positions):
                    exponent = min((row - other_row) ** 2, cap) / (variance[0].item() + epsilon)
                    exponent += min((column - other_column) ** 2, cap) / (variance[1].item() + epsilon)
                    value = amplitude * math.exp(-0.5 * exponent)
                    bias[b, h, num_prefix_tokens + p, num_prefix_tokens + t] = value
    return bias


def trained_like(module):
    """Weights far from their initial values: freshly initialised Gaussians hide mistakes."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double()


@pytest.mark.parametrize(
    ("native_grid", "grid", "num_prefix_tokens"),
    [((3, 4), (3, 4), 1), ((2, 2), (4, 3), 0), ((6, 5), (2, 3), 5), ((1, 1), (2, 2), 1), ((40, 3), (2, 5), 1)],
)
def test_bias_is_the_papers_formula(native_grid, grid, num_prefix_tokens):
    torch.manual_seed(0)
    module = trained_like(LocAtGaussian(4, native_grid)).eval()
    query = torch.randn(1, 2, num_prefix_tokens + grid[0] * grid[1], 4, dtype=torch.float64)
    with torch.no_grad():
        gaussian = module(query, grid, num_prefix_tokens)
        bias = gaussian.bias()
        expected = literal_bias(module, query, grid, native_grid, num_prefix_tokens)
    torch.testing.assert_close(bias, expected, rtol=1e-12, atol=1e-12)
    assert bias[:, :, :num_prefix_tokens].eq(0).all()
    assert bias[:, :, :, :num_prefix_tokens].eq(0).all()

    rows, columns = gaussian.factors()
    assert rows.shape == (1, 2, grid[0], num_prefix_tokens + grid[0] * grid[1])
    assert columns.shape == (1, 2, grid[1], num_prefix_tokens + grid[0] * grid[1])


def test_factors_and_their_products_are_never_subnormal():
    module = LocAtGaussian(4, (40, 40))
    nn.init.constant_(module.variance.bias, -20.0)  # the narrowest Gaussian
    rows, columns = module(torch.randn(1, 1, 1600, 4), (40, 40)).factors()
    smallest = (rows[:, :, :, None] * columns[:, :, None]).min()
    assert 0 < torch.finfo(torch.float32).tiny < smallest < 1e-30


@pytest.mark.parametrize(
    ("longest", "epsilon"), [(14, 0.1), (26, 0.1), (27, 0.2), (51, 0.2), (52, 0.4), (103, 0.8), (205, 1.6), (409, 3.2)]
)
def test_epsilon_follows_the_native_grid(longest, epsilon):
    assert LocAtGaussian(4, (longest, 2)).epsilon == pytest.approx(epsilon)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 1)])
def test_coarse_training_averages_queries_and_is_exact_in_evaluation(grid):
    torch.manual_seed(0)
    coarse = trained_like(LocAtGaussian(4, (32, 32), coarse_training=True))
    exact = LocAtGaussian(4, (32, 32)).double()
    exact.load_state_dict(coarse.state_dict())
    query = torch.randn(1, 1, 1 + grid[0] * grid[1], 4, dtype=torch.float64)
    assert_same_but_for_rounding(coarse.eval()(query, grid, 1).bias(), exact(query, grid, 1).bias())

    # By hand: every block holds the mean of the queries it has, and distances are those of its top-left patch.
    height, width = grid
    patches = query[0, 0, 1:].view(height, width, 4)
    averaged = torch.empty_like(patches)
    for row in range(0, height, 2):
        for column in range(0, width, 2):
            block = patches[row : row + 2, column : column + 2]
            averaged[row : row + 2, column : column + 2] = block.mean(dim=(0, 1))
    fine = exact(torch.cat([query[:, :, :1], averaged.view(1, 1, -1, 4)], dim=2), grid, 1)
    expected = torch.zeros(height * width, height * width, dtype=torch.float64)
    for p in range(height * width):
        for t in range(height * width):
            rows = (p // width // 2 * 2 - t // width // 2 * 2) ** 2
            columns = (p % width // 2 * 2 - t % width // 2 * 2) ** 2
            exponent = rows * fine.inverse_variance[0, 0, p, 0] + columns * fine.inverse_variance[0, 0, p, 1]
            expected[p, t] = fine.amplitude[0, 0, p] * torch.exp(-0.5 * exponent)
    torch.testing.assert_close(coarse.train()(query, grid, 1).bias()[0, 0, 1:, 1:], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_promoted(dtype):
    torch.manual_seed(0)
    module = trained_like(LocAtGaussian(8, (14, 14)))
    query = torch.randn(1, 2, 197, 8)
    expected = module(query.double(), (14, 14), 1).bias()
    gaussian = module.to(dtype)(query.to(dtype), (14, 14), 1)
    assert gaussian.amplitude.dtype == gaussian.inverse_variance.dtype == torch.float32
    assert (gaussian.bias() - expected).abs().max() < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_autocast_does_not_lower_the_precision_of_the_gaussian():
    torch.manual_seed(0)
    module = trained_like(LocAtGaussian(8, (6, 6))).float()
    query = torch.randn(1, 2, 37, 8)
    expected = module(query, (6, 6), 1).bias()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bias = module(query, (6, 6), 1).bias()
    assert_same_but_for_rounding(bias, expected)


def test_every_gaussian_parameter_gets_a_gradient():
    module = trained_like(LocAtGaussian(4, (5, 5)))
    query = torch.randn(2, 3, 26, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: module(q, (5, 5), 1).bias(), (query[:1, :1],), atol=1e-6)
    module(query, (5, 5), 1).bias().square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_refinement_is_self_attention_without_parameters():
    torch.manual_seed(0)
    tokens = torch.randn(2, 7, 12, dtype=torch.float64)
    expected = []
    for chunk in tokens.chunk(3, dim=-1):
        weights = (chunk @ chunk.transpose(1, 2) / math.sqrt(4)).softmax(dim=-1)
        expected.append(weights @ chunk)
    expected = torch.cat(expected, dim=-1)
    torch.testing.assert_close(refine(tokens, 3), expected)
    torch.testing.assert_close(refine(tokens, 3, num_queries=2), expected[:, :2])


def test_refinement_equals_timms_pooling():
    from timm.layers import AttentionPoolPrr

    torch.manual_seed(0)
    tokens = torch.randn(2, 17, 24)
    pool = AttentionPoolPrr(24, num_heads=3, pool_type="token").eval()
    torch.testing.assert_close(refine(tokens, 3, num_queries=1)[:, 0], pool(tokens), rtol=1e-5, atol=1e-6)
