"""Floats as bits, compiled: raw bf16, fp16 and fp32 to float32 and back, rounding to even once.

Works on blocks of a few thousand elements that stay in the first-level cache. Integer arithmetic
only, so that every machine gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

BF16, F16, F32 = 0, 1, 2
FORMATS = {"BF16": BF16, "F16": F16, "F32": F32}  # safetensors' names

ABSOLUTE = np.uint32(0x7FFFFFFF)
SIGN = np.uint32(0x80000000)
EXPONENT = np.uint32(0x7F800000)


def compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call, without the interpreter's lock, and keep it on disk.

    Where no folder for that can be written, it is compiled anew in every process.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba: no locator available
        return njit(**options)(function)


@intrinsic  # type: ignore[untyped-decorator]
def as_bits(_typing: Any, _value: Any) -> Any:
    """The bits of a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def as_float(_typing: Any, _bits: Any) -> Any:
    """The float32 that has these bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@compiled
def widen(raw: Any, kind: int, first: int, n: int, into: Any) -> bool:
    """Read elements [first, first + n) of raw bytes as float32; whether all are finite."""
    odd = np.uint32(0)
    if kind == BF16:
        halves = raw.view(np.uint16)[first : first + n]
        for i in range(n):
            bits = np.uint32(halves[i]) << np.uint32(16)
            odd |= np.uint32((bits & EXPONENT) == EXPONENT)
            into[i] = as_float(bits)
    elif kind == F16:
        halves = raw.view(np.uint16)[first : first + n]
        scale = as_float(np.uint32(0x77800000))  # 2**112 moves the exponent, also of denormals
        for i in range(n):
            half = np.uint32(halves[i])
            magnitude = half & np.uint32(0x7FFF)
            odd |= np.uint32(magnitude >= np.uint32(0x7C00))
            scaled = as_float(magnitude << np.uint32(13)) * scale
            sign = (half & np.uint32(0x8000)) << np.uint32(16)
            into[i] = as_float(as_bits(scaled) | sign)
    else:
        words = raw.view(np.uint32)[first : first + n]
        for i in range(n):
            bits = words[i]
            odd |= np.uint32((bits & EXPONENT) == EXPONENT)
            into[i] = as_float(bits)
    return bool(odd == np.uint32(0))


@compiled
def narrow(values: Any, n: int, kind: int, raw: Any, first: int) -> bool:
    """Write n float32 values as raw bytes, rounding to nearest even; whether all are finite."""
    odd = np.uint32(0)
    if kind == BF16:
        halves = raw.view(np.uint16)[first : first + n]
        for i in range(n):
            bits = as_bits(values[i])
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> (
                np.uint32(16)
            )
            odd |= np.uint32((rounded & np.uint32(0x7F80)) == np.uint32(0x7F80))
            halves[i] = np.uint16(rounded)
    elif kind == F16:
        halves = raw.view(np.uint16)[first : first + n]
        half = np.float32(0.5)  # adding it rounds a denormal in the last place of 0.5
        for i in range(n):
            bits = as_bits(values[i])
            magnitude = bits & ABSOLUTE
            even = np.uint32(0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))
            normal = (magnitude - np.uint32(0x38000000) + even) >> np.uint32(13)
            tiny = as_bits(as_float(magnitude) + half) - as_bits(half)
            rounded = tiny if magnitude < np.uint32(0x38800000) else normal
            too_large = magnitude >= np.uint32(0x477FF000)
            odd |= np.uint32(too_large)
            rounded = np.uint32(0x7C00) if too_large else rounded
            sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
            halves[i] = np.uint16(rounded | sign)
    else:
        words = raw.view(np.uint32)[first : first + n]
        for i in range(n):
            bits = as_bits(values[i])
            odd |= np.uint32((bits & EXPONENT) == EXPONENT)
            words[i] = bits
    return bool(odd == np.uint32(0))
