"""The fused kernel against float64 autograd of the plain formula.

Not collected by name: `test_triton_locat.py` starts it in a process of its own, because Triton's interpreter has to be
chosen before triton is first imported. LOCATVIT_KERNEL_DEVICE names the device; on "cpu" kernels are interpreted.
"""

import contextlib
import functools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from benchmarks.gpu_check import correctness
from benchmarks.gpu_check.correctness import NAMES, attention_formula, laid_out, output_and_gradients
from benchmarks.gpu_check.interpreter import interpreting_as_a_gpu
from locatvit_hf import triton_locat
from locatvit_hf.locat import Gaussian, LocAtGaussian
from locatvit_hf.triton_locat import Tiles, fused_attention, unsupported_reason
from tests.tolerances import assert_same_but_for_rounding

DEVICE = os.environ["LOCATVIT_KERNEL_DEVICE"]
# ||kernel - float64|| / ||float64||, the inputs rounded alike; TF32 would be near 3e-4. A gradient of zero (there is
# one key) is compared with 1.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def later(*values):
    """A case of `make test-all`, near another one."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def as_a_gpu():
    with interpreting_as_a_gpu() if DEVICE == "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that tiny inputs have several of them in every direction."""
    if DEVICE != "cpu":
        return
    for table, queries, keys in (
        (triton_locat.FORWARD_TILES, 32, 16),
        (triton_locat.QUERY_GRADIENT_TILES, 16, 32),
        (triton_locat.KEY_VALUE_GRADIENT_TILES, 32, 16),
    ):
        for entry in table:
            monkeypatch.setitem(table, entry, Tiles(queries, keys, 4, 2))


random_inputs = functools.partial(correctness.random_inputs, device=DEVICE)


def assert_matches_float64(inputs, *geometry, tolerance=None):
    weights = torch.randn(inputs[0].transpose(1, 2).shape, generator=torch.Generator().manual_seed(1))
    actual = output_and_gradients(fused_attention, inputs, weights, *geometry)
    # The kernel sees dO in the type of the output.
    weights = weights.to(inputs[0].dtype)
    exact = [tensor.double() for tensor in inputs]
    expected = output_and_gradients(attention_formula, exact, weights, *geometry)
    for name, ours, truth in zip(NAMES, actual, expected, strict=True):
        assert ours.shape == truth.shape, name
        error = (ours.double() - truth).norm() / truth.norm().clamp(min=1.0)
        assert error < (tolerance or TOLERANCE[inputs[0].dtype]), f"{name}: {error:.1e}"


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    prefix=st.integers(0, 6),
    head_dim=st.sampled_from((32, 48, 64)),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    cap=st.sampled_from((1.0, 9.0, 13100.0)),
    block_size=st.integers(1, 2),
    seed=st.integers(0, 2**16),
)
def test_random_shapes_match_float64_autograd(grid, prefix, head_dim, batch, heads, cap, block_size, seed):
    inputs = random_inputs(batch, heads, grid, prefix, head_dim, torch.float32, seed)
    assert_matches_float64(inputs, grid, prefix, cap, block_size, head_dim**-0.5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("grid", "prefix", "head_dim"), (((6, 4), 1, 48), later((5, 9), 3, 64)))
def test_half_types_match_float64_autograd(dtype, grid, prefix, head_dim):
    inputs = random_inputs(1, 2, grid, prefix, head_dim, dtype)
    assert_matches_float64(inputs, grid, prefix, 16.0, 1, head_dim**-0.5)


@pytest.mark.parametrize("head_dim", (80, later(96), later(112), 128))
def test_large_heads_match_float64_autograd(head_dim):
    inputs = random_inputs(1, 1, (4, 5), 1, head_dim, torch.float32)
    assert_matches_float64(inputs, (4, 5), 1, 100.0, 1, head_dim**-0.5)


@pytest.mark.parametrize("keys", (16, later(64)))
@pytest.mark.parametrize("grid", ((3, 17), (17, 3), later((8, 8)), later((1, 20)), later((20, 1))))
def test_every_rectangle_of_a_tile_gives_the_same_numbers(grid, keys, monkeypatch):
    inputs = random_inputs(1, 1, grid, 2, 32, torch.float32)
    for table in (triton_locat.FORWARD_TILES, triton_locat.QUERY_GRADIENT_TILES, triton_locat.KEY_VALUE_GRADIENT_TILES):
        monkeypatch.setitem(table, (4, 32), Tiles(64, keys, 4, 2))
    assert_matches_float64(inputs, grid, 2, 50.0, 1, 0.2)


