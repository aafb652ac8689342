"""The header of one safetensors file: where each tensor lies. Files may be hostile."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from lewis_hub.errors import BrokenCheckpointError

if TYPE_CHECKING:
    import torch


ReadRange = Callable[[str, int, int], bytes]  # (file, start, stop) -> its bytes [start, stop)

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
FIRST_READ_BYTES = 64 * 1024  # most headers fit, so that a remote file takes one request

WIDTHS = {  # bytes of an element
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
MERGEABLE = ("BF16", "F16", "F32")
COPIED = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies; `start` counts from the first byte of the file `shard`.

    A tensor that an adapter changes lies nowhere: `adapted` says what its bytes are made of. Nor
    does a quantised one: there `scaled` says it.
    """

    name: str
    dtype: str  # as safetensors writes it: BF16, F16, F32, I64, ...
    shape: tuple[int, ...]
    shard: str
    start: int
    n_bytes: int
    adapted: Adapted | None = None
    scaled: Scaled | FourBit | Transposed | None = None

    @property
    def n_elements(self) -> int:
        """The number of elements: 1 for a 0-d tensor."""
        return prod(self.shape)

    @property
    def is_computed(self) -> bool:
        """Whether it is made as it is read, and lies in no file as it is."""
        return bool(self.adapted or self.scaled)

    @property
    def kept_dtype(self) -> str:
        """What it is written as where nobody asks for another dtype."""
        if self.adapted:
            return self.adapted.base.kept_dtype
        return "BF16" if self.scaled else self.dtype


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to a matrix: `scale` times b @ a.

    Attributes:
        a: (rank, in), in the adapter's file; of an embedding (rank, vocabulary).
        b: (out, rank), there too.
        transposed: whether the matrix lies as (in, out), as in embeddings and GPT-2's Conv1D.
        magnitude: (out,) lengths that DoRA gives to the result; None: it keeps its own.
    """

    a: TensorHeader
    b: TensorHeader
    scale: float
    transposed: bool
    magnitude: TensorHeader | None


@dataclass(frozen=True)
class Adapted:
    """How an adapter changes one tensor of its base.

    Attributes:
        base: the tensor in the base.
        saved: the tensor in the adapter's file that takes its place; None: the base's stays.
        update: what is added then; None: nothing.
    """

    base: TensorHeader
    saved: TensorHeader | None
    update: LowRank | None

    @property
    def own(self) -> tuple[TensorHeader, ...]:
        """What of it lies in the adapter's file."""
        update = self.update
        parts = (update.a, update.b, update.magnitude) if update else ()
        return tuple(part for part in (self.saved, *parts) if part)


@dataclass(frozen=True)
class ShardHeader:
    """The tensors of one file in the order of their bytes."""

    tensors: tuple[TensorHeader, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class _File:
    """Where messages point to."""

    label: str
    path: str

    def broken(self, problem: str) -> BrokenCheckpointError:
        return BrokenCheckpointError(
            f"{self.label}: {self.path}",
            problem,
            "The file is damaged or was not written by safetensors: use an intact copy.",
        )


def read_header(label: str, path: str, n_bytes: int, read: ReadRange) -> ShardHeader:
    """Read and check the header of one safetensors file.

    Args:
        label: the source, for messages.
        path: the file within the source.
        n_bytes: of the whole file.
        read: called once, or twice where the header is long.

    Raises:
        BrokenCheckpointError: the header is too large, is not what safetensors writes, or its
            tensors do not tile the file.
    """
    file = _File(label, path)
    if n_bytes < 8:
        raise file.broken(f"it has {n_bytes} bytes, too few for a safetensors header")
    begin = read(path, 0, min(n_bytes, FIRST_READ_BYTES))
    (length,) = struct.unpack("<Q", begin[:8])
    if length > MAX_HEADER_BYTES:
        raise file.broken(
            f"its header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read"
        )
    if 8 + length > n_bytes:
        raise file.broken(
            f"it is cut short: the header ends at {8 + length}, the file at {n_bytes}"
        )
    text = begin[8 : 8 + length]
    if len(text) < length:
        text += read(path, len(begin), 8 + length)
    entries = _parse(file, text)
    metadata = _metadata(file, entries.pop("__metadata__", {}))
    tensors = tuple(_tensor(file, name, entry, 8 + length) for name, entry in entries.items())
    ordered = tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.n_bytes)))
    _require_tiling(file, ordered, 8 + length, n_bytes)
    return ShardHeader(ordered, metadata)


def _parse(file: _File, text: bytes) -> dict[str, Any]:
    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise file.broken(f"its header names `{key}` twice")
            found[key] = value
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise file.broken("its header is not JSON") from None
    if not isinstance(entries, dict):
        raise file.broken("its header is not a JSON object")
    return entries


