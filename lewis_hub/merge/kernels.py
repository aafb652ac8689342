"""The hot loops: one piece of a tensor, all sources at once, from raw bytes to raw bytes.

Inside a piece the work goes by blocks that stay in the first-level cache: widen every source to
float32, form votes, combine them, round once. The order of additions is that of the definitions
in `methods/`, so both give the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lewis_hub.merge.bits import as_bits, as_float, compiled, inner, narrow, widen
from lewis_hub.merge.operands import BLOCK, DRAW, KEEP_ALL, RANK, TRIM, Experts, Mix, Piece
from lewis_hub.merge.ranking import N_DIGITS, N_VALUES, Sorting, rank
from lewis_hub.methods.random_bits import GOLDEN, MIX_1, MIX_2

HALF = np.uint64(0xFFFFFFFF)
ZERO = np.float32(0)


@inner
def subtract(raw: Any, kind: int, first: int, n: int, base: Any, delta: Any) -> bool:
    """Form a block of an expert's task vector; whether the expert is finite."""
    finite = widen(raw, kind, first, n, delta)
    for i in range(n):
        delta[i] = delta[i] - base[i]
    return bool(finite)


@inner
def vote_trimmed(delta: Any, n: int, experts: Experts, e: int, votes: Any) -> None:
    """Vote with the entries above the threshold, and evenly spread ones of those on it."""
    weight, threshold = experts.weights[e], experts.thresholds[e]
    n_tied = 0
    for i in range(n):
        magnitude = abs(delta[i])
        votes[i] = weight * delta[i] if magnitude > threshold else ZERO
        n_tied += magnitude == threshold
    wanted, tied, remainder = experts.ties[e, 0], experts.ties[e, 1], experts.ties[e, 2]
    if n_tied > 0 and wanted == tied:
        for i in range(n):
            votes[i] = weight * delta[i] if abs(delta[i]) >= threshold else ZERO
    elif n_tied > 0 and wanted > 0:
        for i in range(n):
            if abs(delta[i]) == threshold:
                remainder += wanted
                if remainder >= tied:
                    remainder -= tied
                    votes[i] = weight * delta[i]
        experts.ties[e, 2] = remainder


@inner
def random_word(stream: Any, number: Any) -> Any:
    """64 bits for two entries, as `random_bits` draws them."""
    word = stream + np.uint64(number + 1) * np.uint64(GOLDEN)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(MIX_1)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(MIX_2)
    return word ^ (word >> np.uint64(31))


