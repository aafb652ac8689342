"""Readers of a merge's sources: adapters, other widths, rows of several sources, without NaN.

A value depends only on its position: not on the pieces that are read, nor on the number of threads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import NO_FILE, WIDTHS, Adapted, Fitted, LowRank, TensorHeader
from lewis_hub.checkpoint.reader import Reader
from lewis_hub.kernels.calls import FORMATS, Floats, add_low_rank, narrow, widen
from lewis_hub.merge.alignment import MEAN, Assembled
from lewis_hub.merge.permutation import Order, PermutingReader, as_order
from lewis_hub.merge.plan import ShardPlan, TensorPlan
from lewis_hub.merge.quantised import BLOCK, ScaledReader, fill_floats, read_floats

N_HELD = 32  # tensors whose factors are cached: more than there are threads at work
N_KEPT = 64  # a mean of more rows is computed once and kept

OpenFiles = Callable[[str], AbstractContextManager[Reader]]  # of the source with this label


@contextmanager
def open_source(label: str, base: str | None, open_files: OpenFiles) -> Iterator[Reader]:
    """Open a source; `base` is the label of the checkpoint that it changes if it is an adapter."""
    with open_files(label) as own:
        if base is None:
            yield PermutingReader(ScaledReader(own))
            return
        with open_files(base) as files:
            yield PermutingReader(AdapterReader(ScaledReader(files), ScaledReader(own)))


def input_readers(
    plan: ShardPlan, tensor: TensorPlan, sources: Sequence[Reader]
) -> tuple[Reader, ...]:
    """The reader of each input of a tensor; `sources` are those of `plan.labels`."""
    own = [sources[number] for number in tensor.sources]
    readers: list[Reader] = [
        AssemblingReader(rows, own) if rows else reader
        for rows, reader in zip(tensor.assembled or [None] * len(own), own, strict=True)
    ]
    if not (plan.allow_nan and tensor.has_base):
        return tuple(readers)
    base, *experts = readers
    return (base, *(NanReplacingReader(one, base, tensor.inputs[0]) for one in experts))


@dataclass(frozen=True)
class Factors:
    """A low-rank update in float32."""

    left: Floats  # (rows, rank)
    right: Floats  # (rank, columns)
    lengths: Floats | None  # DoRA's factor for each row, or for each column


class AdapterReader:
    """Reads the tensors of a base, changed by an adapter's files. Threads may share it."""

    def __init__(self, base: Reader, own: Reader) -> None:
        self._base, self._own = base, own
        self._factors = lru_cache(N_HELD)(self._read_factors)

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on: float32 if it is changed."""
        adapted = tensor.adapted
        if adapted is None:
            self._base.read(tensor, first_byte, into)
        else:
            fill_floats(into, first_byte, lambda first, n: self._elements(adapted, first, n))

    def _elements(self, adapted: Adapted, first: int, n: int) -> Floats:
        values = self._start(adapted, first, n)
        if adapted.update:
            factors = self._factors(adapted, adapted.update)
            add_low_rank(
                values, first, factors.left, factors.right, np.float32(adapted.update.scale)
            )
            if factors.lengths is not None:
                lines = _lines_of(adapted.update, factors, first, n)
                with np.errstate(invalid="ignore"):  # reported as a value that is not finite
                    values *= factors.lengths[lines]
        return values

    def _start(self, adapted: Adapted, first: int, n: int) -> Floats:
        """The values to update: the base's, or zeros or those that the adapter stores instead."""
        if adapted.saved and adapted.fitted:
            return self._fit(adapted, adapted.saved, adapted.fitted, first, n)
        if adapted.saved:
            return self._saved(adapted.saved, first, n)
        return read_floats(self._base, adapted.base, first, n)

    def _saved(self, saved: TensorHeader, first: int, n: int) -> Floats:
        if saved.shard == NO_FILE:
            return np.zeros(n, np.float32)
        return read_floats(self._own, saved, first, n)

    def _fit(
        self, adapted: Adapted, saved: TensorHeader, fitted: Fitted, first: int, n: int
    ) -> Floats:
        """The values of the base, but where `saved` has a row and a column.

        Rows that go to one place become their mean, and columns their sum, but entries of a vector
        their mean. Sums are in float64, in the order of the columns.
        """
        values, n_columns = read_floats(self._base, adapted.base, first, n), adapted.base.shape[-1]
        rows, columns = as_order(fitted.rows), as_order(fitted.columns)
        columns = np.arange(saved.shape[-1]) if columns is None else columns
        [taken] = np.nonzero(columns >= 0)
        places = columns[taken]
        counts = np.bincount(places, minlength=n_columns)
        shares = np.maximum(counts, 1) if len(saved.shape) == 1 else np.ones(n_columns, np.int64)
        done, wanted = 0, range(first // n_columns, -(-(first + n) // n_columns))
        for stored in rows_by_place(rows, wanted):
            start = (first + done) % n_columns
            piece = values[done : done + n_columns - start]
            total = np.zeros(n_columns)
            for one in stored:
                found = self._saved(saved, one * len(columns), len(columns))
                total += np.bincount(places, found[taken], n_columns)
            if stored:
                mean = total * fitted.scale / (shares * len(stored))
                part = slice(start, start + len(piece))
                with np.errstate(over="ignore"):  # reported as a value that is not finite
                    np.copyto(piece, mean[part], "same_kind", where=counts[part] > 0)
            done += len(piece)
        return values

    def _read_factors(self, adapted: Adapted, update: LowRank) -> Factors:
        left, right = (read_floats(self._own, t).reshape(t.shape) for t in (update.b, update.a))
        if update.transposed:
            left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
        factors = Factors(left, right, None)
        if update.magnitude is None:
            return factors
        magnitude = read_floats(self._own, update.magnitude)
        norms = self._norms(adapted, update, factors)
        with np.errstate(divide="ignore", invalid="ignore"):  # as above
            return replace(factors, lengths=magnitude / norms)

    def _norms(self, adapted: Adapted, update: LowRank, factors: Factors) -> Floats:
        """The norm of the updated weights of each output of the module."""
        n_rows, n_columns = len(factors.left), factors.right.shape[1]
        squares = np.zeros(n_columns if update.transposed else n_rows, np.float64)
        for first in range(0, n_rows * n_columns, BLOCK):
            values = self._start(adapted, first, min(BLOCK, n_rows * n_columns - first))
            add_low_rank(values, first, factors.left, factors.right, np.float32(update.scale))
            lines = _lines_of(update, factors, first, len(values))
            np.add.at(squares, lines, np.square(values, dtype=np.float64))  # in their order
        return np.sqrt(squares).astype(np.float32)


def rows_by_place(rows: Order | None, places: range) -> list[list[int]]:
    """The stored rows that go to each of these places, ascending; `rows` are the places of all."""
    if rows is None:
        return [[place] for place in places]
    [found] = np.nonzero((rows >= places.start) & (rows < places.stop))
    found = found[rows[found].argsort(kind="stable")]
    ends = np.searchsorted(rows[found], np.arange(places.start, places.stop + 1)).tolist()
    return [found[begin:end].tolist() for begin, end in pairwise(ends)]


def _lines_of(update: LowRank, factors: Factors, first: int, n: int) -> npt.NDArray[np.int64]:
    """The output of the module that each of n elements belongs to: its row, or its column."""
    places, n_columns = np.arange(first, first + n), factors.right.shape[1]
    lines: npt.NDArray[np.int64]
    lines = places % n_columns if update.transposed else places // n_columns
    return lines


class AssemblingReader:
    """Reads one tensor whose rows come from several sources. Threads may share it."""

    def __init__(self, rows: Assembled, sources: Sequence[Reader]) -> None:
        self._rows, self._sources = rows, sources
        self._means: dict[int, Floats] = {}

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with bytes from `first_byte` on; both ends lie between two elements."""
        width = WIDTHS[tensor.dtype]
        n_columns = tensor.n_elements // max(self._rows.n_rows, 1)
        first, stop = first_byte // width, (first_byte + into.nbytes) // width
        for begin, end, source, start in self._runs(n_columns, first, stop):
            piece = into[(begin - first) * width : (end - first) * width]
            if source == MEAN:
                self._fill_means(range(start, start + end - begin), n_columns, piece)
                continue
            part = self._rows.parts[source]
            assert part  # rows are only from sources that have the tensor
            if part.dtype == tensor.dtype:
                self._sources[source].read(part, start * width, piece)
            else:
                found = read_floats(self._sources[source], part, start, end - begin)
                piece[:] = found.view(np.uint8).data

    def _runs(self, n_columns: int, first: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Elements [first, stop) by runs: begin, end, source, and the run's begin in the source."""
        runs = self._rows.runs
        lowest = int(np.searchsorted(runs[:, 0], first // max(n_columns, 1), side="right")) - 1
        highest = int(np.searchsorted(runs[:, 0], -(-stop // max(n_columns, 1)), side="left"))
        taken = runs[lowest:highest].tolist()
        ends = [*(following[0] for _, following in pairwise(taken)), sys.maxsize]
        for (row, source, stored_row), end in zip(taken, ends, strict=True):
            begin = max(first, row * n_columns)
            yield begin, min(stop, end * n_columns), source, begin + (stored_row - row) * n_columns

    def _fill_means(self, elements: range, n_columns: int, into: memoryview) -> None:
        """Fill `into` with elements of the table whose rows are the means."""
        first, stop = elements.start // n_columns, -(-elements.stop // n_columns)
        rows = np.concatenate([self._mean(number, n_columns) for number in range(first, stop)])
        start = elements.start - first * n_columns
        into[:] = rows[start : start + len(elements)].view(np.uint8).data

    def _mean(self, number: int, n_columns: int) -> Floats:
        """A mean in float64, rounded once; two threads may both compute it."""
        if number in self._means:
            return self._means[number]
        total, rows = np.zeros(n_columns, np.float64), self._rows.means[number]
        for source, row in rows.tolist():
            part = self._rows.parts[source]
            assert part  # as above
            total += read_floats(self._sources[source], part, row * n_columns, n_columns)
        mean: Floats = (total / max(len(rows), 1)).astype(np.float32)
        if len(rows) > N_KEPT:
            self._means[number] = mean
        return mean


class NanReplacingReader:
    """Reads a tensor of an expert and replaces NaN and infinity, as `--allow-nan` requires.

    The base's value replaces them, so that the task vector is zero there. Where the base's value is
    not finite either, or does not fit the dtype, the tensor is still not finite.
    """

    def __init__(self, own: Reader, base: Reader, start: TensorHeader) -> None:
        self._own, self._base, self._start = own, base, start
        self.has_replaced = False

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the values from `first_byte` on, the first byte of an element."""
        self._own.read(tensor, first_byte, into)
        if tensor.dtype not in FORMATS:
            return
        kind, width = FORMATS[tensor.dtype], WIDTHS[tensor.dtype]
        bits = np.frombuffer(into, f"<u{width}")
        broken = ~np.isfinite(widen(bits.view(np.uint8), kind, bits.size))
        if broken.any():
            self.has_replaced = True
            values = read_floats(self._base, self._start, first_byte // width, bits.size)
            bits[broken] = narrow(values, kind)[broken]
