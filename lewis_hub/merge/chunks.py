"""A tensor's bytes, piece by piece: from all sources onto a buffer, and from there into the shard.

A large tensor is worked on in spans, several at a time.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import WIDTHS
from lewis_hub.checkpoint.reader import Reader, read_tensor
from lewis_hub.kernels import calls, random_bits
from lewis_hub.kernels.calls import BLOCK, FORMATS, Bytes, Experts, Mix, Piece, Table
from lewis_hub.merge.plan import Moments, ShardPlan, TensorPlan
from lewis_hub.merge.readers import NanReplacingReader, input_readers
from lewis_hub.merge.runners import Runner
from lewis_hub.methods.dare import allowances
from lewis_hub.methods.votes import NEGLIGIBLE, n_kept


@dataclass(frozen=True)
class Fused:
    """A method in the kernel's terms, of tensors without second moments."""

    thins: int  # KEEP_ALL, TRIM, DRAW or RANK of `calls`
    elects: bool
    averages: bool = False  # whatever the options say


FUSED = {
    "task_arithmetic": Fused(calls.KEEP_ALL, elects=False),
    "ties": Fused(calls.TRIM, elects=True),
    "dare_linear": Fused(calls.DRAW, elects=False),
    "dare_ties": Fused(calls.DRAW, elects=True),
    "della_linear": Fused(calls.RANK, elects=False),
    "della": Fused(calls.RANK, elects=True),
    "regmean": Fused(calls.TRIM, elects=False, averages=True),
}
AVERAGED = "linear"
# The options that the kernels know; those of second moments do not matter to them.
OPTIONS = {"normalize", "lambda", "rescale", "trim", "trim_exponent", "off_diagonal", "inputs"}
OPTIONS |= {"normalize_grams", "ridge", "anchor_scale", "interpolation", "compensate"}
OPTIONS |= {"anchor", "anchor_density", "affine", "prior", "embeddings"}
LONGEST_ROW = 1 << 20  # of a longer one the ranks are left to the definition


def block_of(method: str, tensor: TensorPlan) -> int:
    """How many entries of a tensor have to be worked on together: a row where ranks count."""
    ranked = method in FUSED and FUSED[method].thins == calls.RANK and tensor.weights
    return row_of(tensor) if ranked else BLOCK


def row_of(tensor: TensorPlan) -> int:
    """The entries along the last dimension; a 0-d tensor has one."""
    return max(1, tensor.output.shape[-1]) if tensor.output.shape else 1


def is_fused(method: str, tensor: TensorPlan) -> bool:
    """Whether a kernel can make the tensor: it knows magnitudes, no activations, and OPTIONS."""
    if method not in FUSED or tensor.grams or block_of(method, tensor) > LONGEST_ROW:
        return False
    if not tensor.options.keys() <= OPTIONS or tensor.options.get("ridge"):
        return False
    return FUSED[method].thins != calls.TRIM or not tensor.options.get("rescale")


def experts_of(tensor: TensorPlan, fused: Fused) -> Experts:
    """The kernel's view of a plan; thresholds and ties are not known yet."""
    n = len(tensor.weights)
    densities = tensor.densities or (1.0,) * n
    rescales = tensor.options.get("rescale", False)
    factors = [1 / d if rescales and 0 < d < 1 else 1.0 for d in densities]
    experts: Experts = np.zeros(n, calls.EXPERT)
    experts["mode"] = [_mode(fused, d, tensor.output.n_elements) for d in densities]
    experts["stream"] = np.array(tensor.streams or (0,) * n, np.uint64)
    experts["below"] = np.array([random_bits.below(d) for d in densities], np.uint64)
    experts["weight"] = tensor.weights
    experts["factor"] = factors
    return experts


