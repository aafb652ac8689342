"""The exact k-th largest magnitude, from a sample and one pass over the tensor.

A sample says between which two magnitudes the threshold must lie; the pass then counts what is
above, and keeps the few per cent in between. Where the sample was misleading, or is not worth its
while, two passes count all magnitudes by their bits. Either way the result is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lewis_hub.kernels.calls import ABSOLUTE, AT_HIGH, AT_LOW, LOW_BINS, Integers, Words

SAFETY = 4.0  # standard errors of the sample on either side
N_BITS = 12  # that magnitudes are told apart by before they are sorted
WIDEST = 0.06  # of a tensor: with more of it inside the bracket, counting by bits is quicker


@dataclass(frozen=True)
class Threshold:
    """The smallest magnitude of a task vector that is kept."""

    bits: int
    wanted: int  # how many of the entries at the threshold are kept
    tied: tuple[int, ...]  # per span of the tensor, how many entries are at the threshold


@dataclass(frozen=True)
class Bracket:
    """Two magnitudes between which, or on which, the threshold lies; the share between them."""

    low: int
    high: int
    share: float


@dataclass(frozen=True)
class Tally:
    """One span of one expert after `threshold.sort_out`."""

    counts: Integers  # (4,)
    inside: Words  # the magnitudes within the bracket
    overflown: bool = False


def bracket(sample: Words, fraction: float) -> Bracket | None:
    """Where the magnitude with `fraction` of the tensor above it will be.

    The error is judged by how much the places differ, as neighbours resemble each other.

    Args:
        sample: (n_places, length): magnitudes from all over the tensor, neighbours from each place.
        fraction: in (0, 1).

    Returns:
        None if the sample is too vague to save a pass.
    """
    last = sample.size - 1
    rank = min(int((1 - fraction) * sample.size), last)
    (guess,) = at_ranks(sample.ravel(), [rank])
    spreads = [
        np.std(np.count_nonzero(side, axis=1)) / sample.shape[1]
        for side in (sample > guess, sample >= guess)
    ]
    margin = SAFETY * max(spreads) / np.sqrt(len(sample)) + 4 / sample.size
    if margin > WIDEST / 2:
        return None
    width = int(margin * sample.size) + 1
    ends = at_ranks(sample.ravel(), [max(rank - width, 0), min(rank + width, last)])
    low = ends[0] if rank >= width else 0
    high = ends[1] if rank + width <= last else ABSOLUTE
    return Bracket(low, high, float(2 * margin))


def pick(tallies: Sequence[Tally], found: Bracket, k: int) -> Threshold | None:
    """The threshold of the k largest, from all spans; None where the bracket missed it."""
    if any(tally.overflown for tally in tallies):
        return None
    counts = np.stack([tally.counts for tally in tallies])
    above, at_high, at_low, inside = (int(n) for n in counts.sum(axis=0))
    wanted = k - above
    if wanted <= 0:
        return None
    if wanted <= at_high:
        return Threshold(found.high, wanted, tuple(counts[:, AT_HIGH].tolist()))
    wanted -= at_high
    if wanted <= inside:
        together = np.concatenate([tally.inside for tally in tallies])
        (bits,) = at_ranks(together, [inside - wanted])
        wanted -= int(np.count_nonzero(together > bits))
        tied = tuple(int(np.count_nonzero(tally.inside == bits)) for tally in tallies)
        return Threshold(bits, wanted, tied)
    wanted -= inside
    if found.low < found.high and wanted <= at_low:
        return Threshold(found.low, wanted, tuple(counts[:, AT_LOW].tolist()))
    return None


def at_ranks(values: Words, ranks: Sequence[int]) -> list[int]:
    """The values at some ranks, ascending from 0.

    They are counted by their leading bits, and only those of a bin are sorted: bfloat16's task
    vectors have few magnitudes, many times each, on which numpy's own selection is very slow.
    """
    lowest = values.min()
    shift = np.uint32(max(int(values.max() - lowest).bit_length() - N_BITS, 0))
    bins = (values - lowest) >> shift
    ends = np.bincount(bins).cumsum()
    found = []
    for rank in ranks:
        which = int(np.searchsorted(ends, rank, side="right"))
        before = int(ends[which - 1]) if which else 0
        held = np.sort(values[bins == which]) if shift else values[bins == which]
        found.append(int(held[rank - before]))
    return found


@dataclass(frozen=True)
class Cut:
    """The high bits of a threshold, and how many entries have larger ones."""

    high: int
    n_above: int


def cut_high(counts: Sequence[Words], k: int) -> Cut:
    """The high bits of the k-th largest; `counts`: per span, of `calls.count_bits`."""
    return Cut(*_bin_of(_added(counts), k))


def cut_low(counts: Sequence[Words], cut: Cut, k: int) -> Threshold:
    """The whole of it; `counts`: per span, of `calls.count_bits` under the cut."""
    low, n_above = _bin_of(_added(counts), k - cut.n_above)
    tied = tuple(int(count[low]) for count in counts)
    return Threshold(cut.high * LOW_BINS + low, k - cut.n_above - n_above, tied)


def _added(counts: Sequence[Words]) -> Integers:
    total = counts[0].astype(np.int64)
    for count in counts[1:]:
        total += count
    return total


def _bin_of(counts: Integers, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many lie in the bins above it."""
    from_top = counts[::-1].cumsum()
    place = int(np.searchsorted(from_top, k))
    return len(counts) - 1 - place, int(from_top[place] - counts[len(counts) - 1 - place])
