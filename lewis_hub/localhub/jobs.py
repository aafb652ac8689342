"""Jobs on the embedded Hub: commands run as processes of this machine.

No container is started and nothing is installed: of ``uv run --with PACKAGE COMMAND`` only the
command runs, from this Python's environment, in a folder of its own. A process sees only this
Hub's address, its Job's variables and its secrets; secrets are kept in memory only. Schedules are
kept, listed and triggered by hand; no clock runs them. Buckets hold the files of Jobs.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter
from starlette.responses import JSONResponse, Response, StreamingResponse

from lewis_hub.files import size_of
from lewis_hub.localhub import files
from lewis_hub.localhub.call import Answer, Call, parsed, refusal
from lewis_hub.localhub.hub import Grant
from lewis_hub.localhub.store import now, object_id
from lewis_hub.system import kill_with_children

BUCKET_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
DEFAULT_TIMEOUT_S = 30 * 60
MAX_TIMEOUT_S = 366 * 24 * 3600
LOG_POLL_S = 0.05
LINES_AT_ONCE = 100  # of a log, before other requests are answered
MAX_LOG_CHARACTERS = 50_000_000  # of a Job, with LINE_CHARACTERS for each line
LINE_CHARACTERS = 100  # its time, and its place in memory
MAX_LINE_CHARACTERS = 10_000  # a longer line is kept as several
UV_WITH_VALUE = ("--with", "--python")
SPEC = ("dockerImage", "command", "arguments", "environment", "flavor", "labels", "volumes")

Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]  # as the system takes it
Texts = Annotated[list[Text], Field(fail_fast=True)]


@dataclass(frozen=True)
class Volume:
    """A bucket that a Job reads, or a folder of it."""

    type: str
    source: str
    mount_path: Annotated[str, Field(validation_alias="mountPath")]
    path: Text = ""


@dataclass(frozen=True)
class Spec:
    """The parts of a request for a Job that decide what runs."""

    command: Texts | None = None
    arguments: Texts | None = None
    environment: dict[Text, Text] | None = None
    secrets: dict[Text, Text] | None = None
    volumes: Annotated[list[Volume], Field(fail_fast=True)] | None = None
    timeout_s: Annotated[
        float, Field(validation_alias="timeoutSeconds", gt=0, le=MAX_TIMEOUT_S)
    ] = DEFAULT_TIMEOUT_S


@dataclass(frozen=True)
class BucketLine:
    """A line of a batch that changes a bucket."""

    type: str
    path: Text = ""
    xet_hash: Annotated[str, Field(validation_alias="xetHash")] = ""


SPEC_SHAPE, BUCKET_LINE = TypeAdapter(Spec), TypeAdapter(BucketLine)


@dataclass
class Job:
    """One run of a command: what answers say about it, and the time and text of each line."""

    entry: dict[str, Any]
    log: list[tuple[str, str]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    n_characters: int = 0  # of the log

    @property
    def active(self) -> bool:
        """Whether the Job has not ended yet."""
        return self.entry["status"]["stage"] in ("SCHEDULING", "RUNNING")

    def keep(self, line: str) -> None:
        """Add a line to the log, unless it is full."""
        if self.n_characters > MAX_LOG_CHARACTERS:
            return
        self.n_characters += len(line) + LINE_CHARACTERS
        if self.n_characters > MAX_LOG_CHARACTERS:
            line = "===== the rest of the log is not kept ====="
        self.log.append((now(), line))

    def enter(self, stage: str, message: str | None = None) -> None:
        """Enter a stage, unless the Job has ended."""
        if self.active:
            self.entry["status"] = {"stage": stage, "message": message}

    def stop(self, stage: str, message: str | None = None) -> None:
        """Enter a last stage, and end the process with its children."""
        self.enter(stage, message)
        if self.process and self.process.poll() is None:
            kill_with_children(self.process)


@dataclass(frozen=True)
class Schedule:
    """A scheduled Job: what answers say about it, who made it, and the request of each run."""

    entry: dict[str, Any]
    user: str
    spec: Mapping[str, Any]


S = TypeVar("S", Job, Schedule)


def _user(name: str) -> dict[str, str]:
    return {"type": "user", "id": object_id(name), "name": name}


def _new_entry(namespace: str) -> dict[str, Any]:
    return {"id": secrets.token_hex(12), "createdAt": now(), "owner": _user(namespace)}


def _without_secrets(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: spec.get(key) for key in SPEC}


class Jobs:
    """The Jobs, schedules and buckets of a Hub."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root.resolve(), url  # a Job runs in a folder of its own
        self.jobs: dict[str, Job] = {}
        self.schedules: dict[str, Schedule] = {}
        self.public: set[Path] = set()  # buckets that were not made private

    def close(self) -> None:
        """End all Jobs."""
        for job in self.jobs.values():
            job.stop("CANCELED")

    def routes(self) -> tuple[tuple[str, str, Answer], ...]:
        """Method and path of each address, with the function that answers it."""
        jobs, schedules = "/api/jobs/{namespace}", "/api/scheduled-jobs/{namespace}"
        bucket = "/api/buckets/{namespace}/{name}"
        return (
            ("POST", jobs, self._run),
            ("GET", jobs, lambda call: _entries(call, self.jobs)[::-1]),  # newest first
            ("GET", jobs + "/{id}", lambda call: _find(call, self.jobs).entry),
            ("GET", jobs + "/{id}/logs", self._send_log),
            ("POST", jobs + "/{id}/cancel", self._cancel),
            ("POST", schedules, self._schedule),
            ("GET", schedules, lambda call: _entries(call, self.schedules)),
            ("DELETE", schedules + "/{id}", self._unschedule),
            ("POST", schedules + "/{id}/run", self._trigger),
            ("GET", bucket, self._describe_bucket),
            ("POST", bucket, self._create_bucket),
            ("GET", bucket + "/xet-write-token", lambda c: files.xet_token(c.store, _writer(c))),
            ("POST", bucket + "/batch", self._fill_bucket),
        )

    def _run(self, call: Call) -> dict[str, Any]:
        return self._start(call.parts["namespace"], _writer(call).user, call.json()).entry

    def _send_log(self, call: Call) -> Response:
        """The lines as events, until the Job ends."""
        job = _find(call, self.jobs)

        async def events() -> AsyncIterator[str]:
            n_sent = 0
            while job.active or n_sent < len(job.log):
                lines = job.log[n_sent : n_sent + LINES_AT_ONCE]
                n_sent += len(lines)
                told = (json.dumps({"data": line, "timestamp": when}) for when, line in lines)
                yield "".join(f"data: {event}\n\n" for event in told)
                await asyncio.sleep(0 if lines else LOG_POLL_S)  # other requests get their turn

        return StreamingResponse(events(), media_type="text/event-stream")

    def _cancel(self, call: Call) -> dict[str, Any]:
        job = _find(call, self.jobs)
        job.stop("CANCELED")
        return job.entry

    def _schedule(self, call: Call) -> dict[str, Any]:
        user, document = _writer(call).user, call.json()
        spec = document.get("jobSpec") or {}
        parsed(SPEC_SHAPE, json.dumps(spec).encode())
        entry = _new_entry(call.parts["namespace"]) | {
            "schedule": str(document.get("schedule")),
            "suspend": False,
            "concurrency": False,
            "jobSpec": _without_secrets(spec),
            "status": {"lastJob": None},
        }
        self.schedules[entry["id"]] = Schedule(entry, user, spec)
        return entry

    def _unschedule(self, call: Call) -> dict[str, Any]:
        del self.schedules[_find(call, self.schedules, "Scheduled Job").entry["id"]]
        return {}

    def _trigger(self, call: Call) -> dict[str, Any]:
        """Run a scheduled Job now, whatever its schedule says."""
        item = _find(call, self.schedules, "Scheduled Job")
        started = self._start(call.parts["namespace"], item.user, item.spec).entry
        item.entry["status"]["lastJob"] = {"id": started["id"], "at": started["createdAt"]}
        return started

    def _bucket(self, namespace: str, name: str) -> Path:
        """The folder with a bucket's files."""
        if not (BUCKET_NAME.fullmatch(namespace) and BUCKET_NAME.fullmatch(name)):
            raise refusal(400, f"{namespace}/{name} is no name of a bucket")
        return self.root / "buckets" / namespace / name

    def _create_bucket(self, call: Call) -> Response:
        """A bucket that exists is a conflict; the answer has its address."""
        _writer(call)
        folder = self._bucket(call.parts["namespace"], call.parts["name"])
        existed = folder.exists()
        if not existed and call.json().get("visibility") != "private":
            self.public.add(folder)
        folder.mkdir(parents=True, exist_ok=True)
        url = f"{call.endpoint}/buckets/{call.parts['namespace']}/{call.parts['name']}"
        return JSONResponse({"url": url}, 409 if existed else 200)

    def _describe_bucket(self, call: Call) -> dict[str, Any]:
        _writer(call)
        namespace, name = call.parts["namespace"], call.parts["name"]
        folder = self._bucket(namespace, name)
        if not folder.exists():
            raise refusal(404, "Bucket not found")
        sizes = [size_of(path) for path in folder.rglob("*") if path.is_file()]
        return {
            "id": f"{namespace}/{name}",
            "private": folder not in self.public,
            "createdAt": now(),
            "size": sum(sizes),
            "totalFiles": len(sizes),
        }

    def _fill_bucket(self, call: Call) -> dict[str, Any]:
        """Add files; the body has lines of JSON, each a file."""
        grant = _writer(call)
        folder = self._bucket(call.parts["namespace"], call.parts["name"])
        for line in io.BytesIO(call.body):
            entry = parsed(BUCKET_LINE, line)
            target = folder / entry.path
            if entry.type != "addFile" or not target.resolve().is_relative_to(folder.resolve()):
                raise refusal(400, "This Hub's buckets take new files only")
            if not files.take_xet_upload(call.store, grant, entry.xet_hash, target):
                raise refusal(400, f"{entry.path} was not uploaded")
        return {"success": True}

    def _start(self, namespace: str, user: str, spec: Mapping[str, Any]) -> Job:
        """Run a command in a thread, with the secrets as environment variables."""
        asked = parsed(SPEC_SHAPE, json.dumps(spec).encode())
        command = without_uv([*(asked.command or ()), *(asked.arguments or ())])
        if not command:
            raise refusal(400, "A Job needs a command")
        entry = _new_entry(namespace) | {"initiator": _user(user)} | _without_secrets(spec)
        job = Job(entry | {"status": {"stage": "SCHEDULING", "message": None}})
        folder = self.root / "jobs" / entry["id"]
        mounts = self._mount(folder, asked.volumes or ())
        self.jobs[entry["id"]] = job
        words = [_below_mount(word, mounts) for word in command]
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "HF_HOME": str(folder / "hf-home"),
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "LANG": "C.UTF-8",
            "JOB_ID": entry["id"],
            **(asked.environment or {}),
            **(asked.secrets or {}),
        }
        run = (job, words, folder, environment, asked.timeout_s)
        threading.Thread(target=_run, args=run, daemon=True).start()
        return job

    def _mount(self, folder: Path, volumes: Sequence[Volume]) -> dict[str, Path]:
        """Mount path -> a copy of the bucket's folder."""
        folder.mkdir(parents=True)
        mounts = {}
        for number, volume in enumerate(volumes):
            if volume.type != "bucket":
                raise refusal(400, "This Hub mounts buckets only")
            namespace, _, name = volume.source.partition("/")
            bucket = self._bucket(namespace, name).resolve()
            source = (bucket / volume.path).resolve()
            if not source.is_relative_to(bucket) or not source.is_dir():
                raise refusal(404, f"Bucket {volume.source} has no such folder")
            mounts[volume.mount_path] = shutil.copytree(source, folder / f"mount-{number}")
        return mounts