def test_many_prefix_tokens_take_several_tiles():
    inputs = random_inputs(1, 1, (3, 3), 70, 32, torch.float32)
    assert_matches_float64(inputs, (3, 3), 70, 4.0, 1, 0.2)


def test_the_tiles_of_the_table_compute_the_same(monkeypatch):
    monkeypatch.undo()
    grid = (12, 13)
    inputs = random_inputs(1, 1, grid, 1, 64, torch.float32)
    assert_matches_float64(inputs, grid, 1, 121.0, 1, 0.125)


@pytest.mark.parametrize("block_size", (1, 2))
def test_the_gaussian_of_the_model_gives_its_parameters_their_gradients(block_size):
    torch.manual_seed(0)
    module = LocAtGaussian(32, (4, 5), coarse_training=block_size == 2).to(DEVICE).train()
    query, key, value, *_ = random_inputs(2, 2, (5, 7), 1, 32, torch.float32)
    results = []
    for attention, dtype in ((fused_attention, torch.float32), (attention_formula, torch.float64)):
        module = module.to(dtype)
        gaussian = module(query.to(dtype), (5, 7), num_prefix_tokens=1)
        assert gaussian.block_size == block_size
        output = attention(query.to(dtype), key.to(dtype), value.to(dtype), gaussian, 0.2)
        results.append(torch.autograd.grad(output.square().sum(), tuple(module.parameters())))
    for ours, truth in zip(*results, strict=True):
        assert (ours.double() - truth).norm() < 1e-5 * truth.norm()


def test_an_amplitude_of_zero_has_a_gradient():
    inputs = random_inputs(1, 1, (3, 4), 0, 32, torch.float32)
    inputs[4].zero_()
    weights = torch.ones(1, 12, 1, 32)
    geometry = ((3, 4), 0, 9.0, 1, 0.2)
    weights[..., ::2] = -2.0
    actual = output_and_gradients(fused_attention, inputs, weights, *geometry)
    expected = output_and_gradients(attention_formula, [tensor.double() for tensor in inputs], weights, *geometry)
    assert_same_but_for_rounding(actual[5], expected[5].float(), terms=12 * 32)
    assert not actual[4].any()


def test_large_logits_do_not_overflow():
    inputs = random_inputs(1, 1, (4, 5), 1, 32, torch.float32)
    inputs[0] *= 40.0
    inputs[4] *= 50.0
    assert_matches_float64(inputs, (4, 5), 1, 16.0, 1, 1.0, tolerance=5e-3)


def test_two_runs_give_the_same_bits():
    inputs = random_inputs(2, 2, (5, 6), 2, 32, torch.float32)
    weights = torch.randn(2, 32, 2, 32)
    first, second = (output_and_gradients(fused_attention, inputs, weights, (5, 6), 2, 9.0, 1, 0.2) for _ in range(2))
    assert all(torch.equal(ours, again) for ours, again in zip(first, second, strict=True))


def test_strides_are_taken_as_they_are():
    grid, prefix, head_dim = (3, 5), 1, 32
    inputs = random_inputs(2, 2, grid, prefix, head_dim, torch.float32)
    weights = torch.randn(2, 16, 2, head_dim)
    geometry = (grid, prefix, 9.0, 1, 0.2)
    expected = output_and_gradients(fused_attention, [tensor.contiguous() for tensor in inputs], weights, *geometry)
    for layout in ("packed", "channels"):
        views = laid_out(inputs, layout)
        assert not any(view.is_contiguous() for view in views)
        actual = output_and_gradients(fused_attention, views, weights, *geometry)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_sum_has_no_strides_to_rely_on():
    inputs = random_inputs(1, 2, (3, 3), 1, 32, torch.float32)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    totals = []
    for attention in (fused_attention, attention_formula):
        output = attention(*inputs[:3], Gaussian(*inputs[3:], (3, 3), 1, 4.0), 0.2)
        totals.append(torch.autograd.grad(output.sum(), inputs[2])[0])
    torch.testing.assert_close(*totals)


def test_without_gradients_nothing_is_kept():
    inputs = random_inputs(1, 1, (3, 4), 1, 32, torch.float32)
    gaussian = Gaussian(*inputs[3:], (3, 4), 1, 9.0)
    with torch.inference_mode():
        output = fused_attention(*inputs[:3], gaussian, 0.2)
    assert not output.requires_grad and output.is_contiguous() and output.shape == (1, 13, 1, 32)
    torch.testing.assert_close(output, attention_formula(*inputs[:3], gaussian, 0.2), rtol=1e-5, atol=1e-5)


