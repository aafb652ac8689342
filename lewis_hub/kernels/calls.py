"""The kernels as functions of numpy arrays, and the types of their operands.

Arrays are contiguous. Threads may call the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lewis_hub.kernels.machine_code import call

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
    ]
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


N_BINS = 1 << 11  # of a digit of a magnitude, when ranks are found


def merge_task_vectors(piece: Piece, experts: Experts, table: Table, mix: Mix) -> int:
    """Merge one piece of a base and its experts, whose remainders are carried on.

    Returns:
        -1; or the number of a source that holds NaN or infinity; or, where only the result does,
        the number of sources.
    """
    strip = max(BLOCK // piece.block, 1) * piece.block
    ranked = bool((experts["mode"] == RANK).any())
    scratch = (
        np.empty((4 + len(experts), strip), np.float32),
        np.empty(strip + 8, np.uint8),
        np.empty(strip + 8, np.uint16),
        np.empty(strip // 2 + 2, np.uint64),
        np.empty((2, piece.block if ranked else 0), np.uint64),
        np.empty(N_BINS if ranked else 0, np.uint32),
        np.zeros(len(experts) + 1, np.uint32),
    )
    return call(
        "vote.merge_task_vectors",
        *(piece.raw, piece.kinds, piece.n, piece.first, strip, piece.out, piece.out_kind),
        *(experts, len(experts), table.below, table.factors),
        *(np.array([mix.divisor, mix.scale], np.float32), int(mix.elects), int(mix.normalize)),
        *(piece.block, scratch),
    )


def average(piece: Piece, weights: Floats, divisor: np.float32) -> int:
    """Average one piece of several models, as `methods.linear` does; returns as above."""
    weights = np.append(weights, divisor).astype(np.float32)
    scratch = np.empty((2, BLOCK), np.float32), np.zeros(len(piece.raw), np.uint32)
    return call(
        "vote.average",
        *(piece.raw, piece.kinds, piece.n, len(piece.raw), BLOCK),
        *(piece.out, piece.out_kind, weights, scratch),
    )


def sample(piece: Piece, places: Integers, found: Words) -> None:
    """Write the magnitudes of each expert's task vector at some places, RUN from each on.

    Places are indices within the piece, at most n - RUN. `found` is (n_experts, n_places, RUN).
    """
    base = np.empty(RUN, np.float32)
    call(
        "threshold.sample",
        *(piece.raw, piece.kinds, len(found), places, len(places), list(found), base),
    )


def sort_out(
    piece: Piece, chosen: Integers, brackets: Integers, tallies: Integers, inside: Words
) -> None:
    """Count the magnitudes above a bracket and on its ends, and collect those inside it.

    Args:
        piece: of all sources.
        chosen: (n_chosen,): numbers of experts.
        brackets: (n_chosen, 2): the lower and the upper end.
        tallies: (n_chosen, 4), added to: above, at high, at low, inside.
        inside: (n_chosen, capacity), filled as far as the tally's last column says; where that is
            `capacity`, some may be missing.
    """
    call(
        "threshold.sort_out",
        *(piece.raw, piece.kinds, piece.n, chosen, len(chosen)),
        *(brackets, tallies, list(inside), inside.shape[1], _scratch()),
    )


def count_bits(piece: Piece, chosen: Integers, high: Integers, counts: Words) -> None:
    """Count magnitudes of the chosen experts' task vectors, into (n_chosen, n_bins).

    Where `high` is -1, all are counted by their high 16 bits; else those with these high bits are
    counted by their low 15.
    """
    arguments = piece.raw, piece.kinds, piece.n, chosen, len(chosen), high, list(counts)
    call("threshold.count_bits", *arguments, _scratch())


def scale_up(codes: Bytes, first: int, decoding: Decoding, values: Floats) -> None:
    """Write elements [first, first + n) of a matrix of codes as float32, row by row."""
    table, n_rows, groups, scales, zeros = decoding
    numbers = codes.size, first, groups.size, n_rows, scales.shape[1]
    call("decode.scale_up", codes, *numbers, table, groups, scales, zeros, values)


def add_low_rank(
    values: Floats, first: int, left: Floats, right: Floats, scale: np.float32
) -> None:
    """Add scale * left @ right to elements [first, first + n) of a matrix, row by row."""
    rank, n_columns = right.shape
    factor, sums = np.array([scale], np.float32), np.empty(n_columns, np.float32)
    numbers = values.size, first, n_columns, rank
    call("decode.add_low_rank", values, *numbers, left, right, factor, sums)


def widen(raw: Bytes, kind: int, n: int) -> Floats:
    """The first n elements of raw bytes as float32; `kind`: a value of FORMATS."""
    values = np.empty(n, np.float32)
    call("decode.widen_array", raw, kind, n, values)
    return values


def narrow(values: Floats, kind: int) -> npt.NDArray[np.unsignedinteger]:
    """Float32 values as the bits of a format, rounded to nearest even."""
    out: npt.NDArray[np.unsignedinteger]
    out = np.empty(values.size, np.uint32) if kind == F32 else np.empty(values.size, np.uint16)
    call("decode.narrow_array", values, values.size, kind, out)
    return out


def _scratch() -> tuple[Floats, Bytes, npt.NDArray[np.uint16]]:
    return (
        np.empty((2, BLOCK), np.float32),
        np.empty(BLOCK, np.uint8),
        np.empty(BLOCK + 8, np.uint16),
    )
