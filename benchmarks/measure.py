"""How it is measured: steps of all models interleaved in one process, memory in a fresh process for each."""

import contextlib
import ctypes
import functools
import gc
import math
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from locatvit_hf import LocAtViTConfig, LocAtViTImageProcessor
from locatvit_hf.locat import LocAtGaussian
from locatvit_hf.utils.io import one_line

from . import models

MIN_ROUNDS, MAX_ROUNDS = 3, 60
SIZES = (224, 384, 512, 768, 1024)
OVER_BUDGET, OUT_OF_MEMORY = "over the budget", "out of memory"


@dataclass(frozen=True)
class Cell:
    """One measurement: a row of the report for each model.

    mode: "forward" (inference), "train" (forward, loss and backward; the optimizer, which costs every model of a size
        the same, is left out) or "attention" (forward and backward of one layer's attention, without projections).
    goal: the ratio to the reference that our model should not exceed.
    """

    scale: str
    image_size: int
    batch: int
    mode: str
    dtype: str = "float32"
    goal: float | None = None

    @property
    def name(self) -> str:
        return f"{self.scale}-{self.image_size}-b{self.batch}-{self.mode}-{self.dtype}"

    @property
    def reference(self) -> str:
        return models.ATTENTION_REFERENCE if self.mode == "attention" else models.REFERENCE

    def candidates(self, suite: str) -> list[str]:
        """Names of who takes part, the reference first."""
        if suite == "growth":
            return [models.REFERENCE, "pacavit"]
        names = models.ATTENTION if self.mode == "attention" else models.MODELS
        return [name for name in names if suite == "gpu" or name not in models.GPU_ONLY]


def cells_of(suite: str) -> list[Cell]:
    """All cells of a suite, those with a goal first. Raises ValueError for an unknown suite."""
    if suite == "growth":
        return [Cell("tiny", size, 1, mode) for mode in ("forward", "train") for size in SIZES]
    if suite == "cpu":
        goals = [
            Cell("tiny", 224, 8, "forward", goal=1.05),
            Cell("tiny", 512, 1, "forward", goal=1.10),
            Cell("base", 224, 2, "forward", goal=1.03),
            Cell("tiny", 224, 8, "train", goal=1.10),
            Cell("tiny", 512, 1, "train", goal=1.20),
        ]
        rest = [Cell("tiny", size, 1, mode) for mode in ("forward", "train") for size in (384, 768, 1024)]
        return goals + rest + [Cell("tiny", size, 1, "attention") for size in (512, 1024)]
    if suite == "gpu":
        goals = {"attention": 1.15, "train": 1.08, "forward": None}
        cells = []
        for mode, goal in goals.items():
            for dtype, sizes in (("bfloat16", SIZES), ("float16", (512, 1024)), ("float32", (512, 1024))):
                for scale, batch in (("tiny", 32), ("base", 8)):
                    for size in sizes:
                        # As many patches in every batch: enough to fill a GPU, few enough for the formula written out.
                        same_patches = round(batch * (512 / size) ** 2)
                        has_goal = dtype == "bfloat16" and size in (512, 1024)
                        cells.append(Cell(scale, size, same_patches, mode, dtype, goal if has_goal else None))
        return sorted(cells, key=lambda cell: cell.goal is None)
    raise ValueError(f"There is no suite {suite!r}; use cpu, gpu or growth.")


# -------------------------------------------------------------------------------------------------------------- steps
class Step(NamedTuple):
    """What is timed: `run` returns the logits, the loss or a gradient. `parameters` are those of the model."""

    run: Callable[[], torch.Tensor]
    parameters: list[torch.nn.Parameter]

    def finite(self) -> bool:
        """Runs it once: whether what it returns, and every gradient that it leaves, is finite."""
        tensors = [self.run(), *(parameter.grad for parameter in self.parameters if parameter.grad is not None)]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)


