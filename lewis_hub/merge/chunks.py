"""A tensor's bytes, piece by piece: from all sources onto a desk, and from there into the shard.

A large tensor is worked on in spans, several at a time.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import WIDTHS
from lewis_hub.checkpoint.reader import Reader
from lewis_hub.merge.nan import MendingReader, mending
from lewis_hub.merge.operands import (
    BLOCK,
    DRAW,
    FORMATS,
    KEEP_ALL,
    KEEP_NONE,
    LANES,
    RANK,
    TRIM,
    Experts,
    Mix,
    Piece,
    Table,
)
from lewis_hub.merge.plan import ShardPlan, TensorPlan
from lewis_hub.merge.reference import Moments
from lewis_hub.merge.runners import Runner
from lewis_hub.methods import random_bits
from lewis_hub.methods.combine import NEGLIGIBLE
from lewis_hub.methods.della import allowances
from lewis_hub.methods.sparsify import n_kept


@dataclass(frozen=True)
class Fused:
    """A method in the kernel's terms, of tensors without second moments."""

    thins: int  # KEEP_ALL, TRIM, DRAW or RANK
    elects: bool
    averages: bool = False  # whatever the options say


FUSED = {
    "task_arithmetic": Fused(KEEP_ALL, elects=False),
    "ties": Fused(TRIM, elects=True),
    "dare_linear": Fused(DRAW, elects=False),
    "dare_ties": Fused(DRAW, elects=True),
    "della_linear": Fused(RANK, elects=False),
    "della": Fused(RANK, elects=True),
    "regmean": Fused(TRIM, elects=False, averages=True),
}
AVERAGED = "linear"
NO_TABLE = Table(np.zeros((0, 0), np.uint64), np.zeros((0, 0), np.float32))
LONGEST_ROW = 1 << 20  # of a longer one the ranks are left to the definition


def block_of(method: str, tensor: TensorPlan) -> int:
    """How many entries of a tensor have to be worked on together: a row where ranks count."""
    ranked = method in FUSED and FUSED[method].thins == RANK and tensor.weights
    return row_of(tensor) if ranked else BLOCK


def row_of(tensor: TensorPlan) -> int:
    """The entries along the last dimension; a 0-d tensor has one."""
    return max(1, tensor.output.shape[-1]) if tensor.output.shape else 1


def is_fused(method: str, tensor: TensorPlan) -> bool:
    """Whether a kernel can make the tensor: it knows magnitudes, and no activations."""
    if method not in FUSED or tensor.grams or block_of(method, tensor) > LONGEST_ROW:
        return False
    return FUSED[method].thins != TRIM or not tensor.options.get("rescale")


def experts_of(tensor: TensorPlan, fused: Fused) -> Experts:
    """The kernel's view of a plan; thresholds and ties are not known yet."""
    n = len(tensor.weights)
    densities = tensor.densities or (1.0,) * n
    rescales = tensor.options.get("rescale", False)
    factors = [1 / d if rescales and 0 < d < 1 else 1.0 for d in densities]
    return Experts(
        modes=np.array([_mode(fused, d, tensor.output.n_elements) for d in densities], np.int64),
        weights=np.array(tensor.weights, np.float32),
        thresholds=np.zeros(n, np.float32),
        ties=np.zeros((n, 3), np.int64),
        streams=np.array(tensor.streams or (0,) * n, np.uint64),
        below=np.array([random_bits.below(d) for d in densities], np.uint64),
        factors=np.array(factors, np.float32),
        table=_table(tensor, densities, rescales=rescales) if fused.thins == RANK else NO_TABLE,
    )


def _table(tensor: TensorPlan, densities: Sequence[float], *, rescales: bool) -> Table:
    found = [
        allowances(row_of(tensor), density, spread, rescale=rescales)
        for density, spread in zip(densities, tensor.own["spreads"], strict=True)
    ]
    return Table(
        np.stack([below for below, _ in found]),
        np.stack([factors for _, factors in found]).astype(np.float32),
    )


