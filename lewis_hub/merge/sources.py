"""Quantised tensors, multiplied by their scales as they are read: none is ever held whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import (
    WIDTHS,
    Adapted,
    FourBit,
    LowRank,
    Scaled,
    TensorHeader,
    Transposed,
)
from lewis_hub.checkpoint.reader import Reader
from lewis_hub.errors import BrokenCheckpointError
from lewis_hub.kernels.calls import add_low_rank, scale_up, widen
from lewis_hub.kernels.operands import FORMATS, Decoding

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def e4m3_values() -> Floats:
    """What each of the 256 patterns of F8_E4M3 stands for: no infinity, and NaN twice."""
    pattern = np.arange(256)
    exponent, mantissa = pattern >> 3 & 15, pattern & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    magnitude[pattern & 127 == 127] = np.nan
    return np.where(pattern & 128, -magnitude, magnitude).astype(np.float32)


VALUES = e4m3_values()
NATURAL = np.arange(256, dtype=np.uint8)
TABLES = {  # codes, and whether they are packed -> what each pattern stands for
    ("F8_E4M3", False): VALUES,
    ("I8", False): NATURAL.view(np.int8).astype(np.float32),
    ("INT8", False): NATURAL.view(np.int8).astype(np.float32) / np.float32(127),
    ("I8", True): NATURAL.astype(np.float32) - np.float32(128),
    ("I4", True): NATURAL.astype(np.float32) - np.float32(8),
}


def decode(files: Reader, tensor: TensorHeader, scaled: Scaled | FourBit) -> Decoding:
    """Read what belongs to a quantised tensor.

    Args:
        files: hold its parts.
        tensor: what it is read as.
        scaled: how it is stored.

    Raises:
        BrokenCheckpointError: its shape, or the order of its groups, is not what it says.
    """
    if isinstance(scaled, FourBit):
        return _four_bit(files, scaled)
    n_columns = tensor.shape[-1] if tensor.shape else 1
    n_across = -(-n_columns // scaled.block[1])
    scales = _floats(files, scaled.scale).reshape(-1, n_across)
    table = TABLES[scaled.codes, scaled.stored.dtype == "I32"]
    zeros = _zeros(files, scaled, table, scales.shape)
    if scaled.measure and (said := _integers(files, scaled.measure)) != [*tensor.shape]:
        shape = f"the stored tensor has the shape {[*tensor.shape]}"
        problem = f"`{scaled.measure.name}` gives the shape {said}, but {shape}"
        raise _broken(scaled.stored, problem)
    in_order = np.arange(n_columns, dtype=np.int32) // np.int32(scaled.block[1])
    groups = groups_of(files, scaled.groups, in_order, n_across)
    return Decoding(table, scaled.block[0], groups, scales, zeros)


def halves(raw: Bytes, *, low: Literal[0, 1] = 0) -> Bytes:
    """The codes of 4 bits in bytes: twice as many; of two, the one in the lower bits is `low`."""
    codes = np.empty((*raw.shape, 2), np.uint8)
    np.bitwise_and(raw, 15, out=codes[..., low])
    np.right_shift(raw, 4, out=codes[..., 1 - low])
    return codes.reshape(*raw.shape[:-1], 2 * raw.shape[-1])


def codes_of(scaled: Scaled | FourBit, raw: Bytes) -> Bytes:
    """The codes in bytes of a tensor: one or two in each."""
    if isinstance(scaled, FourBit):
        return halves(raw, low=1)
    return halves(raw) if scaled.codes == "I4" else raw


def _four_bit(files: Reader, scaled: FourBit) -> Decoding:
    """The elements of a block count as a row, which has one scale."""
    table = np.zeros(256, np.float32)
    table[:16] = _floats(files, scaled.table)
    nested = scaled.nested
    if nested is None:
        scales = _floats(files, scaled.scale)
    else:
        codes = _bytes(files, scaled.scale)
        spread = np.repeat(_floats(files, nested.scale), nested.n_a_block)[: codes.size]
        scales = _floats(files, nested.table)[codes] * spread + np.float32(nested.offset)
    scales = scales.reshape(-1, 1)
    return Decoding(table, 1, np.zeros(scaled.n_a_block, np.int32), scales, np.zeros_like(scales))


def _zeros(files: Reader, scaled: Scaled, table: Floats, shape: tuple[int, ...]) -> Floats:
    """One a scale, as what its code stands for."""
    zero = scaled.zero
    if zero is None:
        return np.zeros(shape, np.float32)
    raw = _bytes(files, zero)
    if zero.dtype == "I8":
        return TABLES["I8", False][raw].reshape(shape)
    words = raw.view("<u4").reshape(-1, shape[1])
    across = np.ascontiguousarray(words.T).view(np.uint8)  # a row of codes for each column
    return np.ascontiguousarray(table[codes_of(scaled, across)[:, : shape[0]].T])


def groups_of(
    files: Reader, told: TensorHeader | None, in_order: npt.NDArray[np.int32], n_groups: int
) -> npt.NDArray[np.int32]:
    """Per column of a matrix the number of its group.

    Args:
        files: hold `told`.
        told: says it; None, or where all it says is negative: they are in order.
        in_order: what that is.
        n_groups: that there are.

    Raises:
        BrokenCheckpointError: it names others.
    """
    if told is None:
        return in_order
    found = _bytes(files, told).view("<i4").astype(np.int32)
    if (found < 0).all():
        return in_order
    if found.min() < 0 or found.max() >= n_groups:
        raise _broken(told, f"`{told.name}` names groups that have no scale")
    return found


def _bytes(files: Reader, tensor: TensorHeader) -> Bytes:
    raw = np.empty(tensor.n_bytes, np.uint8)
    files.read(tensor, 0, raw.data)
    return raw


def _floats(files: Reader, tensor: TensorHeader) -> Floats:
    return widen(_bytes(files, tensor), FORMATS[tensor.dtype], tensor.n_elements)


def _integers(files: Reader, tensor: TensorHeader) -> list[int]:
    held = _bytes(files, tensor)
    return [int(n) for n in held.view("<i8" if tensor.dtype == "I64" else "<i4")]


def _broken(tensor: TensorHeader, problem: str) -> BrokenCheckpointError:
    remedy = "Use an intact copy, or the model that it was quantised from."
    return BrokenCheckpointError(tensor.shard, problem, remedy)


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
    scales = widen(raw.reshape(-1), FORMATS[stored.scale.dtype], raw.size // width)
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


N_HELD = 32  # tensors whose factors are kept: more than there are threads at work


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

    def _piece(self, name: str, adapted: Adapted, first: int, n: int) -> Floats:
        """Elements [first, first + n)."""
        values = self._start(adapted, first, n)
        if adapted.update:
            factors = self._factors(name, adapted, adapted.update)
            self._update(adapted.update, factors, first, values)
            if factors.lengths is not None:
                n_columns, axis = factors.right.shape[1], int(adapted.update.transposed)
                with np.errstate(invalid="ignore"):  # told as what is not finite
                    values *= factors.lengths[_adapted_rows(first, n, n_columns, axis)]
        return values

    def _start(self, adapted: Adapted, first: int, n: int) -> Floats:
        """What an update starts from: the base's elements, or those that were saved instead."""
        if adapted.saved:
            return floats(self._own, adapted.saved, first, n)
        return floats(self._base, adapted.base, first, n)

    def _update(self, update: LowRank, factors: Factors, first: int, values: Floats) -> None:
        scale = np.float32(update.scale)
        add_low_rank(values, first, factors.left, factors.right, scale)

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
            lines = _adapted_rows(first, len(values), n_columns, axis)
            np.add.at(squares, lines, np.square(values, dtype=np.float64))  # in their order
        return np.sqrt(squares).astype(np.float32)


def floats(reader: Reader, tensor: TensorHeader, first: int, n: int) -> Floats:
    """Elements [first, first + n) of a tensor, as float32."""
    width = WIDTHS[tensor.dtype]
    raw = np.empty(n * width, np.uint8)
    reader.read(tensor, first * width, raw.data)
    return widen(raw, FORMATS[tensor.dtype], n)


def _adapted_rows(first: int, n: int, n_columns: int, axis: int) -> npt.NDArray[np.int64]:
    """The row, or for axis 1 the column, of each of n elements of a matrix."""
    places = np.arange(first, first + n)
    return places % n_columns if axis else places // n_columns