def build_step(cell: Cell, name: str, device: str = "cpu") -> Step:
    """The step of the model, or the attention, of that name. Raises RuntimeError where there is none here."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    if cell.mode == "attention":
        config = LocAtViTConfig.from_preset(cell.scale)
        return Step(attention_step(cell, config, name, device, generator), [])
    model = models.MODELS[name](cell.scale, cell.image_size)
    pixels = torch.randn(cell.batch, 3, cell.image_size, cell.image_size, generator=generator)
    labels = torch.randint(1000, (cell.batch,), generator=generator).to(device)
    if cell.mode == "forward":
        model, pixels = model.to(device, dtype).eval(), pixels.to(device, dtype)

        def step() -> torch.Tensor:
            with torch.inference_mode():
                return logits_of(model(pixels))

        return Step(step, list(model.parameters()))

    return training_step(model.to(device).train(), pixels.to(device), labels, dtype)


def training_step(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> Step:
    """Forward in `dtype`, loss and backward of one batch; model, pixels and labels are on one device."""

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            logits = logits_of(model(pixels))
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss

    return Step(step, list(model.parameters()))


def logits_of(output) -> torch.Tensor:
    """timm returns a tensor, transformers an object."""
    return output if isinstance(output, torch.Tensor) else output.logits


def attention_step(
    cell: Cell,
    config: LocAtViTConfig,
    name: str,
    device: str,
    generator: torch.Generator,
    backward: bool = True,
) -> Callable[[], torch.Tensor]:
    """One attention, ready for its backward pass, and that pass; projections and the Gaussian's maps lie outside."""
    attend, dtype = models.attention_function(name), getattr(torch, cell.dtype)
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    grid = (cell.image_size // 16,) * 2
    shape = (cell.batch, 1 + grid[0] * grid[1], heads, head_dim)
    states = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    module = LocAtGaussian(head_dim, config.native_grid).to(device)
    with torch.no_grad():
        gaussian = module(states[0].transpose(1, 2).float(), grid, num_prefix_tokens=1)
    scalars = [gaussian.inverse_variance.requires_grad_(), gaussian.amplitude.requires_grad_()]
    gradient = torch.randn(shape, generator=generator).to(device, dtype)

    def step() -> torch.Tensor:
        query, key, value = (state.transpose(1, 2) for state in states)
        output, _ = attend(module, query, key, value, None, scaling=head_dim**-0.5, gaussian=gaussian)
        if not backward:
            return output.detach()
        leaves = states if name == models.ATTENTION_REFERENCE else states + scalars
        return torch.autograd.grad(output, leaves, gradient)[0]

    return step


@functools.cache
def gmacs(name: str, scale: str, image_size: int) -> float | None:
    """Billions of multiply-accumulates in the matrix products and convolutions of one image's forward pass."""
    if name not in models.MODELS or name in models.GPU_ONLY:
        return None
    model = models.MODELS[name](scale, image_size).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() / 2e9


# --------------------------------------------------------------------------------------------------------------- time
def timed(step: Callable[[], torch.Tensor], device: str) -> float:
    """Seconds of one call: wall clock on CPU, CUDA events on a GPU."""
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_cell(cell: Cell, names: list[str], budget: float, device: str = "cpu", with_memory: bool = True) -> dict:
    """Times and memory of all `names` in one cell: a record for each, by name.

    budget: seconds for the interleaved rounds. A model that cannot make MIN_ROUNDS in it alone is not measured,
        except for the reference.
    """
    records: dict[str, dict] = {name: {} for name in names}
    steps = {}
    keep_freed_memory()
    with memory_limit(device):
        for name, record in records.items():
            try:
                step = build_step(cell, name, device)
                record["parameters"] = sum(parameter.numel() for parameter in step.parameters)
                record["gmacs"] = gmacs(name, cell.scale, cell.image_size) if cell.mode != "attention" else None
                warm_up(step, record, math.inf if name == cell.reference else budget, device)
                steps[name] = step.run
            except Exception as error:  # whatever it is, the others are still measured
                record["missing"] = reason(error)
        for name, seconds in interleave(steps, budget, device).items():
            records[name]["seconds"] = seconds
        if cell.goal and device == "cpu":
            for name in {cell.reference, "locatvit"} & set(steps):
                records[name]["operators"] = operators(steps[name])
    # Other processes need the memory.
    steps.clear()
    give_back_freed_memory()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif with_memory:
        for name, record in records.items():
            if record.get("missing") in (None, OVER_BUDGET, OUT_OF_MEMORY):
                record.update(memory_of(cell, name))
    return records


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, as servers and training runs do with an allocator such as jemalloc.

    glibc gives large blocks back to the system and gets them again as fresh pages, in some steps tens of thousands and
    in others none; which model that strikes is chance, and costs up to a quarter of its time.
    """
    trim_threshold, mmap_max = -1, -4  # names of `mallopt`, in malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def give_back_freed_memory() -> None:
    """Undoes `keep_freed_memory` for what is free by now."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def warm_up(step: Step, record: dict, budget: float, device: str) -> None:
    """Calls before the clock runs; they fill in `finite`, `first_seconds` and, on a GPU, `step_bytes`.

    Raises RuntimeError where MIN_ROUNDS calls would take longer than `budget` seconds.
    """
    record["first_seconds"] = first = timed(step.run, device)
    if device == "cuda":  # where the first call compiles
        for parameter in step.parameters:
            parameter.grad = None
        torch.cuda.empty_cache()
        idle = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        timed(step.run, device)
        record["step_bytes"] = torch.cuda.max_memory_allocated() - idle
    elif first * MIN_ROUNDS > 2 * budget:
        raise RuntimeError(OVER_BUDGET)
    start = time.perf_counter()
    record["finite"] = step.finite()
    if (time.perf_counter() - start) * MIN_ROUNDS > budget:
        raise RuntimeError(OVER_BUDGET)


def interleave(steps: dict[str, Callable], budget: float, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every step in every round. In a round each step runs once, in an order drawn anew.

    Rounds are made until `budget` seconds have passed, at least MIN_ROUNDS and at most MAX_ROUNDS.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    shuffle, start = random.Random(0).shuffle, time.perf_counter()
    order = list(steps)
    for done in range(MAX_ROUNDS if steps else 0):
        if done >= MIN_ROUNDS and time.perf_counter() - start > budget:
            break
        shuffle(order)
        for name in order:
            seconds[name].append(timed(steps[name], device))
    return seconds


def operators(step: Callable[[], torch.Tensor], calls: int = 3) -> dict[str, float]:
    """Milliseconds that a call spends in each operator itself, all threads of PyTorch working."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(calls):
            step()
    own = {event.key: event.self_cpu_time_total / 1e3 / calls for event in profiled.key_averages()}
    return {name: milliseconds for name, milliseconds in own.items() if milliseconds >= 0.01}


def paired_ratios(seconds: list[float], reference: list[float]) -> list[float]:
    """Each round's time over the reference's in the same round, so that what slows a round down cancels."""
    return [one / other for one, other in zip(seconds, reference, strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def growth_exponent(sizes: list[int], values: list[float]) -> float:
    """p of the fit value ~ pixels ** p, `sizes` being the sides of square images: 1 is linear in the pixels."""
    return statistics.linear_regression([2 * math.log(size) for size in sizes], [math.log(v) for v in values]).slope


# ------------------------------------------------------------------------------------------------------------- memory
def memory_of(cell: Cell, name: str) -> dict:
    """`peak_bytes`, the high-water mark of a fresh process, and `step_bytes`, how far it lies above the idle model."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.measure"])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_memory_here, cell, name, torch.get_num_threads()).result()
    except BrokenProcessPool:
        return {"memory_missing": OUT_OF_MEMORY}
    except (RuntimeError, MemoryError, ValueError, OSError) as error:
        return {"memory_missing": reason(error)}


