"""Quantised tensors, multiplied by their scales as they are read: none is ever held whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lewis_hub.checkpoint.codes import FourBit, Scaled, Transposed
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Reader, whole_tensor
from lewis_hub.merge.arithmetic import scale_up
from lewis_hub.merge.decoding import Floats, codes_of, decode
from lewis_hub.merge.operands import Decoding
from lewis_hub.merge.transposed import Panel, panel_of

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 4  # bytes of a float32, which every computed tensor is read as
BLOCK = 1 << 16  # elements computed at a time; even, for codes of which two lie in a byte
HALF_BYTES = ("I4", "NF4", "FP4")  # codes of which two lie in a byte
HELD_BYTES = 1 << 27  # of scales that are kept, beyond those of the last tensor


class ScaledReader:
    """The tensors of a source, quantised ones in float32. Threads may share it.

    A value is a code less the zero of its block, times the block's scale, rounded once: it depends
    on nothing but its place.

    Args:
        files: of the source's folder; closed with this reader.
    """

    def __init__(self, files: Reader) -> None:
        self._files = files
        self._held: dict[str, Decoding] = {}
        self._holding = threading.Lock()
        self._panels = threading.local()

    def __enter__(self) -> ScaledReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on: float32 where it is scaled.

        Raises:
            BrokenCheckpointError: a file is missing or ends before that, or what goes with the
                codes does not fit them.
        """
        scaled = tensor.scaled
        if scaled is None:
            self._files.read(tensor, first_byte, into)
            return
        if isinstance(scaled, Transposed):
            fill(into, first_byte, lambda first, n: self._turned(tensor, scaled, first, n))
            return
        decoding = self._decoding(tensor, scaled)
        fill(into, first_byte, lambda first, n: self._piece(scaled, decoding, first, n))

    def view(self, tensor: TensorHeader, first_byte: int, n_bytes: int) -> memoryview | None:
        """Bytes in their place, where nothing is scaled."""
        if tensor.scaled:
            return None
        return self._files.view(tensor, first_byte, n_bytes)

    def tensor(self, tensor: TensorHeader) -> Tensor:
        """The whole tensor as torch has it, in float32 where it is a float; imports torch."""
        return whole_tensor(self, tensor)

    def _piece(self, scaled: Scaled | FourBit, decoding: Decoding, first: int, n: int) -> Floats:
        """Elements [first, first + n)."""
        n_a_byte = 2 if scaled.codes in HALF_BYTES else 1
        begin, end = first // n_a_byte, -(-(first + n) // n_a_byte)
        raw, values = np.empty(end - begin, np.uint8), np.empty(n, np.float32)
        self._files.read(scaled.stored, begin, raw.data)
        codes = codes_of(scaled, raw)[first % n_a_byte :][:n]
        scale_up(codes, first, decoding, values)
        return values

    def _turned(self, tensor: TensorHeader, stored: Transposed, first: int, n: int) -> Floats:
        """Elements [first, first + n), from one panel after another."""
        values, done = np.empty(n, np.float32), 0
        while done < n:
            panel = self._panel(tensor, stored, first + done)
            place = first + done - panel.first
            codes = panel.codes[place : place + n - done]
            scale_up(codes, place, panel.decoding, values[done : done + codes.size])
            done += codes.size
        return values

    def _panel(self, tensor: TensorHeader, stored: Transposed, element: int) -> Panel:
        """The last one that this thread read, where that is it."""
        held: Panel | None = getattr(self._panels, "last", None)
        if held is None or not held.holds(tensor, element):
            self._panels.last = None  # not two at a time
            held = self._panels.last = panel_of(self._files, tensor, stored, element)
        return held

    def _decoding(self, tensor: TensorHeader, scaled: Scaled | FourBit) -> Decoding:
        """From the file, or as it was left there; two threads may both read the same."""
        held = self._held.get(tensor.name)
        if held is None:
            held = decode(self._files, tensor, scaled)
            with self._holding:
                self._held[tensor.name] = held
                while len(self._held) > 1 and sum(map(_n_bytes, self._held.values())) > HELD_BYTES:
                    del self._held[next(iter(self._held))]
        return held


def _n_bytes(decoding: Decoding) -> int:
    return int(decoding.scales.nbytes + decoding.zeros.nbytes + decoding.groups.nbytes)


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
