"""The hot loops: one piece of a tensor, all sources at once, from raw bytes to raw bytes.

A strip of every source is widened to float32, votes are formed and combined, and rounded once: what
is worked on never leaves the registers. The order of additions is that of the definitions in
`methods/`, so both give the same bytes. Code is made for each number of sources, their formats and
what becomes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from lewis_hub.merge.bits import magnitude
from lewis_hub.merge.drawing import RandomHalves
from lewis_hub.merge.lanes import F32, U32, U64, Value
from lewis_hub.merge.loops import Code
from lewis_hub.merge.native import Native, address_of, addresses_of, compiled
from lewis_hub.merge.operands import DRAW, KEEP_ALL, LANES, RANK, TRIM, Experts, Mix, Piece
from lewis_hub.merge.ranking import thinned
from lewis_hub.merge.strips import Strip, make_strips, number_of, sources_at
from lewis_hub.merge.turns import Turns

MERGE = ("n", "first", "out", "raw", "weights", "thresholds", "ties", "streams", "below")

Voter = Callable[[Strip, Value], Value]  # (strip, task vector) -> votes


def merge_task_vectors(piece: Piece, experts: Experts, mix: Mix) -> int:
    """Merge one piece of a base and its experts.

    Returns:
        -1; or the number of a source that holds NaN or infinity; or, where only the result does,
        the number of sources.
    """
    kinds, modes = tuple(piece.kinds.tolist()), tuple(experts.modes.tolist())
    merge = _merging(kinds, piece.out_kind, modes, mix.elects, mix.normalize)
    by_rank = [thinned(piece, experts, e) for e in range(len(modes))]
    mixing = np.array([mix.divisor, mix.scale], np.float32)
    arrays = (addresses_of(piece.raw), *experts[1:7], addresses_of(by_rank), mixing)
    numbers = (piece.n, piece.first, address_of(piece.out))
    return merge(*numbers, *(address_of(array) for array in arrays))


def average(piece: Piece, weights: Any, divisor: Any) -> int:
    """Average one piece of several models, as `linear.linear` does; returns as above."""
    run = _averaging(tuple(piece.kinds.tolist()), piece.out_kind)
    arrays = (addresses_of(piece.raw), weights, np.array([divisor], np.float32))
    return run(piece.n, address_of(piece.out), *(address_of(array) for array in arrays))


@cache
def _averaging(kinds: tuple[int, ...], out_kind: int) -> Native:
    def write(code: Code) -> None:
        weights = [number_of(code, "weights", s) for s in range(len(kinds))]
        divisor = number_of(code, "mixing", 0)

        def make(strip: Strip) -> Value:
            total = code.many(0.0, F32)
            for source, weight in enumerate(weights):
                total += weight * strip.read(source)
            return total / divisor

        make_strips(sources_at(code, kinds), out_kind, make)

    return compiled("average", ("n", "out", "raw", "weights", "mixing"), write)


@cache
def _merging(
    kinds: tuple[int, ...],
    out_kind: int,
    modes: tuple[int, ...],
    elects: bool,  # noqa: FBT001
    normalize: bool,  # noqa: FBT001
) -> Native:
    def write(code: Code) -> None:
        weights = [number_of(code, "weights", e) for e in range(len(modes))]
        divisor, scale = number_of(code, "mixing", 0), number_of(code, "mixing", 1)
        voters = [_voter(code, e, mode, weights[e]) for e, mode in enumerate(modes)]
        zero = code.many(0.0, F32)

        def make(strip: Strip) -> Value:
            base = strip.read(0)
            deltas = [strip.read(e + 1) - base for e in range(len(modes))]
            votes = [vote(strip, delta) for vote, delta in zip(voters, deltas, strict=True)]
            if not elects:
                return base + scale * (sum(votes, zero) / divisor)
            return base + scale * _elected(votes, weights if normalize else None, zero)

        make_strips(sources_at(code, kinds), out_kind, make)

    return compiled("merge", (*MERGE, "factors", "thinned", "mixing"), write)


def _elected(votes: Sequence[Value], weights: Sequence[Value] | None, zero: Value) -> Value:
    """Combine the votes that have the elected sign, as `combine.elected_votes` does.

    Args:
        votes: one an expert.
        weights: those of the votes that agree divide their sum; None: nothing does.
        zero: in all lanes.
    """
    balance = sum(votes, zero)
    up, down = balance > zero, balance < zero
    agree = [((vote > zero) & up) | ((vote < zero) & down) for vote in votes]
    mixed = sum((vote.where(a) for vote, a in zip(votes, agree, strict=True)), zero)
    if weights is None:
        return mixed
    total = sum((weight.where(a) for weight, a in zip(weights, agree, strict=True)), zero)
    return mixed / total.where(total.differs(0), 1.0)


def _voter(code: Code, e: int, mode: int, weight: Value) -> Voter:
    """How an expert votes; what its numbers are is looked up here, before the loop."""
    if mode == TRIM:
        return _trimming(code, e, weight)
    if mode == DRAW:
        return _drawing(code, e, weight)
    if mode == RANK:
        thinned = code.load(code.arguments["thinned"] + 8 * e, U64)
        return lambda strip, _: weight * code.load(thinned + strip.first * 4, F32, LANES)
    if mode == KEEP_ALL:
        return lambda _, delta: weight * delta
    return lambda *_: code.many(0.0, F32)


def _trimming(code: Code, e: int, weight: Value) -> Voter:
    """The entries above the threshold, and evenly spread ones of those on it."""
    threshold = code.load(code.arguments["thresholds"] + 4 * e, U32).everywhere()
    turns = Turns(code, code.arguments["ties"] + 24 * e)

    def vote(strip: Strip, delta: Value) -> Value:
        size = magnitude(delta)
        tied = (size.equals(threshold) & strip.valid).packed
        kept = code.variable(code.number(0, U32))
        with code.when(tied.differs(0)):
            kept.set(turns.taken(tied))
        return (weight * delta).where((size > threshold) | kept.value.unpacked)

    return vote


def _drawing(code: Code, e: int, weight: Value) -> Voter:
    """The entries whose random bits say so, as `random_bits` draws them."""
    factor = number_of(code, "factors", e)
    below = code.load(code.arguments["below"] + 8 * e, U64)
    highest = (below - 1).narrowed(U32).everywhere()  # it is not zero
    stream = code.load(code.arguments["streams"] + 8 * e, U64)
    halves = RandomHalves(code, stream, code.arguments["first"])

    def vote(_: Strip, delta: Value) -> Value:
        return weight * (factor * delta.where(halves.draw() <= highest))

    return vote