def _refuse(_call: Call) -> Response:
    raise refusal(400, "This Hub runs no Jobs: start it with `lewis-hub hub --jobs`")


REFUSED: tuple[tuple[str, str, Answer], ...] = tuple(
    (method, f"/api/{noun}/{{rest:path}}", _refuse)
    for noun in ("jobs", "scheduled-jobs", "buckets")
    for method in ("GET", "POST", "DELETE")
)


def _writer(call: Call) -> Grant:
    return call.owner(call.parts["namespace"], "job")


def _entries(call: Call, known: Mapping[str, S]) -> list[dict[str, Any]]:
    _writer(call)
    namespace = call.parts["namespace"]
    return [item.entry for item in known.values() if item.entry["owner"]["name"] == namespace]


def _find(call: Call, known: Mapping[str, S], noun: str = "Job") -> S:
    _writer(call)
    item = known.get(call.parts["id"])
    if item is None or item.entry["owner"]["name"] != call.parts["namespace"]:
        raise refusal(404, f"{noun} not found")
    return item


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


def _run(
    job: Job, words: list[str], folder: Path, environment: Mapping[str, str], timeout_s: float
) -> None:
    """Run a Job's command to its end, and keep its lines."""
    job.keep(f"===== Job started at {now()} =====")
    try:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # ValueError: `=` in the name of a variable
        reason = error.strerror if isinstance(error, OSError) else error
        job.enter("ERROR", f"Job failed with exit code: 127. Reason: {reason}")
        return
    job.process = process
    job.enter("RUNNING")
    if not job.active:  # it was cancelled before the process started
        job.stop("CANCELED")
    timer = threading.Timer(timeout_s, job.stop, ("ERROR", "Job timeout"))
    timer.daemon = True
    timer.start()
    assert process.stdout
    with process.stdout as lines:
        while line := lines.readline(MAX_LINE_CHARACTERS):
            job.keep(line.rstrip("\n"))
    code = process.wait()
    timer.cancel()
    if code:
        job.enter("ERROR", f"Job failed with exit code: {code}. Reason: Error")
    else:
        job.enter("COMPLETED")
