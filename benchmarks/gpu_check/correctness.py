"""Attention functions against float64: the output, and the gradients of query, key, value and both Gaussian tensors."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from locatvit_hf.attention_locat import flex_attention_forward
from locatvit_hf.locat import Gaussian
from locatvit_hf.triton_locat import fused_attention

from .cells import Case

NAMES = ("output", "d_query", "d_key", "d_value", "d_inverse_variance", "d_amplitude")
# Where the error is above half of the tolerance, it may be at most so many times that of the written bias.
WORSE_THAN_WRITTEN = 2.0
# (query, key, value, gaussian, scaling) to (batch, tokens, heads, head_dim).
Attention = Callable[..., torch.Tensor]


def attention_formula(query, key, value, gaussian: Gaussian, scaling: float) -> torch.Tensor:
    """The equation, written out."""
    logits = query @ key.transpose(-1, -2) * scaling + gaussian.bias()
    return (logits.softmax(-1) @ value).transpose(1, 2)


def written_attention(query, key, value, gaussian: Gaussian, scaling: float) -> torch.Tensor:
    """PyTorch's attention with the bias as its mask, in the type of the query."""
    bias = gaussian.bias().to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling).transpose(1, 2)


def flex_attention(query, key, value, gaussian: Gaussian, scaling: float) -> torch.Tensor:
    return flex_attention_forward(None, query, key, value, None, scaling, gaussian=gaussian)[0]


ATTENTIONS: dict[str, Attention] = {"fused": fused_attention, "flex": flex_attention}


# ------------------------------------------------------------------------------------------------------------- inputs
def random_inputs(batch, heads, grid, prefix, head_dim, dtype, seed=0, device="cpu") -> list[torch.Tensor]:
    """Query, key and value as a model has them (heads transposed, not contiguous), inverse variance and amplitude."""
    generator = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    tokens = [torch.randn(batch, prefix + patches, heads, head_dim, generator=generator) for _ in range(3)]
    inverse_variance = 10 ** (2.5 * torch.rand(batch, heads, patches, 2, generator=generator) - 2)
    amplitude = 5 * torch.rand(batch, heads, patches, generator=generator)
    tokens = [tensor.to(device, dtype).transpose(1, 2) for tensor in tokens]
    return [*tokens, inverse_variance.to(device), amplitude.to(device)]


def laid_out(inputs: list[torch.Tensor], layout: str) -> list[torch.Tensor]:
    """The same values elsewhere in memory.

    layout: "model" (as `random_inputs` has them), "contiguous", "packed" (query, key and value of one projection, and
        both Gaussian tensors of one map), or "channels" (channels that are not contiguous).
    """
    if layout == "model":
        return inputs
    tokens, (inverse_variance, amplitude) = inputs[:3], inputs[3:]
    if layout == "contiguous":
        return [tensor.contiguous() for tensor in inputs]
    scalars = torch.cat([inverse_variance, amplitude[..., None]], dim=-1)
    if layout == "packed":
        tokens = torch.stack([tensor.transpose(1, 2) for tensor in tokens], dim=2).transpose(1, 3).unbind(2)
    elif layout == "channels":
        tokens = torch.stack(tokens, dim=-1).unbind(-1)
    else:
        raise ValueError(f"There is no layout {layout!r}.")
    return [*tokens, scalars[..., :2], scalars[..., 2]]


def output_and_gradients(
    attention: Attention, inputs, weights, grid, prefix, distance_cap, block_size, scaling
) -> tuple[torch.Tensor, ...]:
    """What `NAMES` says. weights: (batch, tokens, heads, head_dim), the gradient of the output."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    gaussian = Gaussian(*inputs[3:], grid, prefix, distance_cap, block_size)
    output = attention(*inputs[:3], gaussian, scaling)
    return output.detach(), *torch.autograd.grad(output, inputs, weights.to(output))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """While open, fresh memory holds NaN: what a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# -------------------------------------------------------------------------------------------------------------- errors
