"""Jobs on the embedded Hub: commands run as processes of this machine.

No container is started and nothing is installed: of ``uv run --with PACKAGE COMMAND`` only the
command runs, from this Python's environment, in a folder of its own. A process sees only this
Hub's address, its Job's variables and its secrets; secrets are kept in memory only. Schedules are
kept, listed and triggered by hand; no clock runs them.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lewis_hub.localhub.access import Refusal
from lewis_hub.localhub.store import now

BUCKET_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
DEFAULT_TIMEOUT_S = 30 * 60
UV_WITH_VALUE = ("--with", "--python")


@dataclass
class Job:
    """One run of a command.

    Attributes:
        spec: the request, without secrets.
        log: time and text of each line.
    """

    namespace: str
    user: str
    spec: Mapping[str, Any]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created_at: str = field(default_factory=now)
    stage: str = "SCHEDULING"
    message: str | None = None
    log: list[tuple[str, str]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    @property
    def active(self) -> bool:
        """Whether the Job has not ended yet."""
        return self.stage in ("SCHEDULING", "RUNNING")

    def enter(self, stage: str, message: str | None = None) -> None:
        """Enter a stage, unless the Job has ended."""
        if self.active:
            self.stage, self.message = stage, message

    def stop(self, stage: str, message: str | None = None) -> None:
        """Enter a last stage, and end the process with its children."""
        self.enter(stage, message)
        if self.process and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@dataclass
class Schedule:
    """A scheduled Job."""

    namespace: str
    user: str
    spec: Mapping[str, Any]
    secrets: Mapping[str, str]
    schedule: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created_at: str = field(default_factory=now)
    last: Job | None = None


class Jobs:
    """The Jobs, schedules and buckets of a Hub; `close` ends the Jobs that run."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root, url
        self.jobs: dict[str, Job] = {}
        self.schedules: dict[str, Schedule] = {}

    def bucket(self, namespace: str, name: str) -> Path:
        """The folder with a bucket's files.

        Raises:
            Refusal: the name is not valid.
        """
        if not (BUCKET_NAME.fullmatch(namespace) and BUCKET_NAME.fullmatch(name)):
            raise Refusal(400, f"{namespace}/{name} is no name of a bucket")
        return self.root / "buckets" / namespace / name

    def start(
        self, namespace: str, user: str, spec: Mapping[str, Any], variables: Mapping[str, str]
    ) -> Job:
        """Run a command in a thread.

        Args:
            namespace: whose Job it is.
            user: who starts it.
            spec: the request, without secrets.
            variables: the secrets, as environment variables.

        Raises:
            Refusal: there is no command, or a volume is not a folder of a bucket.
        """
        command = without_uv([*(spec.get("command") or ()), *(spec.get("arguments") or ())])
        if not command:
            raise Refusal(400, "A Job needs a command")
        job = Job(namespace, user, spec)
        folder = self.root / "jobs" / job.id
        mounts = self._mount(folder, spec.get("volumes") or ())
        self.jobs[job.id] = job
        words = [_below_mount(word, mounts) for word in command]
        environment = {**self._environment(folder, job), **(spec.get("environment") or {})}
        environment |= variables
        threading.Thread(target=_run, args=(job, words, folder, environment), daemon=True).start()
        return job

    def close(self) -> None:
        """End all Jobs."""
        for job in self.jobs.values():
            job.stop("CANCELED")

    def _mount(self, folder: Path, volumes: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
        """Mount path -> a copy of the bucket's folder."""
        folder.mkdir(parents=True)
        mounts = {}
        for number, volume in enumerate(volumes):
            if volume["type"] != "bucket":
                raise Refusal(400, "This Hub mounts buckets only")
            namespace, _, name = volume["source"].partition("/")
            source = (self.bucket(namespace, name) / volume.get("path", "")).resolve()
            if not source.is_relative_to(self.root.resolve()) or not source.is_dir():
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
    """The command that uv would run after it installed the packages."""
    if list(command[:2]) != ["uv", "run"]:
        return list(command)
    rest = list(command[2:])
    while rest[:1] and rest[0] in UV_WITH_VALUE:
        rest = rest[2:]
    return rest


def _below_mount(word: str, mounts: Mapping[str, Path]) -> str:
    """A path below a mount, as a path of this machine."""
    for mount, folder in mounts.items():
        if word == mount or word.startswith(f"{mount}/"):
            return str(folder) + word.removeprefix(mount)
    return word


def _run(job: Job, words: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    """Run a Job's command to its end, and keep its lines."""
    job.log.append((now(), f"===== Job started at {now()} ====="))
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
        job.enter("ERROR", f"Job failed with exit code: 127. Reason: {error.strerror}")
        return
    job.process = process
    job.enter("RUNNING")
    if not job.active:  # it was cancelled before the process started
        job.stop(job.stage)
    timeout_s = job.spec.get("timeoutSeconds", DEFAULT_TIMEOUT_S)
    timer = threading.Timer(timeout_s, job.stop, ("ERROR", "Job timeout"))
    timer.daemon = True
    timer.start()
    assert process.stdout
    with process.stdout as lines:
        for line in lines:
            job.log.append((now(), line.rstrip("\n")))
    code = process.wait()
    timer.cancel()
    if code:
        job.enter("ERROR", f"Job failed with exit code: {code}. Reason: Error")
    else:
        job.enter("COMPLETED")