def mix_of(tensor: TensorPlan, fused: Fused) -> Mix:
    """How the votes of the experts are combined."""
    normalize = fused.averages or bool(tensor.options["normalize"])
    total = _in_order(tensor.weights)
    divides = normalize and abs(total) >= np.float32(NEGLIGIBLE)
    return Mix(
        elects=fused.elects,
        normalize=normalize,
        divisor=total if divides else np.float32(1),
        scale=np.float32(tensor.options["lambda"]),
    )


def divisor_of(tensor: TensorPlan) -> np.float32:
    """What a weighted sum of models is divided by."""
    return _in_order(tensor.weights) if tensor.options["normalize"] else np.float32(1)


def _mode(fused: Fused, density: float, n_elements: int) -> int:
    if fused.thins == TRIM:
        k = n_kept(n_elements, density)
        return KEEP_ALL if k == n_elements else TRIM if k else KEEP_NONE
    if fused.thins == RANK:
        return KEEP_ALL if density >= 1 else RANK
    if fused.thins == DRAW:
        return KEEP_ALL if density >= 1 else DRAW if random_bits.below(density) else KEEP_NONE
    return KEEP_ALL


def _in_order(weights: Sequence[float]) -> np.float32:
    total = np.float32(0)
    for weight in weights:
        total += np.float32(weight)
    return total


RAW_BYTES = 6 << 20  # of all sources in one piece, of which half of an L2 cache holds the result
SEEN_BYTES = 40 << 20  # of all sources mapped at once, which is kept from pass to pass
LONGEST_SPAN = 1 << 31  # elements: they are counted in 32 bits

Span = range  # of elements; begins at a multiple of the job's block


@dataclass(frozen=True)
class Seen:
    """Elements of a tensor in the place where they lie, one view a source; None: to be read."""

    tensor: str
    elements: Span
    views: Sequence[memoryview | None]