def tolerance(dtype: torch.dtype, tokens: int, largest_logit: float) -> float:
    """Of ||x - float64|| / ||float64||, both from the same rounded inputs.

    Sums of as many terms as there are tokens, and exponentials of logits, are made in float32: a sum of N terms is off
    by about sqrt(N) roundings, an exponential by its logit times one. The half types also round weights, gradients of
    logits and results, each by at most one unit. Sums in TF32 would be off by 3e-4 and more.
    """
    rounding = torch.finfo(torch.float32).eps / 2
    of_sums = rounding * (16 * math.sqrt(tokens) + 4 * largest_logit)
    return of_sums + (0.0 if dtype == torch.float32 else 2.5 * torch.finfo(dtype).eps)


def relative_error(ours: torch.Tensor, truth: torch.Tensor, gradient: torch.Tensor) -> float:
    """||ours - truth|| / ||truth||; a truth of zero, as where there is one key, counts as large as `gradient`."""
    norm, scale = truth.norm(), gradient.double().norm()
    return ((ours.double() - truth).norm() / torch.where(norm > 1e-9 * scale, norm, scale)).item()


def check(case: Case, device: str, attention: Attention | None = None) -> dict:
    """The errors of one case, and whether all are within their limits.

    Args:
        case: what to compute.
        device: "cuda", or "cpu" where kernels are interpreted.
        attention: instead of the function that the case names.

    Returns:
        A record: `errors` by name, each with `ours`, `written` and `limit`; `same_bits`, whether two runs agree in
        every bit (None for flex, which adds atomically); `passed`.
    """
    dtype = getattr(torch, case.dtype)
    attention = attention or ATTENTIONS[case.attention]
    if case.compiled:
        attention = torch.compile(attention, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    inputs = random_inputs(
        case.batch, case.heads, case.grid, case.prefix, case.head_dim, dtype, case.seed, device
    )  # fmt: skip
    inputs[0], inputs[4] = inputs[0] * case.logits, inputs[4] * (case.amplitude / 5.0)
    inputs = laid_out(inputs, case.layout)
    generator = torch.Generator().manual_seed(case.seed + 1)
    output_shape = inputs[0].transpose(1, 2).shape
    gradient = torch.randn(output_shape, generator=generator).to(device, dtype)
    if case.gradient == "sum":
        gradient = gradient.flatten()[0].expand(output_shape)
    geometry = (case.grid, case.prefix, case.cap, case.block, case.head_dim**-0.5)

    exact = [tensor.double() for tensor in inputs]
    truth = output_and_gradients(attention_formula, exact, gradient, *geometry)
    largest = largest_logit(exact, *geometry)
    try:
        written = output_and_gradients(written_attention, inputs, gradient, *geometry)
    except RuntimeError:  # which says nothing about the one that is checked
        written = None
    # Flex attention is compiled, and the compiler has other code for deterministic algorithms.
    with poisoned_memory() if case.attention == "fused" else contextlib.nullcontext():
        first = output_and_gradients(attention, inputs, gradient, *geometry)
        second = output_and_gradients(attention, inputs, gradient, *geometry)

    allowed = tolerance(dtype, case.prefix + case.grid[0] * case.grid[1], largest)
    errors, passed = {}, True
    for index, (name, expected) in enumerate(zip(NAMES, truth, strict=True)):
        ours, again = (relative_error(run[index], expected, gradient) for run in (first, second))
        theirs = relative_error(written[index], expected, gradient) if written else None
        limit = allowed
        if theirs is not None and math.isfinite(theirs):
            limit = min(allowed, max(allowed / 2, WORSE_THAN_WRITTEN * theirs))
        fits = first[index].shape == expected.shape and ours <= limit and again <= limit  # NaN never is
        errors[name] = {"ours": ours, "written": theirs, "limit": limit, "passed": fits}
        passed = passed and fits
    same_bits = None
    if case.attention == "fused":
        same_bits = all(torch.equal(ours, again) for ours, again in zip(first, second, strict=True))
        passed = passed and same_bits
    return {"errors": errors, "same_bits": same_bits, "largest_logit": largest, "passed": passed}


def largest_logit(inputs: list[torch.Tensor], grid, prefix, distance_cap, block_size, scaling) -> float:
    """Of the formula, in absolute value."""
    gaussian = Gaussian(*inputs[3:], grid, prefix, distance_cap, block_size)
    return (inputs[0] @ inputs[1].transpose(-1, -2) * scaling + gaussian.bias()).abs().max().item()
