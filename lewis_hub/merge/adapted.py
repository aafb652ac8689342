"""An adapter's tensors, computed piece by piece as they are read: none is ever held whole."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import WIDTHS, Adapted, LowRank, TensorHeader
from lewis_hub.checkpoint.reader import Reader, whole_tensor
from lewis_hub.merge import arithmetic
from lewis_hub.merge.operands import FORMATS
from lewis_hub.merge.plain import widened
from lewis_hub.merge.scaled import BLOCK, fill

if TYPE_CHECKING:
    from torch import Tensor

N_HELD = 32  # tensors whose factors are kept: more than there are threads at work

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Factors:
    """A low-rank update in float32, as the kernels take it.

    Attributes:
        left: (rows, rank).
        right: (rank, columns).
        lengths: DoRA's factor of each row, or of each column; None: there is none.
    """

    left: Floats
    right: Floats
    lengths: Floats | None


class AdapterReader:
    """The tensors of a base, changed by an adapter as they are read. Threads may share it.

    What an element is depends on nothing but its place: not on the pieces that are read, nor on
    the number of threads.

    Args:
        base: of the base's folder; closed with this reader.
        own: of the adapter's folder; likewise.
    """

    def __init__(self, base: Reader, own: Reader) -> None:
        self._base, self._own = base, own
        self._held: dict[str, Factors] = {}
        self._holding = threading.Lock()

    def __enter__(self) -> AdapterReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.__exit__()
        self._own.__exit__()

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on: float32 where it is adapted.

        Raises:
            BrokenCheckpointError: a file is missing, or ends before that.
        """
        adapted = tensor.adapted
        if adapted is None:
            self._base.read(tensor, first_byte, into)
            return
        fill(into, first_byte, lambda first, n: self._piece(tensor.name, adapted, first, n))

    def view(self, tensor: TensorHeader, first_byte: int, n_bytes: int) -> memoryview | None:
        """Bytes in their place, where nothing is adapted."""
        if tensor.adapted:
            return None
        return self._base.view(tensor, first_byte, n_bytes)

    def tensor(self, tensor: TensorHeader) -> Tensor:
        """The whole tensor as torch has it, in float32 where it is a float; imports torch."""
        return whole_tensor(self, tensor)

    def _piece(self, name: str, adapted: Adapted, first: int, n: int) -> Floats:
        """Elements [first, first + n)."""
        values = self._start(adapted, first, n)
        if adapted.update:
            factors = self._factors(name, adapted, adapted.update)
            self._update(adapted.update, factors, first, values)
            if factors.lengths is not None:
                n_columns, axis = factors.right.shape[1], int(adapted.update.transposed)
                with np.errstate(invalid="ignore"):  # told as what is not finite
                    values *= factors.lengths[_lines(first, n, n_columns, axis)]
        return values

    def _start(self, adapted: Adapted, first: int, n: int) -> Floats:
        """What an update starts from: the base's elements, or those that were saved instead."""
        if adapted.saved:
            return floats(self._own, adapted.saved, first, n)
        return floats(self._base, adapted.base, first, n)

    def _update(self, update: LowRank, factors: Factors, first: int, values: Floats) -> None:
        scale = np.float32(update.scale)
        arithmetic.add_low_rank(values, first, factors.left, factors.right, scale)

    def _factors(self, name: str, adapted: Adapted, update: LowRank) -> Factors:
        """From the file, or as they were left there; two threads may both compute the same."""
        held = self._held.get(name)
        if held is None:
            held = self._read_factors(adapted, update)
            with self._holding:
                self._held[name] = held
                while len(self._held) > N_HELD:
                    del self._held[next(iter(self._held))]
        return held

    def _read_factors(self, adapted: Adapted, update: LowRank) -> Factors:
        left, right = (
            floats(self._own, t, 0, t.n_elements).reshape(t.shape) for t in (update.b, update.a)
        )
        if update.transposed:
            left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
        factors = Factors(left, right, None)
        if update.magnitude is None:
            return factors
        magnitude = floats(self._own, update.magnitude, 0, update.magnitude.n_elements)
        norms = self._norms(adapted, update, factors)
        with np.errstate(divide="ignore", invalid="ignore"):  # told as what is not finite
            return replace(factors, lengths=magnitude / norms)

    def _norms(self, adapted: Adapted, update: LowRank, factors: Factors) -> Floats:
        """Per output of the module the length of its weights, after the update."""
        n_rows, n_columns = len(factors.left), factors.right.shape[1]
        axis = int(update.transposed)
        squares = np.zeros(n_columns if axis else n_rows, np.float64)
        for first in range(0, n_rows * n_columns, BLOCK):
            values = self._start(adapted, first, min(BLOCK, n_rows * n_columns - first))
            self._update(update, factors, first, values)
            lines = _lines(first, len(values), n_columns, axis)
            np.add.at(squares, lines, np.square(values, dtype=np.float64))  # in their order
        return np.sqrt(squares).astype(np.float32)


def floats(reader: Reader, tensor: TensorHeader, first: int, n: int) -> Floats:
    """Elements [first, first + n) of a tensor, as float32."""
    width = WIDTHS[tensor.dtype]
    raw = np.empty(n * width, np.uint8)
    reader.read(tensor, first * width, raw.data)
    values: Floats = widened(raw, FORMATS[tensor.dtype], n)
    return values


def _lines(first: int, n: int, n_columns: int, axis: int) -> npt.NDArray[np.int64]:
    """The row, or for axis 1 the column, of each of n elements of a matrix."""
    places = np.arange(first, first + n)
    return places % n_columns if axis else places // n_columns
