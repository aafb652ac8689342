"""`lewis/cost.json`: time, memory and bytes of each stage, as the operating system counts them."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from lewis_hub.display import size
from lewis_hub.system import memory_bytes, n_cores, peak_bytes

FILE = "lewis/cost.json"
VERSION = 1
PROC = Path("/proc/self")
CPU_INFO = Path("/proc/cpuinfo")
MODEL_NAME = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)

Span = Literal["stage", "process"]


@dataclass(frozen=True)
class Machine:
    """A machine, without data that identify its owner."""

    processor: str  # its product name, or its architecture if the name is unknown
    n_cores: int  # cores that this process may use
    memory_bytes: int | None  # of the whole machine
    accelerator: str | None = None  # of calibration, merge and evaluation; None: the processor

    def __str__(self) -> str:
        memory = f", {size(self.memory_bytes)} of memory" if self.memory_bytes else ""
        cores = "1 core" if self.n_cores == 1 else f"{self.n_cores:,} cores"
        device = f"{self.accelerator}, and " if self.accelerator else ""
        return f"{device}{cores} of {self.processor}{memory}"


@dataclass(frozen=True)
class StageCost:
    """A stage of a run. Numbers are of the whole process with all threads; None if unknown."""

    stage: str
    seconds: float  # wall-clock time
    peak_rss_bytes: int | None  # resident memory, with pages of mapped files
    peak_over: Span  # "process": since its start, if the system cannot reset an earlier peak
    read_bytes: int | None  # by read calls, not through memory maps; also from the page cache
    written_bytes: int | None  # by write calls
    disk_read_bytes: int | None  # from storage, so without the page cache, also through memory maps
    disk_written_bytes: int | None  # to storage
    fetched_bytes: int | None = None  # weights that a stream downloaded in ranges; None with Ray
    rss_before_bytes: int | None = None  # at the start of the stage


class Costs:
    """The stages of a run in the order in which they ended, and its start time (UTC)."""

    def __init__(self) -> None:
        self.began = datetime.now(UTC)
        self.stages: list[StageCost] = []

    @contextmanager
    def measure(self, stage: str, fetched: Callable[[], int] | None = None) -> Iterator[None]:
        """Measure the block and add its cost, also when it raises.

        Stages do not nest: the start of a stage resets the memory peak.

        Args:
            stage: its name.
            fetched: returns the number of bytes downloaded in ranges so far.
        """
        span: Span = "stage" if _forget_peak() else "process"
        before, rss_bytes, started = _counters(), _status_bytes("VmRSS"), time.perf_counter()
        fetched_before = fetched() if fetched else 0
        try:
            yield
        finally:
            seconds, after = time.perf_counter() - started, _counters()
            moved = {key: after[key] - before[key] for key in after.keys() & before.keys()}
            cost = StageCost(
                stage=stage,
                seconds=round(seconds, 3),
                peak_rss_bytes=_peak_rss_bytes(),
                peak_over=span,
                read_bytes=moved.get("rchar"),
                written_bytes=moved.get("wchar"),
                disk_read_bytes=moved.get("read_bytes"),
                disk_written_bytes=moved.get("write_bytes"),
                fetched_bytes=fetched() - fetched_before if fetched else None,
                rss_before_bytes=rss_bytes,
            )
            self.stages.append(cost)

    def to_json(self, machine: Machine) -> str:
        """The text of `cost.json` of a run on this machine."""
        stages = [asdict(cost) for cost in self.stages]
        document = {"version": VERSION, "machine": asdict(machine), "stages": stages}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _forget_peak() -> bool:
    try:
        (PROC / "clear_refs").write_bytes(b"5")  # proc(5): resets VmHWM to what is resident now
    except OSError:
        return False
    return True


def _peak_rss_bytes() -> int | None:
    resident = _status_bytes("VmHWM")
    return peak_bytes() if resident is None else resident


def _status_bytes(name: str) -> int | None:
    """A value of /proc/self/status, see proc(5); None on other systems."""
    try:
        lines = (PROC / "status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None
    )


def _counters() -> dict[str, int]:
    try:
        lines = (PROC / "io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines)
    return {name: int(count) for name, count in pairs}


def this_machine(device: str) -> Machine:
    """Describe the machine that this process runs on.

    Args:
        device: a torch device; for a CUDA device, `accelerator` is its product name, for MPS the
            GPU beside the processor.
    """
    accelerator = "Apple GPU" if device.startswith("mps") else None
    if device.startswith("cuda"):
        import torch

        accelerator = torch.cuda.get_device_name(device)
    return Machine(_processor(), n_cores(), memory_bytes(), accelerator)


def _processor() -> str:
    try:
        named = MODEL_NAME.search(CPU_INFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        named = None
    return " ".join(named[1].split()) if named else platform.machine()


def duration(seconds: float) -> str:
    """A time for readers: `12.3 s`, `1 min 16 s`, `2 h 3 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
