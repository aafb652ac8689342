"""One tensor of a merge, made by kernels piece by piece, or by the definition of its method.

Spans of a large tensor share only counts, so that any division gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lewis_hub.checkpoint.header import torch_dtypes
from lewis_hub.checkpoint.reader import read_tensor
from lewis_hub.errors import MERGE, NonFiniteError
from lewis_hub.kernels import calls, selection
from lewis_hub.kernels.calls import HIGH_BINS, INSIDE, LOW_BINS, RUN, TRIM, Experts, Integers, Piece
from lewis_hub.kernels.selection import Bracket, Tally, Threshold
from lewis_hub.merge import chunks
from lewis_hub.merge.chunks import Span, TensorJob
from lewis_hub.merge.plan import Moments, ShardPlan, TensorPlan
from lewis_hub.merge.runners import Runner
from lewis_hub.methods import registry
from lewis_hub.methods.numerics import all_finite
from lewis_hub.methods.registry import Method
from lewis_hub.methods.votes import n_kept

if TYPE_CHECKING:
    from torch import Tensor

N_PLACES = 2048  # of a sample, RUN entries at each: from many rows, as a row's are alike
SAMPLED = 16 * N_PLACES * RUN  # a tensor with fewer entries is not sampled
ROOM = 1.25  # space for entries inside a bracket, as a multiple of the expected number
TOO_LARGE = "Products of its values are too large: leave out the model with the largest."
GOLDEN = 0.6180339887498949  # its multiples mod 1 are spread evenly, whatever the row length

Thresholds = dict[int, Threshold]  # number of an expert -> its threshold


def make_tensor(job: TensorJob, runner: Runner) -> int:
    """Make one tensor; returns the bytes written."""
    method = job.context.plan.method
    spans = job.spans(runner)
    if job.tensor.is_copied:
        job.copy()
    elif job.context.plan.arithmetic == "float64":
        _define(job)
    elif method == chunks.AVERAGED and job.tensor.options.keys() <= chunks.OPTIONS:
        list(runner.map(lambda span: _average(job, span), spans))
    elif chunks.is_fused(method, job.tensor):
        experts = chunks.experts_of(job.tensor, chunks.FUSED[method])
        views = [experts] * len(spans)
        if (experts["mode"] == TRIM).any():
            views = _with_thresholds(job, experts, spans, runner)
        list(runner.map(lambda part: _merge(job, *part), zip(spans, views, strict=True)))
    else:
        _define(job)
    return job.tensor.output.n_bytes


def _define(job: TensorJob) -> None:
    pairs = zip(job.readers, job.tensor.inputs, strict=True)
    sources = [read_tensor(reader, header) for reader, header in pairs]
    merged = merge_by_definition(job.context.plan, job.tensor, sources, job.moments())
    job.context.writer.write(job.start, bytes_of(merged))


def _with_thresholds(
    job: TensorJob, experts: Experts, spans: Sequence[Span], runner: Runner
) -> list[Experts]:
    """The experts as each span needs them, with the thresholds of their task vectors."""
    n = job.tensor.output.n_elements
    kept = {
        e: n_kept(n, density)
        for e, density in enumerate(job.tensor.densities)
        if experts["mode"][e] == TRIM
    }
    found = _by_sample(job, experts, kept, spans, runner) if n >= SAMPLED else {}
    left = {e: k for e, k in kept.items() if e not in found}
    if left:
        found |= _by_bits(job, left, spans, runner)
    return _views(experts, found, len(spans))


def _by_sample(
    job: TensorJob, experts: Experts, kept: dict[int, int], spans: Sequence[Span], runner: Runner
) -> Thresholds:
    """Find thresholds in one pass; an expert whose threshold is outside its bracket is left out."""
    sample = _sample(job, len(experts), spans, runner)
    n = job.tensor.output.n_elements
    brackets = {e: found for e, k in kept.items() if (found := selection.bracket(sample[e], k / n))}
    if not brackets:
        return {}
    tallies = list(runner.map(partial(_sort_out, job, brackets), spans))
    picked = {
        e: selection.pick([tally[e] for tally in tallies], found, kept[e])
        for e, found in brackets.items()
    }
    return {e: threshold for e, threshold in picked.items() if threshold}


def _sample(job: TensorJob, n_experts: int, spans: Sequence[Span], runner: Runner) -> calls.Words:
    """(n_experts, N_PLACES, RUN) magnitudes, from one place in each part of the tensor."""
    part = job.tensor.output.n_elements // N_PLACES
    order = np.arange(N_PLACES)
    places = order * part + (order * GOLDEN % 1 * (part - RUN)).astype(np.int64)
    found = np.empty((n_experts, N_PLACES, RUN), np.uint32)

    def look_at(span: Span) -> None:
        for piece in job.pieces(span):
            first, last = np.searchsorted(places, (piece.first, piece.first + piece.n))
            inside = np.minimum(places[first:last] - piece.first, piece.n - RUN)
            calls.sample(piece, inside, found[:, first:last])

    list(runner.map(look_at, spans))
    return found


def _sort_out(job: TensorJob, brackets: dict[int, Bracket], span: Span) -> dict[int, Tally]:
    chosen = np.array(list(brackets))
    ends = np.array([(found.low, found.high) for found in brackets.values()])
    capacity = int(ROOM * max(found.share for found in brackets.values()) * len(span)) + RUN
    tallies = np.zeros((len(brackets), 4), np.int64)
    inside = np.empty((len(brackets), capacity), np.uint32)
    for piece in job.pieces(span):
        calls.sort_out(piece, chosen, ends, tallies, inside)
    return {
        e: Tally(tally, found[: tally[INSIDE]], bool(tally[INSIDE] >= capacity))
        for e, tally, found in zip(brackets, tallies, inside, strict=True)
    }


def _by_bits(
    job: TensorJob, kept: dict[int, int], spans: Sequence[Span], runner: Runner
) -> Thresholds:
    """Find thresholds in two passes: by the high 16 bits, then by the low 15 below these."""
    chosen = np.array(list(kept))
    high = list(runner.map(partial(_count, job, chosen, np.full(len(chosen), -1)), spans))
    cuts = [
        selection.cut_high([count[c] for count in high], k) for c, k in enumerate(kept.values())
    ]
    ends = np.array([cut.high for cut in cuts])
    low = list(runner.map(partial(_count, job, chosen, ends), spans))
    return {
        e: selection.cut_low([count[c] for count in low], cuts[c], k)
        for c, (e, k) in enumerate(kept.items())
    }


def _count(job: TensorJob, chosen: Integers, high: Integers, span: Span) -> calls.Words:
    """Count magnitudes by their high bits; if `high` is not -1, by the low bits below it."""
    by_low_bits = bool(high[0] >= 0)
    counts = np.zeros((len(chosen), LOW_BINS if by_low_bits else HIGH_BINS), np.uint32)
    for piece in job.pieces(span):
        calls.count_bits(piece, chosen, high, counts)
    return counts


def _views(experts: Experts, found: Thresholds, n_spans: int) -> list[Experts]:
    """A copy of the experts for each span, with the number of ties before it."""
    views = [experts.copy() for _ in range(n_spans)]
    for e, threshold in found.items():
        if not threshold.bits:
            continue  # zeros are tied: keeping them changes nothing
        n_tied, n_before = sum(threshold.tied), 0
        for view, tied in zip(views, threshold.tied, strict=True):
            view["threshold"][e] = threshold.bits
            view["wanted"][e], view["tied"][e] = threshold.wanted, n_tied
            view["remainder"][e] = n_before * threshold.wanted % n_tied
            n_before += tied
    return views


def _merge(job: TensorJob, span: Span, experts: Experts) -> None:
    fused = chunks.FUSED[job.context.plan.method]
    table, mix = chunks.table_of(job.tensor, fused), chunks.mix_of(job.tensor, fused)
    _make(job, span, lambda piece: calls.merge_task_vectors(piece, experts, table, mix))


def _average(job: TensorJob, span: Span) -> None:
    weights = np.array(job.tensor.weights, np.float32)
    divisor = chunks.divisor_of(job.tensor)
    _make(job, span, lambda piece: calls.average(piece, weights, divisor))


def merge_by_definition(
    plan: ShardPlan, tensor: TensorPlan, sources: Sequence[Tensor], moments: Moments
) -> Tensor:
    """Merge one tensor with the method's function, on the device of its float32 sources.

    The function gets the dtype of the plan's arithmetic. The result is contiguous and has the
    output's dtype.

    Raises:
        NonFiniteError: a source or the result holds NaN or infinity.
    """
    method = registry.find(plan.method)
    for number, source in enumerate(sources):
        if not all_finite(source):
            raise _broken_source(plan, tensor, number)
    if plan.arithmetic == "float64":
        sources = [source.double() for source in sources]
        moments = moments.in_float64()
    given: dict[str, Any] = {
        "weights": sources[0].new_tensor(tensor.weights),
        "densities": tensor.densities,
        "streams": tensor.streams,
        **vars(moments),
        **tensor.own,
    }
    keywords = {key: value for key, value in given.items() if method.takes(key)}
    keywords |= {method.keyword(option): value for option, value in tensor.options.items()}
    positional = _arguments(method, sources, len(tensor.weights))
    if not all_finite(positional[-1]):  # a difference of huge weights
        raise NonFiniteError(tensor.output.name, MERGE, TOO_LARGE)
    merged = method.function(*positional, **keywords)
    rounded = merged.to(torch_dtypes()[tensor.output.dtype]).contiguous()
    if not all_finite(rounded):
        remedy = f"It does not fit into {tensor.output.dtype}: lower the weights."
        if merged.isnan().any():
            remedy = TOO_LARGE
        raise NonFiniteError(tensor.output.name, MERGE, remedy)
    return rounded


def _arguments(method: Method, sources: Sequence[Tensor], n_experts: int) -> tuple[Tensor, ...]:
    """The positional arguments of the method's function; without a base, the base is zero."""
    import torch

    experts = torch.stack(tuple(sources[len(sources) - n_experts :]))
    if not method.takes_base:
        return (experts,)
    base = sources[0] if len(sources) > n_experts else torch.zeros_like(sources[0])
    return base, experts - base if method.takes_task_vectors else experts


