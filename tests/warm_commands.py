"""Commands in processes that are forked from one with all imports: they start in milliseconds.

So hundreds of them can be started, watched and killed. Unlike a thread, a process can be killed,
and unlike a fork of the tests' own process, it has no other threads.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = ("torch", "datasets", "matplotlib.figure", "matplotlib.backends.backend_agg")
IMPORTED += ("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto")
IMPORTED += ("lewis_hub.cli.main", "lewis_hub.pipeline", "lewis_hub.report.plots")
IMPORTED += (
    "lewis_hub.calibration.sequential",
    "lewis_hub.merge.tensor",
    "lewis_hub.merge.readers",
)


def start(work, *words):
    """Start a function of a test module, or of this one, in a process."""
    CONTEXT.set_forkserver_preload([*IMPORTED])
    forkserver.ensure_running()
    process = CONTEXT.Process(target=work, args=words, daemon=True)
    process.start()
    return process


def start_command(folder, words, **environment):
    """Start `lewis-hub` in a folder; what it prints is in `stderr.txt` and `stdout.txt` there."""
    return start(_command, str(folder), words, environment)


def _command(folder, words, environment):
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    sys.argv = ["lewis-hub", *words]
    from lewis_hub.cli import main

    main.main()


def run_command(folder, words, **environment):
    """Run `lewis-hub` to its end; returns its exit code, and what it said on stderr."""
    process = start_command(folder, words, **environment)
    process.join(300)
    code = process.exitcode
    process.close()
    return code, (Path(folder) / "stderr.txt").read_text()


def n_descriptors():
    """The open files of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_bytes():
    """The memory of this process that is in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kill_after(process, delay_s):
    """Kill a process with SIGKILL unless it ends before; whether it was killed."""
    process.join(delay_s)
    killed = process.is_alive()
    if killed:
        process.kill()
    process.join(60)
    with suppress(ValueError):
        process.close()
    return killed
