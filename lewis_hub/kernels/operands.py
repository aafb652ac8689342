"""Operands of the kernels: pieces of a tensor, the settings of each expert, how votes combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.uint16]
Words = npt.NDArray[np.uint32]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

BLOCK = 1024  # elements worked on at a time, in the innermost cache; even: see `random_bits`
# How a task vector is sparsified: not at all, set to zero, by magnitude (TIES), at random (DARE),
# at random with a probability that depends on the rank within the row (DELLA).
KEEP_ALL, KEEP_NONE, TRIM, DRAW, RANK = 0, 1, 2, 3, 4

BF16, F16, F32 = 0, 1, 2
FORMATS = {"BF16": BF16, "F16": F16, "F32": F32}  # safetensors' names

# Bits of a float32. Of NaN and infinity, the bits without the sign are EXPONENT or more.
SIGN, ABSOLUTE, EXPONENT = 0x80000000, 0x7FFFFFFF, 0x7F800000
HIGH_BINS, LOW_BINS = 1 << 16, 1 << 15  # the 31 bits of a magnitude, in two steps
LOW_BITS, LOW_MASK = 15, LOW_BINS - 1
RUN = 16  # neighbouring elements that a sample takes from one place
ABOVE, AT_HIGH, AT_LOW, INSIDE = 0, 1, 2, 3  # columns of a tally

EXPERT = np.dtype(  # a row for each expert
    [
        ("mode", np.int64),
        ("wanted", np.int64),  # TRIM: how many of the entries at the threshold are kept
        ("tied", np.int64),  # TRIM: how many there are
        ("remainder", np.int64),  # TRIM: see `vote.drop_ties`; carried on from piece to piece
        ("stream", np.uint64),  # DRAW and RANK: of random bits
        ("below", np.uint64),  # DRAW: random halves below are kept
        ("threshold", np.uint32),  # TRIM: bits of the smallest magnitude that is kept
        ("weight", np.float32),
        ("factor", np.float32),  # DRAW: what a kept entry is multiplied by
        ("unused", np.float32),
    ],
)
Experts = npt.NDArray[np.void]  # (n_experts,) EXPERT


class Decoding(NamedTuple):
    """The values of a quantised matrix: (table[code] - zero) * scale."""

    table: Floats  # (256,): the value of each code
    n_rows: int  # rows that share a scale
    groups: npt.NDArray[np.int32]  # (columns,): per column, which of the scales across it has
    scales: Floats  # (blocks down, blocks across)
    zeros: Floats  # the same shape


class Piece(NamedTuple):
    """A piece of a tensor: raw bytes of all sources, and space for the result."""

    raw: Sequence[Bytes]  # one array for each source, the base first
    kinds: Integers  # (n_sources,): values of FORMATS
    n: int  # number of elements
    first: int  # the piece's first element within the tensor; a multiple of `block`
    block: int  # elements that are processed together: BLOCK, or a row if ranks are needed
    out: Bytes  # written
    out_kind: int


class Table(NamedTuple):
    """Settings of RANK, by expert and by rank within a row."""

    below: npt.NDArray[np.uint64]  # (n_experts, row): random halves below are kept
    factors: Floats  # (n_experts, row): what a kept entry is multiplied by


NO_TABLE = Table(np.zeros((0, 0), np.uint64), np.zeros((0, 0), np.float32))


class Mix(NamedTuple):
    """How the votes of all experts become one."""

    elects: bool
    normalize: bool
    divisor: Any  # float32: of all votes, where no sign is elected
    scale: Any  # float32: lambda
