"""The kernels as machine code: LLVM compiles them for this processor on first use.

Numba takes 20 seconds to translate the loops, so the package contains its translation: an archive
with LLVM's intermediate code of each kernel, which is the same for all processors. From it, LLVM
makes the machine code of a kernel in a fraction of a second, and it is stored as an object file
that later runs load in a few milliseconds. After a change to a loop, numba translates it again on
its next call; `make kernels` writes a new archive.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any
from zipfile import ZIP_LZMA, BadZipFile, ZipFile, ZipInfo

import numpy as np
import numpy.typing as npt
from huggingface_hub import constants

from lewis_hub.working_folder import hidden_settings

Argument = int | npt.NDArray[Any] | Sequence[npt.NDArray[Any]]

ARCHIVE = Path(__file__).with_name("kernels.zip")
LOOPS = ("decode", "threshold", "vote")
FREE = ("llvm.", "memset", "memcpy", "memmove")  # functions that exist without numba
SOURCES = ("calls", "compiler", "random_bits", *LOOPS)  # they determine the archive

INT64_END = 1 << 63
DIGEST_BYTES = 32  # of the machine code, before it in a file

_loading = threading.Lock()
_functions: dict[str, Any] = {}
_engines: list[Any] = []  # the code lives as long as its engine


def call(kernel: str, *arguments: Argument) -> int:
    """Call a kernel, without the interpreter's lock.

    Args:
        kernel: module.function, in this package.
        arguments: those of its signature: integers, contiguous arrays, sequences of arrays.

    Raises:
        OverflowError: an integer has more than 64 bits; ctypes would cut it off.
    """
    held = [each if isinstance(each, (int, np.ndarray)) else _table(each) for each in arguments]
    words = [each if isinstance(each, int) else each.ctypes.data for each in held]
    if not -INT64_END <= min(words) <= max(words) < INT64_END:
        raise OverflowError(f"{kernel}: an integer has more than 64 bits")
    function = _functions.get(kernel) or _load(kernel, len(words))
    return int(function(*words))


def _table(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uint64]:
    return np.array([array.ctypes.data for array in arrays], np.uint64)


def _load(kernel: str, n_arguments: int) -> Any:
    from llvmlite import binding  # takes 50 MB: not before a kernel is needed

    with _loading:
        if kernel not in _functions:
            engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
            content = _stored(kernel) or _compiled(kernel)
            engine.add_object_file(binding.ObjectFileRef.from_data(content))
            engine.finalize_object()
            kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * n_arguments)
            _engines.append(engine)
            _functions[kernel] = kind(engine.get_function_address(kernel.partition(".")[2]))
        return _functions[kernel]


def _machine() -> Any:
    """LLVM's description of this machine; an engine that gets it owns it."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(binding.get_process_triple())
    features = binding.get_host_cpu_features().flatten()
    return target.create_target_machine(binding.get_host_cpu_name(), features, opt=3)


def _stored(kernel: str) -> bytes | None:
    for path in _places(kernel):
        with suppress(OSError):
            content = path.read_bytes()
            if content.startswith(hashlib.sha256(content[DIGEST_BYTES:]).digest()):
                return content[DIGEST_BYTES:]  # a damaged file would end this process
    return None


def _compiled(kernel: str) -> bytes:
    code = _archived(kernel)
    content = object_code(code or intermediate_code(kernel))
    for path in _places(kernel):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"{path.name}.{os.getpid()}")
            new.write_bytes(hashlib.sha256(content).digest() + content)
            new.replace(path)  # a reader finds all of it, or nothing
            break
        except OSError:
            continue  # if no folder can be written, every process compiles
    return content


def _archived(kernel: str) -> Any:
    """The intermediate code from the archive; None if the loops or LLVM's format differ."""
    from llvmlite import binding

    try:
        with ZipFile(ARCHIVE) as archive:
            if archive.comment.decode() == digest_of_loops():
                return binding.parse_bitcode(archive.read(kernel))
    except (OSError, BadZipFile, KeyError, RuntimeError):  # RuntimeError: an older LLVM
        return None
    return None


def intermediate_code(kernel: str) -> Any:
    """Translate a kernel to intermediate code for any processor: simplified, not vectorised."""
    from llvmlite import binding

    module, _, name = kernel.partition(".")
    with hidden_settings():
        from lewis_hub.kernels.compiler import translate  # imports numba

        code = translate(module, name)
    machine = binding.Target.from_default_triple().create_target_machine()
    _optimize(code, machine, speed_level=1, vectorize=False)
    return code


def write_archive() -> None:
    """Translate all kernels, into the archive that comes with the package."""
    from lewis_hub.kernels.compiler import ENTRIES

    for module in LOOPS:
        import_module(f"lewis_hub.kernels.{module}")
    with ZipFile(ARCHIVE, "w") as archive:
        archive.comment = digest_of_loops().encode()
        for function, _ in ENTRIES.values():
            kernel = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
            content = intermediate_code(kernel).as_bitcode()
            archive.writestr(ZipInfo(kernel), content, ZIP_LZMA)  # dated 1980: equal bytes


def object_code(code: Any) -> bytes:
    """Compile intermediate code for this processor.

    Raises:
        RuntimeError: a loop can raise an exception, or allocates memory.
    """
    machine = _machine()
    code.triple, code.data_layout = machine.triple, str(machine.target_data)
    _optimize(code, machine, speed_level=3, vectorize=True)
    called = [each.name for each in code.functions if each.is_declaration]
    if missing := [each for each in called if not each.startswith(FREE)]:
        raise RuntimeError(f"a kernel calls {missing}: it must neither raise nor allocate")
    return bytes(machine.emit_object(code))


def _optimize(code: Any, machine: Any, speed_level: int, *, vectorize: bool) -> None:
    """Optimise intermediate code in place; vectorise and unroll only for a known processor."""
    from llvmlite import binding

    options = binding.create_pipeline_tuning_options(speed_level=speed_level)
    options.loop_vectorization = options.loop_unrolling = vectorize
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(code, passes)


def _places(kernel: str) -> Iterator[Path]:
    """Paths of the machine code: in Python's own cache of the package, or in the user's cache."""
    name = f"{kernel}-{_digest()}.o"
    yield Path(cache_from_source(__file__)).with_name(name)
    yield Path(constants.HF_HOME) / "lewis-hub" / "kernels" / name


@cache
def digest_of_loops() -> str:
    """Of everything that determines the intermediate code."""
    digest = hashlib.sha256()
    for module in SOURCES:
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    return digest.hexdigest()[:32]


@cache
def _digest() -> str:
    """Of everything that determines the machine code."""
    import llvmlite
    from llvmlite import binding

    told = f"{digest_of_loops()} {llvmlite.__version__} {binding.get_process_triple()} "
    told += f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()}"
    return hashlib.sha256(told.encode() + Path(__file__).read_bytes()).hexdigest()[:32]
