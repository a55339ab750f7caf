"""What every test of the repository relies on: no network, one thread a process, a fixed seed."""

import os

# Read when huggingface_hub is imported, so they come before everything else. A test that talks to a Hub (tests/remote)
# starts processes of its own with their own environment; tests/official turns this off again to fetch its sources.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when torch is imported, here and in every process that a test starts: both must add up in the same order where a
# test compares their bits. `make test OMP_NUM_THREADS=2` tests with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where torch is told to leave out instructions of this processor, its library of kernels leaves them out too: otherwise
# it asks for what torch then refuses ("pack_vnni2 is only supported when avx512 is supported").
if "ATEN_CPU_CAPABILITY" in os.environ:
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

from pathlib import Path

import pytest
import torch

# What a change to a folder of the package needs; the other markers stand at their tests.
MARKERS = {
    "models": "model",
    "kernels": "model",
    "conversion": "conversion",
    "hub": "hub",
    "remote": "hub",
    "training": "training",
    "integrations": "export",
}


# Few tests that take long: begun first, so that no worker ends with one while the others wait.
LONGEST = (
    *("test_hub", "test_triton_locat", "test_layouts", "test_readme", "test_extend", "test_push", "test_gpu_check"),
    *("test_docs", "test_evaluation", "test_distributed"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives every test the marker of its folder, and tests of several processes theirs; puts the longest first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in MARKERS:
            item.add_marker(MARKERS[folder])
        if item.path.stem == "test_distributed" or "two_processes" in item.name:
            item.add_marker("distributed")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, alone or in a suite."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The checkout: where pyproject.toml, README.md and locatvit_hf/ are."""
    return Path(__file__).resolve().parent.parent
