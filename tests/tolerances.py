"""How far two computations of one thing may be apart: what rounding explains, and no more.

A sum of `n` terms, none larger than `m`, is off by at most `n * eps * m` in any order of adding up (Higham, Accuracy
and Stability of Numerical Algorithms, section 4.2), where `eps` is the distance of 1 to the next number of the type.
Processors add up in orders of their own, and so does one processor for another number of threads, another batch or
memory that is laid out otherwise: a reloaded model, whose weights lie in a mapped file, gives other bits. The same bits
come only from a process that repeats a computation on the same tensors.
"""

from collections.abc import Sequence

import numpy as np
import torch


def rounding(terms: int, magnitude: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference that the order of adding up explains.

    Args:
        terms: How many numbers are summed; for layers in a row, those of all layers together.
        magnitude: The size of the largest of them.
        dtype: The type that is summed in.
    """
    return terms * torch.finfo(dtype).eps * magnitude


def assert_same_but_for_rounding(
    actual: torch.Tensor | Sequence[torch.Tensor], expected: torch.Tensor | Sequence[torch.Tensor], terms: int = 256
) -> None:
    """Two computations of one thing agree, relative to the largest number among the results.

    Args:
        actual: A tensor of any shape, or several.
        expected: As many of the same shapes and types.
        terms: As in `rounding`. The small models of the tests have up to four layers of 16 to 64 channels.
    """
    if isinstance(expected, torch.Tensor):
        actual, expected = [actual], [expected]
    for ours, theirs in zip(actual, expected, strict=True):
        largest = theirs.detach().abs().amax().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding(terms, largest, theirs.dtype))


def assert_same_labels(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> None:
    """Two computations of one label map agree but for single pixels: rounding decides between two classes that tie."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.mean(actual == expected) > 0.99
