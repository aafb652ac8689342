"""Sources that hold NaN or infinity, read all the same: what `--allow-nan` asks for.

An entry that is not finite counts as the base's, so that its task vector is zero there; where the
base's is not finite either, or there is no base, it is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.reader import Reader
from lewis_hub.kernels.calls import narrow, widen
from lewis_hub.kernels.operands import FORMATS

if TYPE_CHECKING:
    from lewis_hub.merge.plan import TensorPlan


EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}  # bits: all set in NaN, infinity

Bits = npt.NDArray[np.unsignedinteger]


class NanReplacingReader:
    """A tensor's source whose entries are finite. Threads may share it.

    Args:
        own: of the source; whoever opened it closes it.
        base: of the base, and what it calls the tensor; None: zeros stand in.
    """

    def __init__(self, own: Reader, base: tuple[Reader, TensorHeader] | None) -> None:
        self._own, self._base = own, base
        self.has_replaced = False

    def __enter__(self) -> NanReplacingReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with finite entries, from `first_byte` on, which begins one.

        Raises:
            BrokenCheckpointError: a file is missing, or ends before that.
        """
        self._own.read(tensor, first_byte, into)
        if tensor.dtype not in FORMATS:
            return
        found = _bits(tensor.dtype, into)
        broken = _not_finite(found, tensor.dtype)
        if broken.any():
            self.has_replaced = True
            found[broken] = self._stand_ins(tensor, first_byte, len(found))[broken]

    def view(self, tensor: TensorHeader, first_byte: int, n_bytes: int) -> memoryview | None:
        """Nothing: every entry has to be looked at."""
        del tensor, first_byte, n_bytes
        return None

    def _stand_ins(self, tensor: TensorHeader, first_byte: int, n: int) -> Bits:
        width = WIDTHS[tensor.dtype]
        if self._base is None:
            return np.zeros(n, f"<u{width}")
        reader, header = self._base
        held = bytearray(n * WIDTHS[header.dtype])
        reader.read(header, first_byte // width * WIDTHS[header.dtype], memoryview(held))
        found = _bits(header.dtype, memoryview(held))
        found[_not_finite(found, header.dtype)] = 0
        given = widen(found.view(np.uint8), FORMATS[header.dtype], n)
        made = narrow(given, FORMATS[tensor.dtype])
        made[_not_finite(made, tensor.dtype)] = 0  # it does not fit
        return made


def replace_nan(tensor: TensorPlan, readers: Sequence[Reader]) -> tuple[NanReplacingReader, ...]:
    """The readers of a tensor's inputs, wrapped; the base, where there is one, is the first."""
    n_bases = len(tensor.inputs) - len(tensor.weights)
    base = (readers[0], tensor.inputs[0]) if n_bases else None
    return tuple(
        NanReplacingReader(own, None if number < n_bases else base)
        for number, own in enumerate(readers)
    )


def _bits(dtype: str, raw: memoryview) -> Bits:
    return np.frombuffer(raw, np.dtype(f"<u{WIDTHS[dtype]}"))


def _not_finite(bits: Bits, dtype: str) -> npt.NDArray[np.bool_]:
    """Which of the bits of a format stand for NaN or infinity."""
    exponent = bits.dtype.type(EXPONENTS[dtype])
    found: npt.NDArray[np.bool_] = (bits & exponent) == exponent
    return found
