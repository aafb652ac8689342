"""Translate the loops to LLVM's intermediate code, with numba.

The modules with loops import this module; `machine_code` imports them only to compile.

Loops must not raise exceptions or allocate arrays, because numba is not loaded when they run.
Floats are computed as written: no fast-math, no fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from llvmlite import binding, ir
from numba import cfunc, config, njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

INTEGER, ADDRESS = types.int64, types.voidptr
ADDRESSES, INTEGERS = types.CPointer(types.voidptr), types.CPointer(types.int64)
ENTRIES: dict[str, tuple[Callable[..., Any], Any]] = {}  # name -> function, signature


def loop(function: Function) -> Function:
    """Mark a function that other loops call."""
    compiled: Function = njit(error_model="numpy")(function)
    return compiled


def entry(*arguments: Any) -> Callable[[Function], Function]:
    """Mark a function that Python calls with integers and addresses, of these types."""

    def add(function: Function) -> Function:
        ENTRIES[function.__name__] = function, types.int64(*arguments)
        return function

    return add


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_: Any, address: Any, offset: Any) -> Any:  # noqa: ARG001
    """Load the cache line at an address + offset (bytes); an invalid address does no harm."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointer, number = builder.gep(arguments[0], [arguments[1]]), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        to_read, for_long, as_data = (ir.Constant(number, n) for n in (0, 3, 1))
        builder.call(function, [pointer, to_read, for_long, as_data])
        return context.get_dummy_value()

    return types.none(types.voidptr, types.int64), generate


def translate(module: str, name: str) -> Any:
    """Translate a function marked by `entry` to a module of LLVM's intermediate code.

    It is not optimised: LLVM does that once, for the processor at hand.
    """
    import_module(f"lewis_hub.kernels.{module}")
    function, signature = ENTRIES[name]
    level, config.OPT = config.OPT, type(config.OPT)(0)
    try:
        compiled = cfunc(signature, error_model="numpy")(function)
    finally:
        config.OPT = level
    # Arrays are views of memory that Python owns: counting references, inlined, does nothing.
    code = binding.parse_assembly(compiled.inspect_llvm().replace("noinline", "alwaysinline"))
    for each in code.functions:
        if not each.is_declaration:
            each.linkage = "external" if each.name == compiled.native_name else "internal"
    code.get_function(compiled.native_name).name = name
    return code
