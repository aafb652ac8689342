"""Jobs of the embedded Hub: commands run as processes of this machine, where it was asked for.

No container is started and nothing is installed: of ``uv run --with PACKAGE COMMAND`` the command
alone runs, from this Python's environment, in a folder of its own. A process is told of nothing but
this Hub, its Job's variables and its secrets; those are kept in memory only. Schedules are kept,
listed and triggered by hand; no clock runs them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lewis_hub.hub.access import Refusal
from lewis_hub.hub.store import now

NAME = re.compile(r"\w[\w.-]*", re.ASCII)
RUNNING = ("SCHEDULING", "RUNNING")
DEFAULT_TIMEOUT_S = 30 * 60
UV_WITH_VALUE = ("--with", "--python")


@dataclass
class Job:
    """One run of a command, as it stands."""

    id: str
    namespace: str
    user: str
    spec: Mapping[str, Any]  # as it was sent, without secrets
    created_at: str
    stage: str = "SCHEDULING"
    message: str | None = None
    log: list[tuple[str, str]] = field(default_factory=list)  # (when, line)
    changed: threading.Condition = field(default_factory=threading.Condition)
    process: subprocess.Popen[str] | None = None

    def move(self, stage: str, message: str | None = None) -> None:
        """Enter a stage; one that is left for good is not entered again."""
        with self.changed:
            if self.stage in RUNNING:
                self.stage, self.message = stage, message
            self.changed.notify_all()

    def say(self, line: str) -> None:
        """Add a line to the log."""
        with self.changed:
            self.log.append((now(), line))
            self.changed.notify_all()

    def follow(self) -> Iterator[tuple[str, str]]:
        """The log from its beginning, as it grows, until the Job ends."""
        shown = 0
        while True:
            with self.changed:
                if len(self.log) == shown and self.stage in RUNNING:
                    self.changed.wait(1)
                new, ended = self.log[shown:], self.stage not in RUNNING
            yield from new
            shown += len(new)
            if ended and not new:
                return


@dataclass
class Schedule:
    """A Job that is to run again and again."""

    id: str
    namespace: str
    user: str
    spec: Mapping[str, Any]
    secrets: Mapping[str, str]
    schedule: str
    created_at: str
    last: Job | None = None


class Jobs:
    """The Jobs and schedules of a Hub; `close` ends what runs."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root, url
        self.jobs: dict[str, Job] = {}
        self.schedules: dict[str, Schedule] = {}

    def bucket(self, namespace: str, name: str) -> Path:
        """Where a bucket's files lie.

        Raises:
            Refusal: these are no names.
        """
        if not (NAME.fullmatch(namespace) and NAME.fullmatch(name)):
            raise Refusal(400, f"{namespace}/{name} is no name of a bucket")
        return self.root / "buckets" / namespace / name

    def start(
        self, namespace: str, user: str, spec: Mapping[str, Any], hidden: Mapping[str, str]
    ) -> Job:
        """Run a command; it goes on in a thread.

        Raises:
            Refusal: no command, or a volume that is no bucket.
        """
        command = list(spec.get("command") or ()) + list(spec.get("arguments") or ())
        if not command:
            raise Refusal(400, "A Job needs a command")
        job = Job(secrets.token_hex(12), namespace, user, spec, now())
        folder = self.root / "jobs" / job.id
        mounts = self._mounted(folder, spec.get("volumes") or ())
        self.jobs[job.id] = job
        words = [_inside(word, mounts) for word in without_uv(command)]
        environment = self._environment(folder, job) | dict(spec.get("environment") or {})
        told = environment | dict(hidden)
        threading.Thread(target=_run, args=(job, words, folder, told), daemon=True).start()
        return job

    def cancel(self, job: Job) -> None:
        """End a Job, its children too."""
        _stop(job, "CANCELED", None)

    def close(self) -> None:
        """End whatever runs."""
        for job in list(self.jobs.values()):
            self.cancel(job)

    def _mounted(self, folder: Path, volumes: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
        """Mount path -> a copy of the bucket's folder."""
        folder.mkdir(parents=True)
        mounts = {}
        for number, volume in enumerate(volumes):
            if volume["type"] != "bucket":
                raise Refusal(400, "This Hub mounts buckets only")
            namespace, _, name = volume["source"].partition("/")
            source = self.bucket(namespace, name) / volume.get("path", "")
            if not source.resolve().is_relative_to(self.root.resolve()) or not source.is_dir():
                raise Refusal(404, f"Bucket {volume['source']} has no such folder")
            mounts[volume["mountPath"]] = shutil.copytree(source, folder / f"mount-{number}")
        return mounts

    def _environment(self, folder: Path, job: Job) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "HF_HOME": str(folder / "hf-home"),
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "LANG": "C.UTF-8",
            "JOB_ID": job.id,
        }


def without_uv(command: Sequence[str]) -> list[str]:
    """The command that uv would run once it had installed what it needs."""
    if list(command[:2]) != ["uv", "run"]:
        return list(command)
    rest = list(command[2:])
    while rest[:1] and rest[0] in UV_WITH_VALUE:
        rest = rest[2:]
    return rest


def _inside(word: str, mounts: Mapping[str, Path]) -> str:
    """A path below a mount, where that is on this machine."""
    for mount, folder in mounts.items():
        if word == mount or word.startswith(f"{mount}/"):
            return str(folder) + word.removeprefix(mount)
    return word


def _run(job: Job, words: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    job.say(f"===== Job started at {now()} =====")
    try:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        job.move("ERROR", f"Job failed with exit code: 127. Reason: {error.strerror}")
        return
    job.process = process
    job.move("RUNNING")
    if job.stage != "RUNNING":  # it was cancelled while it started
        _stop(job, job.stage, job.message)
    limit_s = job.spec.get("timeoutSeconds", DEFAULT_TIMEOUT_S)
    timer = threading.Timer(limit_s, _stop, (job, "ERROR", "Job timeout"))
    timer.daemon = True
    timer.start()
    assert process.stdout
    with process.stdout as lines:
        for line in lines:
            job.say(line.rstrip("\n"))
    code = process.wait()
    timer.cancel()
    if code:
        job.move("ERROR", f"Job failed with exit code: {code}. Reason: Error")
    else:
        job.move("COMPLETED")


def _stop(job: Job, stage: str, message: str | None) -> None:
    """Enter a last stage, and end the process with its children."""
    job.move(stage, message)
    if job.process and job.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