def _memory_here(cell: Cell, name: str, threads: int) -> dict:
    torch.set_num_threads(threads)
    build_step(replace(cell, image_size=224, batch=1), name).run()  # libraries allocate, code is paged in
    with memory_limit("cpu"):
        step = build_step(cell, name)
        ctypes.CDLL(None).malloc_trim(0)  # what the first call has freed goes back
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        idle = _status("VmRSS")
        step.run()
    return {"peak_bytes": _status("VmHWM"), "step_bytes": _status("VmHWM") - idle}


def _status(field: str) -> int:
    """Bytes, as Linux counts them; unlike getrusage it knows nothing of the process this one was forked from."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


@contextlib.contextmanager
def memory_limit(device: str) -> Iterator[None]:
    """While open, an allocation beyond what the machine has fails, instead of the machine."""
    if device != "cpu" or sys.platform != "linux":
        yield
        return
    import resource

    available = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + int(0.95 * available), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def reason(error: BaseException) -> str:
    """Why something was not measured, in a few words."""
    text = one_line(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return OUT_OF_MEMORY
    return text[:120]


# ------------------------------------------------------------------------------------------------------------ startup
IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
PREDICT = """
import numpy, sys, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
inputs = processor(numpy.zeros((256, 256, 3), numpy.uint8), return_tensors="pt")
with torch.inference_mode():
    print(model(**inputs).logits.argmax().item())
"""


def startup(rounds: int = 5) -> dict[str, dict[str, list[float]]]:
    """Seconds in fresh processes, interleaved: `import` of each package, and from the start of Python to the first
    prediction of a folder with a ViT-Tiny: ours, whose code comes from the folder, and the ViT of transformers.
    """
    with tempfile.TemporaryDirectory() as folder:
        folders = {"locatvit": f"{folder}/locatvit", "hf-vit": f"{folder}/hf-vit"}
        for name, path in folders.items():
            model = models.MODELS[name]("tiny", 224)
            model.save_pretrained(path)
            LocAtViTImageProcessor().save_pretrained(path) if name == "locatvit" else None
        models.hf.ViTImageProcessor().save_pretrained(folders["hf-vit"])
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{folder}/modules"}
        imports: dict[str, list[float]] = {name: [] for name in ("torch", "timm", "transformers", "locatvit_hf")}
        predictions: dict[str, list[float]] = {name: [] for name in folders}
        for done in range(rounds + 1):  # the first round, which reads from disk, does not count
            for name, seconds in imports.items():
                seconds += [float(python(IMPORT.format(name), environment))] if done else []
            for name, seconds in predictions.items():
                start = time.perf_counter()
                python(PREDICT, environment, folders[name])
                seconds += [time.perf_counter() - start] if done else []
    return {"import": imports, "first_prediction": predictions}


def python(code: str, environment: dict[str, str], *arguments: str) -> str:
    """What a fresh Python prints. Raises RuntimeError with its last line where it fails."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"A fresh Python failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout
