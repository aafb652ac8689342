"""The hot loops: one piece of a tensor, all sources at once, from raw bytes to raw bytes.

Inside a piece the work goes by blocks that stay in the first-level cache: widen every source to
float32, form votes, combine them, round once. The order of additions is that of the definitions
in `methods/`, so both give the same bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lewis_hub.merge.bits import ABSOLUTE, as_bits, compiled, narrow, widen
from lewis_hub.methods.random_bits import GOLDEN, MIX_1, MIX_2

BLOCK = 2048  # elements; even, because one random word serves two
HIGH_BINS, LOW_BINS, LOW_BITS = 1 << 16, 1 << 15, 15  # the 31 bits of a magnitude, in two steps

KEEP_ALL, KEEP_NONE, TRIM, DRAW = 0, 1, 2, 3  # what becomes of an expert's task vector


class Piece(NamedTuple):
    """A piece of a tensor: raw bytes of all sources, and room for the result."""

    raw: Any  # (n_sources, bytes) uint8, the base first
    kinds: Any  # (n_sources,) int64 formats of `bits`
    n: int  # elements
    first: int  # the piece's first element within the tensor; even
    out: Any  # (bytes,) uint8, written
    out_kind: int


class Experts(NamedTuple):
    """What becomes of each expert's task vector; one value an expert."""

    modes: Any  # int64
    weights: Any  # float32
    thresholds: Any  # float32: magnitude of the smallest entry kept by TRIM
    ties: Any  # (n_experts, 3) int64: wanted, tied, remainder; the remainder is carried on
    streams: Any  # uint64: of DRAW
    below: Any  # uint64: random halves below are kept
    factors: Any  # float32: rescaling of DRAW


class Mix(NamedTuple):
    """How the votes of all experts become one."""

    elects: bool
    normalize: bool
    divisor: Any  # float32: of all votes, where no sign is elected
    scale: Any  # float32: lambda


@compiled
def count_high(raw: Any, kinds: Any, n: int, modes: Any, histogram: Any) -> None:
    """Count the magnitudes of task vectors by their high 16 bits.

    Args:
        raw: (n_sources, bytes) uint8: a piece of each source, the base first.
        kinds: (n_sources,) int64: formats of `bits`.
        n: elements in the piece.
        modes: (n_experts,) int64: only those that are trimmed are counted.
        histogram: (n_experts, HIGH_BINS) uint32, added to.
    """
    base, expert = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for first in range(0, n, BLOCK):
        length = min(BLOCK, n - first)
        widen(raw[0], kinds[0], first, length, base)
        for e in range(modes.size):
            if modes[e] != TRIM:
                continue
            widen(raw[e + 1], kinds[e + 1], first, length, expert)
            counts = histogram[e]
            for i in range(length):
                magnitude = as_bits(expert[i] - base[i]) & ABSOLUTE
                counts[magnitude >> np.uint32(LOW_BITS)] += np.uint32(1)


@compiled
def count_low(raw: Any, kinds: Any, n: int, chosen: Any, histogram: Any) -> None:
    """Count, among magnitudes with the chosen high bits, by the low 15 bits.

    Args:
        raw: as for `count_high`.
        kinds: as for `count_high`.
        n: elements in the piece.
        chosen: (n_experts,) int64: the high bits; -1 where an expert is not trimmed.
        histogram: (n_experts, LOW_BINS) uint32, added to.
    """
    base, expert = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for first in range(0, n, BLOCK):
        length = min(BLOCK, n - first)
        widen(raw[0], kinds[0], first, length, base)
        for e in range(chosen.size):
            if chosen[e] < 0:
                continue
            widen(raw[e + 1], kinds[e + 1], first, length, expert)
            high, counts = np.uint32(chosen[e]), histogram[e]
            for i in range(length):
                magnitude = as_bits(expert[i] - base[i]) & ABSOLUTE
                if magnitude >> np.uint32(LOW_BITS) == high:
                    counts[magnitude & np.uint32(LOW_BINS - 1)] += np.uint32(1)


@compiled
def draw(stream: Any, first: int, n: int, words: Any) -> None:
    """Fill `words` with the random bits of elements [first, first + n); `first` is even."""
    for i in range((n + 1) // 2):
        word = stream + np.uint64(first // 2 + i + 1) * np.uint64(GOLDEN)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(MIX_1)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(MIX_2)
        words[i] = word ^ (word >> np.uint64(31))


@compiled
def vote_trimmed(delta: Any, weight: Any, threshold: Any, ties: Any, votes: Any) -> None:
    """Vote with the entries above the threshold, and evenly spread ones of those on it.

    Args:
        delta: (n,) a task vector.
        weight: of the expert.
        threshold: magnitude of the smallest entry kept.
        ties: (wanted, tied, remainder) int64; the remainder, (j * wanted) mod tied, is carried on.
        votes: (n,) written.
    """
    n, n_tied = delta.size, 0
    for i in range(n):
        magnitude = abs(delta[i])
        votes[i] = weight * delta[i] if magnitude > threshold else np.float32(0)
        n_tied += magnitude == threshold
    if n_tied == 0 or ties[0] == 0:
        return
    if ties[0] == ties[1]:
        for i in range(n):
            votes[i] = weight * delta[i] if abs(delta[i]) >= threshold else np.float32(0)
        return
    wanted, tied, remainder = ties[0], ties[1], ties[2]
    for i in range(n):
        if abs(delta[i]) == threshold:
            remainder += wanted
            if remainder >= tied:
                remainder -= tied
                votes[i] = weight * delta[i]
    ties[2] = remainder


@compiled
def vote_drawn(delta: Any, halves: Any, below: Any, factors: Any, votes: Any) -> None:
    """Vote with the entries whose random bits are below a number.

    Args:
        delta: (n,) a task vector.
        halves: (n,) uint32 random bits, one an element.
        below: the number, up to 2**32.
        factors: (rescaling, weight) of the expert.
        votes: (n,) written.
    """
    factor, weight = factors
    for i in range(delta.size):
        kept = delta[i] if np.uint64(halves[i]) < below else np.float32(0)
        votes[i] = weight * (factor * kept)


@compiled
def vote(experts: Experts, e: int, first: int, delta: Any, votes: Any) -> None:
    """Let expert e vote with a block of its task vector that begins at element `first`."""
    weight, mode, n = experts.weights[e], experts.modes[e], delta.size
    if mode == TRIM:
        vote_trimmed(delta, weight, experts.thresholds[e], experts.ties[e], votes)
    elif mode == DRAW:
        words = np.empty(BLOCK // 2, np.uint64)
        draw(experts.streams[e], first, n, words)
        factors = (experts.factors[e], weight)
        vote_drawn(delta, words.view(np.uint32), experts.below[e], factors, votes)
    elif mode == KEEP_ALL:
        for i in range(n):
            votes[i] = weight * delta[i]
    else:
        votes[:n] = np.float32(0)


@compiled
def elect(votes: Any, weights: Any, normalize: bool, mixed: Any) -> None:  # noqa: FBT001
    """Combine the votes that have the elected sign, as `combine.elected_votes` does.

    Args:
        votes: (n_experts, n).
        weights: (n_experts,).
        normalize: divide by the weights of those that agree.
        mixed: (n,) written.
    """
    n = mixed.size
    balance, total = np.zeros(n, np.float32), np.zeros(n, np.float32)
    for e in range(weights.size):
        vote = votes[e]
        for i in range(n):
            balance[i] += vote[i]
    mixed[:] = np.float32(0)
    for e in range(weights.size):
        vote, weight = votes[e], weights[e]
        for i in range(n):
            agrees = ((vote[i] > 0) & (balance[i] > 0)) | ((vote[i] < 0) & (balance[i] < 0))
            mixed[i] += vote[i] if agrees else np.float32(0)
            total[i] += weight if agrees else np.float32(0)
    if normalize:
        for i in range(n):
            mixed[i] = mixed[i] / (total[i] if total[i] != 0 else np.float32(1))


@compiled
def add_up(votes: Any, divisor: Any, mixed: Any) -> None:
    """Combine all votes, as `combine.all_votes` does."""
    n = mixed.size
    mixed[:] = np.float32(0)
    for e in range(votes.shape[0]):
        vote = votes[e]
        for i in range(n):
            mixed[i] += vote[i]
    for i in range(n):
        mixed[i] = mixed[i] / divisor


@compiled
def merge_task_vectors(piece: Piece, experts: Experts, mix: Mix) -> int:
    """Merge one piece of a base and its experts.

    Returns:
        -1; or the number of a source that holds NaN or infinity; or, where only the result does,
        the number of sources.
    """
    n_experts = experts.weights.size
    base, delta = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    votes = np.empty((n_experts, BLOCK), np.float32)
    mixed = np.empty(BLOCK, np.float32)
    for first in range(0, piece.n, BLOCK):
        n = min(BLOCK, piece.n - first)
        if not widen(piece.raw[0], piece.kinds[0], first, n, base):
            return 0
        for e in range(n_experts):
            if not widen(piece.raw[e + 1], piece.kinds[e + 1], first, n, delta):
                return e + 1
            for i in range(n):
                delta[i] = delta[i] - base[i]
            vote(experts, e, piece.first + first, delta[:n], votes[e])
        if mix.elects:
            elect(votes, experts.weights, mix.normalize, mixed[:n])
        else:
            add_up(votes, mix.divisor, mixed[:n])
        for i in range(n):
            mixed[i] = base[i] + mix.scale * mixed[i]
        if not narrow(mixed, n, piece.out_kind, piece.out, first):
            return int(n_experts + 1)
    return -1


@compiled
def average(piece: Piece, weights: Any, divisor: Any) -> int:
    """Average one piece of several models, as `linear.linear` does; returns as above."""
    tensor, mixed = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for first in range(0, piece.n, BLOCK):
        n = min(BLOCK, piece.n - first)
        mixed[:] = np.float32(0)
        for s in range(weights.size):
            if not widen(piece.raw[s], piece.kinds[s], first, n, tensor):
                return s
            weight = weights[s]
            for i in range(n):
                mixed[i] += weight * tensor[i]
        for i in range(n):
            mixed[i] = mixed[i] / divisor
        if not narrow(mixed, n, piece.out_kind, piece.out, first):
            return int(weights.size)
    return -1
