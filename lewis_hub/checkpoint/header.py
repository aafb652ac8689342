"""The header of a safetensors file, and how each tensor of a checkpoint is stored."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from lewis_hub.documents import MAX_JSON_VALUES, MAX_TABLE_BYTES, count_values
from lewis_hub.errors import BrokenCheckpointError

if TYPE_CHECKING:
    import torch

ReadRange = Callable[[str, int, int], bytes]  # (file, start, stop) -> its bytes [start, stop)
Codes = Literal["F8_E4M3", "I8", "I4", "INT8"]
Layout = Literal["GPTQ", "AWQ", "MXFP4"]

MAX_DIMENSIONS = 64
MAX_SHOWN = 100  # letters
MAX_NAME = 1000  # characters: some work on a name grows with the square of its length
MAX_EMPTY = 1 << 20  # of a dimension of a tensor without values
LARGE_HEADER_BYTES = 4 << 20  # larger ones are parsed one at a time, since each takes much memory
LARGE_HEADER = threading.Lock()
FIRST_READ_BYTES = 64 * 1024  # most headers fit, so that a remote file takes one request

WIDTHS = {  # bytes of an element
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
MERGEABLE = ("BF16", "F16", "F32")
NO_FILE = ""  # in place of the file of a tensor that is not stored
COPIED = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")


@dataclass(frozen=True)
class TensorHeader:
    """Name, dtype, shape and position of a tensor.

    A tensor that an adapter changes, or that is quantised, is computed while it is read: then
    `adapted` or `scaled` name the stored tensors that it is computed from. Then `permuted` applies.
    """

    name: str
    dtype: str  # as safetensors writes it: BF16, F16, F32, I64, ...
    shape: tuple[int, ...]
    shard: str  # the file
    start: int  # offset of the first byte from the beginning of the file
    n_bytes: int
    adapted: Adapted | None = None
    scaled: Scaled | FourBit | Transposed | None = None
    permuted: Permuted | None = None

    @property
    def n_elements(self) -> int:
        """The number of elements: 1 for a 0-d tensor."""
        return prod(self.shape)

    @property
    def is_computed(self) -> bool:
        """Whether its values are computed while it is read."""
        return bool(self.adapted or self.scaled or self.permuted)

    @property
    def kept_dtype(self) -> str:
        """The dtype that it is written in if the recipe names none."""
        if self.adapted:
            return self.adapted.base.kept_dtype
        return "BF16" if self.scaled else self.dtype


@dataclass(frozen=True)
class Permuted:
    """The order in which rows and columns are read; None: as they are stored.

    Entry i is the number of the stored row or column that is read in place i. A vector is one row.
    """

    rows: bytes | None  # little-endian int32
    columns: bytes | None


@dataclass(frozen=True)
class LowRank:
    """The update that a LoRA adds to a matrix: `scale` times b @ a."""

    a: TensorHeader  # (rank, in), in the adapter's file; of an embedding (rank, vocab_size)
    b: TensorHeader  # (out, rank), in the same file
    scale: float
    transposed: bool  # whether the matrix is (in, out), as embeddings and GPT-2's Conv1D are
    magnitude: TensorHeader | None  # DoRA's (out,) norms of the updated rows


@dataclass(frozen=True)
class Fitted:
    """Where the rows and columns of a tensor go in one of another size; None: where they are.

    Entry i is the place of stored row or column i, or -1. A vector is one row.
    """

    rows: bytes | None  # little-endian int32
    columns: bytes | None
    scale: float  # of all values


@dataclass(frozen=True)
class Adapted:
    """How an adapter, or a model of another depth or width, changes one tensor of its base."""

    base: TensorHeader
    saved: TensorHeader | None  # of its own file, replaces the base's tensor; NO_FILE: zeros
    update: LowRank | None  # added afterwards
    fitted: Fitted | None = None  # of a `saved` of another size: the other entries are the base's

    @property
    def own(self) -> tuple[TensorHeader, ...]:
        """The stored tensors in the adapter's file."""
        update = self.update
        parts = (update.a, update.b, update.magnitude) if update else ()
        return tuple(part for part in (self.saved, *parts) if part and part.shard != NO_FILE)


