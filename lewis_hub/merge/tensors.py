"""One tensor: read by pieces, merged by a fused kernel or by the definition, written in place.

A large tensor is worked on in spans, several at a time. What a span needs to know of the others
are counts, so that any split gives the same bytes.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.reader import Reader
from lewis_hub.checkpoint.writer import ShardWriter
from lewis_hub.errors import NonFiniteError
from lewis_hub.merge import fused, kernels
from lewis_hub.merge.bits import FORMATS
from lewis_hub.merge.definition import merge_by_definition
from lewis_hub.merge.kernels import BLOCK, TRIM, Experts, Piece
from lewis_hub.merge.plan import ShardPlan, TensorPlan
from lewis_hub.merge.runners import Runner

RAW_BYTES = 768 * 1024  # of all sources in one piece: what the second-level cache holds

Counts = npt.NDArray[np.uint32]
Span = range  # of elements; begins at a multiple of BLOCK


@dataclass(frozen=True)
class Desk:
    """Room for one piece, reused from piece to piece."""

    raw: npt.NDArray[np.uint8]  # (n_sources, bytes)
    out: npt.NDArray[np.uint8]

    @property
    def n_elements(self) -> int:
        """The largest piece, whatever the dtypes."""
        return int(self.raw.shape[1] // 4)


class Desks:
    """As many desks as there are threads at work."""

    def __init__(self, n_sources: int) -> None:
        n_elements = max(RAW_BYTES // (2 * n_sources) // BLOCK, 1) * BLOCK
        self._shape = (n_sources, n_elements * 4)
        self._free: queue.SimpleQueue[Desk] = queue.SimpleQueue()

    @contextmanager
    def one(self) -> Iterator[Desk]:
        """A desk for as long as the block lasts."""
        try:
            desk = self._free.get_nowait()
        except queue.Empty:
            raw, out = np.empty(self._shape, np.uint8), np.empty(self._shape[1], np.uint8)
            desk = Desk(raw, out)
        try:
            yield desk
        finally:
            self._free.put(desk)


@dataclass(frozen=True)
class Site:
    """Where a shard is made.

    Attributes:
        readers: one a source, in the order of the plan.
    """

    plan: ShardPlan
    readers: Sequence[Reader]
    writer: ShardWriter
    desks: Desks


@dataclass(frozen=True)
class Job:
    """One tensor of a shard; `start` is where its bytes begin in the file."""

    site: Site
    tensor: TensorPlan
    start: int

    def finish(self) -> None:
        """Say that its bytes are final."""
        self.site.writer.complete(self.start, self.start + self.tensor.output.n_bytes)


def make_tensor(job: Job, runner: Runner) -> int:
    """Make one tensor; returns the bytes written.

    Raises:
        NonFiniteError: a source or the result holds NaN or infinity.
        BrokenCheckpointError: a file ends too early.
        OutputError: the disk is full.
    """
    method = job.site.plan.method
    spans = _spans(job, runner)
    if job.tensor.is_copied:
        _copy(job)
    elif method == fused.AVERAGED:
        list(runner.map(lambda span: _average(job, span), spans))
    elif method in fused.FUSED:
        parts = _trimmed(job, fused.FUSED[method], spans, runner)
        list(runner.map(lambda part: _merge(job, *part), zip(spans, parts, strict=True)))
    else:
        merged = merge_by_definition(job.site.plan, job.tensor, job.site.readers)
        job.site.writer.write(job.start, memoryview(merged))
    job.finish()
    return job.tensor.output.n_bytes


def _spans(job: Job, runner: Runner) -> list[Span]:
    n = job.tensor.output.n_elements
    n_spans = runner.n_workers if n > runner.large_elements else 1
    length = max(-(-n // n_spans // BLOCK) * BLOCK, BLOCK)
    return [range(first, min(first + length, n)) for first in range(0, n, length)]


def _trimmed(job: Job, method: fused.Fused, spans: Sequence[Span], runner: Runner) -> list[Experts]:
    experts = fused.experts_of(job.tensor, method)
    if not (experts.modes == TRIM).any():
        return [experts] * len(spans)
    high = list(runner.map(lambda span: _count_high(job, experts, span), spans))
    cuts = fused.cut_high(high, job.tensor, experts)
    chosen = np.array([cut.high if cut else -1 for cut in cuts], np.int64)
    low = list(runner.map(lambda span: _count_low(job, chosen, span), spans))
    return fused.cut_low(low, cuts, job.tensor, experts)


def _count_high(job: Job, experts: Experts, span: Span) -> Counts:
    counts = np.zeros((len(experts.modes), kernels.HIGH_BINS), np.uint32)
    with job.site.desks.one() as desk:
        for piece in _pieces(job, desk, span):
            kernels.count_high(piece.raw, piece.kinds, piece.n, experts.modes, counts)
    return counts


def _count_low(job: Job, chosen: npt.NDArray[np.int64], span: Span) -> Counts:
    counts = np.zeros((len(chosen), kernels.LOW_BINS), np.uint32)
    with job.site.desks.one() as desk:
        for piece in _pieces(job, desk, span):
            kernels.count_low(piece.raw, piece.kinds, piece.n, chosen, counts)
    return counts


def _merge(job: Job, span: Span, experts: Experts) -> None:
    mix = fused.mix_of(job.tensor, fused.FUSED[job.site.plan.method])
    _make(job, span, lambda piece: kernels.merge_task_vectors(piece, experts, mix))


def _average(job: Job, span: Span) -> None:
    weights = np.array(job.tensor.weights, np.float32)
    divisor = fused.divisor_of(job.tensor)
    _make(job, span, lambda piece: kernels.average(piece, weights, divisor))


def _make(job: Job, span: Span, kernel: Callable[[Piece], int]) -> None:
    output = job.tensor.output
    width = WIDTHS[output.dtype]
    with job.site.desks.one() as desk:
        for piece in _pieces(job, desk, span):
            at_fault = kernel(piece)
            if at_fault >= 0:
                raise _not_finite(job, at_fault)
            written = desk.out.data[: piece.n * width]
            job.site.writer.write(job.start + piece.first * width, written)


def _pieces(job: Job, desk: Desk, span: Span) -> Iterator[Piece]:
    inputs, output = job.tensor.inputs, job.tensor.output
    kinds = np.array([FORMATS[tensor.dtype] for tensor in inputs], np.int64)
    rows = [row.data for row in desk.raw]
    for first in range(span.start, span.stop, desk.n_elements):
        n = min(desk.n_elements, span.stop - first)
        for reader, tensor, row in zip(job.site.readers, inputs, rows, strict=True):
            width = WIDTHS[tensor.dtype]
            reader.read(tensor, first * width, row[: n * width])
        yield Piece(desk.raw, kinds, n, first, desk.out, FORMATS[output.dtype])


def _copy(job: Job) -> None:
    source: TensorHeader = job.tensor.inputs[0]
    with job.site.desks.one() as desk:
        for first in range(0, source.n_bytes, desk.out.size):
            held = desk.out.data[: source.n_bytes - first]
            job.site.readers[0].read(source, first, held)
            job.site.writer.write(job.start + first, held)


def _not_finite(job: Job, source: int) -> NonFiniteError:
    labels, name = job.site.plan.labels, job.tensor.output.name
    if source < len(labels):
        remedy = "That model is broken: use another revision of it, or leave it out."
        return NonFiniteError(name, labels[source], remedy)
    remedy = f"It does not fit into {job.tensor.output.dtype}: lower the weights, or choose"
    return NonFiniteError(name, "the merged model", f"{remedy} `dtype: bfloat16`.")
