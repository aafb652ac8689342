"""One tensor: read by pieces, merged by a fused kernel or by the definition, written in place.

What a span of a large tensor needs to know of the others are counts, so that any split gives the
same bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lewis_hub.errors import MERGE, NonFiniteError
from lewis_hub.merge import arithmetic, fused
from lewis_hub.merge.definition import broken_source, bytes_of, merge_by_definition
from lewis_hub.merge.operands import TRIM, Experts, Piece
from lewis_hub.merge.pieces import Job, Span
from lewis_hub.merge.runners import Runner
from lewis_hub.merge.trimming import trimmed


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
    elif method == fused.AVERAGED:
        list(runner.map(lambda span: _average(job, span), spans))
    elif fused.is_fused(method, job.tensor):
        experts = fused.experts_of(job.tensor, fused.FUSED[method])
        views = [experts] * len(spans)
        if (experts.modes == TRIM).any():
            views = trimmed(job, experts, spans, runner)
        list(runner.map(lambda part: _merge(job, *part), zip(spans, views, strict=True)))
    else:
        _define(job)
    job.finish()
    return job.tensor.output.n_bytes


def _merge(job: Job, span: Span, experts: Experts) -> None:
    mix = fused.mix_of(job.tensor, fused.FUSED[job.site.plan.method])
    _make(job, span, lambda piece: arithmetic.merge_task_vectors(piece, experts, mix))


def _average(job: Job, span: Span) -> None:
    weights = np.array(job.tensor.weights, np.float32)
    divisor = fused.divisor_of(job.tensor)
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
