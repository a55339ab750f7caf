"""Races: contenders interleaved in one process, with times, memory, and the kernels that take the time."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from benchmarks import measure, models
from locatvit_hf import LocAtSwinConfig, LocAtViTConfig, attention_locat, triton_locat
from locatvit_hf.locat import LocAtGaussian
from locatvit_hf.modeling_locatswin import ALL_ATTENTION_FUNCTIONS, shift_mask

from .cells import Profile, Speed
from .contenders import Contenders
from .device import Processor

MODELS = {
    "written": "locatvit-written",
    "fused": "locatvit-fused",
    "none": "baseline",
    "flex": "locatvit-flex",
    "formula": "literal",
}
ATTENTIONS = {
    "written": "locat-written",
    "fused": "locat-fused",
    "none": "plain",
    "flex": "locat-flex",
    "formula": "literal",
}
SHORTEST = 2e-3  # seconds between two readings of the clock: what is faster is run several times
Run = Callable[[], torch.Tensor]


@contextlib.contextmanager
def no_fallback() -> Iterator[None]:
    """While open, a back-end that would quietly use 'sdpa' instead of itself raises RuntimeError."""

    def refuse(*arguments, **keywords):
        raise RuntimeError("it would use 'sdpa' instead")

    with contextlib.ExitStack() as patches:
        for module in (attention_locat, triton_locat):
            patches.enter_context(mock.patch.object(module, "sdpa_attention_forward", refuse))
        yield


def race(cell: Speed, without: tuple[str, ...], device: Processor, tell) -> dict:
    """Times and memory of every contender.

    Returns:
        A record: `contenders`, by name `parts`, by part `seconds` (one number a round, paired across contenders),
        `bytes` above the idle model at the peak, and `captured`, whether a graph was timed; or `missing`, the reason.
    """
    entries = Contenders([name for name in cell.contenders if name not in without], device, tell)
    runs: dict[str, dict[str, Callable[[], object]]] = {}

    def prepare(name: str, record: dict) -> None:
        parts, prepared = {}, {}
        for part, step in parts_of(cell, name, device).items():
            known: dict = {}
            with no_fallback():
                measure.warm_up(step, known, math.inf, device.name)
            parts[part] = {"bytes": known.pop("step_bytes", None), **known, "captured": False}
            prepared[part] = step.run
            if cell.subject in ("attention", "windows"):  # launching would take longer than computing
                with contextlib.suppress(RuntimeError):
                    prepared[part], parts[part]["captured"] = device.captured(step.run), True
        record["parts"], runs[name] = parts, prepared

    entries.attempt(prepare)
    # The formula is many times slower: in the race it would leave the others few rounds.
    racers = [name for name in runs if name != "formula"]
    for names, seconds in ((racers, cell.seconds), (["formula"] if "formula" in runs else [], cell.seconds / 4)):
        for part in runs[names[0]] if names else ():
            calls = {name: calls_of(runs[name][part], device) for name in names}
            repeated = {name: functools.partial(repeat, runs[name][part], calls[name]) for name in names}
            for name, times in measure.interleave(repeated, seconds, device.name).items():
                entries.records[name]["parts"][part]["seconds"] = [time / calls[name] for time in times]
            entries.report()
    return entries.record()


def repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


def calls_of(run: Callable[[], object], device: Processor) -> int:
    """How often to run something between two readings of the clock."""
    return max(1, min(50, math.ceil(SHORTEST / measure.timed(run, device.name))))


def parts_of(cell: Speed, name: str, device: Processor) -> dict[str, measure.Step]:
    """What is timed of a contender, by name. Models and inputs are the same for all, from fixed seeds."""
    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    if cell.subject in ("step", "window step"):
        model = model_of(cell, name).to(device.name).train()
        pixels = torch.randn(cell.batch, 3, cell.image_size, cell.image_size).to(device.name)
        labels = torch.randint(1000, (cell.batch,)).to(device.name)
        return {"step": measure.training_step(model, pixels, labels, dtype)}
    parts = {}
    for part, backward in (("forward", False), ("forward and backward", True)):
        if cell.subject == "attention":
            config = LocAtViTConfig.from_preset(cell.scale, **cell.overrides)
            alone = measure.Cell(cell.scale, cell.image_size, cell.batch, "attention", cell.dtype)
            generator = torch.Generator().manual_seed(0)
            run = measure.attention_step(alone, config, ATTENTIONS[name], device.name, generator, backward)
        else:
            run = windows_step(cell, name, device, dtype, backward)
        parts[part] = measure.Step(run, [])
    return parts


def model_of(cell: Speed, name: str) -> torch.nn.Module:
    if cell.subject == "step":
        return models.MODELS[MODELS[name]](cell.scale, cell.image_size, **cell.overrides)
    overrides = {**cell.overrides, **(models.PLAIN if name == "none" else {})}
    model = models.locatswin(cell.scale, cell.image_size, **overrides)
    model.config._attn_implementation = {"written": "sdpa", "none": "sdpa", "flex": "flex_attention"}[name]
    return model


def windows_step(cell: Speed, name: str, device: Processor, dtype: torch.dtype, backward: bool) -> Run:
    """Attention in the shifted windows of the first stage of a LocAtSwin, position bias and mask added as it does."""
    config = LocAtSwinConfig.from_preset(cell.scale)
    (window, shift), heads = config.windows[0], config.num_heads[0]
    head_dim, area = config.stage_channels[0] // heads, window[0] * window[1]
    grid = tuple(-(-cell.image_size // 4 // length) * length for length in window)
    windows = cell.batch * (grid[0] // window[0]) * (grid[1] // window[1])
    shape = (windows, heads, area, head_dim)
    states = [torch.randn(shape).to(device.name, dtype).requires_grad_() for _ in range(3)]
    positions = torch.randn(1, heads, area, area).to(device.name, dtype).requires_grad_()
    mask = shift_mask(grid, window, shift, like=states[0])
    gradient = torch.randn(windows, area, heads, head_dim).to(device.name, dtype)
    leaves, gaussian = [*states, positions], None
    if name != "none":
        module = LocAtGaussian(head_dim, window).to(device.name)
        with torch.no_grad():
            gaussian = module(states[0].float(), window)
        leaves += [gaussian.inverse_variance.requires_grad_(), gaussian.amplitude.requires_grad_()]
    attend = ALL_ATTENTION_FUNCTIONS["flex_attention" if name == "flex" else "sdpa"]

    def run() -> torch.Tensor:
        bias = (positions + mask).expand(cell.batch, -1, -1, -1, -1).flatten(0, 1)
        output, _ = attend(None, *states, bias, scaling=head_dim**-0.5, gaussian=gaussian)
        if not backward:
            return output.detach()
        return torch.autograd.grad(output, leaves, gradient)[0]

    return run


def kernels(cell: Profile, without: tuple[str, ...], device: Processor, tell) -> dict:
    """`contenders`, by name the `kernels` that take the most time in one step."""
    entries = Contenders([name for name in cell.contenders if name not in without], device, tell)

    def work(name: str, record: dict) -> None:
        (*_, step) = parts_of(cell.cell, name, device).values()
        record["kernels"] = device.kernels(step.run)

    entries.attempt(work)
    return entries.record()
