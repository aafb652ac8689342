"""What a merge ran on, as its card tells it; no part of what fixes the bytes."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
MODEL_NAME = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Machine:
    """A machine, without anything that tells whose it is.

    Attributes:
        processor: as its maker calls it, or the kind where nobody tells.
        n_cores: that this process may use.
        memory_bytes: of the whole machine; None where nobody tells.
        accelerator: the device that models were measured, merged and scored on; None: no other
            than the processor.
    """

    processor: str
    n_cores: int
    memory_bytes: int | None
    accelerator: str | None = None


def this_machine(device: str) -> Machine:
    """Look at the machine that this process runs on.

    Args:
        device: as torch names it; one of CUDA's is named as its maker calls it.
    """
    accelerator = None
    if device.startswith("cuda"):
        import torch

        accelerator = torch.cuda.get_device_name(device)
    return Machine(_processor(), _n_cores(), _memory_bytes(), accelerator)


def _processor() -> str:
    try:
        named = MODEL_NAME.search(CPU_INFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        named = None
    return " ".join(named[1].split()) if named else platform.machine()


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
