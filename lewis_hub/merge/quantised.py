"""Quantised tensors, decoded while they are read: no tensor is held whole in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import WIDTHS, FourBit, Scaled, TensorHeader, Transposed
from lewis_hub.checkpoint.reader import Reader
from lewis_hub.errors import BrokenCheckpointError
from lewis_hub.kernels.calls import FORMATS, Bytes, Decoding, Floats, scale_up, widen

WIDTH = 4  # bytes of a float32
BLOCK = 1 << 16  # elements decoded at a time; even, as two codes of 4 bits share a byte
HELD_BYTES = 1 << 27  # limit for the cached scales; those of one tensor are always cached
PANEL = 1 << 23  # codes of a panel, in whole rows
STEP = 32  # a panel starts at a multiple of it, as so many rows may share a word or a scale
HALF_BYTES = ("I4", "NF4", "FP4")  # codes of 4 bits
AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # the position in a word of the code of the first row, the second...
ONES = {"I4": 0x11111111, "I8": 0x01010101}  # a word whose every code is 1


def e4m3_values() -> Floats:
    """The value of each of the 256 patterns of F8_E4M3: no infinity, and NaN twice."""
    pattern = np.arange(256)
    exponent, mantissa = pattern >> 3 & 15, pattern & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    magnitude[pattern & 127 == 127] = np.nan
    return np.where(pattern & 128, -magnitude, magnitude).astype(np.float32)


VALUES = e4m3_values()
NATURAL = np.arange(256, dtype=np.uint8)
PLAIN = NATURAL.astype(np.float32)
TABLES = {  # type of the codes, whether they are packed in words -> value of each code
    ("F8_E4M3", False): VALUES,
    ("I8", False): NATURAL.view(np.int8).astype(np.float32),
    ("INT8", False): NATURAL.view(np.int8).astype(np.float32) / np.float32(127),
    ("I8", True): PLAIN - np.float32(128),
    ("I4", True): PLAIN - np.float32(8),
}
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)  # MXFP4's positive values, doubled
SIGNED = np.zeros(256, np.float32)
SIGNED[:16] = np.concatenate([E2M1, -E2M1])
E8M0 = np.ldexp(1.0, np.arange(256) - 128).astype(np.float32)  # halved, so that all are finite


class ScaledReader:
    """Reads the tensors of a source; quantised tensors become float32. Threads may share it.

    A value is (code - zero) * scale of its block, rounded once.
    """

    def __init__(self, files: Reader) -> None:
        self._files = files
        self._held: dict[str, Decoding] = {}
        self._holding = threading.Lock()
        self._panels = threading.local()

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte` on."""
        scaled = tensor.scaled
        if not into.nbytes:  # a tensor without values may have a scale
            return
        if scaled is None:
            self._files.read(tensor, first_byte, into)
        elif isinstance(scaled, Transposed):
            fill_floats(into, first_byte, lambda first, n: self._columns(tensor, scaled, first, n))
        else:
            decoding = self._decoding(tensor, scaled)
            fill_floats(into, first_byte, lambda first, n: self._rows(scaled, decoding, first, n))

    def _rows(self, scaled: Scaled | FourBit, decoding: Decoding, first: int, n: int) -> Floats:
        """Elements [first, first + n) of codes that are stored by rows."""
        n_a_byte = 2 if scaled.codes in HALF_BYTES else 1
        begin, end = first // n_a_byte, -(-(first + n) // n_a_byte)
        raw, values = np.empty(end - begin, np.uint8), np.empty(n, np.float32)
        self._files.read(scaled.stored, begin, raw.data)
        codes = _codes_of(scaled, raw)[first % n_a_byte :][:n]
        scale_up(codes, first, decoding, values)
        return values

    def _columns(self, tensor: TensorHeader, stored: Transposed, first: int, n: int) -> Floats:
        """Elements [first, first + n) of codes that are stored by columns."""
        values, done = np.empty(n, np.float32), 0
        while done < n:
            panel = self._panel(tensor, stored, first + done)
            start = first + done - panel.first
            codes = panel.codes[start : start + n - done]
            scale_up(codes, start, panel.decoding, values[done : done + codes.size])
            done += codes.size
        return values

    def _panel(self, tensor: TensorHeader, stored: Transposed, element: int) -> _Panel:
        """The panel of an element: the last one that this thread read, or a new one."""
        held: _Panel | None = getattr(self._panels, "last", None)
        if not (
            held and held.tensor == tensor.name and 0 <= element - held.first < held.codes.size
        ):
            self._panels.last = None  # not two at a time
            held = self._panels.last = _read_panel(self._files, tensor, stored, element)
        return held

    def _decoding(self, tensor: TensorHeader, scaled: Scaled | FourBit) -> Decoding:
        """The scales of a tensor, cached; two threads may both read them."""
        held = self._held.get(tensor.name)
        if held is None:
            if isinstance(scaled, FourBit):
                held = _four_bit(self._files, scaled)
            else:
                held = _block_scales(self._files, tensor, scaled)
            with self._holding:
                self._held[tensor.name] = held
                while len(self._held) > 1 and _n_bytes(self._held.values()) > HELD_BYTES:
                    del self._held[next(iter(self._held))]
        return held


