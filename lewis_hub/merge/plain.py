"""What the kernels do, in numpy: where there is no compiler. The bytes are the same.

Every function stands for the one of its name in `kernels`, `counting`, `scaling` or `low_rank`,
and is documented there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lewis_hub.merge.operands import (
    ABOVE,
    AT_HIGH,
    AT_LOW,
    BF16,
    DRAW,
    F16,
    F32,
    INSIDE,
    KEEP_ALL,
    LANES,
    LOW_BITS,
    LOW_MASK,
    RANK,
    TRIM,
    Decoding,
    Experts,
    Mix,
    Piece,
)
from lewis_hub.methods import random_bits

ABSOLUTE = np.uint32(0x7FFFFFFF)
EXPONENTS = {BF16: 0x7F80, F16: 0x7C00, F32: 0x7F800000}
STORED = {BF16: "<u2", F16: "<u2", F32: "<u4"}
ZERO = np.float32(0)


def sample(piece: Piece, places: Any, found: Any) -> None:  # noqa: D103
    chosen = (places[:, None] + np.arange(LANES)).ravel()
    base, *experts = (
        widened(raw.view(STORED[kind])[chosen].view(np.uint8), kind, len(chosen))
        for raw, kind in zip(piece.raw, piece.kinds, strict=True)
    )
    for e, expert in enumerate(experts):
        found[e] = _bits(expert - base).reshape(len(places), LANES)


def sort_out(  # noqa: D103
    piece: Piece, chosen: tuple[int, ...], ends: Any, tally: Any, inside: Any
) -> None:
    low, high = ends
    for e, delta in enumerate(_task_vectors(piece)):
        if e not in chosen:
            continue
        bits = _bits(delta)
        tally[e, ABOVE] += np.count_nonzero(bits > high[e])
        tally[e, AT_HIGH] += np.count_nonzero(bits == high[e])
        tally[e, AT_LOW] += np.count_nonzero(bits == low[e])
        between = bits[(bits > low[e]) & (bits < high[e])]
        place = tally[e, INSIDE]
        fitting = between[: inside.shape[1] - LANES - place]
        inside[e, place : place + len(fitting)] = fitting
        tally[e, INSIDE] += len(fitting)


def count_high(piece: Piece, chosen: tuple[int, ...], counts: Any) -> None:  # noqa: D103
    for e, delta in enumerate(_task_vectors(piece)):
        if e in chosen:
            counts[e] += _counted(_bits(delta) >> np.uint32(LOW_BITS), counts)


def count_low(  # noqa: D103
    piece: Piece, chosen: tuple[int, ...], high: Any, counts: Any
) -> None:
    for e, delta in enumerate(_task_vectors(piece)):
        if e in chosen:
            bits = _bits(delta)
            found = bits[bits >> np.uint32(LOW_BITS) == high[e]]
            counts[e] += _counted(found & np.uint32(LOW_MASK), counts)


def merge_task_vectors(piece: Piece, experts: Experts, mix: Mix) -> int:  # noqa: D103
    base = widened(piece.raw[0], piece.kinds[0], piece.n)
    if not np.isfinite(base).all():
        return 0
    votes = []
    for e in range(len(experts.weights)):
        expert = widened(piece.raw[e + 1], piece.kinds[e + 1], piece.n)
        if not np.isfinite(expert).all():
            return e + 1
        votes.append(experts.weights[e] * _thinned(expert - base, experts, e, piece))
    mixed = _elected(votes, experts, mix) if mix.elects else _added(votes) / mix.divisor
    fits = _narrow(base + mix.scale * mixed, piece)
    return -1 if fits else len(experts.weights) + 1


def average(piece: Piece, weights: Any, divisor: Any) -> int:  # noqa: D103
    tensors = []
    for s, weight in enumerate(weights):
        tensor = widened(piece.raw[s], piece.kinds[s], piece.n)
        if not np.isfinite(tensor).all():
            return s
        tensors.append(weight * tensor)
    return -1 if _narrow(_added(tensors) / divisor, piece) else len(weights)


def scale_up(codes: Any, first: int, decoding: Decoding, values: Any) -> None:  # noqa: D103
    places = first + np.arange(codes.size)
    rows = places // decoding.groups.size // decoding.n_rows
    groups = decoding.groups[places % decoding.groups.size]
    shifted = decoding.table[codes] - decoding.zeros[rows, groups]
    values[:] = shifted * decoding.scales[rows, groups]


def add_low_rank(values: Any, first: int, left: Any, right: Any, scale: Any) -> None:  # noqa: D103
    n_columns, done = right.shape[1], 0
    while done < values.size:
        row, column = divmod(first + done, n_columns)
        n = min(n_columns - column, values.size - done)
        sums = np.zeros(n, np.float32)
        for factor, numbers in zip(left[row], right[:, column : column + n], strict=True):
            sums += factor * numbers
        values[done : done + n] += scale * sums
        done += n


def _task_vectors(piece: Piece) -> Any:
    pairs = zip(piece.raw, piece.kinds, strict=True)
    base, *experts = (widened(raw, kind, piece.n) for raw, kind in pairs)
    return (expert - base for expert in experts)


def widened(raw: Any, kind: int, n: int) -> Any:
    """The first n elements of raw bytes as float32; of a format of `operands`."""
    if kind == BF16:
        return (raw[: 2 * n].view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == F16:
        return raw[: 2 * n].view("<f2").astype(np.float32)
    return raw[: 4 * n].view("<f4")


def narrowed(values: Any, kind: int) -> Any:
    """Float32 values as the bits of a format of `operands`, rounded to nearest even."""
    if kind == BF16:
        bits = values.view(np.uint32)
        even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return ((bits + even) >> np.uint32(16)).astype("<u2")
    with np.errstate(over="ignore"):
        return values.astype("<f2").view("<u2") if kind == F16 else values.view("<u4")


def odd(bits: Any, kind: int) -> Any:
    """Which of the bits of a format stand for NaN or infinity."""
    exponent = bits.dtype.type(EXPONENTS[kind])
    return (bits & exponent) == exponent


def _narrow(values: Any, piece: Piece) -> bool:
    """Round and write; whether all are finite."""
    bits = narrowed(values, piece.out_kind)
    piece.out[: bits.nbytes] = bits.view(np.uint8)
    # a NaN may be rounded to a number
    return not odd(bits, piece.out_kind).any() and bool(np.isfinite(values).all())


def _bits(delta: Any) -> Any:
    return delta.view(np.uint32) & ABSOLUTE


def _counted(values: Any, counts: Any) -> Any:
    return np.bincount(values, minlength=counts.shape[1]).astype(counts.dtype)


def _thinned(delta: Any, experts: Experts, e: int, piece: Piece) -> Any:
    mode = experts.modes[e]
    kept: dict[int, Callable[[], Any]] = {
        KEEP_ALL: lambda: delta,
        TRIM: lambda: _trimmed(delta, experts, e),
        DRAW: lambda: experts.factors[e] * _where(_drawn(experts, e, piece), delta),
        RANK: lambda: _ranked(delta, experts, e, piece),
    }
    return kept[mode]() if mode in kept else np.zeros_like(delta)


def _where(kept: Any, delta: Any) -> Any:
    return np.where(kept, delta, ZERO)


def _trimmed(delta: Any, experts: Experts, e: int) -> Any:
    magnitude, threshold = np.abs(delta), experts.thresholds[e]
    wanted, tied, remainder = (int(number) for number in experts.ties[e])
    at = magnitude == threshold
    n_tied = np.count_nonzero(at)
    if n_tied and wanted:
        passed = remainder + wanted * np.arange(1, n_tied + 1)
        chosen = passed // tied > (passed - wanted) // tied
        experts.ties[e, 2] = (remainder + wanted * n_tied) % tied
        at[at] = chosen
    else:
        at[:] = False
    return _where((magnitude > threshold) | at, delta)


def _drawn(experts: Experts, e: int, piece: Piece) -> Any:
    return random_bits.halves(int(experts.streams[e]), piece.n, piece.first) < experts.below[e]


def _ranked(delta: Any, experts: Experts, e: int, piece: Piece) -> Any:
    rows = _bits(delta).reshape(-1, piece.block)
    ranks = rows.argsort(axis=1, kind="stable").argsort(axis=1).ravel()
    below, factors = experts.table.below[e], experts.table.factors[e]
    drawn = random_bits.halves(int(experts.streams[e]), piece.n, piece.first) < below[ranks]
    return _where(drawn, delta * factors[ranks])


def _added(votes: Any) -> Any:
    total = np.zeros_like(votes[0])
    for vote in votes:
        total += vote
    return total


def _elected(votes: Any, experts: Experts, mix: Mix) -> Any:
    balance = _added(votes)
    agrees = [(v > 0) & (balance > 0) | (v < 0) & (balance < 0) for v in votes]
    mixed = _added([_where(a, v) for v, a in zip(votes, agrees, strict=True)])
    if not mix.normalize:
        return mixed
    total = _added([_where(a, w) for w, a in zip(experts.weights, agrees, strict=True)])
    return mixed / np.where(total != 0, total, np.float32(1))
