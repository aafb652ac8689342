"""What the kernels do, in numpy: where there is no compiler. The bytes are the same.

Every function stands for the one of its name in `kernels`, `counting`, `scaling` or `low_rank`,
and is documented there. A piece is worked on part by part, so that what lies between its bytes and
the result's stays in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
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
HALF = np.uint32(16)  # of a float32's bits; the upper one is a bfloat16
EXPONENTS = {BF16: 0x7F80, F16: 0x7C00, F32: 0x7F800000}
STORED = {BF16: "<u2", F16: "<u2", F32: "<u4"}
ZERO = np.float32(0)
PART = 1 << 16  # entries: of fewer the calls cost most, of more they leave the cache
KEPT_BYTES = 64 * PART  # 16 intermediate results of a part


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
    for e, sizes in _sizes(piece, chosen):
        tally[e, ABOVE] += np.count_nonzero(sizes > high[e])
        tally[e, AT_HIGH] += np.count_nonzero(sizes == high[e])
        tally[e, AT_LOW] += np.count_nonzero(sizes == low[e])
        between = sizes[(sizes > low[e]) & (sizes < high[e])]
        place = tally[e, INSIDE]
        fitting = between[: inside.shape[1] - LANES - place]
        inside[e, place : place + len(fitting)] = fitting
        tally[e, INSIDE] += len(fitting)


def count_high(piece: Piece, chosen: tuple[int, ...], counts: Any) -> None:  # noqa: D103
    for e, sizes in _sizes(piece, chosen):
        counts[e] += _counted(sizes >> np.uint32(LOW_BITS), counts)


def count_low(  # noqa: D103
    piece: Piece, chosen: tuple[int, ...], high: Any, counts: Any
) -> None:
    for e, sizes in _sizes(piece, chosen):
        found = sizes[sizes >> np.uint32(LOW_BITS) == high[e]]
        counts[e] += _counted(found & np.uint32(LOW_MASK), counts)


def merge_task_vectors(piece: Piece, experts: Experts, mix: Mix) -> int:  # noqa: D103
    faults = (_merge_part(part, experts, mix) for part in _parts(piece))
    return next((fault for fault in faults if fault >= 0), -1)


def average(piece: Piece, weights: Any, divisor: Any) -> int:  # noqa: D103
    faults = (_average_part(part, weights, divisor) for part in _parts(piece))
    return next((fault for fault in faults if fault >= 0), -1)


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


def _parts(piece: Piece) -> Iterator[Piece]:
    length = max(PART // piece.block, 1) * piece.block
    stored = [raw.view(STORED[kind]) for raw, kind in zip(piece.raw, piece.kinds, strict=True)]
    out = piece.out.view(STORED[piece.out_kind])
    # glibc keeps freed memory up to twice the largest block that was freed (mallopt(3)); else each
    # part would be handed its pages anew, which takes as long as the arithmetic
    np.empty(KEPT_BYTES, np.uint8)
    for start in range(0, piece.n, length):
        n, first = min(length, piece.n - start), piece.first + start
        raw = tuple(held[start:][:n].view(np.uint8) for held in stored)
        yield piece._replace(raw=raw, n=n, first=first, out=out[start:][:n].view(np.uint8))


def _sizes(piece: Piece, chosen: tuple[int, ...]) -> Iterator[tuple[int, Any]]:
    """The magnitudes of the chosen experts' task vectors, part by part."""
    for part in _parts(piece):
        base = widened(part.raw[0], part.kinds[0], part.n)
        for e in chosen:
            yield e, _bits(widened(part.raw[e + 1], part.kinds[e + 1], part.n) - base)


def _merge_part(part: Piece, experts: Experts, mix: Mix) -> int:
    at_fault = _odd_source(part)
    if at_fault >= 0:
        return at_fault
    tensors = _tensors(part)
    base = next(tensors)
    votes = [
        weight * _thinned(tensor - base, experts, e, part)
        for e, (weight, tensor) in enumerate(zip(experts.weights, tensors, strict=True))
    ]
    mixed = _elected(votes, experts, mix) if mix.elects else _added(votes) / mix.divisor
    return -1 if _narrow(base + mix.scale * mixed, part) else len(part.raw)


