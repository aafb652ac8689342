"""One tensor: read by pieces, merged by a fused kernel or by the definition, written in place.

What a span of a large tensor needs to know of the others are counts, so that any split gives the
same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from lewis_hub.errors import MERGE, NonFiniteError
from lewis_hub.merge import arithmetic, chunks, selection
from lewis_hub.merge.chunks import Job, Span
from lewis_hub.merge.operands import HIGH_BINS, INSIDE, LANES, LOW_BINS, TRIM, Experts, Piece
from lewis_hub.merge.reference import broken_source, bytes_of, merge_by_definition
from lewis_hub.merge.runners import Runner
from lewis_hub.merge.selection import Bracket, Tally, Threshold, Words
from lewis_hub.methods.sparsify import n_kept

N_PLACES = 2048  # of a sample, LANES entries at each: from many rows, as a row's are alike
SAMPLED = 16 * N_PLACES * LANES  # of fewer entries, no sample is taken
ROOM = 1.25  # times what is expected inside a bracket
MOST_TIED = 1 << 32
GOLDEN = 0.6180339887498949  # its multiples spread evenly and keep step with no row

Trimmed = dict[int, Threshold]  # number of an expert -> its threshold


def trimmed(job: Job, experts: Experts, spans: Sequence[Span], runner: Runner) -> list[Experts]:
    """What each span of the tensor needs to know to trim it.

    Args:
        job: the tensor.
        experts: the kernel's view of them, without thresholds.
        spans: of the tensor, in order.
        runner: works on several spans at a time; the result is the same whichever it is.
    """
    n = job.tensor.output.n_elements
    kept = {
        e: n_kept(n, density)
        for e, density in enumerate(job.tensor.densities)
        if experts.modes[e] == TRIM
    }
    found = _by_sample(job, experts, kept, spans, runner) if n >= SAMPLED else {}
    left = {e: k for e, k in kept.items() if e not in found}
    if left:
        found |= _by_bits(job, left, spans, runner)
    return _views(experts, found, len(spans))


def _by_sample(
    job: Job, experts: Experts, kept: dict[int, int], spans: Sequence[Span], runner: Runner
) -> Trimmed:
    """One pass; an expert whose bracket was vague or missed is left out."""
    sample = _sample(job, len(experts.modes), spans, runner)
    n = job.tensor.output.n_elements
    brackets = {e: found for e, k in kept.items() if (found := selection.bracket(sample[e], k / n))}
    if not brackets:
        return {}
    tallies = list(runner.map(partial(_sort_out, job, len(experts.modes), brackets), spans))
    picked = {
        e: selection.pick([tally[e] for tally in tallies], found, kept[e])
        for e, found in brackets.items()
    }
    return {e: threshold for e, threshold in picked.items() if threshold}


def _sample(job: Job, n_experts: int, spans: Sequence[Span], runner: Runner) -> Words:
    """(n_experts, N_PLACES, LANES) magnitudes, from somewhere in each part of the tensor."""
    part = job.tensor.output.n_elements // N_PLACES
    order = np.arange(N_PLACES)
    places = order * part + (order * GOLDEN % 1 * (part - LANES)).astype(np.int64)
    found = np.empty((n_experts, N_PLACES, LANES), np.uint32)

    def look_at(span: Span) -> None:
        for piece in job.pieces(span):
            first, last = np.searchsorted(places, (piece.first, piece.first + piece.n))
            inside = np.minimum(places[first:last] - piece.first, piece.n - LANES)
            arithmetic.sample(piece, inside, found[:, first:last])

    list(runner.map(look_at, spans))
    return found


def _sort_out(
    job: Job, n_experts: int, brackets: dict[int, Bracket], span: Span
) -> dict[int, Tally]:
    ends = np.zeros((2, n_experts), np.uint32)
    for e, found in brackets.items():
        ends[:, e] = found.low, found.high
    room = int(ROOM * max(found.share for found in brackets.values()) * len(span)) + LANES
    counts = np.zeros((n_experts, 4), np.int64)
    inside = np.empty((n_experts, room + LANES), np.uint32)
    for piece in job.pieces(span):
        arithmetic.sort_out(piece, tuple(brackets), ends, counts, inside)
    return {
        e: Tally(counts[e], inside[e, : counts[e, INSIDE]], bool(counts[e, INSIDE] >= room))
        for e in brackets
    }


def _by_bits(job: Job, kept: dict[int, int], spans: Sequence[Span], runner: Runner) -> Trimmed:
    """Two passes: by the high 16 bits, then by the low 15 of those with the right high ones."""
    n_experts, chosen = len(job.tensor.weights), tuple(kept)
    high = list(runner.map(partial(_count_high, job, n_experts, chosen), spans))
    cuts = {e: selection.cut_high([count[e] for count in high], k) for e, k in kept.items()}
    found = np.zeros(n_experts, np.uint32)
    found[list(cuts)] = [cut.high for cut in cuts.values()]
    low = list(runner.map(partial(_count_low, job, chosen, found), spans))
    return {e: selection.cut_low([c[e] for c in low], cuts[e], k) for e, k in kept.items()}


def _count_high(job: Job, n_experts: int, chosen: tuple[int, ...], span: Span) -> Words:
    counts = np.zeros((n_experts, HIGH_BINS), np.uint32)
    for piece in job.pieces(span):
        arithmetic.count_high(piece, chosen, counts)
    return counts


def _count_low(job: Job, chosen: tuple[int, ...], high: Words, span: Span) -> Words:
    counts = np.zeros((len(high), LOW_BINS), np.uint32)
    for piece in job.pieces(span):
        arithmetic.count_low(piece, chosen, high, counts)
    return counts


def _views(experts: Experts, found: Trimmed, n_spans: int) -> list[Experts]:
    """The experts as each span sees them: where in the run of ties it begins."""
    bits = np.zeros(len(experts.modes), np.uint32)
    ties = np.zeros((n_spans, *experts.ties.shape), np.int64)
    for e, threshold in found.items():
        if not threshold.bits:
            continue  # zeros are tied: it is the same to keep them
        bits[e] = threshold.bits
        n_tied, n_before = sum(threshold.tied), 0
        assert n_tied < MOST_TIED, "more entries are tied than the kernels count"
        for span, tied in enumerate(threshold.tied):
            ties[span, e] = threshold.wanted, n_tied, n_before * threshold.wanted % n_tied
            n_before += tied
    return [experts._replace(thresholds=bits.view(np.float32), ties=tied) for tied in ties]


def make_tensor(job: Job, runner: Runner) -> int:
    """Make one tensor; returns the bytes written.

    Raises:
        NonFiniteError: a source or the result holds NaN or infinity.
        BrokenCheckpointError: a file ends too early.
        OutputError: the disk is full.
    """
    method = job.site.plan.method
    spans = job.spans(runner)
    if job.tensor.is_copied:
        job.copy()
    elif method == chunks.AVERAGED:
        list(runner.map(lambda span: _average(job, span), spans))
    elif chunks.is_fused(method, job.tensor):
        experts = chunks.experts_of(job.tensor, chunks.FUSED[method])
        views = [experts] * len(spans)
        if (experts.modes == TRIM).any():
            views = trimmed(job, experts, spans, runner)
        list(runner.map(lambda part: _merge(job, *part), zip(spans, views, strict=True)))
    else:
        _define(job)
    job.finish()
    return job.tensor.output.n_bytes


def _merge(job: Job, span: Span, experts: Experts) -> None:
    mix = chunks.mix_of(job.tensor, chunks.FUSED[job.site.plan.method])
    _make(job, span, lambda piece: arithmetic.merge_task_vectors(piece, experts, mix))


def _average(job: Job, span: Span) -> None:
    weights = np.array(job.tensor.weights, np.float32)
    divisor = chunks.divisor_of(job.tensor)
    _make(job, span, lambda piece: arithmetic.average(piece, weights, divisor))


def _define(job: Job) -> None:
    pairs = zip(job.readers, job.tensor.inputs, strict=True)
    sources = [reader.tensor(header) for reader, header in pairs]
    merged = merge_by_definition(job.site.plan, job.tensor, sources, job.moments())
    job.site.writer.write(job.start, bytes_of(merged))


def _make(job: Job, span: Span, kernel: Callable[[Piece], int]) -> None:
    for piece in job.pieces(span):
        at_fault = kernel(piece)
        if at_fault >= 0:
            raise _not_finite(job, at_fault)
        job.write(piece)


def _not_finite(job: Job, source: int) -> NonFiniteError:
    name = job.tensor.output.name
    labels = [job.site.plan.labels[number] for number in job.tensor.sources]
    if source < len(labels):
        return broken_source(name, labels[source])
    lower = ", or choose `dtype: bfloat16`" if job.tensor.output.dtype == "F16" else ""
    remedy = f"It does not fit into {job.tensor.output.dtype}: lower the weights{lower}."
    return NonFiniteError(name, MERGE, remedy)
