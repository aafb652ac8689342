"""The kernels as machine code: compiled by numba on first use, and read from disk afterwards.

Importing numba and loading a function from numba's own cache takes a second and 100 MB, more than
the arithmetic of most merges. So numba's output is stored as an object file, which llvmlite loads
in a few milliseconds. The name of the file contains a digest of everything that determines its
content: after a change to a loop, it is compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from huggingface_hub import constants
from llvmlite import binding

Argument = int | npt.NDArray[Any] | Sequence[npt.NDArray[Any]]

COMPILED = ("compiler", "decode", "operands", "random_bits", "ranks", "threshold", "vote")

_loading = threading.Lock()
_engines: list[Any] = []


def call(kernel: str, *arguments: Argument) -> int:
    """Call a kernel, without the interpreter's lock.

    Args:
        kernel: module.function, in this package.
        arguments: those of its signature: integers, contiguous arrays, sequences of arrays.
    """
    held = [each if isinstance(each, (int, np.ndarray)) else _table(each) for each in arguments]
    words = [each if isinstance(each, int) else each.ctypes.data for each in held]
    with _loading:
        function = _load(kernel, len(words))
    return int(function(*words))


def _table(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uint64]:
    return np.array([array.ctypes.data for array in arrays], np.uint64)


@cache
def _load(kernel: str, n_arguments: int) -> Any:
    module, _, name = kernel.partition(".")
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    content = _stored(kernel) or _compiled(kernel)
    engine.add_object_file(binding.ObjectFileRef.from_data(content))
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * n_arguments)
    _engines.append(engine)  # the code lives as long as its engine
    return kind(engine.get_function_address(name))


def _machine() -> Any:
    """LLVM's description of this machine; an engine that gets it owns it."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    features = binding.get_host_cpu_features().flatten()
    return target.create_target_machine(binding.get_host_cpu_name(), features, opt=3)


def _stored(kernel: str) -> bytes | None:
    for path in _places(kernel):
        try:
            return path.read_bytes()
        except OSError:
            continue
    return None


def _compiled(kernel: str) -> bytes:
    from lewis_hub.kernels.compiler import compile_kernel  # imports numba

    module, _, name = kernel.partition(".")
    content = compile_kernel(module, name, _machine())
    for path in _places(kernel):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"{path.name}.{os.getpid()}")
            new.write_bytes(content)
            new.replace(path)  # a reader finds all of it, or nothing
            break
        except OSError:
            continue  # if no folder can be written, every process compiles
    return content


def _places(kernel: str) -> Iterator[Path]:
    """Paths of the machine code: in Python's own cache of the package, or in the user's cache."""
    name = f"{kernel}-{_digest()}.o"
    yield Path(cache_from_source(__file__)).with_name(name)
    yield Path(constants.HF_HOME) / "lewis-hub" / "kernels" / name


@cache
def _digest() -> str:
    """Of everything that determines the machine code."""
    told = f"{version('numba')} {binding.get_host_cpu_name()} "
    digest = hashlib.sha256((told + binding.get_host_cpu_features().flatten()).encode())
    for module in COMPILED:
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    return digest.hexdigest()[:32]