def _average_part(part: Piece, weights: Any, divisor: Any) -> int:
    at_fault = _odd_source(part)
    if at_fault >= 0:
        return at_fault
    pairs = zip(weights, _tensors(part), strict=True)
    added = _added([weight * tensor for weight, tensor in pairs])
    return -1 if _narrow(added / divisor, part) else len(part.raw)


def _tensors(part: Piece) -> Iterator[Any]:
    return map(widened, part.raw, part.kinds, repeat(part.n))


def _odd_source(part: Piece) -> int:
    """The number of the first source that holds NaN or infinity, or -1."""
    for source, (raw, kind) in enumerate(zip(part.raw, part.kinds, strict=True)):
        if odd(raw.view(STORED[kind]), kind).any():
            return source
    return -1


def widened(raw: Any, kind: int, n: int) -> Any:
    """The first n elements of raw bytes as float32; of a format of `operands`."""
    if kind == BF16:
        return (raw[: 2 * n].view("<u2") << HALF).view(np.float32)
    if kind == F16:
        return raw[: 2 * n].view("<f2").astype(np.float32)
    return raw[: 4 * n].view("<f4")


def narrowed(values: Any, kind: int) -> Any:
    """Float32 values as the bits of a format of `operands`, rounded to nearest even."""
    if kind == BF16:
        bits = values.view(np.uint32)
        rounded = bits >> HALF
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= HALF
        return rounded.astype("<u2")
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
        TRIM: lambda: _where(_largest(delta, experts, e), delta),
        DRAW: lambda: experts.factors[e] * _where(_drawn(experts, e, piece), delta),
        RANK: lambda: _ranked(delta, experts, e, piece),
    }
    return kept[mode]() if mode in kept else np.zeros_like(delta)


def _where(kept: Any, values: Any) -> Any:
    """Float32 values where kept, else 0; `np.where` is far slower where the two mix."""
    all_bits = -kept.view(np.int8)  # or none
    return (values.view(np.int32) & all_bits).view(np.float32)


def _largest(delta: Any, experts: Experts, e: int) -> Any:
    magnitude, threshold = np.abs(delta), experts.thresholds[e]
    kept = magnitude > threshold
    wanted, tied, remainder = (int(number) for number in experts.ties[e])
    if wanted:
        places = np.flatnonzero(magnitude == threshold)
        n_kept, experts.ties[e, 2] = divmod(remainder + wanted * len(places), tied)
        # those at which the multiples of `wanted` pass one of `tied`
        passing = (tied * np.arange(1, n_kept + 1) - remainder - 1) // wanted
        kept[places[passing]] = True
    return kept


def _drawn(experts: Experts, e: int, piece: Piece) -> Any:
    return random_bits.halves(int(experts.streams[e]), piece.n, piece.first) < experts.below[e]


def _ranked(delta: Any, experts: Experts, e: int, piece: Piece) -> Any:
    rows = _bits(delta).reshape(-1, piece.block)
    order = rows.argsort(axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(piece.block)[None], axis=1)
    ranks = ranks.ravel()
    below, factors = experts.table.below[e], experts.table.factors[e]
    drawn = random_bits.halves(int(experts.streams[e]), piece.n, piece.first) < below[ranks]
    return _where(drawn, delta * factors[ranks])


def _added(votes: Any) -> Any:
    total = ZERO + votes[0]
    for vote in votes[1:]:
        total += vote
    return total


def _elected(votes: Any, experts: Experts, mix: Mix) -> Any:
    balance = _added(votes)
    up, down = balance > 0, balance < 0
    agrees = [(v > 0) & up | (v < 0) & down for v in votes]
    mixed = _added([_where(a, v) for v, a in zip(votes, agrees, strict=True)])
    if not mix.normalize:
        return mixed
    total = _added([w * a for w, a in zip(experts.weights, agrees, strict=True)])
    total += total == 0
    return mixed / total
