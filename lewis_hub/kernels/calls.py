"""The kernels as functions of numpy arrays; all arrays are contiguous. Threads may call them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lewis_hub.kernels.machine_code import call
from lewis_hub.kernels.operands import (
    BLOCK,
    F32,
    RANK,
    RUN,
    Bytes,
    Decoding,
    Experts,
    Floats,
    Integers,
    Mix,
    Piece,
    Table,
    Words,
)

N_BINS = 1 << 11  # of a digit of a magnitude, when ranks are found


def merge_task_vectors(piece: Piece, experts: Experts, table: Table, mix: Mix) -> int:
    """Merge one piece of a base and its experts.

    Args:
        piece: of all sources.
        experts: (n_experts,) EXPERT; the remainders are carried on.
        table: of the experts whose mode is RANK.
        mix: how their votes become one.

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

    Args:
        piece: of all sources; of at least RUN elements.
        places: (n_places,): of elements within the piece, at most n - RUN.
        found: (n_experts, n_places, RUN), written.
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
        chosen: (n_chosen,): numbers of the experts that are looked at.
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


def count_high(piece: Piece, chosen: Integers, counts: Words) -> None:
    """Count the magnitudes of task vectors by their high 16 bits.

    Args:
        piece: of all sources.
        chosen: (n_chosen,): numbers of the experts that are looked at.
        counts: (n_chosen, HIGH_BINS), added to.
    """
    arguments = piece.raw, piece.kinds, piece.n, chosen, len(chosen), list(counts)
    call("threshold.count_high", *arguments, _scratch())


def count_low(piece: Piece, chosen: Integers, high: Words, counts: Words) -> None:
    """Count, among magnitudes with certain high bits, by the low 15 bits.

    Args:
        piece: of all sources.
        chosen: (n_chosen,): numbers of the experts that are looked at.
        high: (n_chosen,): the high bits.
        counts: (n_chosen, LOW_BINS), added to.
    """
    arguments = piece.raw, piece.kinds, piece.n, chosen, len(chosen), high, list(counts)
    call("threshold.count_low", *arguments, _scratch())


def scale_up(codes: Bytes, first: int, decoding: Decoding, values: Floats) -> None:
    """Read a piece of a matrix of codes as float32: one difference and one product an element.

    Args:
        codes: (n,): elements [first, first + n) of the matrix, row by row.
        first: the piece's first element.
        decoding: of the matrix.
        values: (n,), written.
    """
    table, n_rows, groups, scales, zeros = decoding
    numbers = codes.size, first, groups.size, n_rows, scales.shape[1]
    call("decode.scale_up", codes, *numbers, table, groups, scales, zeros, values)


def add_low_rank(
    values: Floats, first: int, left: Floats, right: Floats, scale: np.float32
) -> None:
    """Add scale * left @ right to a piece of a matrix.

    Args:
        values: (n,): elements [first, first + n) of the matrix, row by row; added to.
        first: the piece's first element.
        left: (rows, rank).
        right: (rank, columns).
        scale: of the product.
    """
    rank, n_columns = right.shape
    factor, sums = np.array([scale], np.float32), np.empty(n_columns, np.float32)
    call(
        "decode.add_low_rank",
        values,
        values.size,
        first,
        n_columns,
        rank,
        left,
        right,
        factor,
        sums,
    )


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