@inner
def vote_drawn(delta: Any, n: int, experts: Experts, e: int, first: int, votes: Any) -> None:
    """Vote with the entries whose random bits say so; `first` is even."""
    weight, factor = experts.weights[e], experts.factors[e]
    stream, below = experts.streams[e], experts.below[e]
    for w in range((n + 1) // 2):
        word = random_word(stream, first // 2 + w)
        low, high = word & HALF, word >> np.uint64(32)
        # an odd block's last high half falls on room that is not read
        votes[2 * w] = weight * (factor * (delta[2 * w] if low < below else ZERO))
        votes[2 * w + 1] = weight * (factor * (delta[2 * w + 1] if high < below else ZERO))


@inner
def vote_ranked(  # noqa: PLR0913
    delta: Any, n: int, experts: Experts, e: int, first: int, votes: Any, room: Sorting
) -> None:
    """Vote with the entries of a row whose random bits are below what their rank allows."""
    weight, stream = experts.weights[e], experts.streams[e]
    below, factors = experts.table.below[e], experts.table.factors[e]
    rank(delta, n, room)
    for i in range(n):
        room.drawn[i] = delta[i] * factors[room.ranks[i]]
    odd = first % 2  # a row may begin with the high half of a word
    for w in range((odd + n + 1) // 2):
        word = random_word(stream, first // 2 + w)
        room.halves[2 * w] = np.uint32(word & HALF)
        room.halves[2 * w + 1] = np.uint32(word >> np.uint64(32))
    for i in range(n):
        kept = np.uint32(room.halves[odd + i] < below[room.ranks[i]])
        mask = (
            np.uint32(0) - kept
        )  # all bits or none: a branch would be guessed wrong half the time
        votes[i] = weight * as_float(as_bits(room.drawn[i]) & mask)


@inner
def elect(votes: Any, n: int, experts: Experts, mix: Mix, room: Any) -> None:
    """Combine the votes that have the elected sign, as `combine.elected_votes` does.

    Args:
        votes: (n_experts, BLOCK).
        n: elements in the block.
        experts: whose weights count.
        mix: whether to divide by the weights of those that agree.
        room: (3, BLOCK) the result in the first row; the others are written over.
    """
    mixed, balance, total = room[0], room[1], room[2]
    for i in range(n):
        mixed[i] = balance[i] = total[i] = ZERO
    for e in range(experts.weights.size):
        vote = votes[e]
        for i in range(n):
            balance[i] += vote[i]
    for e in range(experts.weights.size):
        vote, weight = votes[e], experts.weights[e]
        for i in range(n):
            agrees = ((vote[i] > 0) & (balance[i] > 0)) | ((vote[i] < 0) & (balance[i] < 0))
            mixed[i] += vote[i] if agrees else ZERO
            total[i] += weight if agrees else ZERO
    if mix.normalize:
        for i in range(n):
            mixed[i] = mixed[i] / (total[i] if total[i] != 0 else np.float32(1))


@inner
def add_up(votes: Any, n: int, divisor: Any, mixed: Any) -> None:
    """Combine all votes, as `combine.all_votes` does."""
    for i in range(n):
        mixed[i] = ZERO
    for e in range(votes.shape[0]):
        vote = votes[e]
        for i in range(n):
            mixed[i] += vote[i]
    for i in range(n):
        mixed[i] = mixed[i] / divisor


@inner
def vote(  # noqa: PLR0913
    delta: Any, n: int, experts: Experts, e: int, first: int, votes: Any, room: Sorting
) -> None:
    """Weigh what is kept of a block of an expert's task vector."""
    mode, weight = experts.modes[e], experts.weights[e]
    if mode == TRIM:
        vote_trimmed(delta, n, experts, e, votes)
    elif mode == DRAW:
        vote_drawn(delta, n, experts, e, first, votes)
    elif mode == RANK:
        vote_ranked(delta, n, experts, e, first, votes, room)
    elif mode == KEEP_ALL:
        for i in range(n):
            votes[i] = weight * delta[i]


@compiled
def merge_task_vectors(piece: Piece, experts: Experts, mix: Mix) -> int:
    """Merge one piece of a base and its experts.

    Returns:
        -1; or the number of a source that holds NaN or infinity; or, where only the result does,
        the number of sources.
    """
    n_experts, block = experts.weights.size, piece.block
    votes = np.zeros((n_experts, block), np.float32)
    room = np.zeros((5, block), np.float32)
    keys, ranks = np.empty((2, block), np.uint64), np.empty(block, np.int32)
    counts, halves = np.empty((N_DIGITS, N_VALUES), np.int32), np.empty(block + 2, np.uint32)
    sorting = Sorting(keys, counts, ranks, halves, np.empty(block, np.float32))
    base, delta, mixed = room[3], room[4], room[0]
    for first in range(0, piece.n, block):
        n = min(block, piece.n - first)
        if not widen(piece.raw[0], piece.kinds[0], first, n, base):
            return 0
        for e in range(n_experts):
            if not subtract(piece.raw[e + 1], piece.kinds[e + 1], first, n, base, delta):
                return int(e + 1)
            vote(delta, n, experts, e, piece.first + first, votes[e], sorting)
        if mix.elects:
            elect(votes, n, experts, mix, room)
        else:
            add_up(votes, n, mix.divisor, mixed)
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
        for i in range(n):
            mixed[i] = ZERO
        for s in range(weights.size):
            if not widen(piece.raw[s], piece.kinds[s], first, n, tensor):
                return int(s)
            weight = weights[s]
            for i in range(n):
                mixed[i] += weight * tensor[i]
        for i in range(n):
            mixed[i] = mixed[i] / divisor
        if not narrow(mixed, n, piece.out_kind, piece.out, first):
            return int(weights.size)
    return -1
