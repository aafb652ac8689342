"""Code made for this machine's processor, in a few milliseconds, when it is first asked for."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import binding, ir

from lewis_hub.merge.loops import Code

Native = Callable[..., int]  # takes integers and addresses, without the interpreter's lock

FEATURES = frozenset(name for name, has in binding.get_host_cpu_features().items() if has)

_compiling = threading.RLock()


def compiled(name: str, arguments: Sequence[str], write: Callable[[Code], None]) -> Native:
    """A function of this process.

    Args:
        name: of the function.
        arguments: names of its arguments, integers of 64 bits.
        write: writes its code.
    """
    with _compiling:
        module = ir.Module(name)
        module.triple = binding.get_process_triple()
        write(Code(module, name, arguments, FEATURES))
        engine = _engine(str(module))
        address = engine.get_function_address(name)
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_uint64] * len(arguments))
    function = kind(address)

    def call(*given: int) -> int:
        assert engine  # the code lives as long as it does
        return int(function(*given))

    return call


def address_of(array: Any) -> int:
    """Where the elements of a contiguous array begin."""
    return int(array.__array_interface__["data"][0])


def addresses_of(arrays: Sequence[Any]) -> Any:
    """Where each of several arrays begins, as an array that code reads."""
    return np.array([address_of(array) for array in arrays], np.uint64)


def _engine(text: str) -> Any:
    machine = _machine()
    module = binding.parse_assembly(text)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


def _machine() -> Any:
    """A description of this machine; the engine that it is given to owns it."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=2
    )