def table_of(tensor: TensorPlan, fused: Fused) -> Table:
    """The limit and the factor of each rank, where ranks count."""
    if fused.thins != calls.RANK:
        return calls.NO_TABLE
    rescales = tensor.options.get("rescale", False)
    found = [
        allowances(row_of(tensor), density, spread, rescale=rescales)
        for density, spread in zip(tensor.densities, tensor.own["spreads"], strict=True)
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
    """The divisor of a weighted sum of models."""
    return _in_order(tensor.weights) if tensor.options["normalize"] else np.float32(1)


def _mode(fused: Fused, density: float, n_elements: int) -> int:
    if fused.thins == calls.TRIM:
        k = n_kept(n_elements, density)
        return calls.KEEP_ALL if k == n_elements else calls.TRIM if k else calls.KEEP_NONE
    if fused.thins == calls.KEEP_ALL or density >= 1:
        return calls.KEEP_ALL
    draws_none = fused.thins == calls.DRAW and not random_bits.below(density)
    return calls.KEEP_NONE if draws_none else fused.thins


def _in_order(weights: Sequence[float]) -> np.float32:
    total = np.float32(0)
    for weight in weights:
        total += np.float32(weight)
    return total


RAW_BYTES = 6 << 20  # of all sources in one piece, of which half of an L2 cache holds the result
SPANS_PER_WORKER = 4  # of a large tensor
LONGEST_SPAN = 1 << 31  # elements: they are counted in 32 bits

Span = range  # of elements; begins at a multiple of the job's block


@dataclass
class Buffer:
    """Memory for one piece, reused from piece to piece."""

    raw: npt.NDArray[np.uint8]  # (n_sources, bytes)
    out: npt.NDArray[np.uint8]


class Buffers:
    """As many buffers as there are threads at work; a buffer holds `least` elements or more."""

    def __init__(self, n_sources: int, least: int = BLOCK) -> None:
        n_elements = max(RAW_BYTES // (2 * n_sources) // BLOCK * BLOCK, least)
        self._shape = (n_sources, n_elements * 4)
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()

    @contextmanager
    def one(self) -> Iterator[Buffer]:
        """A buffer for as long as the block lasts."""
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            buffer = Buffer(np.empty(self._shape, np.uint8), np.empty(self._shape[1], np.uint8))
        try:
            yield buffer
        finally:
            self._free.put(buffer)


class Shard(Protocol):
    """Where the bytes of a shard go; threads share it and write disjoint ranges."""

    def write(self, position: int, content: memoryview) -> None:
        """Put final bytes at an offset from its beginning."""


@dataclass(frozen=True)
class ShardContext:
    """The open sources of a shard, and the place where its bytes are written."""

    plan: ShardPlan
    readers: Sequence[Reader]  # per source, in the order of the plan's labels
    writer: Shard
    buffers: Buffers
    statistics: Sequence[Reader] = ()  # per expert, if the method takes them


@dataclass(frozen=True)
class TensorJob:
    """One tensor of a shard; `start` is where its bytes begin in the file."""

    context: ShardContext
    tensor: TensorPlan
    start: int

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """The reader of each input."""
        return input_readers(self.context.plan, self.tensor, self.context.readers)

    @property
    def replaced_nan(self) -> list[tuple[str, str]]:
        """Each source that held NaN or infinity, and its name of the tensor."""
        inputs = zip(self.readers, self.tensor.sources, self.tensor.inputs, strict=True)
        return [
            (self.context.plan.labels[source], header.name)
            for reader, source, header in inputs
            if isinstance(reader, NanReplacingReader) and reader.has_replaced
        ]

    def moments(self) -> Moments:
        """Second moments of its inputs, per expert; read anew. Imports torch."""
        if not self.tensor.grams:
            return Moments([None] * len(self.tensor.weights))
        pairs = zip(self.context.statistics, self.tensor.grams, strict=True)
        grams = [read_tensor(reader, gram.stored) if gram else None for reader, gram in pairs]
        return Moments(grams, transposed=self.tensor.is_transposed)

    @cached_property
    def block(self) -> int:
        """Entries that have to be worked on together."""
        return block_of(self.context.plan.method, self.tensor)

    def spans(self, runner: Runner) -> list[Span]:
        """The whole tensor, or parts of a large one: several per worker, as one also hashes."""
        n = self.tensor.output.n_elements
        n_spans = SPANS_PER_WORKER * runner.n_workers if n > runner.large_elements else 1
        n_spans = max(n_spans, -(-n // LONGEST_SPAN))
        length = max(-(-n // n_spans // self.block) * self.block, self.block)
        return [range(first, min(first + length, n)) for first in range(0, n, length)]

    def pieces(self, span: Span) -> Iterator[Piece]:
        """All of a span; a piece is valid until the next is requested."""
        kinds = np.array([FORMATS[tensor.dtype] for tensor in self.tensor.inputs], np.int64)
        kind = FORMATS[self.tensor.output.dtype]
        with self.context.buffers.one() as buffer:
            most = buffer.out.size // 4 // self.block * self.block  # whatever the dtypes
            for first in range(span.start, span.stop, most):
                n = min(most, span.stop - first)
                raw = self._read(buffer, first, n)
                yield Piece(raw, kinds, n, first, self.block, buffer.out, kind)

    def write(self, piece: Piece) -> None:
        """Write a finished piece."""
        width = WIDTHS[self.tensor.output.dtype]
        written = piece.out.data[: piece.n * width]
        self.context.writer.write(self.start + piece.first * width, written)

    def copy(self) -> None:
        """Take the tensor from its first source as it is."""
        source, reader = self.tensor.inputs[0], self.readers[0]
        with self.context.buffers.one() as buffer:
            for first in range(0, source.n_bytes, buffer.out.size):
                held = buffer.out.data[: source.n_bytes - first]
                reader.read(source, first, held)
                self.context.writer.write(self.start + first, held)

    def _read(self, buffer: Buffer, first: int, n: int) -> list[Bytes]:
        """Elements [first, first + n) of every input as bytes.

        They are read, not mapped: a file that is truncated under a map ends the process.
        """
        raw = []
        for reader, tensor, held in zip(self.readers, self.tensor.inputs, buffer.raw, strict=False):
            width = WIDTHS[tensor.dtype]
            filled = held[: n * width]
            reader.read(tensor, first * width, filled.data)
            raw.append(filled)
        return raw