def bytes_of(merged: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    import torch

    return merged.flatten().view(torch.uint8).numpy().data


def _make(job: TensorJob, span: Span, kernel: Callable[[Piece], int]) -> None:
    for piece in job.pieces(span):
        at_fault = kernel(piece)
        if at_fault >= 0:
            raise _not_finite(job, at_fault)
        job.write(piece)


def _not_finite(job: TensorJob, source: int) -> NonFiniteError:
    if source < len(job.tensor.sources):
        return _broken_source(job.context.plan, job.tensor, source)
    lower = ", or choose `dtype: bfloat16`" if job.tensor.output.dtype == "F16" else ""
    remedy = f"It does not fit into {job.tensor.output.dtype}: lower the weights{lower}."
    return NonFiniteError(job.tensor.output.name, MERGE, remedy)


def _broken_source(plan: ShardPlan, tensor: TensorPlan, number: int) -> NonFiniteError:
    """The error for an input that is not finite; only a base's value may replace an expert's."""
    remedy = "Use another revision of that model."
    if number >= len(tensor.inputs) - len(tensor.weights):
        remedy = "Use another revision of that model, or leave it out."
        if tensor.has_base and not plan.allow_nan:
            remedy = "Use another revision of that model, leave it out, or use the base's values "
            remedy += "there with `--allow-nan`."
    return NonFiniteError(tensor.output.name, plan.labels[tensor.sources[number]], remedy)
