"""Pin what workflows install: lock.py PAGE < RESOLVED > templates/workflows/requirements.txt.

RESOLVED is `uv pip compile --universal --generate-hashes`, and PAGE a file with PyTorch's index of
torch for CPUs. On Linux torch is the one of this index, without the packages of CUDA.
"""

import re
import sys
from pathlib import Path

HEADER = """\
# What the workflows install beside lewis-hub, which runs beside a token: each file by its hash.
# Made by `make lock`. On Linux torch is that of https://download.pytorch.org/whl/cpu, without CUDA.
"""
ENTRY = re.compile(r"\n(?=\S)")
UNNEEDED = re.compile(
    r"(nvidia-|cuda-|triton==|httpx2-jsfetch)"
)  # by torch for CPUs, or in browsers
WHEEL = r'"[^"]*/torch-{}%2Bcpu-cp31[1-3]-cp31[1-3]-manylinux[^"]*\.whl#sha256=([0-9a-f]{{64}})"'


def locked(resolved: str, page: str) -> str:
    """The requirements of the workflows."""
    entries = ENTRY.split(resolved.strip())
    kept = [entry for entry in entries if not UNNEEDED.match(entry)]
    return HEADER + "".join(f"{part}\n" for entry in kept for part in _parts(entry, page))


def _parts(entry: str, page: str) -> list[str]:
    """An entry; torch becomes two, since Linux has another one."""
    found = re.match(r"torch==([\d.]+) ", entry)
    if found is None:
        return [entry]
    hashes = re.findall(WHEEL.format(re.escape(found[1])), page)
    assert hashes, f"the index has no torch {found[1]} for CPUs"
    pinned = [f"torch=={found[1]}+cpu ; sys_platform == 'linux'"]
    pinned += [f"    --hash=sha256:{one}" for one in sorted(set(hashes))]
    other = entry.replace(found[0], f"{found[0]}; sys_platform != 'linux' ", 1)
    return [" \\\n".join(pinned), other]


if __name__ == "__main__":
    sys.stdout.write(locked(sys.stdin.read(), Path(sys.argv[1]).read_text(encoding="utf-8")))
