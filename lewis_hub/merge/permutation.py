"""Reads tensors with their rows and columns in another order: no whole tensor is held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import WIDTHS, Permuted, TensorHeader
from lewis_hub.checkpoint.reader import Reader

Order = npt.NDArray[np.int64]  # the number of the stored entry that is read in each place

STORED = np.dtype("<i4")


def as_bytes(order: Sequence[int] | Order) -> bytes:
    """An order as a header holds it."""
    return np.asarray(order, STORED).tobytes()


def as_order(stored: bytes | None) -> Order | None:
    """The order that a header holds; None: entries are where they are stored."""
    return None if stored is None else np.frombuffer(stored, STORED).astype(np.int64)


def permuted_header(tensor: TensorHeader, orders: Sequence[Order | None]) -> TensorHeader:
    """The header of a tensor whose dimensions, two at most, are read in these orders."""
    *rows, columns = (None if order is None else as_bytes(order) for order in orders)
    found = Permuted(rows[0] if rows else None, columns)
    return replace(tensor, permuted=found) if found.rows or found.columns else tensor


class PermutingReader:
    """Reads the tensors of a source, permuted where their headers say so. Threads may share it."""

    def __init__(self, files: Reader) -> None:
        self._files = files

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on; both ends may be in a row."""
        if tensor.permuted is None:
            self._files.read(tensor, first_byte, into)
            return
        stored, width = replace(tensor, permuted=None), WIDTHS[tensor.dtype]
        rows, columns = (as_order(one) for one in (tensor.permuted.rows, tensor.permuted.columns))
        row_bytes = tensor.shape[-1] * width
        done = 0
        while done < into.nbytes:
            row, start = divmod(first_byte + done, row_bytes)
            piece = into[done : done + row_bytes - start]
            place = (row if rows is None else int(rows[row])) * row_bytes
            if columns is None:
                self._files.read(stored, place + start, piece)
            else:
                entries = columns[start // width : (start + piece.nbytes) // width]
                self._fill(stored, place, row_bytes, entries, piece)
            done += piece.nbytes

    def _fill(
        self, stored: TensorHeader, place: int, row_bytes: int, entries: Order, into: memoryview
    ) -> None:
        """Fill `into` with entries of the row that is stored from byte `place` on."""
        kind = f"V{WIDTHS[stored.dtype]}"
        row = np.empty(row_bytes, np.uint8)
        self._files.read(stored, place, row.data)
        into[:] = row.view(kind)[entries].view(np.uint8).data