@dataclass(frozen=True)
class Scaled:
    """A tensor of codes with block scales: value = (code - zero) * scale.

    Codes in 32-bit words are packed from the lowest bits up, with an offset that makes all of them
    non-negative. INT8 counts in 127ths.
    """

    stored: TensorHeader  # the codes, row by row
    scale: TensorHeader  # one number a block, row by row
    block: tuple[int, int]  # rows and columns of a block; the last blocks may be smaller
    codes: Codes = "F8_E4M3"  # their type, also where they are packed
    zero: TensorHeader | None = None  # one code a block, as the scales or packed down the columns
    groups: TensorHeader | None = None  # the group number of each column; all negative: in order
    measure: TensorHeader | None = None  # holds the shape


@dataclass(frozen=True)
class Nested:
    """How bitsandbytes' double quantisation stores the scales of `FourBit` in 8 bits."""

    table: TensorHeader  # (256,) value of each code
    scale: TensorHeader  # one number for every `n_a_block` of them
    n_a_block: int  # scales that share a scale
    offset: float  # added to each


@dataclass(frozen=True)
class FourBit:
    """A tensor in 4 bits of bitsandbytes: value = table[code] * scale of its block."""

    stored: TensorHeader  # the codes, two in a byte, the higher bits first
    codes: Literal["NF4", "FP4"]
    table: TensorHeader  # (16,) value of each code
    scale: TensorHeader  # one number for every `n_a_block` elements, row by row
    n_a_block: int  # elements that share a scale
    nested: Nested | None  # how the scales are quantised; None: they are floats


@dataclass(frozen=True)
class Transposed:
    """A matrix of GPTQ, AWQ or MXFP4, which store it by columns: value = (code - zero) * scale.

    A group, whose values share a scale and a zero, is some columns of one row; for MXFP4 it is
    32 rows of one column. Codes are packed from the lowest bits up. GPTQ: a 32-bit word holds the
    next columns of one row. AWQ: a word holds 8 rows of one column, those with even numbers first.
    MXFP4: a byte holds two rows of one column.
    """

    stored: TensorHeader  # the codes
    codes: Literal["I4", "I8", "MXFP4"]
    layout: Layout
    scale: TensorHeader  # of each group and row; for MXFP4 powers of two
    zero: TensorHeader | None = None  # of each group, as the scales, its rows packed in words
    offset: int = 0  # added to every zero; an overflow carries into the next code of the word
    groups: TensorHeader | None = None  # of each column; None: groups of equal size, in order


@dataclass(frozen=True)
class _File:
    """A file that is being read, as messages name it."""

    label: str
    path: str

    def broken(self, problem: str) -> BrokenCheckpointError:
        remedy = "The file is damaged or was not written by safetensors: use an intact copy."
        return BrokenCheckpointError(f"{self.label}: {self.path}", problem, remedy)


def read_header(label: str, path: str, n_bytes: int, read: ReadRange) -> tuple[TensorHeader, ...]:
    """Read and check the header of one safetensors file of `n_bytes`, which may be hostile.

    The tensors are in the order of their bytes. `read` is called once, or twice if the header is
    long. A BrokenCheckpointError says that the header is too large, is not in the safetensors
    format, or that its tensors do not tile the file.
    """
    file = _File(label, path)
    if n_bytes < 8:
        raise file.broken(f"it has {n_bytes} bytes, too few for a safetensors header")
    begin = read(path, 0, min(n_bytes, FIRST_READ_BYTES))
    if len(begin) < 8:
        raise file.broken("another process truncated it while it was read")
    (length,) = struct.unpack("<Q", begin[:8])
    if length > MAX_TABLE_BYTES:
        problem = f"its header claims {length:,} bytes; at most {MAX_TABLE_BYTES:,} are read"
        raise file.broken(problem)
    end = 8 + length
    if end > n_bytes:
        raise file.broken(
            f"it is truncated: the header ends at byte {end}, the file at byte {n_bytes}"
        )
    with LARGE_HEADER if length > LARGE_HEADER_BYTES else nullcontext():
        text = begin[8:end]
        if len(text) < length:
            text += read(path, len(begin), end)
        entries = _parse(file, text)
        tensors = [_tensor(file, name, entry, end) for name, entry in entries.items()]
    ordered = tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.n_bytes)))
    _require_tiling(file, ordered, end, n_bytes)
    return ordered


