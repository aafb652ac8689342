"""Read mutated documents, each within 5 s and 1 GB: python -m hardening.fuzz CASES SEED TARGET...

The seconds are those of the processor. It runs in `tests/`, and prints figures and findings as
JSON. CASES are shared by all targets of `targets.py`; those that are not named are left out. A
finding is stored below $LEWIS_HUB_FINDINGS; those in `corpus/` are read again in each run of the
tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from hardening.mutation import Document, mutated
from hardening.targets import TARGETS, Target
from lewis_hub.errors import LewisHubError

CORPUS = Path(__file__).with_name("corpus")
MAX_S = 5  # of all cores
MAX_WAIT_S = 60
MAX_BYTES = 1 << 30
MAX_FINDINGS = 20


class TooSlowError(BaseException):
    """A case took more than MAX_S; no `except Exception` catches it."""


def main() -> None:
    """Fuzz targets, print what was found, and store each finding."""
    n_cases, seed, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    warnings.filterwarnings("error")
    for name in names:
        for document in TARGETS[name].seeds:
            TARGETS[name].read(document)  # it is valid, and what is loaded once is loaded
    with limits():
        json.dump([fuzzed(name, TARGETS[name], n_cases, seed) for name in names], sys.stdout)


def fuzzed(name: str, target: Target, n_cases: int, seed: int) -> dict[str, Any]:
    """The figures of a target, and where each finding is stored."""
    random, found, slowest_s, n_done = Random(f"{name} {seed}"), dict[str, Document](), 0.0, 0
    n_drawn, began = round(n_cases * target.share), time.process_time()
    drawn = (mutated(random.choice(target.seeds), random) for _ in range(n_drawn))
    for document in chain(kept(name), drawn):
        case_began = time.perf_counter()
        if problem := failure(target.read, document):
            found.setdefault(problem, document)
        slowest_s = max(slowest_s, time.perf_counter() - case_began)
        n_done += 1
        if len(found) == MAX_FINDINGS:
            break
    return {
        **{"target": name, "n_cases": n_done, "cpu_s": round(time.process_time() - began, 1)},
        "slowest_s": round(slowest_s, 3),
        "findings": {problem: store(name, document) for problem, document in found.items()},
    }


def kept(name: str) -> list[Document]:
    """What was found in a target before."""
    files = sorted((CORPUS / name).glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def failure(read: Callable[[Document], object], document: Document) -> str | None:
    """Where a case fails by anything but an error of ours; None if it does not."""
    try:
        with time_limit():
            read(document)
    except LewisHubError as error:
        return None if str(error) else f"an empty message of {type(error).__name__}"
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "lewis_hub" in frame.filename] or frames
        return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
    return None


@contextmanager
def time_limit() -> Iterator[None]:
    """Interrupt a case that takes too long, again and again in case that something goes on.

    Processor time counts, so that other work on the machine makes no case slow; a case that waits
    is interrupted by the clock.
    """

    def stop(*_: object) -> None:
        raise TooSlowError(f"more than {MAX_S} s, or {MAX_WAIT_S} s of the clock")

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, MAX_S),
        (signal.SIGALRM, signal.ITIMER_REAL, MAX_WAIT_S),
    )
    for number, timer, most_s in timers:
        signal.signal(number, stop)
        signal.setitimer(timer, most_s, 0.1)
    try:
        yield
    finally:
        for _, timer, _ in timers:
            signal.setitimer(timer, 0)


@contextmanager
def limits() -> Iterator[None]:
    """Let this process allocate MAX_BYTES more than it has; Linux tells how much that is."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    data_kib = next(int(s.split()[1]) for s in status.splitlines() if s.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data_kib * 1024 + MAX_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def store(name: str, document: Document) -> str:
    """Write a finding as a file of the corpus; return its path, or the document itself."""
    text = json.dumps(document, indent=1) + "\n"
    if "LEWIS_HUB_FINDINGS" not in os.environ:
        return text
    folder = Path(os.environ["LEWIS_HUB_FINDINGS"]) / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    file.write_text(text, encoding="utf-8")
    return str(file)


if __name__ == "__main__":
    main()
