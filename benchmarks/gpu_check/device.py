"""The GPU, and the processor that stands in for it in a rehearsal: everything that differs between the two."""

import contextlib
import gc
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable

import torch
import torch._dynamo.config
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from locatvit_hf import triton_locat

from .interpreter import interpreting_as_a_gpu


class Processor:
    """A rehearsal: kernels are interpreted, times are those of the wall clock, and of memory nothing is known."""

    name = "cpu"
    activities = [ProfilerActivity.CPU]
    profiled_calls = 1
    poisoned = False
    repair: contextlib.ExitStack | None = None

    def prepare(self) -> None:
        """Before every cell, the first time with an effect. Raises RuntimeError where the device cannot be used."""
        if self.repair:
            return
        if not triton_locat.INTERPRETED:
            raise RuntimeError("A rehearsal needs Triton, and TRITON_INTERPRET=1 before it is imported.")
        torch.set_num_threads(1)
        self.repair = contextlib.ExitStack()  # kept, for what is collected is undone
        self.repair.enter_context(interpreting_as_a_gpu())

    def is_usable(self) -> bool:
        """Whether it still computes: after some errors a process can never use its GPU again."""
        return not self.poisoned

    def facts(self) -> dict:
        """What the numbers depend on."""
        return {"device": platform.processor() or platform.machine(), **versions()}

    def captured(self, run: Callable[[], torch.Tensor]) -> Callable[[], object]:
        """`run` as one graph that is launched as a whole. Raises RuntimeError where it cannot be captured."""
        return run

    def free(self) -> None:
        """Give back what a contender has left."""
        gc.collect()

    def own_seconds(self, event) -> float:
        """Of a row of the profiler: seconds in this operator itself."""
        return event.self_cpu_time_total / 1e6

    def kernels(self, run: Callable[[], object], most: int = 12) -> list[dict]:
        """The kernels that take the most time: name, milliseconds and calls in one run."""
        run()
        with profile(activities=self.activities) as profiled:
            for _ in range(self.profiled_calls):
                run()
        calls = self.profiled_calls
        events = sorted(profiled.key_averages(), key=self.own_seconds, reverse=True)
        return [
            {"name": event.key[:120], "ms": 1e3 * self.own_seconds(event) / calls, "calls": event.count / calls}
            for event in events[:most]
        ]


class Gpu(Processor):
    """The CUDA device."""

    name = "cuda"
    activities = [ProfilerActivity.CUDA]
    profiled_calls = 3

    def prepare(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("There is no CUDA device; --rehearse runs the same on the processor.")
        # Every size is compiled for itself and none falls back to the formula because there are many.
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 256
        torch.cuda.init()

    def is_usable(self) -> bool:
        try:
            torch.cuda.synchronize()
            return bool((torch.ones(8, device="cuda").sum() == 8).item())
        except RuntimeError:
            return False

    def facts(self) -> dict:
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            driver = "unknown"
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory, GB": round(properties.total_memory / 1e9, 1),
            "driver": driver,
            "cuda": torch.version.cuda,
            **versions(),
            **ceilings(),
        }

    def captured(self, run: Callable[[], torch.Tensor]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def free(self) -> None:
        gc.collect()
        with contextlib.suppress(RuntimeError):  # of a device that is lost, which `is_usable` finds out
            torch.cuda.empty_cache()

    def own_seconds(self, event) -> float:
        return event.self_device_time_total / 1e6


def versions() -> dict[str, str | int]:
    """Of the libraries, and the processor's cores."""
    libraries = ("torch", "triton", "transformers", "timm", "numpy")
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and operations a second of a product of bfloat16, both measured."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    left, right = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = {}
    for name, run in (("copy", lambda: target.copy_(source)), ("product", lambda: left @ right)):
        run()
        seconds[name] = measure.quartiles([measure.timed(run, "cuda") for _ in range(10)])[1]
    return {
        "copy, TB/s": round(2 * 4 * source.numel() / seconds["copy"] / 1e12, 2),
        "bfloat16 product, TFLOP/s": round(2 * 8192**3 / seconds["product"] / 1e12),
    }