def _parse(file: _File, text: bytes) -> dict[str, Any]:
    """The entries of the tensors."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, value in pairs:
            if key in entries:
                raise file.broken(f"its header names `{key}` twice")
            entries[key] = value
        return entries

    if (n_values := count_values(text)) > MAX_JSON_VALUES:
        problem = f"its header has {n_values:,} values; at most {MAX_JSON_VALUES:,} are read"
        raise file.broken(problem)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise file.broken("its header is not JSON") from None
    if not isinstance(header, dict):
        raise file.broken("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise file.broken("its `__metadata__` is not a mapping from strings to strings")
    return header


def _tensor(file: _File, name: str, entry: object, data_start: int) -> TensorHeader:
    if not name.isprintable():
        raise file.broken(f"its header names a tensor {name!r}, which cannot be printed")
    if len(name) > MAX_NAME:
        problem = f"its header names a tensor of {len(name):,} characters, {name[:40]!r} and so on"
        raise file.broken(f"{problem}; at most {MAX_NAME:,} are read")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        problem = f"the entry of `{name}` must have exactly the keys dtype, shape and data_offsets"
        raise file.broken(problem)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        known = ", ".join(WIDTHS)
        raise file.broken(f"`{name}` has the unknown dtype {_shown(dtype)}; known are {known}")
    if not _are_sizes(shape):
        raise file.broken(f"`{name}` has the shape {_shown(shape)}, which is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        problem = f"`{name}` has the data_offsets {_shown(offsets)}, expected [start, stop]"
        raise file.broken(problem)
    start, stop = offsets
    n_bytes = prod(shape) * WIDTHS[dtype]
    if stop - start != n_bytes:
        raise file.broken(
            f"`{name}` is {dtype} of shape {shape}, {n_bytes} bytes, "
            f"but its data_offsets span {stop - start}"
        )
    if not n_bytes and max(shape, default=0) > MAX_EMPTY:
        raise file.broken(f"`{name}` has the shape {shape}, but no values")
    return TensorHeader(name, dtype, tuple(shape), file.path, data_start + start, n_bytes)


def _shown(value: object) -> str:
    """A value of the header as text, which may be as long as the header."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} and so on"


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(n) is int and 0 <= n < 2**63 for n in value)


def _require_tiling(
    file: _File, ordered: tuple[TensorHeader, ...], position: int, n_bytes: int
) -> None:
    before = "the header"
    for tensor in ordered:
        if tensor.start < position:
            raise file.broken(f"`{tensor.name}` overlaps {before}")
        if tensor.start > position:
            between = f"{tensor.start - position} bytes between {before} and `{tensor.name}`"
            raise file.broken(f"{between} belong to no tensor")
        position, before = tensor.start + tensor.n_bytes, f"`{tensor.name}`"
    if position > n_bytes:
        raise file.broken(
            f"it is truncated: {before} ends at byte {position}, the file at byte {n_bytes}"
        )
    if position < n_bytes:
        raise file.broken(f"{n_bytes - position} bytes after {before} belong to no tensor")


@cache
def torch_dtypes() -> Mapping[str, torch.dtype]:
    """The dtypes that safetensors and torch share, by safetensors' names; imports torch."""
    import torch

    return {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
    }