def _metadata(file: _File, found: Any) -> Mapping[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise file.broken("its `__metadata__` is not a mapping of texts")
    return found


def _tensor(file: _File, name: str, entry: Any, data_start: int) -> TensorHeader:
    if not name.isprintable():
        raise file.broken(f"its header names a tensor {name!r}, which cannot be printed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise file.broken(f"`{name}` does not say exactly its dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        known = ", ".join(WIDTHS)
        raise file.broken(f"`{name}` has the unknown dtype {dtype!r}; known are {known}")
    if not _is_counts(shape):
        raise file.broken(f"`{name}` has the shape {shape!r}, which is no list of sizes")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise file.broken(f"`{name}` has the data_offsets {offsets!r}, which are no range")
    start, stop = offsets
    n_bytes = prod(shape) * WIDTHS[dtype]
    if stop - start != n_bytes:
        raise file.broken(
            f"`{name}` is {dtype} of shape {shape}, {n_bytes} bytes, "
            f"but its data_offsets span {stop - start}"
        )
    return TensorHeader(name, dtype, tuple(shape), file.path, data_start + start, n_bytes)


def _is_counts(found: Any) -> bool:
    counts = isinstance(found, list) and len(found) <= MAX_DIMENSIONS
    return counts and all(type(n) is int and 0 <= n < 2**63 for n in found)


def _require_tiling(
    file: _File, ordered: tuple[TensorHeader, ...], position: int, n_bytes: int
) -> None:
    before = "the header"
    for tensor in ordered:
        if tensor.start < position:
            raise file.broken(f"`{tensor.name}` overlaps {before}")
        if tensor.start > position:
            gap = tensor.start - position
            raise file.broken(f"{gap} bytes between {before} and `{tensor.name}` belong to nothing")
        position, before = tensor.start + tensor.n_bytes, f"`{tensor.name}`"
    if position > n_bytes:
        raise file.broken(f"it is cut short: {before} ends at {position}, the file at {n_bytes}")
    if position < n_bytes:
        raise file.broken(f"{n_bytes - position} bytes after {before} belong to nothing")


Codes = Literal["F8_E4M3", "I8", "I4", "INT8"]
Layout = Literal["GPTQ", "AWQ", "MXFP4"]


@dataclass(frozen=True)
class Scaled:
    """How a quantised tensor is stored: a value is its code, less the zero of its block, scaled.

    Attributes:
        stored: the codes, row by row. In words of 32 bits they are packed from the lowest bits
            on, and shifted so that none is negative.
        codes: what they are, also where they are packed; INT8 is in 127ths.
        scale: what they are multiplied by: one number a block, row by row.
        block: rows and columns of a block; the last ones may be smaller.
        zero: what is subtracted: one code a block, as the scales lie, or packed down the columns;
            None: nothing.
        groups: per column the number of its block; None, or all negative: in their order.
        measure: holds the shape; None: no tensor does.
    """

    stored: TensorHeader
    scale: TensorHeader
    block: tuple[int, int]
    codes: Codes = "F8_E4M3"
    zero: TensorHeader | None = None
    groups: TensorHeader | None = None
    measure: TensorHeader | None = None


@dataclass(frozen=True)
class Nested:
    """How the scales of `FourBit` are stored where they are quantised themselves, to 8 bits.

    Attributes:
        table: (256,) what a code stands for.
        scale: one number for every `n_a_block` of them.
        n_a_block: scales that share a scale.
        offset: added to each.
    """

    table: TensorHeader
    scale: TensorHeader
    n_a_block: int
    offset: float


@dataclass(frozen=True)
class FourBit:
    """How bitsandbytes stores a tensor: a table's entry times the scale of its block.

    Attributes:
        stored: the codes, two in a byte, the higher bits first.
        codes: what they are called.
        table: (16,) what a code stands for.
        scale: one number for every `n_a_block` elements, row by row.
        n_a_block: elements that share a scale.
        nested: how the scales are stored; None: as they are.
    """

    stored: TensorHeader
    codes: Literal["NF4", "FP4"]
    table: TensorHeader
    scale: TensorHeader
    n_a_block: int
    nested: Nested | None


@dataclass(frozen=True)
class Transposed:
    """How GPTQ, AWQ and MXFP4 store matrices: by columns of what they are read as.

    A value is its code, less the zero of its group, times the group's scale. A group is some of the
    columns of one row; of MXFP4 it is 32 rows of one column.

    Attributes:
        stored: the codes, of 4 bits from the lowest ones on. GPTQ: a word of 32 bits holds the next
            columns of one row. AWQ: it holds 8 rows of one column, those of even places first.
            MXFP4: a byte holds two rows of one column.
        codes: what they are called.
        layout: which of the three it is.
        scale: what values are multiplied by: of each group and row, or for MXFP4 powers of two of
            each column and 32 rows.
        zero: what is subtracted: of each group, as the scales lie, rows packed in words; None:
            nothing.
        offset: added to every zero; what is more than a code holds is carried into the word's next.
        groups: per column the number of its group; None: they are of equal size, in their order.
    """

    stored: TensorHeader
    codes: Literal["I4", "I8", "MXFP4"]
    layout: Layout
    scale: TensorHeader
    zero: TensorHeader | None = None
    offset: int = 0
    groups: TensorHeader | None = None


@cache
def torch_dtypes() -> Mapping[str, torch.dtype]:
    """All that both have; imports torch."""
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
    }