def fill_floats(into: memoryview, first_byte: int, read: Callable[[int, int], Floats]) -> None:
    """Fill `into` with bytes of a float32 tensor from `first_byte` on, BLOCK elements at a time.

    Both ends may lie within an element. `read(first, n)` returns the elements [first, first + n).
    """
    into, stop = into.cast("B"), first_byte + into.nbytes
    for first in range(first_byte // WIDTH, -(-stop // WIDTH), BLOCK):
        n = min(BLOCK, -(-stop // WIDTH) - first)
        content = read(first, n).view(np.uint8).data
        begin, end = max(first_byte, first * WIDTH), min(stop, (first + n) * WIDTH)
        piece = content[begin - first * WIDTH : end - first * WIDTH]
        into[begin - first_byte : end - first_byte] = piece


def read_floats(
    reader: Reader, tensor: TensorHeader, first: int = 0, n: int | None = None
) -> Floats:
    """Read n elements of a tensor from the first on, as float32; None: all the rest."""
    n = tensor.n_elements - first if n is None else n
    width = WIDTHS[tensor.dtype]
    raw = np.empty(n * width, np.uint8)
    reader.read(tensor, first * width, raw.data)
    return widen(raw, FORMATS[tensor.dtype], n)


def _block_scales(files: Reader, tensor: TensorHeader, scaled: Scaled) -> Decoding:
    n_columns = tensor.shape[-1] if tensor.shape else 1
    n_across = -(-n_columns // scaled.block[1])
    scales = read_floats(files, scaled.scale).reshape(-1, n_across)
    table = TABLES[scaled.codes, scaled.stored.dtype == "I32"]
    zeros = _zeros(files, scaled, table, scales.shape)
    if scaled.measure:
        integers = "<i8" if scaled.measure.dtype == "I64" else "<i4"
        shape = _read_bytes(files, scaled.measure).view(integers).tolist()
        if shape != [*tensor.shape]:
            problem = f"`{scaled.measure.name}` gives the shape {shape}, but the stored tensor has "
            raise _broken(scaled.stored, f"{problem}the shape {[*tensor.shape]}")
    groups = _groups(files, scaled.groups, n_columns, scaled.block[1], n_across)
    return Decoding(table, scaled.block[0], groups, scales, zeros)


def _four_bit(files: Reader, scaled: FourBit) -> Decoding:
    """Each block of elements is decoded as a row of a matrix with one scale per row."""
    table = np.zeros(256, np.float32)
    table[:16] = read_floats(files, scaled.table)
    nested = scaled.nested
    if nested is None:
        scales = read_floats(files, scaled.scale)
    else:
        codes = _read_bytes(files, scaled.scale)
        spread = np.repeat(read_floats(files, nested.scale), nested.n_a_block)[: codes.size]
        scales = read_floats(files, nested.table)[codes] * spread + np.float32(nested.offset)
    scales = scales.reshape(-1, 1)
    return Decoding(table, 1, np.zeros(scaled.n_a_block, np.int32), scales, np.zeros_like(scales))


def _zeros(files: Reader, scaled: Scaled, table: Floats, shape: tuple[int, ...]) -> Floats:
    """The value of the zero of each scale."""
    zero = scaled.zero
    if zero is None:
        return np.zeros(shape, np.float32)
    raw = _read_bytes(files, zero)
    if zero.dtype == "I8":
        return TABLES["I8", False][raw].reshape(shape)
    words = raw.view("<u4").reshape(-1, shape[1])
    across = np.ascontiguousarray(words.T).view(np.uint8)  # a row of codes for each column
    return np.ascontiguousarray(table[_codes_of(scaled, across)[:, : shape[0]].T])


def _groups(
    files: Reader, stored: TensorHeader | None, n_columns: int, width: int, n_groups: int
) -> npt.NDArray[np.int32]:
    """The group number of each column.

    If no numbers are stored, or only negative ones, groups of `width` columns are in order.
    """
    in_order = np.arange(n_columns, dtype=np.int32) // np.int32(width)
    if stored is None:
        return in_order
    groups = _read_bytes(files, stored).view("<i4").astype(np.int32)
    if (groups < 0).all():
        return in_order
    if groups.min() < 0 or groups.max() >= n_groups:
        raise _broken(stored, f"`{stored.name}` names groups that have no scale")
    return groups


def _codes_of(scaled: Scaled | FourBit, raw: Bytes) -> Bytes:
    """The codes in bytes of a tensor: one or two per byte."""
    if isinstance(scaled, FourBit):
        return halves(raw, low=1)
    return halves(raw) if scaled.codes == "I4" else raw


def halves(raw: Bytes, *, low: Literal[0, 1] = 0) -> Bytes:
    """The two codes of each byte; the code in the lower bits is the first (0) or the second (1)."""
    codes = np.empty((*raw.shape, 2), np.uint8)
    np.bitwise_and(raw, 15, out=codes[..., low])
    np.right_shift(raw, 4, out=codes[..., 1 - low])
    return codes.reshape(*raw.shape[:-1], 2 * raw.shape[-1])


def _read_bytes(files: Reader, tensor: TensorHeader) -> Bytes:
    raw = np.empty(tensor.n_bytes, np.uint8)
    files.read(tensor, 0, raw.data)
    return raw


def _n_bytes(held: Iterable[Decoding]) -> int:
    return sum(one.scales.nbytes + one.zeros.nbytes + one.groups.nbytes for one in held)


def _broken(tensor: TensorHeader, problem: str) -> BrokenCheckpointError:
    remedy = "Use an intact copy, or the model that it was quantised from."
    return BrokenCheckpointError(tensor.shard, problem, remedy)


@dataclass(frozen=True)
class _Panel:
    """Consecutive rows of a tensor whose codes are stored by columns."""

    tensor: str  # name
    first: int  # index of the first element in the tensor
    codes: Bytes
    decoding: Decoding  # of the panel as a matrix of its own


def _read_panel(files: Reader, tensor: TensorHeader, stored: Transposed, element: int) -> _Panel:
    """Read the panel of an element of a matrix, or of a stack of matrices."""
    n_rows, n_columns = tensor.shape[-2:]
    matrix, row = divmod(element // n_columns, n_rows)
    height = max(STEP, PANEL // n_columns // STEP * STEP)
    top = row // height * height
    rows = range(top, min(top + height, n_rows))
    read = _read_mxfp4 if stored.layout == "MXFP4" else _read_words
    codes, decoding = read(files, stored, matrix, rows, n_columns)
    return _Panel(tensor.name, (matrix * n_rows + top) * n_columns, codes.reshape(-1), decoding)


def _read_mxfp4(
    files: Reader, stored: Transposed, matrix: int, rows: range, n_columns: int
) -> tuple[Bytes, Decoding]:
    codes = _by_rows(_lines(files, stored.stored, matrix, n_columns, _share(rows, 1, 2)), stored)
    powers = _lines(files, stored.scale, matrix, n_columns, _share(rows, 1, STEP)).T
    scales = np.ascontiguousarray(E8M0[powers])
    columns = np.arange(n_columns, dtype=np.int32)
    return codes, Decoding(SIGNED, STEP, columns, scales, np.zeros_like(scales))


def _read_words(
    files: Reader, stored: Transposed, matrix: int, rows: range, n_columns: int
) -> tuple[Bytes, Decoding]:
    n_groups, width = stored.scale.shape[0], WIDTHS[stored.scale.dtype]
    raw = _lines(files, stored.scale, matrix, n_groups, _share(rows, width, 1))
    scales = widen(raw.reshape(-1), FORMATS[stored.scale.dtype], raw.size // width)
    scales = np.ascontiguousarray(scales.reshape(n_groups, len(rows)).T)
    zeros = np.zeros_like(scales)
    if stored.zero:
        share = _share(rows, 1, 2 if stored.codes == "I4" else 1)
        words = _lines(files, stored.zero, matrix, n_groups, share).view("<u4")
        words += np.uint32(stored.offset * ONES[stored.codes])
        zeros = PLAIN[_by_rows(words.view(np.uint8), stored)]
    groups = _groups(files, stored.groups, n_columns, -(-n_columns // n_groups), n_groups)
    share = _share(rows, 1, 2) if stored.layout == "AWQ" else _share(rows, 4, 1)
    packed = _lines(files, stored.stored, matrix, stored.stored.shape[0], share)
    if stored.layout == "AWQ":
        codes = _by_rows(packed, stored)
    else:
        along_columns = np.ascontiguousarray(packed.view("<u4").T).view(np.uint8)
        codes = halves(along_columns) if stored.codes == "I4" else along_columns
    return codes, Decoding(PLAIN, 1, groups, scales, zeros)


def _by_rows(packed: Bytes, stored: Transposed) -> Bytes:
    """(rows, lines): the codes of consecutive rows, of which a line holds one each."""
    turned = np.ascontiguousarray(packed.T)
    if stored.codes == "I8":
        return turned
    codes = np.stack([turned & np.uint8(15), turned >> np.uint8(4)], axis=1)
    if stored.layout == "AWQ":
        codes = codes.reshape(-1, len(AWQ), len(packed))[:, AWQ]
    return codes.reshape(-1, len(packed))


def _share(rows: range, n_bytes: int, n_rows: int) -> range:
    """The bytes of a line that hold these rows, if `n_rows` take `n_bytes`."""
    return range(rows.start * n_bytes // n_rows, -(-rows.stop * n_bytes // n_rows))


def _lines(files: Reader, tensor: TensorHeader, matrix: int, n_lines: int, share: range) -> Bytes:
    """(n_lines, bytes): the same share of each line of a matrix."""
    n_matrices = tensor.shape[0] if len(tensor.shape) > 2 else 1
    length = tensor.n_bytes // (n_matrices * n_lines)
    start, lines = matrix * n_lines * length, np.empty((n_lines, len(share)), np.uint8)
    if len(share) == length:
        files.read(tensor, start, lines.reshape(-1).data)
        return lines
    for number, line in enumerate(lines):
        files.read(tensor, start + number * length + share.start, line.data)
    return lines
