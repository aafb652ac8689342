"""A function that is being written in LLVM's intermediate code: variables, memory, loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from lewis_hub.merge.lanes import BIT, BYTE, U32, U64, Value, Variable, constant, lanes
from lewis_hub.merge.operands import LANES


class Code:
    """A function that is being written: it takes integers of 64 bits, and gives back one.

    Args:
        module: it becomes part of.
        name: of the function.
        arguments: their names.
        features: of the processor, as LLVM names them.
    """

    def __init__(
        self, module: Any, name: str, arguments: Sequence[str], features: frozenset[str]
    ) -> None:
        kind = ir.FunctionType(U64, [U64] * len(arguments))
        self._function = ir.Function(module, kind, name)
        self._entry = ir.IRBuilder(self._function.append_basic_block("variables"))
        self._builder = ir.IRBuilder(self._function.append_basic_block("begin"))
        self._begin = self._builder.block
        pairs = zip(arguments, self._function.args, strict=True)
        self._features = features
        self.arguments = {name: self._value(raw) for name, raw in pairs}

    def number(self, number: int, kind: Any = U64) -> Value:
        """An integer known beforehand."""
        return self._value(ir.Constant(kind, number))

    def many(self, numbers: Any, kind: Any) -> Value:
        """Numbers side by side: one each, or the same in all LANES."""
        several = isinstance(numbers, list)
        found = ir.Constant(lanes(kind, len(numbers)), numbers) if several else None
        return self._value(found or constant(lanes(kind), numbers))

    def variable(self, value: Value) -> Variable:
        """A variable, and what it is at first."""
        found = Variable(self._builder, self._entry.alloca(value.raw.type))
        found.set(value)
        return found

    def room(self, n_bytes: int) -> Value:
        """The address of some bytes that the function has to itself."""
        place = self._entry.alloca(ir.ArrayType(BYTE, n_bytes))
        place.align = 64
        return self._value(self._builder.ptrtoint(place, U64))

    def load(self, address: Value, kind: Any, n: int = 0, align: int = 0) -> Value:
        """A number at an address; n > 0: so many from there on. `align`: bytes, of one number."""
        width = kind.width // 8 if isinstance(kind, ir.IntType) else 4
        place = self._place(address, lanes(kind, n) if n else kind)
        return self._value(self._builder.load(place, align=align or width))

    def store(self, value: Value, address: Value, align: int = 0) -> None:
        """Write what `load` reads."""
        kind = value.kind
        width = kind.width // 8 if isinstance(kind, ir.IntType) else 4
        place = self._place(address, value.raw.type)
        self._builder.store(value.raw, place, align=align or width)

    def deposited(self, low: Value, places: Value) -> Value:
        """The low bits of a number of 32 bits, in order, at the bits that `places` has set."""
        if "bmi2" in self._features:
            signature = ir.FunctionType(U32, [U32, U32])
            name = "llvm.x86.bmi.pdep.32"
            deposit = self._builder.module.declare_intrinsic(name, fnty=signature)
            return self._value(self._builder.call(deposit, [low.raw, places.raw]))
        found, left = self.variable(self.number(0, U32)), self.variable(places)
        following = self.variable(low)
        with self.repeating() as leave:
            leave(left.value.equals(0))
            found.set(found.value | ((following.value & 1) << left.value.lowest_bit))
            following.set(following.value >> 1)
            left.set(left.value & (left.value - 1))
        return found.value

    def store_chosen(self, value: Value, chosen: Value, address: Value) -> None:
        """Write the chosen lanes next to each other; room for LANES is overwritten."""
        if "avx512f" in self._features:
            self.store(value.compressed(chosen), address)
            return
        # What LLVM makes of `compressed` elsewhere loses lanes on Arm.
        held = self.room(4 * LANES)
        self.store(value, held)
        left, place = self.variable(chosen.packed), self.variable(address)
        with self.repeating() as leave:
            leave(left.value.equals(0))
            number = self.load(held + left.value.lowest_bit.widened(U64) * 4, U32)
            self.store(number, place.value)
            place.set(place.value + 4)
            left.set(left.value & (left.value - 1))

    def fetch_ahead(self, address: Value) -> None:
        """Have the memory at an address brought into the cache; it need not be there."""
        pointer = self._place(address, BYTE)
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, U32, U32, U32])
        prefetch = self._builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=signature)
        to_read, for_long, as_data = (ir.Constant(U32, number) for number in (0, 3, 1))
        self._builder.call(prefetch, [pointer, to_read, for_long, as_data])

    def copy(self, source: Value, target: Value, n_bytes: Value) -> None:
        """Copy bytes from address to address."""
        pointers = [self._place(address, BYTE) for address in (target, source)]
        kinds = [pointer.type for pointer in pointers]
        memcpy = self._builder.module.declare_intrinsic("llvm.memcpy", [*kinds, U64])
        self._builder.call(memcpy, [*pointers, n_bytes.raw, ir.Constant(BIT, 0)])

    @contextmanager
    def counting(self, start: Value, stop: Value, step: Value | int = 1) -> Iterator[Value]:
        """Run for start, start + step and so on below stop."""
        place = self.variable(start)
        with self.repeating() as leave:
            leave(place.value >= stop)
            yield place.value
            place.set(place.value + step)

    @contextmanager
    def repeating(self) -> Iterator[Any]:
        """Run again and again; what is yielded takes a truth value that ends it."""
        builder, function = self._builder, self._function
        head, after = function.append_basic_block("again"), function.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)

        def leave(ends: Value) -> None:
            on = function.append_basic_block("on")
            builder.cbranch(ends.raw, after, on)
            builder.position_at_end(on)

        yield leave
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def when(self, happens: Value, *, likely: bool | None = None) -> Iterator[None]:
        """Run if a truth value holds."""
        with self._builder.if_then(happens.raw, likely=likely):
            yield

    def give_back(self, value: Value) -> None:
        """End the function."""
        self._builder.ret(value.raw)
        self._entry.branch(self._begin)

    def _value(self, raw: Any) -> Value:
        return Value(self._builder, raw)

    def _place(self, address: Value, kind: Any) -> Any:
        return self._builder.inttoptr(address.raw, kind.as_pointer())
