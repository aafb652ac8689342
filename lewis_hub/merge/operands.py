"""What the kernels are handed: pieces, what becomes of each expert, and how votes combine."""

from __future__ import annotations

from typing import Any, NamedTuple

BLOCK = 2048  # elements; even, because one random word serves two
LANES = 16  # elements worked on at once: one register of AVX-512, two of AVX, four of NEON
KEEP_ALL, KEEP_NONE, TRIM, DRAW, RANK = 0, 1, 2, 3, 4  # what becomes of an expert's task vector

BF16, F16, F32 = 0, 1, 2
FORMATS = {"BF16": BF16, "F16": F16, "F32": F32}  # safetensors' names

HIGH_BINS, LOW_BINS = 1 << 16, 1 << 15  # the 31 bits of a magnitude, in two steps
LOW_BITS, LOW_MASK = 15, LOW_BINS - 1
ABOVE, AT_HIGH, AT_LOW, INSIDE = 0, 1, 2, 3  # columns of a tally


class Decoding(NamedTuple):
    """What the codes of a quantised matrix stand for: (table[code] - zero) * scale."""

    table: Any  # (256,) float32: of each code
    n_rows: int  # that share a scale
    groups: Any  # (columns,) int32: per column, which of the scales across it has
    scales: Any  # (blocks down, blocks across) float32
    zeros: Any  # likewise


class Piece(NamedTuple):
    """A piece of a tensor: raw bytes of all sources, and room for the result."""

    raw: Any  # one a source, the base first: (bytes,) uint8
    kinds: Any  # (n_sources,) int64: values of FORMATS
    n: int  # elements
    first: int  # the piece's first element within the tensor; a multiple of `block`
    block: int  # elements that are worked on together: BLOCK, or a row where ranks are asked for
    out: Any  # (bytes,) uint8, written: with room for LANES more elements
    out_kind: int


class Table(NamedTuple):
    """What RANK keeps, by expert and by rank within a row."""

    below: Any  # (n_experts, row) uint64: random halves below are kept
    factors: Any  # (n_experts, row) float32: what a kept entry is multiplied by


class Experts(NamedTuple):
    """What becomes of each expert's task vector; one value an expert."""

    modes: Any  # int64
    weights: Any  # float32
    thresholds: Any  # float32: magnitude of the smallest entry kept by TRIM
    ties: Any  # (n_experts, 3) int64: wanted, tied, remainder; the remainder is carried on
    streams: Any  # uint64: of DRAW and RANK
    below: Any  # uint64: random halves below are kept by DRAW
    factors: Any  # float32: rescaling of DRAW
    table: Table  # of RANK


class Mix(NamedTuple):
    """How the votes of all experts become one."""

    elects: bool
    normalize: bool
    divisor: Any  # float32: of all votes, where no sign is elected
    scale: Any  # float32: lambda
