"""A small language for many numbers at once, written as LLVM's intermediate code.

A `Value` is a number, or LANES of them side by side; the operators of Python make the code that
computes them. Integers have no sign. What is written is what is done: nothing is fused or put in
another order, so every machine rounds alike.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lewis_hub.merge.operands import LANES

BIT, U16, U32, U64 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64)
BYTE, F32 = ir.IntType(8), ir.FloatType()


def lanes(kind: Any, n: int = LANES) -> Any:
    """The type of n numbers side by side."""
    return ir.VectorType(kind, n)


class Value:
    """What a piece of code computes: a number, a truth value, or LANES of either."""

    def __init__(self, builder: Any, raw: Any) -> None:
        self._builder, self.raw = builder, raw

    @property
    def kind(self) -> Any:
        """The type of one number of it."""
        return self.raw.type.element if isinstance(self.raw.type, ir.VectorType) else self.raw.type

    def __add__(self, other: Any) -> Value:
        return self._either("fadd", "add", other)

    def __sub__(self, other: Any) -> Value:
        return self._either("fsub", "sub", other)

    def __mul__(self, other: Any) -> Value:
        return self._either("fmul", "mul", other)

    def __truediv__(self, other: Any) -> Value:
        return self._either("fdiv", "udiv", other)

    def __mod__(self, other: Any) -> Value:
        return self._either("", "urem", other)

    def __and__(self, other: Any) -> Value:
        return self._either("", "and_", other)

    def __or__(self, other: Any) -> Value:
        return self._either("", "or_", other)

    def __xor__(self, other: Any) -> Value:
        return self._either("", "xor", other)

    def __lshift__(self, other: Any) -> Value:
        return self._either("", "shl", other)

    def __rshift__(self, other: Any) -> Value:
        return self._either("", "lshr", other)

    def __lt__(self, other: Any) -> Value:
        return self._compared("<", other)

    def __le__(self, other: Any) -> Value:
        return self._compared("<=", other)

    def __gt__(self, other: Any) -> Value:
        return self._compared(">", other)

    def __ge__(self, other: Any) -> Value:
        return self._compared(">=", other)

    def equals(self, other: Any) -> Value:
        """Whether both are equal; no NaN is."""
        return self._compared("==", other)

    def differs(self, other: Any) -> Value:
        """Whether they differ; no NaN does."""
        return self._compared("!=", other)

    def where(self, chosen: Value, otherwise: Any = 0) -> Value:
        """These numbers where chosen, else the others."""
        other = self._like(otherwise)
        return self._made(self._builder.select(chosen.raw, self.raw, other))

    def largest(self, other: Value) -> Value:
        """The larger of two integers."""
        return self.where(self > other, other)

    def smallest(self, other: Value) -> Value:
        """The smaller of two integers."""
        return self.where(self < other, other)

    @property
    def bits(self) -> Value:
        """A float32 as the integer that has its bits."""
        return self._cast("bitcast", U32)

    @property
    def floats(self) -> Value:
        """An integer as the float32 that has its bits."""
        return self._cast("bitcast", F32)

    def widened(self, kind: Any) -> Value:
        """An integer in a wider type."""
        return self._cast("zext", kind)

    def narrowed(self, kind: Any) -> Value:
        """The low bits of an integer."""
        return self._cast("trunc", kind)

    def regrouped(self, kind: Any, n: int) -> Value:
        """The same bits as n numbers of another type, the low ones first."""
        return self._made(self._builder.bitcast(self.raw, lanes(kind, n)))

    @property
    def packed(self) -> Value:
        """LANES truth values as the bits of one number, the first the lowest."""
        found = self._builder.bitcast(self.raw, ir.IntType(LANES))
        return self._made(self._builder.zext(found, U32))

    @property
    def unpacked(self) -> Value:
        """The low bits of a number as LANES truth values."""
        low = self._builder.trunc(self.raw, ir.IntType(LANES))
        return self._made(self._builder.bitcast(low, lanes(BIT)))

    @property
    def lowest_bit(self) -> Value:
        """The place of the lowest bit that is set; there is one."""
        return self._made(self._builder.cttz(self.raw, ir.Constant(BIT, 1)))

    @property
    def n_bits(self) -> Value:
        """How many bits are set."""
        return self._made(self._builder.ctpop(self.raw))

    def compressed(self, chosen: Value) -> Value:
        """The chosen lanes' numbers in the lowest lanes; what lies behind them is rubbish.

        On AVX-512 alone: see `loops.Code.store_chosen`.
        """
        kind, rubbish = self.raw.type, ir.Constant(self.raw.type, ir.Undefined)
        name = f"llvm.experimental.vector.compress.v{LANES}{self.kind.intrinsic_name}"
        signature = ir.FunctionType(kind, [kind, chosen.raw.type, kind])
        compress = self._builder.module.declare_intrinsic(name, fnty=signature)
        return self._made(self._builder.call(compress, [self.raw, chosen.raw, rubbish]))

    def everywhere(self, n: int = LANES) -> Value:
        """One number in all lanes."""
        empty = ir.Constant(lanes(self.raw.type, n), ir.Undefined)
        first = self._builder.insert_element(empty, self.raw, ir.Constant(U32, 0))
        zeros = ir.Constant(lanes(U32, n), [0] * n)
        return self._made(self._builder.shuffle_vector(first, empty, zeros))

    def moved_up(self, distance: int) -> Value:
        """Each number so many lanes further up; zeros follow it."""
        zeros = ir.Constant(self.raw.type, [0] * LANES)
        return self._shuffled([*range(LANES, LANES + distance), *range(LANES - distance)], zeros)

    @property
    def last_everywhere(self) -> Value:
        """The number of the last lane in all lanes."""
        return self._shuffled([LANES - 1] * LANES, ir.Constant(self.raw.type, ir.Undefined))

    def _shuffled(self, places: list[int], beside: Any) -> Value:
        order = ir.Constant(lanes(U32), places)
        return self._made(self._builder.shuffle_vector(self.raw, beside, order))

    def _either(self, of_floats: str, of_integers: str, other: Any) -> Value:
        name = of_floats if self.kind == F32 else of_integers
        return self._made(getattr(self._builder, name)(self.raw, self._like(other)))

    def _compared(self, sign: str, other: Any) -> Value:
        builder = self._builder
        compare = builder.fcmp_ordered if self.kind == F32 else builder.icmp_unsigned
        return self._made(compare(sign, self.raw, self._like(other)))

    def _like(self, other: Any) -> Any:
        return other.raw if isinstance(other, Value) else constant(self.raw.type, other)

    def _cast(self, name: str, kind: Any) -> Value:
        many = isinstance(self.raw.type, ir.VectorType)
        target = lanes(kind, self.raw.type.count) if many else kind
        return self._made(getattr(self._builder, name)(self.raw, target))

    def _made(self, raw: Any) -> Value:
        return Value(self._builder, raw)


def constant(kind: Any, number: Any) -> Any:
    """A number known beforehand, in every lane where the type has several."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [number] * kind.count)
    return ir.Constant(kind, number)


class Variable:
    """A value that changes as the code runs."""

    def __init__(self, builder: Any, place: Any) -> None:
        self._builder, self._place = builder, place

    @property
    def value(self) -> Value:
        """What it is now."""
        return Value(self._builder, self._builder.load(self._place))

    def set(self, value: Value) -> None:
        """Change it."""
        self._builder.store(value.raw, self._place)
