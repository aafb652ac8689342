"""Faults of the embedded Hub, and commands that run against it at the same time, for tests."""

import subprocess
import sys

ANY = "."
NEVER = 1_000_000


def _status(code):
    return lambda hub, skip, times: hub.fail(ANY, code, skip=skip, times=times)


def _cut(after_bytes):
    return lambda hub, skip, times: hub.fail(
        ANY, "drop", skip=skip, times=times, after_bytes=after_bytes
    )


FAULTS = {  # name -> a function that makes it happen `times` times, after `skip` good calls
    **{str(code): _status(code) for code in (500, 503, 429, 412)},
    "no answer": _cut(None),
    "lost answer": _cut(0),
    "cut answer": _cut(100),
}


def run_concurrently(hub, delay_s, commands):
    """Run `lewis-hub` in several processes at once; the Hub delays each answer by `delay_s`.

    Args:
        commands: name -> the arguments, and the working folder.

    Returns:
        Name -> the finished process.
    """
    hub.faults.delay_s = delay_s
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "lewis_hub", *words],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (words, folder) in commands.items()
    }
    told = {name: process.communicate(timeout=120) for name, process in running.items()}
    hub.faults.clear()
    return {
        name: subprocess.CompletedProcess(process.args, process.returncode, *told[name])
        for name, process in running.items()
    }
