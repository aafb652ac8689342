"""A folder for each open tab, and the processes that work in it.

A process gets the token of the signed-in user and no other secret. Closing the tab ends its
processes, with those that they started, and deletes its folder; steps that still wait do not run.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MAX_MINUTES = float(os.environ.get("MAX_MINUTES", "30"))  # of a step
ROOT = Path(tempfile.mkdtemp(prefix="lewis-hub-space-"))
WORKER = Path(__file__).with_name("worker.py")
# the settings of this machine that a process needs; the Space's secrets are not among them
PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT"),
    *("PYTHONPATH", "OMP_NUM_THREADS", "HF_ENDPOINT", "MAX_GB", "SSL_CERT_FILE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)
UNUSED_S = 6 * 3600.0  # the folder of a client that closes no tab is kept for so long
# Sources, rows, a merge and its zip file. Where the disk has less, no idle folder is kept.
FREE_BYTES = 4e9 * float(os.environ.get("MAX_GB", "4"))
RUNNING: list[tuple[Path, subprocess.Popen[str]]] = []  # the folder of each process
CLOSED: set[Path] = set()  # the folders of closed tabs
Event = Mapping[str, Any]


def is_own_page(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from this Space's own page, or from no browser.

    Gradio lets every site send requests with the login of its visitors, and read the answers.
    """
    if site := headers.get("sec-fetch-site"):
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def folder_of(session: str) -> Path:
    """The folder of a tab, whose name its browser chose."""
    return ROOT / hashlib.sha256(session.encode()).hexdigest()[:32]


def run(step: str, session: str, request: Event, token: str | None = None) -> Iterator[Event]:
    """Run a step of `worker.py` and yield what it reports; it ends with the iteration."""
    folder = folder_of(session)
    if folder in CLOSED:
        yield {"problem": "This tab was closed."}
        return
    _delete_unused(folder)
    (folder / "recipe").mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    process = subprocess.Popen(
        [sys.executable, WORKER, step, folder],
        env=_environment(folder, token),
        cwd=folder / "recipe",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    RUNNING.append((folder, process))
    is_late = threading.Event()

    def stop() -> None:
        is_late.set()
        _end(process)

    limit = threading.Timer(MAX_MINUTES * 60, stop)
    limit.start()
    try:
        assert process.stdin
        assert process.stdout
        with process.stdin as stdin:
            stdin.write(json.dumps(request))
        last: Event = {}
        for line in process.stdout:
            last = json.loads(line)
            yield last
        if not last.keys() & {"result", "problem"}:
            yield {"problem": _unfinished(is_late=is_late.is_set())}
    finally:
        limit.cancel()
        _end(process)
        if process.stdout:
            process.stdout.close()
        RUNNING.remove((folder, process))


def _delete_unused(own: Path) -> None:
    """Delete the folders in which nothing has run for long, or the oldest if the disk is full."""
    used = {own, *(folder for folder, _ in RUNNING)}
    ages = {}
    for folder in set(ROOT.glob("*")) - used:  # none if all tabs were closed
        with suppress(OSError):  # it is closed at this moment
            ages[folder] = time.time() - folder.stat().st_mtime
    for folder in sorted(ages, key=ages.__getitem__, reverse=True):
        if ages[folder] > UNUSED_S or shutil.disk_usage(ROOT).free < FREE_BYTES:
            shutil.rmtree(folder, ignore_errors=True)


def close(session: str) -> None:
    """End the processes of a tab and delete its folder."""
    folder = folder_of(session)
    CLOSED.add(folder)
    for process in [process for where, process in RUNNING if where == folder]:
        _end(process)
    shutil.rmtree(folder, ignore_errors=True)


@atexit.register
def close_all() -> None:
    """End every process and delete the folders of all tabs."""
    for _, process in [*RUNNING]:
        _end(process)
    shutil.rmtree(ROOT, ignore_errors=True)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process and those that it started, which are a group of their own."""
    if process.returncode is None:  # it was not waited for, so its id is still its own
        with suppress(ProcessLookupError):  # of a step that ends at this moment
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(folder: Path, token: str | None) -> dict[str, str]:
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return passed_on | {
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MPLBACKEND": "agg",
        "TOKENIZERS_PARALLELISM": "false",
        **({"HF_TOKEN": token} if token else {}),
    }


def _unfinished(*, is_late: bool) -> str:
    if is_late:
        return f"This took more than {MAX_MINUTES:g} minutes and was stopped. Merge smaller models."
    return "The step ended without a result, maybe for lack of memory. Merge smaller models."
