"""Machine code is compiled once, kept where there is space, and without numba."""

import subprocess
import sys
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

from lewis_hub.kernels import machine_code
from lewis_hub.kernels.calls import BF16, widen

KERNEL = "decode.widen_array"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Where the machine code may be: in a folder that cannot be written, then in another."""
    (tmp_path / "file").touch()
    found = [tmp_path / "file" / "kernel.o", tmp_path / "cache" / "kernel.o"]
    monkeypatch.setattr(machine_code, "_places", lambda _: iter(found))
    return found


def test_it_goes_to_the_first_place_that_can_be_written(places):
    content = machine_code._compiled(KERNEL)

    assert places[1].read_bytes() == sha256(content).digest() + content
    assert machine_code._stored(KERNEL) == content
    assert [file.name for file in places[1].parent.iterdir()] == ["kernel.o"]


@pytest.mark.parametrize("damaged", [lambda c: c[:-100], lambda c: bytes(len(c)), lambda _: b""])
def test_a_damaged_file_is_made_again(places, damaged):
    content = machine_code._compiled(KERNEL)
    whole = places[1].read_bytes()
    places[1].write_bytes(damaged(whole))

    assert machine_code._stored(KERNEL) is None
    assert machine_code._compiled(KERNEL) == content
    assert places[1].read_bytes() == whole


def test_where_nothing_can_be_written_it_is_compiled_all_the_same(places, monkeypatch):
    monkeypatch.setattr(machine_code, "_places", lambda _: iter(places[:1]))

    assert machine_code._compiled(KERNEL)
    assert machine_code._stored(KERNEL) is None


def test_the_places_are_beside_pythons_own_cache_and_in_the_users(monkeypatch):
    beside, own = machine_code._places(KERNEL)

    assert beside.parent == Path(machine_code.__file__).parent / "__pycache__"
    assert own.parent.parts[-2:] == ("lewis-hub", "kernels")
    assert beside.name == own.name
    assert beside.name.startswith(f"{KERNEL}-")


def test_a_kernel_that_was_compiled_needs_no_numba():
    halves = np.array([0x3F80, 0xC000], np.uint16)
    widen(halves.view(np.uint8), BF16, 2)  # compiled, if it was not
    told = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np\n"
        "from lewis_hub.kernels.calls import widen\n"
        "print(widen(np.array([0x3F80, 0xC000], np.uint16).view(np.uint8), 0, 2))"
    )

    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)

    assert done.stdout == "[ 1. -2.]\n"


def test_the_archive_holds_all_kernels_as_the_loops_are_now():
    from lewis_hub.kernels import compiler

    for module in machine_code.LOOPS:
        import_module(f"lewis_hub.kernels.{module}")
    names = {
        f"{f.__module__.rpartition('.')[2]}.{f.__name__}" for f, _ in compiler.ENTRIES.values()
    }

    with ZipFile(machine_code.ARCHIVE) as archive:
        assert archive.comment.decode() == machine_code.digest_of_loops(), "run `make kernels`"
        assert set(archive.namelist()) == names


def test_numba_translates_a_loop_to_what_the_archive_holds():
    translated = machine_code.object_code(machine_code.intermediate_code(KERNEL))

    assert machine_code.object_code(machine_code._archived(KERNEL)) == translated


def test_a_changed_loop_is_translated_again(places, monkeypatch):
    monkeypatch.setattr(machine_code, "digest_of_loops", lambda: "of other loops")

    assert machine_code._archived(KERNEL) is None
    assert machine_code._compiled(KERNEL) == machine_code._stored(KERNEL)


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_without_the_archive_numba_is_used(content, tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "ARCHIVE", tmp_path / "kernels.zip")
    if content is not None:
        machine_code.ARCHIVE.write_bytes(content)

    assert machine_code._archived(KERNEL) is None


@pytest.mark.parametrize("n", [1 << 63, (1 << 64) + 4, -(1 << 63) - 1])
def test_a_kernel_gets_no_integer_that_it_would_see_as_another(n):
    values = np.zeros(4, np.float32)

    with pytest.raises(OverflowError, match="decode.widen_array: an integer has more than 64 bits"):
        machine_code.call(KERNEL, np.zeros(4, np.uint16), BF16, n, values)


def test_a_kernel_that_could_raise_is_refused():
    from lewis_hub.kernels import compiler

    @compiler.entry(compiler.INTEGER)
    def raising(n):
        if n:
            raise ValueError
        return 0

    try:
        code = machine_code.intermediate_code("decode.raising")
        with pytest.raises(RuntimeError, match=r"calls \[.*must neither raise nor allocate"):
            machine_code.object_code(code)
    finally:
        del compiler.ENTRIES["raising"]


@pytest.mark.parametrize(
    ("triple", "magic"),
    [  # numba's JIT on Windows takes ELF, with Windows' calling convention
        ("x86_64-pc-windows-msvc-elf", b"\x7fELF"),
        ("arm64-apple-darwin22.0.0", b"\xcf\xfa\xed\xfe"),
    ],
)
def test_kernels_for_other_systems_call_only_functions_of_their_c_library(
    triple, magic, monkeypatch
):
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(triple)
    monkeypatch.setattr(machine_code, "_machine", lambda: target.create_target_machine(opt=3))

    content = machine_code.object_code(machine_code._archived("decode.add_low_rank"))

    assert content.startswith(magic)
    assert b"add_low_rank" in content
    # of Windows' compiler: a check of large stacks, and a mark of floats
    assert not [name for name in (b"__chkstk", b"_fltused") if name in content]


def test_machine_code_of_another_system_is_stored_apart(monkeypatch):
    from llvmlite import binding

    machine_code._digest.cache_clear()
    here = machine_code._digest()
    monkeypatch.setattr(binding, "get_process_triple", lambda: "arm64-apple-darwin22.0.0")
    machine_code._digest.cache_clear()

    assert machine_code._digest() != here
    monkeypatch.undo()
    machine_code._digest.cache_clear()
