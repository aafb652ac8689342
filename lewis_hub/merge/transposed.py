"""Matrices of GPTQ, AWQ and MXFP4: some of their rows at a time, turned round.

What lies together in the file is a column. So the codes of as many rows as are worked on for a
while are read from all columns and held, with the scales of these rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lewis_hub.checkpoint.codes import Transposed
from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.reader import Reader
from lewis_hub.merge.decoding import NATURAL, Bytes, Floats, groups_of, halves
from lewis_hub.merge.operands import FORMATS, Decoding
from lewis_hub.merge.plain import widened

PANEL = 1 << 23  # codes that are held, in as many rows as they fill
STEP = 32  # rows that are only read together: they share a word or a scale
AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # which of the codes in a word is of the first row, the second, ...
ONES = {"I4": 0x11111111, "I8": 0x01010101}  # a word whose every code is 1
PLAIN = NATURAL.astype(np.float32)
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)  # of MXFP4, doubled; then with the sign
SIGNED = np.zeros(256, np.float32)
SIGNED[:16] = np.concatenate([E2M1, -E2M1])
E8M0 = np.ldexp(1.0, np.arange(256) - 128).astype(np.float32)  # halved: all are finite


@dataclass(frozen=True)
class Panel:
    """Consecutive rows of a tensor.

    Attributes:
        tensor: its name.
        first: the number of their first element in the tensor.
        codes: of each element.
        decoding: of a matrix of these rows alone.
    """

    tensor: str
    first: int
    codes: Bytes
    decoding: Decoding

    def holds(self, tensor: TensorHeader, element: int) -> bool:
        """Whether it is the one that an element of a tensor is in."""
        return tensor.name == self.tensor and 0 <= element - self.first < self.codes.size


def panel_of(files: Reader, tensor: TensorHeader, stored: Transposed, element: int) -> Panel:
    """Read the panel that an element is in.

    Args:
        files: hold the parts of the tensor.
        tensor: what it is read as: a matrix, or several one after another.
        stored: how it is stored.
        element: its number.

    Raises:
        BrokenCheckpointError: a file ends too early, or columns name a group that has no scale.
    """
    n_rows, n_columns = tensor.shape[-2:]
    matrix, row = divmod(element // n_columns, n_rows)
    height = max(STEP, PANEL // n_columns // STEP * STEP)
    top = row // height * height
    rows = range(top, min(top + height, n_rows))
    read = _blocks if stored.layout == "MXFP4" else _words
    codes, decoding = read(files, stored, matrix, rows, n_columns)
    return Panel(tensor.name, (matrix * n_rows + top) * n_columns, codes.reshape(-1), decoding)


def _blocks(
    files: Reader, stored: Transposed, matrix: int, rows: range, n_columns: int
) -> tuple[Bytes, Decoding]:
    codes = _by_rows(_lines(files, stored.stored, matrix, n_columns, _share(rows, 1, 2)), stored)
    powers = _lines(files, stored.scale, matrix, n_columns, _share(rows, 1, STEP)).T
    scales = np.ascontiguousarray(E8M0[powers])
    columns = np.arange(n_columns, dtype=np.int32)
    return codes, Decoding(SIGNED, STEP, columns, scales, np.zeros_like(scales))


def _words(
    files: Reader, stored: Transposed, matrix: int, rows: range, n_columns: int
) -> tuple[Bytes, Decoding]:
    n_groups, width = stored.scale.shape[0], WIDTHS[stored.scale.dtype]
    raw = _lines(files, stored.scale, matrix, n_groups, _share(rows, width, 1))
    scales: Floats = widened(raw.reshape(-1), FORMATS[stored.scale.dtype], raw.size // width)
    scales = np.ascontiguousarray(scales.reshape(n_groups, len(rows)).T)
    zeros = np.zeros_like(scales)
    if stored.zero:
        taken = _share(rows, 1, 2 if stored.codes == "I4" else 1)
        words = _lines(files, stored.zero, matrix, n_groups, taken).view("<u4")
        words += np.uint32(stored.offset * ONES[stored.codes])
        zeros = PLAIN[_by_rows(words.view(np.uint8), stored)]
    in_order = np.arange(n_columns, dtype=np.int32) // np.int32(-(-n_columns // n_groups))
    groups = groups_of(files, stored.groups, in_order, n_groups)
    return _codes(files, stored, matrix, rows), Decoding(PLAIN, 1, groups, scales, zeros)


def _codes(files: Reader, stored: Transposed, matrix: int, rows: range) -> Bytes:
    """(rows, columns) as they are read."""
    n_lines = stored.stored.shape[0]
    if stored.layout == "AWQ":
        return _by_rows(_lines(files, stored.stored, matrix, n_lines, _share(rows, 1, 2)), stored)
    words = _lines(files, stored.stored, matrix, n_lines, _share(rows, 4, 1)).view("<u4")
    along_columns = np.ascontiguousarray(words.T).view(np.uint8)
    return halves(along_columns) if stored.codes == "I4" else along_columns


def _by_rows(packed: Bytes, stored: Transposed) -> Bytes:
    """(rows, lines): what lines hold of consecutive rows, a code a byte."""
    turned = np.ascontiguousarray(packed.T)
    if stored.codes == "I8":
        return turned
    codes = np.stack([turned & np.uint8(15), turned >> np.uint8(4)], axis=1)
    if stored.layout == "AWQ":
        codes = codes.reshape(-1, len(AWQ), len(packed))[:, AWQ]
    return codes.reshape(-1, len(packed))


def _share(rows: range, n_bytes: int, n_rows: int) -> range:
    """The bytes of a line that rows are in, of which `n_rows` take `n_bytes`."""
    return range(rows.start * n_bytes // n_rows, -(-rows.stop * n_bytes // n_rows))


def _lines(files: Reader, tensor: TensorHeader, matrix: int, n_lines: int, taken: range) -> Bytes:
    """(n_lines, bytes): the same bytes of each line of a matrix."""
    n_matrices = tensor.shape[0] if len(tensor.shape) > 2 else 1
    length = tensor.n_bytes // (n_matrices * n_lines)
    start, found = matrix * n_lines * length, np.empty((n_lines, len(taken)), np.uint8)
    if len(taken) == length:
        files.read(tensor, start, found.reshape(-1).data)
        return found
    for number, line in enumerate(found):
        files.read(tensor, start + number * length + taken.start, line.data)
    return found
