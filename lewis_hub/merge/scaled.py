"""Tensors of 8-bit floats, multiplied by their scales as they are read: none is ever held whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import Scaled, TensorHeader
from lewis_hub.checkpoint.reader import TensorReader, whole_tensor
from lewis_hub.merge.arithmetic import scale_up
from lewis_hub.merge.operands import FORMATS
from lewis_hub.merge.plain import widened

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 4  # bytes of a float32, which every computed tensor is read as
BLOCK = 1 << 16  # elements computed at a time
N_HELD = 64  # tensors whose scales are kept: more than there are threads at work

Floats = npt.NDArray[np.float32]


def e4m3_values() -> Floats:
    """What each of the 256 patterns of F8_E4M3 stands for: no infinity, and NaN twice."""
    pattern = np.arange(256)
    exponent, mantissa = pattern >> 3 & 15, pattern & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    magnitude[pattern & 127 == 127] = np.nan
    return np.where(pattern & 128, -magnitude, magnitude).astype(np.float32)


VALUES = e4m3_values()


class ScaledReader:
    """The tensors of a source, those of 8-bit floats in float32. Threads may share it.

    A value is the 8-bit float times its block's scale, rounded once: it depends on nothing but its
    place.

    Args:
        files: of the source's folder; closed with this reader.
    """

    def __init__(self, files: TensorReader) -> None:
        self._files = files
        self._held: dict[str, Floats] = {}
        self._holding = threading.Lock()

    def __enter__(self) -> ScaledReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on: float32 where it is scaled.

        Raises:
            BrokenCheckpointError: a file is missing, or ends before that.
        """
        scaled = tensor.scaled
        if scaled is None:
            self._files.read(tensor, first_byte, into)
            return
        fill(into, first_byte, lambda first, n: self._piece(scaled, first, n))

    def view(self, tensor: TensorHeader, first_byte: int, n_bytes: int) -> memoryview | None:
        """Bytes in their place, where nothing is scaled."""
        if tensor.scaled:
            return None
        return self._files.view(tensor, first_byte, n_bytes)

    def tensor(self, tensor: TensorHeader) -> Tensor:
        """The whole tensor as torch has it, in float32 where it is a float; imports torch."""
        return whole_tensor(self, tensor)

    def _piece(self, scaled: Scaled, first: int, n: int) -> Floats:
        """Elements [first, first + n)."""
        raw, values = np.empty(n, np.uint8), np.empty(n, np.float32)
        self._files.read(scaled.stored, first, raw.data)
        lengths = (_n_columns(scaled), *scaled.block)
        scale_up(raw, VALUES, first, lengths, self._scales(scaled), values)
        return values

    def _scales(self, scaled: Scaled) -> Floats:
        """From the file, or as they were left there; two threads may both read the same."""
        held = self._held.get(scaled.stored.name)
        if held is None:
            held = self._read_scales(scaled)
            with self._holding:
                self._held[scaled.stored.name] = held
                while len(self._held) > N_HELD:
                    del self._held[next(iter(self._held))]
        return held

    def _read_scales(self, scaled: Scaled) -> Floats:
        scale = scaled.scale
        raw = np.empty(scale.n_bytes, np.uint8)
        self._files.read(scale, 0, raw.data)
        values = widened(raw, FORMATS[scale.dtype], scale.n_elements)
        n_across = -(-_n_columns(scaled) // scaled.block[1])
        return np.ascontiguousarray(values.reshape(-1, n_across))


def _n_columns(scaled: Scaled) -> int:
    return scaled.stored.shape[-1] if scaled.stored.shape else 1


def fill(into: memoryview, first_byte: int, piece: Callable[[int, int], Floats]) -> None:
    """Fill `into` with bytes of a float32 tensor from `first_byte` on, some elements at a time.

    Args:
        into: any number of bytes.
        first_byte: may lie within an element, and so may the end.
        piece: the elements [first, first + n) of (first, n).
    """
    into, stop = into.cast("B"), first_byte + into.nbytes
    for first in range(first_byte // WIDTH, -(-stop // WIDTH), BLOCK):
        n = min(BLOCK, -(-stop // WIDTH) - first)
        found = piece(first, n).view(np.uint8).data
        begin, end = max(first_byte, first * WIDTH), min(stop, (first + n) * WIDTH)
        taken = found[begin - first * WIDTH : end - first * WIDTH]
        into[begin - first_byte : end - first_byte] = taken
