"""Raw bf16, fp16 and fp32 to float32 and back; quantised matrices; low-rank updates.

The bits result from integer arithmetic and single exact operations, so all machines give the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from lewis_hub.kernels.calls import ABSOLUTE, BF16, EXPONENT, F16, F32, Floats, Halves
from lewis_hub.kernels.compiler import ADDRESS, INTEGER, entry, loop, prefetch

U16, U32 = np.uint16, np.uint32
UP_112 = np.float32(2.0**112)  # the difference of the exponents' biases
HALF = np.float32(0.5)
LINE_BYTES = 64  # of the cache
ROWS_TOGETHER = 4  # of the right factor of a low-rank update


@loop
def bits_of(value: np.float32) -> np.uint32:
    """The bits of a float32."""
    bits: np.uint32 = np.float32(value).view(np.uint32)
    return bits


@loop
def float_of(bits: np.uint32) -> np.float32:
    """The float32 with these bits."""
    value: np.float32 = np.uint32(bits).view(np.float32)
    return value


@loop
def size_of(value: np.float32) -> np.uint32:
    """The magnitude of a float32: its bits without the sign, in the order of the numbers."""
    return U32(bits_of(value) & U32(ABSOLUTE))


@loop
def views_of(raw: Any, kind: int, first: int, n: int) -> tuple[Halves, Floats]:
    """Elements [first, first + n) of raw bytes as 16-bit and as 32-bit items, for `value_at`.

    The items behind them are loaded into the cache meanwhile: the processor's own prefetching stops
    when the sources take turns.
    """
    width = 4 if kind == F32 else 2
    for i in range(0, n * width, LINE_BYTES):
        prefetch(raw, (first + n) * width + i)
    return carray(raw, first + n, np.uint16)[first:], carray(raw, first + n, np.float32)[first:]


@loop
def value_at(views: tuple[Halves, Floats], kind: int, i: int) -> np.float32:
    """Return an element as float32. LLVM compiles a loop over it once for each format."""
    if kind == BF16:
        return float_of(U32(views[0][i]) << U32(16))
    if kind == F16:
        half = U32(views[0][i])
        size = U32(half & U32(0x7FFF))
        scaled = float_of(size << U32(13)) * UP_112
        # in NaN and infinity, all bits of the exponent are set in both formats
        odd = U32(EXPONENT) if size >= U32(0x7C00) else U32(0)
        return float_of(U32(bits_of(scaled) | odd) | U32(U32(half & U32(0x8000)) << U32(16)))
    value: np.float32 = views[1][i]
    return value


@loop
def widen(raw: Any, kind: int, first: int, values: Floats) -> np.uint32:
    """Read elements [first, first + n) of raw bytes as float32; returns the largest magnitude."""
    views, largest = views_of(raw, kind, first, values.size), U32(0)
    for i in range(values.size):
        values[i] = value_at(views, kind, i)
        largest = max(largest, size_of(values[i]))
    return largest


@loop
def narrow(values: Floats, kind: int, out: Any, first: int) -> np.uint32:
    """Write float32 as elements [first, first + n) of a format, rounding to nearest even.

    Returns:
        Bits that reach EXPONENT where a value is not finite, before or after.
    """
    n = values.size
    largest = U32(0)
    if kind == BF16:
        halves = carray(out, first + n, np.uint16)[first:]
        for i in range(n):
            bits = bits_of(values[i])
            rounded = U32(
                U32(bits & U32(ABSOLUTE)) + U32(U32(U32(bits >> U32(16)) & U32(1)) + U32(0x7FFF))
            )
            halves[i] = U16(U32(rounded >> U32(16)) | U32(U32(bits >> U32(16)) & U32(0x8000)))
            largest = max(largest, rounded)
    elif kind == F16:
        halves = carray(out, first + n, np.uint16)[first:]
        for i in range(n):
            bits = bits_of(values[i])
            half = to_half(U32(bits & U32(ABSOLUTE)))
            halves[i] = U16(half | U32(U32(bits >> U32(16)) & U32(0x8000)))
            largest = max(largest, half)
        largest = U32(EXPONENT) if largest >= U32(0x7C00) else U32(0)
    else:
        floats = carray(out, first + n, np.float32)[first:]
        for i in range(n):
            floats[i] = values[i]
            largest = max(largest, size_of(values[i]))
    return largest


@loop
def to_half(size: np.uint32) -> np.uint32:
    """The bits of a magnitude as those of the nearest fp16; infinity from 65520 on."""
    even = U32(U32(U32(size >> U32(13)) & U32(1)) + U32(0xFFF))
    normal = U32(U32(U32(size - U32(0x38000000)) + even) >> U32(13))
    # adding 0.5 rounds a denormal to the last bit of 0.5
    tiny = U32(bits_of(float_of(size) + HALF) - bits_of(HALF))
    rounded = tiny if size < U32(0x38800000) else normal
    return U32(0x7C00) if size >= U32(0x477FF000) else rounded


@entry(ADDRESS, INTEGER, INTEGER, ADDRESS)
def widen_array(raw: Any, kind: int, n: int, values: Any) -> int:
    """Read n elements as float32."""
    widen(raw, kind, 0, carray(values, n, np.float32))
    return 0


@entry(ADDRESS, INTEGER, INTEGER, ADDRESS)
def narrow_array(values: Any, n: int, kind: int, out: Any) -> int:
    """Write n float32 values in a format."""
    narrow(carray(values, n, np.float32), kind, out, 0)
    return 0


@entry(ADDRESS, *[INTEGER] * 5, *[ADDRESS] * 5)
def scale_up(  # noqa: PLR0913
    codes: Any,
    n: int,
    first: int,
    n_columns: int,
    block_rows: int,
    n_across: int,
    table: Any,
    groups: Any,
    scales: Any,
    zeros: Any,
    values: Any,
) -> int:
    """Read codes of a quantised matrix as float32; the arguments are those of `calls.scale_up`."""
    codes, values = carray(codes, n, np.uint8), carray(values, n, np.float32)
    table, groups = carray(table, 256, np.float32), carray(groups, n_columns, np.int32)
    n_blocks = ((first + n) // n_columns // block_rows + 1) * n_across
    scales, zeros = carray(scales, n_blocks, np.float32), carray(zeros, n_blocks, np.float32)
    done = 0
    while done < n:  # row by row, or the part of a row that belongs to the piece
        row, column = (first + done) // n_columns, (first + done) % n_columns
        down = row // block_rows * n_across
        stop = min(n, done + n_columns - column)
        for i in range(done, stop):
            group = down + groups[column + i - done]
            values[i] = (table[codes[i]] - zeros[group]) * scales[group]
        done = stop
    return 0


@entry(ADDRESS, INTEGER, INTEGER, INTEGER, INTEGER, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
def add_low_rank(  # noqa: PLR0913
    values: Any,
    n: int,
    first: int,
    n_columns: int,
    rank: int,
    left: Any,
    right: Any,
    scale: Any,
    sums: Any,
) -> int:
    """Add scale * left @ right to a piece of a matrix; the arguments are those of `calls`.

    Each element is summed over the rank in order. So the bits depend neither on how the tensor is
    cut into pieces nor on the machine, as they would with a BLAS.
    """
    values, sums = carray(values, n, np.float32), carray(sums, n_columns, np.float32)
    left = carray(left, ((first + n) // n_columns + 1, rank), np.float32)
    right, scale = carray(right, (rank, n_columns), np.float32), carray(scale, 1, np.float32)[0]
    done = 0
    while done < n:  # row by row, or the part of a row that belongs to the piece
        row, column = (first + done) // n_columns, (first + done) % n_columns
        length = min(n - done, n_columns - column)
        for i in range(length):
            sums[i] = 0
        add_product(sums[:length], left[row], right, column)
        for i in range(length):
            values[done + i] += scale * sums[i]
        done += length
    return 0


@loop
def add_product(sums: Floats, left: Floats, right: Floats, column: int) -> None:
    """Add left @ right[:, column : column + n] to (n,); four terms at a time, in their order."""
    n, rank, k = sums.size, left.size, 0
    while k + ROWS_TOGETHER <= rank:
        f0, f1, f2, f3 = left[k], left[k + 1], left[k + 2], left[k + 3]
        r0, r1 = right[k][column : column + n], right[k + 1][column : column + n]
        r2, r3 = right[k + 2][column : column + n], right[k + 3][column : column + n]
        for i in range(n):
            sums[i] = (((sums[i] + f0 * r0[i]) + f1 * r1[i]) + f2 * r2[i]) + f3 * r3[i]
        k += ROWS_TOGETHER
    while k < rank:
        f0, r0 = left[k], right[k][column : column + n]
        for i in range(n):
            sums[i] = sums[i] + f0 * r0[i]
        k += 1
