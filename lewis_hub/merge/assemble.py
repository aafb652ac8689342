"""Tensors that are put together from rows of several sources, piece by piece as they are read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.reader import Reader
from lewis_hub.merge.alignment import MEAN, Assembled

if TYPE_CHECKING:
    from lewis_hub.merge.plan import ShardPlan


N_KEPT = 64  # a mean of more rows is computed once and kept

Floats = npt.NDArray[np.float32]


def assembling(plan: ShardPlan, readers: Sequence[Reader]) -> Sequence[Reader]:
    """The readers of a shard's sources, wrapped where the plan puts tensors together.

    Args:
        plan: of the shard.
        readers: one a source; whoever opened them closes them.
    """
    if not any(tensor.assembled for tensor in plan.tensors):
        return readers
    made: list[dict[str, tuple[Assembled, list[Reader]]]] = [{} for _ in readers]
    for tensor in plan.tensors:
        own = [readers[i] for i in tensor.sources]
        for i, one in zip(tensor.sources, tensor.assembled, strict=False):  # none: all lie there
            if one:
                made[i][tensor.output.name] = one, own
    return [AssemblingReader(own, rows) for own, rows in zip(readers, made, strict=True)]


class AssemblingReader:
    """A source whose tensors are in part put together. Threads may share it.

    What an element is depends on nothing but its place: not on the pieces that are read, nor on the
    number of threads.

    Args:
        own: of the source; for tensors that are not put together.
        assembled: by the tensor's name, with the readers of the sources that its map counts.
    """

    def __init__(
        self, own: Reader, assembled: Mapping[str, tuple[Assembled, Sequence[Reader]]]
    ) -> None:
        self._own, self._assembled = own, assembled
        self._kept: dict[tuple[str, int], Floats] = {}

    def __enter__(self) -> AssemblingReader:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: the readers belong to whoever opened them."""

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on.

        Both ends lie between two elements.

        Raises:
            BrokenCheckpointError: a file is missing, or ends before that.
        """
        if tensor.name not in self._assembled:
            self._own.read(tensor, first_byte, into)
            return
        one, readers = self._assembled[tensor.name]
        width = WIDTHS[tensor.dtype]
        n_columns = tensor.n_elements // max(one.rows.n_rows, 1)
        first, stop = first_byte // width, (first_byte + into.nbytes) // width
        for begin, end, source, start in _runs(one, n_columns, first, stop):
            piece = into[(begin - first) * width : (end - first) * width]
            if source == MEAN:
                self._fill_means(tensor, range(start, start + end - begin), piece)
                continue
            part = one.parts[source]
            assert part  # a map names only sources that have the tensor
            if part.dtype == tensor.dtype:
                readers[source].read(part, start * width, piece)
            else:
                found = _floats(readers[source], part, start, end - begin)
                piece[:] = found.view(np.uint8).data

    def view(self, tensor: TensorHeader, first_byte: int, n_bytes: int) -> memoryview | None:
        """Bytes in their place, where nothing is assembled."""
        if tensor.name in self._assembled:
            return None
        return self._own.view(tensor, first_byte, n_bytes)

    def _fill_means(self, tensor: TensorHeader, elements: range, into: memoryview) -> None:
        """Elements of the table whose rows are the means."""
        n_columns = tensor.n_elements // tensor.shape[0]
        for number in range(elements.start // n_columns, -(-elements.stop // n_columns)):
            begin = max(elements.start, number * n_columns)
            end = min(elements.stop, (number + 1) * n_columns)
            row = self._mean(tensor.name, number, n_columns)
            piece = row[begin - number * n_columns : end - number * n_columns].view(np.uint8).data
            into[4 * (begin - elements.start) : 4 * (end - elements.start)] = piece

    def _mean(self, name: str, number: int, n_columns: int) -> Floats:
        """A mean in float64, rounded once; two threads may both compute the same."""
        kept = self._kept.get((name, number))
        if kept is not None:
            return kept
        one, readers = self._assembled[name]
        total, of = np.zeros(n_columns, np.float64), one.rows.means[number]
        for source, row in of.tolist():
            part = one.parts[source]
            assert part  # a map names only sources that have the tensor
            total += _floats(readers[source], part, row * n_columns, n_columns)
        mean: Floats = (total / max(len(of), 1)).astype(np.float32)
        if len(of) > N_KEPT:
            self._kept[name, number] = mean
        return mean


def _runs(
    one: Assembled, n_columns: int, first: int, stop: int
) -> Iterator[tuple[int, int, int, int]]:
    """Elements [first, stop) as runs: begin, end, source, and where the run begins there."""
    runs = one.rows.runs
    lowest = int(np.searchsorted(runs[:, 0], first // max(n_columns, 1), side="right")) - 1
    highest = int(np.searchsorted(runs[:, 0], -(-stop // max(n_columns, 1)), side="left"))
    taken = runs[lowest:highest].tolist()
    ends = [*(following[0] for _, following in pairwise(taken)), sys.maxsize]
    for (row, source, there), end in zip(taken, ends, strict=True):
        begin = max(first, row * n_columns)
        yield begin, min(stop, end * n_columns), source, begin + (there - row) * n_columns


def _floats(reader: Reader, tensor: TensorHeader, first: int, n: int) -> Floats:
    """Elements [first, first + n) in float32."""
    width = WIDTHS[tensor.dtype]
    raw = np.empty(n * width, np.uint8)
    reader.read(tensor, first * width, raw.data)
    if tensor.dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16 if tensor.dtype == "F16" else np.float32).astype(np.float32)
