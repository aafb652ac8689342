"""Floats as bits: raw bf16, fp16 and fp32 to float32 and back, rounding to even once.

What decides a bit is integer arithmetic or a single exact operation, so every machine gives the
same.
"""

from __future__ import annotations

from lewis_hub.merge.lanes import F32, U16, U32, Value
from lewis_hub.merge.loops import Code
from lewis_hub.merge.operands import BF16, F16, LANES

ABSOLUTE, EXPONENT = 0x7FFFFFFF, 0x7F800000
SIGN_OF_HALF = 0x8000
UP_112 = 0x77800000  # 2**112: moves the exponent of fp16 to where float32 has it
WIDTHS = {BF16: 2, F16: 2}  # bytes of an element; of the others 4


def width(kind: int) -> int:
    """Bytes of an element in a format."""
    return WIDTHS.get(kind, 4)


def widen(code: Code, address: Value, kind: int) -> Value:
    """LANES elements of a format, from an address on, as float32."""
    if kind == BF16:
        return (code.load(address, U16, LANES, 2).widened(U32) << 16).floats
    if kind == F16:
        half = code.load(address, U16, LANES, 2).widened(U32)
        scaled = ((half & 0x7FFF) << 13).floats * code.number(UP_112, U32).floats.everywhere()
        # all bits of the exponent are set in NaN and infinity, here and there
        odd = code.many(EXPONENT, U32).where((half & 0x7FFF) >= 0x7C00)
        return (scaled.bits | odd | ((half & SIGN_OF_HALF) << 16)).floats
    return code.load(address, F32, LANES, 2)


def magnitude(value: Value) -> Value:
    """The 31 bits of a float32 without its sign; their order is that of the numbers."""
    return value.bits & ABSOLUTE


def narrow(code: Code, value: Value, kind: int, address: Value) -> Value:
    """Write float32 values in a format, rounding to nearest even.

    Returns:
        Integers that reach `EXPONENT` where a value is not finite, before or after.
    """
    bits = value.bits
    size = bits & ABSOLUTE
    if kind == BF16:
        rounded = size + (((bits >> 16) & 1) + 0x7FFF)
        halves = (rounded >> 16) | ((bits >> 16) & SIGN_OF_HALF)
        code.store(halves.narrowed(U16), address, 2)
        return rounded
    if kind == F16:
        half = _to_half(code, size)
        code.store((half | ((bits >> 16) & SIGN_OF_HALF)).narrowed(U16), address, 2)
        return code.many(EXPONENT, U32).where(half >= 0x7C00)
    code.store(value, address, 2)
    return size


def _to_half(code: Code, size: Value) -> Value:
    """A magnitude's bits as those of the nearest fp16; infinity from 65520 on."""
    normal = (size - 0x38000000 + (((size >> 13) & 1) + 0xFFF)) >> 13
    one_half = code.many(0.5, F32)
    # adding it rounds a denormal in the last place of 0.5
    tiny = (size.floats + one_half).bits - one_half.bits
    rounded = tiny.where(size < 0x38800000, normal)
    return code.many(0x7C00, U32).where(size >= 0x477FF000, rounded)
