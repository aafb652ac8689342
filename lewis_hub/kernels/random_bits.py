"""Counter-based random bits: they do not depend on order, threads, shards or machine.

A stream is a 64-bit number derived from (seed, tensor, expert). Its w-th word is SplitMix64's
output for the state stream + (w + 1) * GOLDEN, and serves two elements: the low half element 2w,
the high half element 2w + 1. An element is kept when its half is below density * 2**32.
`vote.random_words` draws the same bits.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
HALVES = 1 << 32  # the values that one element's bits can take


def stream(seed: int, tensor: str, expert: int) -> int:
    """The stream of a tensor and an expert, which is numbered from 0 in the order of the recipe."""
    key = f"{seed}\0{tensor}\0{expert}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def halves(stream: int, n: int, first: int = 0) -> npt.NDArray[np.uint32]:
    """The bits of n elements from `first` on: (n,), uniform over all 32-bit values.

    Source:
        SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    counts = np.arange(first // 2 + 1, (first + n + 1) // 2 + 1, dtype=np.uint64)
    words = counts * np.uint64(GOLDEN) + np.uint64(stream)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(MIX_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(MIX_2)
    words ^= words >> np.uint64(31)
    return words.astype("<u8").view("<u4")[first % 2 :][:n].astype(np.uint32, copy=False)


def below(density: float) -> int:
    """The limit below which halves are kept: all at density 1, none at 0."""
    return round(density * HALVES)