@dataclass
class Desk:
    """Room for one piece, reused from piece to piece; and what was last looked at from it."""

    raw: npt.NDArray[np.uint8]  # (n_sources, bytes)
    out: npt.NDArray[np.uint8]
    seen: Seen | None = None

    @property
    def n_elements(self) -> int:
        """The largest piece, whatever the dtypes."""
        return int(self.raw.shape[1] // 4)


class Desks:
    """As many desks as there are threads at work.

    Args:
        n_sources: that are read together.
        least: entries that a piece must be able to hold.
    """

    def __init__(self, n_sources: int, least: int = BLOCK) -> None:
        n_elements = max(RAW_BYTES // (2 * n_sources) // BLOCK * BLOCK, least)
        self._shape = (n_sources, n_elements * 4)
        self._free: queue.SimpleQueue[Desk] = queue.SimpleQueue()

    @contextmanager
    def one(self) -> Iterator[Desk]:
        """A desk for as long as the block lasts."""
        try:
            desk = self._free.get_nowait()
        except queue.Empty:
            raw = np.empty(self._shape, np.uint8)
            out = np.empty(self._shape[1] + 4 * LANES, np.uint8)
            desk = Desk(raw, out)
        try:
            yield desk
        finally:
            self._free.put(desk)


class Shard(Protocol):
    """Where the bytes of a shard go; threads share it and write disjoint ranges."""

    def write(self, position: int, content: memoryview) -> None:
        """Put bytes at an offset from its beginning."""

    def complete(self, start: int, stop: int) -> None:
        """Say that the bytes [start, stop) are final."""


@dataclass(frozen=True)
class Site:
    """Where a shard is made.

    Attributes:
        readers: one a source, as the plan's `labels` count them.
        statistics: one an expert, where the method merges by them.
    """

    plan: ShardPlan
    readers: Sequence[Reader]
    writer: Shard
    desks: Desks
    statistics: Sequence[Reader] = ()


@dataclass(frozen=True)
class Job:
    """One tensor of a shard; `start` is where its bytes begin in the file."""

    site: Site
    tensor: TensorPlan
    start: int

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """One an input."""
        found = tuple(self.site.readers[source] for source in self.tensor.sources)
        return mending(self.tensor, found) if self.site.plan.allow_nan else found

    @property
    def mended(self) -> list[tuple[str, str]]:
        """Each source that held NaN or infinity, and what it calls the tensor."""
        inputs = zip(self.readers, self.tensor.sources, self.tensor.inputs, strict=True)
        return [
            (self.site.plan.labels[source], header.name)
            for reader, source, header in inputs
            if isinstance(reader, MendingReader) and reader.has_mended
        ]

    def moments(self) -> Moments:
        """Second moments of its inputs, one an expert; read anew. Imports torch."""
        if not self.tensor.grams:
            return Moments([None] * len(self.tensor.weights))
        pairs = zip(self.site.statistics, self.tensor.grams, strict=True)
        grams = [reader.tensor(gram.stored) if gram else None for reader, gram in pairs]
        return Moments(grams, transposed=self.tensor.is_transposed)

    @cached_property
    def kinds(self) -> npt.NDArray[np.int64]:
        """The sources' formats, as kernels take them."""
        return np.array([FORMATS[tensor.dtype] for tensor in self.tensor.inputs], np.int64)

    @cached_property
    def block(self) -> int:
        """Entries that have to be worked on together."""
        return block_of(self.site.plan.method, self.tensor)

    def spans(self, runner: Runner) -> list[Span]:
        """The tensor in as many parts as will be worked on at a time."""
        n = self.tensor.output.n_elements
        n_spans = runner.n_workers if n > runner.large_elements else 1
        n_spans = max(n_spans, -(-n // LONGEST_SPAN))
        length = max(-(-n // n_spans // self.block) * self.block, self.block)
        return [range(first, min(first + length, n)) for first in range(0, n, length)]

    def pieces(self, span: Span) -> Iterator[Piece]:
        """All of a span, in order; a piece is good until the next is asked for."""
        kind = FORMATS[self.tensor.output.dtype]
        with self.site.desks.one() as desk:
            most = desk.n_elements // self.block * self.block
            together = max(SEEN_BYTES // sum(self._widths) // most, 1) * most
            for start in range(span.start, span.stop, together):
                seen = self._seen(desk, span[start - span.start :][:together])
                for first in range(start, seen.elements.stop, most):
                    n = min(most, seen.elements.stop - first)
                    raw = self._raw(desk, seen, first, n)
                    yield Piece(raw, self.kinds, n, first, self.block, desk.out, kind)

    def write(self, piece: Piece) -> None:
        """Put a finished piece where it belongs."""
        width = WIDTHS[self.tensor.output.dtype]
        written = piece.out.data[: piece.n * width]
        self.site.writer.write(self.start + piece.first * width, written)

    def copy(self) -> None:
        """Take the tensor from its first source as it is."""
        source, reader = self.tensor.inputs[0], self.readers[0]
        with self.site.desks.one() as desk:
            for first in range(0, source.n_bytes, desk.out.size):
                held = desk.out.data[: source.n_bytes - first]
                reader.read(source, first, held)
                self.site.writer.write(self.start + first, held)

    def finish(self) -> None:
        """Say that its bytes are final."""
        self.site.writer.complete(self.start, self.start + self.tensor.output.n_bytes)

    @cached_property
    def _widths(self) -> list[int]:
        """Bytes of an element, one an input."""
        return [WIDTHS[tensor.dtype] for tensor in self.tensor.inputs]

    def _seen(self, desk: Desk, elements: Span) -> Seen:
        """Look at some elements, unless the last pass did."""
        name, found = self.tensor.output.name, desk.seen
        if found is None or (found.tensor, found.elements) != (name, elements):
            desk.seen = None  # what is mapped counts as memory
            sources = zip(self.readers, self.tensor.inputs, self._widths, strict=True)
            views = [
                reader.view(tensor, elements.start * width, len(elements) * width)
                for reader, tensor, width in sources
            ]
            desk.seen = found = Seen(name, elements, views)
        return found

    def _raw(self, desk: Desk, seen: Seen, first: int, n: int) -> tuple[Any, ...]:
        """Elements [first, first + n) of every input as bytes, read onto the desk if need be."""
        found = []
        for source, (view, width) in enumerate(zip(seen.views, self._widths, strict=True)):
            if view is None:
                held = desk.raw[source].data[: n * width]
                self.readers[source].read(self.tensor.inputs[source], first * width, held)
            else:
                start = (first - seen.elements.start) * width
                held = view[start : start + n * width]
            found.append(np.frombuffer(held, np.uint8))
        return tuple(found)
