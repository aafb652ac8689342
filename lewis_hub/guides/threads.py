"""As many threads as leave the arithmetic exactly what it is with one.

torch hands each thread an equal share of a tensor and works on it by pairs of vectors; the rest
that fills no pair takes another path, where an activation function may round otherwise. Shares of
whole pairs have no rest, so the measurements, and with them the merged bytes, are the same on any
number of cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import gcd

import torch

PAIR = 32  # float32 numbers in two of a CPU's widest vectors, AVX-512


def whole_shares(widths: Iterable[int], available: int) -> int:
    """The most threads, a power of two, that split every row into shares of whole pairs.

    Args:
        widths: numbers of features of what activation functions work on.
        available: threads there are, at least 1.
    """
    width = gcd(*widths)
    n_threads = 1
    while 2 * n_threads <= available and width % (2 * n_threads * PAIR) == 0:
        n_threads *= 2
    return n_threads


@contextmanager
def threads(n_threads: int) -> Iterator[None]:
    """Let torch work with so many threads for the time being."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
