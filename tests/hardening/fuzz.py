"""Read mutated documents, each within 5 s and 1 GB: `python -m hardening.fuzz TARGET CASES SEED`.

It runs in `tests/`, and prints the number of cases and its findings as JSON. A finding that is kept
in `corpus/TARGET/` is read again in each run of the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from hardening.mutation import Document, mutated

from lewis_hub.errors import LewisHubError

CORPUS = Path(__file__).with_name("corpus")
MAX_S = 5
MAX_BYTES = 1 << 30
MAX_FINDINGS = 20


class TooSlowError(BaseException):
    """A case took more than MAX_S; no `except Exception` catches it."""


def main() -> None:
    """Fuzz a target, print what was found, and store each finding below $LEWIS_HUB_FINDINGS."""
    from hardening.targets import TARGETS

    name, n_cases, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    target, random = TARGETS[name], Random(f"{name} {seed}")
    began, slowest_s, found = time.perf_counter(), 0.0, {}
    warnings.filterwarnings("error")
    for seed_document in target.seeds:
        target.read(seed_document)  # they are valid, and what is loaded once is loaded
    with limits():
        for n_done in range(1, n_cases + 1):
            document = mutated(random.choice(target.seeds), random)
            case_began = time.perf_counter()
            problem = failure(target.read, document)
            slowest_s = max(slowest_s, time.perf_counter() - case_began)
            if problem and problem not in found:
                found[problem] = document
            if len(found) == MAX_FINDINGS:
                break
    json.dump(
        {
            **{"target": name, "n_cases": n_done, "seconds": time.perf_counter() - began},
            **{"slowest_s": slowest_s, "findings": {p: _kept(name, d) for p, d in found.items()}},
        },
        sys.stdout,
    )


def failure(read: Any, document: Document) -> str | None:
    """Where a case fails by anything but an error of ours; None if it does not."""
    try:
        with time_limit():
            read(document)
    except LewisHubError as error:
        try:
            str(error).encode()
        except UnicodeEncodeError:
            return None  # the terminal writes what UTF-8 cannot encode as escapes
    except (Exception, TooSlowError, MemoryError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "lewis_hub" in f.filename] or frames
        return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return f"{type(error).__name__}: {error}"  # a panic of Rust
    return None


@contextmanager
def time_limit() -> Iterator[None]:
    """Interrupt a case that takes too long; only Unix has such alarms."""
    import signal

    def stop(*_: object) -> None:
        raise TooSlowError(f"more than {MAX_S} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


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


def _kept(name: str, document: Document) -> str:
    text = json.dumps(document, indent=1) + "\n"
    folder = Path(os.environ.get("LEWIS_HUB_FINDINGS", "")) / name
    if "LEWIS_HUB_FINDINGS" not in os.environ:
        return text
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    file.write_text(text, encoding="utf-8")
    return str(file)


if __name__ == "__main__":
    main()
