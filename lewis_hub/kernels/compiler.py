"""Compile the loops with numba.

The modules with loops import this module, and only `machine_code` imports those, to compile.

Loops must not raise exceptions or allocate arrays, because numba is not loaded when they run.
Floats are computed as written: no fast-math, no fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from llvmlite import binding, ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

FREE = ("llvm.", "memset", "memcpy", "memmove")  # functions that exist without numba

Function = TypeVar("Function", bound=Callable[..., Any])

INTEGER, ADDRESS = types.int64, types.voidptr
ADDRESSES, INTEGERS = types.CPointer(types.voidptr), types.CPointer(types.int64)
ENTRIES: dict[str, tuple[Callable[..., Any], Any]] = {}  # name -> function, signature


def loop(function: Function) -> Function:
    """Mark a function that other loops call."""
    compiled: Function = njit(error_model="numpy")(function)
    return compiled


def entry(*arguments: Any) -> Callable[[Function], Function]:
    """Mark a function that Python calls with integers and addresses.

    Args:
        arguments: the type of each argument.
    """

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


def compile_kernel(module: str, name: str, machine: Any) -> bytes:
    """Compile a function marked by `entry` to an object file.

    Args:
        module: the module of this package that defines it.
        name: the name of the function, here and in the object file.
        machine: LLVM's description of the processor.

    Raises:
        RuntimeError: the function can raise an exception, or allocates memory.
    """
    import_module(f"lewis_hub.kernels.{module}")
    function, signature = ENTRIES[name]
    compiled = cfunc(signature, error_model="numpy")(function)
    code = binding.parse_assembly(compiled.inspect_llvm())
    for each in code.functions:
        if not each.is_declaration:
            each.linkage = "external" if each.name == compiled.native_name else "internal"
    code.get_function(compiled.native_name).name = name
    # remove unused code, such as numba's exceptions
    options = binding.create_pipeline_tuning_options(speed_level=1)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(code, passes)
    called = [each.name for each in code.functions if each.is_declaration]
    if missing := [each for each in called if not each.startswith(FREE)]:
        raise RuntimeError(f"kernel {name} calls {missing}: it must neither raise nor allocate")
    return bytes(machine.emit_object(code))
