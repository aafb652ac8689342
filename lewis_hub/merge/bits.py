"""Floats as bits, compiled: raw bf16, fp16 and fp32 to float32 and back, rounding to even once.

Works on blocks of a few thousand elements that stay in the first-level cache. What decides a
bit is integer arithmetic or a single exact operation, so every machine gives the same.

numba's cache on disk notices a change of `kernels.py` only: after a change here, touch that file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lewis_hub.merge.operands import BF16, F16

ABSOLUTE = np.uint32(0x7FFFFFFF)
EXPONENT = np.uint32(0x7F800000)


def compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call, without the interpreter's lock, and keep it on disk.

    Where no folder for that can be written, it is compiled anew in every process.
    """
    options = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba: no locator available
        return njit(**options)(function)


def inner(function: Callable[..., Any]) -> Any:
    """Compile as a part of the compiled functions that call it; Python cannot."""
    wrappers = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return njit(nogil=True, error_model="numpy", **wrappers)(function)


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


def _place(context: Any, builder: Any, signature: Any, arguments: Any, width: int) -> Any:
    """The address of the i-th element of `width` bits in an array of bytes."""
    array = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
    elements = builder.bitcast(array.data, ir.IntType(width).as_pointer())
    return builder.gep(elements, [arguments[1]])


def _loading(width: int) -> Any:
    def load(_typing: Any, raw: Any, _i: Any) -> Any:
        """The i-th element of an array of bytes; the caller stays inside."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            found = builder.load(_place(context, builder, signature, arguments, width), align=2)
            return builder.zext(found, ir.IntType(32)) if width < 32 else found

        return types.uint32(raw, types.int64), generate

    return intrinsic(load)


def _storing(width: int) -> Any:
    def store(_typing: Any, raw: Any, _i: Any, _bits: Any) -> Any:
        """Write the i-th element of an array of bytes; the caller stays inside."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            bits = arguments[2]
            written = builder.trunc(bits, ir.IntType(width)) if width < 32 else bits
            place = _place(context, builder, signature, arguments, width)
            builder.store(written, place, align=2)
            return context.get_dummy_value()

        return types.void(raw, types.int64, types.uint32), generate

    return intrinsic(store)


load16, load32, store16, store32 = _loading(16), _loading(32), _storing(16), _storing(32)


@inner
def widen(raw: Any, kind: int, first: int, n: int, into: Any) -> bool:
    """Read elements [first, first + n) of raw bytes as float32; whether all are finite."""
    odd = np.uint32(0)
    if kind == BF16:
        for i in range(n):
            bits = load16(raw, first + i) << np.uint32(16)
            odd |= np.uint32((bits & EXPONENT) == EXPONENT)
            into[i] = as_float(bits)
    elif kind == F16:
        scale = as_float(np.uint32(0x77800000))  # 2**112 moves the exponent, also of denormals
        for i in range(n):
            half = load16(raw, first + i)
            magnitude = half & np.uint32(0x7FFF)
            odd |= np.uint32(magnitude >= np.uint32(0x7C00))
            scaled = as_float(magnitude << np.uint32(13)) * scale
            into[i] = as_float(as_bits(scaled) | ((half & np.uint32(0x8000)) << np.uint32(16)))
    else:
        for i in range(n):
            bits = load32(raw, first + i)
            odd |= np.uint32((bits & EXPONENT) == EXPONENT)
            into[i] = as_float(bits)
    return bool(odd == np.uint32(0))


@inner
def to_half(bits: Any) -> Any:
    """A float32's bits as those of the nearest fp16; infinity from 65520 on."""
    half = np.float32(0.5)  # adding it rounds a denormal in the last place of 0.5
    magnitude = bits & ABSOLUTE
    even = np.uint32(0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))
    normal = (magnitude - np.uint32(0x38000000) + even) >> np.uint32(13)
    tiny = as_bits(as_float(magnitude) + half) - as_bits(half)
    rounded = tiny if magnitude < np.uint32(0x38800000) else normal
    rounded = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else rounded
    return rounded | ((bits >> np.uint32(16)) & np.uint32(0x8000))


@inner
def narrow(values: Any, n: int, kind: int, raw: Any, first: int) -> bool:
    """Write n float32 values as raw bytes, rounding to nearest even; whether all are finite."""
    odd = np.uint32(0)
    if kind == BF16:
        for i in range(n):
            bits = as_bits(values[i])
            even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            rounded = (bits + even) >> np.uint32(16)
            odd |= np.uint32((bits & EXPONENT) == EXPONENT)
            odd |= np.uint32((rounded & np.uint32(0x7F80)) == np.uint32(0x7F80))
            store16(raw, first + i, rounded)
    elif kind == F16:
        for i in range(n):
            rounded = to_half(as_bits(values[i]))
            odd |= np.uint32((rounded & np.uint32(0x7C00)) == np.uint32(0x7C00))
            store16(raw, first + i, rounded)
    else:
        for i in range(n):
            bits = as_bits(values[i])
            odd |= np.uint32((bits & EXPONENT) == EXPONENT)
            store32(raw, first + i, bits)
    return bool(odd == np.uint32(0))