def test_a_partly_frozen_model_gets_the_gradients_it_asks_for():
    inputs = random_inputs(1, 1, (3, 4), 1, 32, torch.float32)
    amplitude = inputs[4].requires_grad_()
    fused_attention(*inputs[:3], Gaussian(*inputs[3:], (3, 4), 1, 9.0), 0.2).square().sum().backward()
    assert amplitude.grad.abs().sum() > 0


@pytest.mark.parametrize("dynamic", (False, True))
def test_torch_compile_takes_it_whole(dynamic):
    """One graph, forward and backward, and with dynamic shapes the same graph for another grid."""
    graphs = []

    def count_graphs(graph, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def step(query, key, value, inverse_variance, amplitude, height, width):
        gaussian = Gaussian(inverse_variance, amplitude, (height, width), 1, 9.0)
        assert unsupported_reason(query, key, value, gaussian) is None
        return fused_attention(query, key, value, gaussian, 0.2) * 2.0

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count_graphs)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for grid in ((3, 4), (5, 4)) if dynamic else ((3, 4),):
        inputs = [tensor.requires_grad_() for tensor in random_inputs(2, 2, grid, 1, 32, torch.float32)]
        expected = torch.autograd.grad(step(*inputs, *grid).square().sum(), inputs)
        actual = torch.autograd.grad(compiled(*inputs, *grid).square().sum(), inputs)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))
    assert len(graphs) == 2  # forward and backward


def test_the_operators_keep_their_contract_with_torch():
    query, key, value, inverse_variance, amplitude = random_inputs(1, 2, (3, 2), 1, 32, torch.float32)
    arguments = (query, key, value, inverse_variance, amplitude, 3, 2, 1, 4.0, 1, 0.2)
    arguments = tuple(x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments)
    torch.library.opcheck(triton_locat._forward_operator, arguments)


def test_what_the_kernel_cannot_do_has_a_reason():
    query, key, value, *scalars = random_inputs(1, 2, (3, 4), 1, 32, torch.float32)
    gaussian = Gaussian(*scalars, (3, 4), 1, 9.0)

    def reason(q=query, k=key, v=value, g=gaussian, **kwargs):
        return unsupported_reason(q, k, v, g, **kwargs)

    assert reason() is None
    assert "no Gaussian" in reason(g=None)
    assert "mask" in reason(attention_mask=torch.zeros(1, 1, 13, 13))
    assert "dropout" in reason(dropout=0.1)
    reasons = []
    torch.func.vmap(lambda q: reasons.append(reason(q)) or q)(query[None])
    assert "torch.func" in reasons[0]
    assert "float64" in reason(query.double(), key.double(), value.double())
    assert "float16" in reason(k=key.half())
    assert "float32" in reason(g=gaussian._replace(amplitude=gaussian.amplitude.double()))
    for head_dim in (16, 40, 144):
        wide = query.new_zeros(1, 2, 13, head_dim)
        assert str(head_dim) in reason(wide, wide, wide)
    assert "shape" in reason(k=key[:, :, 1:])
    assert "prefix tokens" in reason(g=gaussian._replace(num_prefix_tokens=0))
    assert "each head" in reason(g=gaussian._replace(amplitude=gaussian.amplitude[:, :1]))
    assert "2**31" in reason(q=torch.empty_strided(query.shape, (1, 1, 2**28, 1), device="meta"))
    with pytest.raises(ValueError, match=r"cannot run: it has no dropout\.$"):
        fused_attention(query, key, value, gaussian, 0.2, dropout=0.5)
    with pytest.raises(ValueError, match="above zero"):
        fused_attention(query, key, value, gaussian, 0.0)
    output = fused_attention(query.requires_grad_(), key, value, gaussian, 0.2)
    with pytest.raises(RuntimeError, match="one derivative"):
        torch.autograd.grad(output.square().sum(), query, create_graph=True)


@pytest.mark.parametrize("columns_once", (False, True))
@pytest.mark.parametrize("keys", (16, 32, 64))
def test_tiles_fit_the_grid(keys, columns_once):
    for side in (7, 14, 16, 24, 27, 28, 32, 33, 37, 48, 64, 128):
        rows, columns = triton_locat._key_tile(side, side, keys, columns_once)
        assert rows * columns == keys
        padded = -(-side // rows) * rows * -(-side // columns) * columns
        plain = -(-side * side // keys) * keys  # what tiles that ignore the grid would pad to
        assert padded <= 1.5 * plain
        if side % 16 == 0:
            assert padded == side * side
