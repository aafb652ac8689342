"""What each stage of a merge cost, as the operating system counted it: `lewis/cost.json`."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lewis_hub.errors import OutputError

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


FILE = "lewis/cost.json"
VERSION = 1
PROC = Path("/proc/self")

Span = Literal["stage", "process"]


@dataclass(frozen=True)
class StageCost:
    """One stage of one run. Numbers are of the whole process, threads included.

    Attributes:
        stage: its name, such as `merge`.
        seconds: wall-clock time.
        peak_rss_bytes: most memory that was resident at once, pages of mapped files included.
        peak_over: what the peak is over: the stage, or the process since its start where the
            system cannot forget an earlier peak.
        read_bytes: asked of the system by read calls, whether or not the page cache had them;
            reads through a memory map are in `disk_read_bytes` only. None where nobody counts.
        written_bytes: the same for write calls.
        disk_read_bytes: fetched from storage, so nothing for what the page cache had.
        disk_written_bytes: handed to storage.
        fetched_bytes: of weights that came from the Hub by byte ranges, as a stream counts them.
            None where nobody does: there is no stream, or Ray's workers fetch.
        rss_before_bytes: resident when the stage began: what earlier ones left in memory. None
            where nobody tells.
    """

    stage: str
    seconds: float
    peak_rss_bytes: int
    peak_over: Span
    read_bytes: int | None
    written_bytes: int | None
    disk_read_bytes: int | None
    disk_written_bytes: int | None
    fetched_bytes: int | None = None
    rss_before_bytes: int | None = None


class Costs:
    """The stages of one run, in the order in which they ended, and when it began (UTC)."""

    def __init__(self) -> None:
        self.began = datetime.now(UTC)
        self.stages: list[StageCost] = []

    @contextmanager
    def measure(self, stage: str, fetched: Callable[[], int] | None = None) -> Iterator[None]:
        """Measure the block and keep its cost, also when it raises.

        Stages follow one another and do not nest: the start of one resets the peak of memory.

        Args:
            stage: its name.
            fetched: tells how many bytes came by ranges so far; None: nobody counts.
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
        """The text of `cost.json`; `machine` is what the run was made on."""
        stages = [asdict(cost) for cost in self.stages]
        document = {"version": VERSION, "machine": asdict(machine), "stages": stages}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_costs(text: str) -> tuple[StageCost, ...]:
    """Read what `Costs.to_json` wrote.

    Raises:
        OutputError: the text is of another version, or no such document.
    """
    try:
        document: dict[str, Any] = json.loads(text)
        if document["version"] == VERSION:
            return tuple(StageCost(**stage) for stage in document["stages"])
        problem = f"it has version {document['version']}, this program reads version {VERSION}."
    except (ValueError, TypeError, KeyError) as error:
        problem = f"it is no cost document ({error})."
    raise OutputError("cost.json", problem, "Delete the file; the next merge writes it anew.")


def _forget_peak() -> bool:
    try:
        (PROC / "clear_refs").write_text("5")  # proc(5): resets VmHWM to what is resident now
    except OSError:
        return False
    return True


def _peak_rss_bytes() -> int:
    if (told := _status_bytes("VmHWM")) is not None:
        return told
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _status_bytes(name: str) -> int | None:
    """What proc(5) tells in KiB; None on other systems."""
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None
    )


def _counters() -> dict[str, int]:
    try:
        lines = (PROC / "io").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines)
    return {name: int(count) for name, count in pairs}
