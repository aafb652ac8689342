"""What the codes of a quantised tensor stand for, from the small tensors beside it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.codes import FourBit, Scaled
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Reader
from lewis_hub.errors import BrokenCheckpointError
from lewis_hub.merge.operands import FORMATS, Decoding
from lewis_hub.merge.plain import widened

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
        problem = f"`{scaled.measure.name}` says {said}, its bytes are of {list(tensor.shape)}"
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
    found: Any = widened(_bytes(files, tensor), FORMATS[tensor.dtype], tensor.n_elements)
    return np.ascontiguousarray(found)


def _integers(files: Reader, tensor: TensorHeader) -> list[int]:
    held = _bytes(files, tensor)
    return [int(n) for n in held.view("<i8" if tensor.dtype == "I64" else "<i4")]


def _broken(tensor: TensorHeader, problem: str) -> BrokenCheckpointError:
    remedy = "Use an intact copy, or the model that it was quantised from."
    return BrokenCheckpointError(tensor.shard, problem, remedy)
