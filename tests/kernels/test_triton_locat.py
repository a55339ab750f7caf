"""The fused kernel: its checks under Triton's interpreter and on a GPU, life without Triton, and its compilation."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from locatvit_hf import triton_locat
from locatvit_hf.modeling_locatvit import ALL_ATTENTION_FUNCTIONS
from tests.processes import run_program

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HAS_TRITON = triton_locat.triton is not None  # there is none for macOS
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])] if HAS_TRITON else []


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", DEVICES)
def test_kernel_against_float64_autograd(device, chosen):
    """In a process of its own: Triton decides once, when it is imported, whether to interpret."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", chosen]
    kernel = {"LOCATVIT_KERNEL_DEVICE": device, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    run = subprocess.run(
        [*tests, HERE / "interpreted_triton_locat.py"],
        cwd=ROOT,
        env={**os.environ, **kernel},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d\d passed", run.stdout) and "skipped" not in run.stdout, run.stdout


def test_importing_it_without_triton_says_no_with_the_reason():
    program = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError, as where it is not installed
import torch
from locatvit_hf.locat import Gaussian
from locatvit_hf.triton_locat import fused_attention, unsupported_reason
tokens = torch.zeros(1, 1, 4, 32)
gaussian = Gaussian(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4), (2, 2), 0, 1.0)
print(unsupported_reason(tokens, tokens, tokens, gaussian))
try:
    fused_attention(tokens, tokens, tokens, gaussian, 1.0)
except ValueError as error:
    print(error)
"""
    run = run_program("-c", program, folder=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "Triton is not installed",
        "The fused attention kernel cannot run: Triton is not installed.",
    ]


def test_on_cpu_it_says_no():
    if triton_locat.triton is None or triton_locat.INTERPRETED:
        expected = {None, "Triton is not installed"}
    else:
        expected = {"the tensors are on 'cpu', not on a CUDA device"}
    tokens = torch.zeros(1, 1, 4, 32)
    gaussian = triton_locat.Gaussian(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4), (2, 2), 0, 1.0)
    assert triton_locat.unsupported_reason(tokens, tokens, tokens, gaussian) in expected


@pytest.mark.parametrize(("name", "fused_calls"), (("sdpa", 0), ("locat_fused", 1)))
def test_on_cuda_it_runs_only_where_its_name_is_asked_for(name, fused_calls, monkeypatch):
    calls = []

    def fused_attention(query, *arguments):
        calls.append(query.device.type)
        return query.transpose(1, 2)

    monkeypatch.setattr(triton_locat, "fused_attention", fused_attention)
    monkeypatch.setattr(triton_locat, "unsupported_reason", lambda *arguments: None)
    with FakeTensorMode():  # tensors that say that they are on a GPU; there need be none
        tokens = torch.empty(1, 2, 5, 32, device="cuda")
        scalars = torch.empty(1, 2, 4, 2, device="cuda"), torch.empty(1, 2, 4, device="cuda")
        gaussian = triton_locat.Gaussian(*scalars, (2, 2), 1, 1.0)
        attend = ALL_ATTENTION_FUNCTIONS[name]
        output, _ = attend(None, tokens, tokens, tokens, None, scaling=0.2, gaussian=gaussian)
    assert output.shape == (1, 5, 2, 32)
    assert calls == ["cuda"] * fused_calls


def test_two_copies_of_the_file_live_in_one_process():
    """Two Hub repositories bring a copy each: the second must not take the operators of the first."""
    spec = importlib.util.spec_from_file_location("locatvit_hf.another_triton_locat", triton_locat.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert another.NAMESPACE != triton_locat.NAMESPACE
    assert hasattr(torch.ops, another.NAMESPACE) and hasattr(torch.ops, triton_locat.NAMESPACE)


def compile_for(kernel, capability: int, dtype: str, head_dim: int, tiles: triton_locat.Tiles, side: int):
    """Compile a kernel for a GPU that need not be there, with the arguments that a model on a side x side grid gives.

    Returns registers of a thread, bytes of a thread that spilled to memory, and bytes of shared memory of a program.
    """
    triton = triton_locat.triton
    backends, compiler = (importlib.import_module(f"triton.{name}") for name in ("backends.compiler", "compiler"))
    block_d = triton.next_power_of_2(head_dim)
    once = kernel is not triton_locat._key_value_gradient_kernel
    rows, columns = triton_locat._key_tile(side, side, tiles.keys, columns_once=once)
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": tiles.queries,
        "BLOCK_P": 16,
        "ROWS": rows,
        "COLUMNS": columns,
        "PADDED": bool(side % rows or side % columns),
    }
    in_dtype = {"query", "key", "value", "output", "d_output", "d_query", "d_key", "d_value"}
    in_float32 = {"inverse_variance", "amplitude", "lse", "deltas", "d_inverse_variance", "d_amplitude"}
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name in in_dtype or name in in_float32:
            signature[name] = "*fp32" if name in in_float32 else f"*{dtype}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.endswith("_channel") or name in {"iv_axis", "amp_patch", "block_size"}:
            signature[name], values[name] = "constexpr", 1  # Triton makes a constant of every stride that is 1
        elif name in {"distance_cap", "scaling", "scale2"}:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith(("q_", "k_", "v_", "do_")):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = compiler.ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=backends.GPUTarget("cuda", capability, 32), options=tiles.options())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        report = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report)
    return int(usage[1]), int(usage[2]), compiled.metadata.shared


KERNELS = {
    "forward": ("_forward_kernel", "FORWARD_TILES"),
    "query gradient": ("_query_gradient_kernel", "QUERY_GRADIENT_TILES"),
    "key and value gradient": ("_key_value_gradient_kernel", "KEY_VALUE_GRADIENT_TILES"),
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("name", KERNELS if HAS_TRITON else ())
def test_every_kernel_compiles_for_the_gpus_it_is_meant_for(name, capability):
    """No GPU is needed. Shared memory fits what a program may have, and hardly a register spills.

    Consumer GPUs, with the least of it, run what is compiled as for 8.0; 9.0 has matrix units that take more.
    """
    kernel, table = (getattr(triton_locat, attribute) for attribute in KERNELS[name])
    for dtype, bytes_an_element in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        # 32 and 64 channels on grids that tiles fit exactly, 80 (padded to 128) and 128 on grids that they do not.
        for head_dim, side in ((32, 32), (64, 32), (64, 64), (80, 14), (128, 33)):
            tiles = table[bytes_an_element, triton_locat.triton.next_power_of_2(head_dim)]
            registers, spilled, shared = compile_for(kernel, capability, dtype, head_dim, tiles, side)
            print(f"{name}, sm_{capability}, {dtype}, {head_dim} channels: {registers} registers, "
                  f"{spilled} bytes spilled, {shared} bytes shared")  # fmt: skip
            assert shared <= {80: 99, 90: 227}[capability] * 1024
            assert spilled <= 300
