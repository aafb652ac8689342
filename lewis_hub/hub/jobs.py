"""Hugging Face Jobs: run a command of this package on the Hub's machines, now or on a schedule."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx2
from huggingface_hub import Volume
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars
from pydantic import Field, TypeAdapter

from lewis_hub.display import without_credentials
from lewis_hub.hub.failures import (
    HubRepo,
    address,
    call_hub,
    hub_failures,
    no_token,
    read_answer,
    retry,
    retry_transfer,
)
from lewis_hub.hub.target import account

if TYPE_CHECKING:
    from huggingface_hub import HfApi


BUCKET = "jobs-artifacts"  # the bucket in which huggingface_hub uploads files of Jobs
MOUNT = "/recipe"
IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
UV, PYTHON = ("uv", "run"), ("--python", "3.12")
COMPLETED = "COMPLETED"
SERVER_ERROR = 500  # and above: of a gateway, too, which may have passed on the call
EXIT_CODE = re.compile(r"exit code:? (\d{1,3})\b")


Short = Annotated[str, Field(max_length=1000)]
Word = Annotated[str, Field(max_length=10_000)]


@dataclass(frozen=True)
class _Schedule:
    id: Short
    schedule: Short | None
    command: Annotated[list[Word], Field(max_length=1000, fail_fast=True)]
    flavor: Short | None


SCHEDULES = TypeAdapter(Annotated[list[_Schedule], Field(max_length=1000, fail_fast=True)])
JOB_ID = TypeAdapter(Short)
MESSAGE = TypeAdapter(str | None)


@dataclass(frozen=True)
class JobRequest:
    """A command to run as a Job."""

    words: Sequence[str]  # of the command line after `lewis-hub`
    files: Mapping[str, Path]  # by path below `MOUNT`; they are uploaded to a private bucket
    package: str  # installed for the Job; a requirement as pip reads it
    flavor: str | None  # hardware, by the Hub's name; None: the Hub's smallest
    timeout: str | None  # such as `2h`; None: the Hub's default of 30 minutes
    namespace: str | None  # the user or organisation that pays; None: the token's user


@dataclass(frozen=True)
class SubmittedJob:
    """A Job, or with `schedule` a scheduled Job."""

    id: str
    namespace: str
    url: str
    schedule: str | None = None


def submit(api: HfApi, request: JobRequest, cron: str | None = None) -> SubmittedJob:
    """Start a Job, or create one that runs on the schedule `cron`, in UTC.

    It gets the token only as a secret.

    Raises:
        PublishError: no token, no right to run Jobs there, or the Hub failed.
    """
    hub_repo = _namespace(api, request.namespace)
    options: dict[str, Any] = {
        # huggingface_hub's own functions for uv replace words that are files in this folder
        "command": [*UV, "--with", request.package, *PYTHON, "lewis-hub", *request.words],
        "image": IMAGE,
        "name": "lewis-hub",
        "flavor": request.flavor,
        "timeout": request.timeout,
        "secrets": {"HF_TOKEN": hub_repo.token},
        "volumes": [_upload_files(hub_repo, request.files)],
        "namespace": hub_repo.name,
    }
    with hub_failures(hub_repo), _told_if_it_may_run(hub_repo):
        if cron is None:
            job = api.run_job(**options)
            job_id = read_answer(hub_repo, JOB_ID, job.id)
            return SubmittedJob(job_id, hub_repo.name, without_credentials(job.url))
        made = api.create_scheduled_job(schedule=cron, **options)
    job_id = read_answer(hub_repo, JOB_ID, made.id)
    return SubmittedJob(job_id, hub_repo.name, f"{address(api)}/settings/jobs", cron)


@contextmanager
def _told_if_it_may_run(hub_repo: HubRepo) -> Iterator[None]:
    """A Job whose answer was lost may run, and the same command would start a second one."""
    try:
        yield
    except httpx2.ConnectError:  # nothing was sent
        raise
    except (httpx2.RequestError, HfHubHTTPError) as error:
        answer = getattr(error, "response", None)
        if answer is not None and answer.status_code < SERVER_ERROR:
            raise
        said = f"{answer.status_code}" if answer is not None else str(error) or type(error).__name__
        problem = f"no good answer came ({said}), so the Job may exist"
        remedy = f"Look at {address(hub_repo.api)}/settings/jobs before you start it again."
        raise hub_repo.failed(problem, remedy) from error


def follow(api: HfApi, job: SubmittedJob, say: Callable[[str], None]) -> int | None:
    """Pass on the lines of a Job's log until it ends, each line once even after interruptions.

    The result is the command's exit code, or None if the Job's status does not contain it.

    Raises:
        PublishError: the Hub does not answer. The Job continues.
    """
    hub_repo = HubRepo.to_publish(api, job.namespace)
    n_said = 0

    def pass_on() -> None:
        nonlocal n_said
        lines = api.fetch_job_logs(job_id=job.id, follow=True, namespace=job.namespace)
        for line in islice(lines, n_said, None):  # each request gets the log from its beginning
            n_said += 1
            say(line)

    with hub_failures(hub_repo):
        retry_transfer(pass_on, lambda: n_said)
        status = retry(lambda: api.wait_for_job(job.id, namespace=job.namespace)).status
        # A connection that breaks after the Job ended raises no error: read until no line is new.
        n_before = -1
        while n_said > n_before:
            n_before = n_said
            retry_transfer(pass_on, lambda: n_said)
    if status.stage == COMPLETED:
        return 0
    message = read_answer(hub_repo, MESSAGE, status.message) or "the Hub does not say why"
    say(f"Job {status.stage}: {message}")
    return exit_code_in(message)


def exit_code_in(message: str) -> int | None:
    """The exit code of a failure, if the Hub's message on it has one."""
    found = EXIT_CODE.search(message)
    return code if found and 0 < (code := int(found[1])) < 256 else None


def scheduled(api: HfApi, namespace: str | None) -> list[dict[str, Any]]:
    """The schedules in a namespace that run this package."""
    hub_repo = _namespace(api, namespace)
    found = call_hub(hub_repo, lambda: api.list_scheduled_jobs(namespace=hub_repo.name))
    listed = [
        {
            "id": item.id,
            "schedule": item.schedule,
            "command": item.job_spec.command or [],
            "flavor": item.job_spec.flavor,
        }
        for item in found
    ]
    return [
        {**vars(one), "command": " ".join(one.command)}
        for one in read_answer(hub_repo, SCHEDULES, listed)
        if "lewis-hub" in one.command
    ]


def unschedule(api: HfApi, job_id: str, namespace: str | None) -> None:
    """Remove a schedule; its running Jobs continue."""
    hub_repo = _namespace(api, namespace)
    with hub_failures(hub_repo):
        api.delete_scheduled_job(scheduled_job_id=job_id, namespace=hub_repo.name)


def _namespace(api: HfApi, namespace: str | None) -> HubRepo:
    """The namespace in which Jobs run; the token's user by default."""
    nobody = HubRepo.to_publish(api, namespace or "Hugging Face Jobs")
    if nobody.token is None:
        raise no_token(nobody)
    if namespace:
        return nobody
    return HubRepo.to_publish(api, account(nobody).name)


def _upload_files(hub_repo: HubRepo, files: Mapping[str, Path]) -> Volume:
    """Upload files to a new folder in the namespace's private bucket.

    huggingface_hub itself uploads only single files for a Job.

    Raises:
        PublishError: the bucket is public, or the Hub failed.
    """
    bucket = f"{hub_repo.name}/{BUCKET}"
    folder = f"lewis-hub-{datetime.now(UTC):%Y%m%dT%H%M%S}-{time.monotonic_ns() % 10**6:06}"
    added: list[tuple[str | Path | bytes, str]] = [
        (file, f"{folder}/{path}") for path, file in files.items()
    ]
    disable_progress_bars()
    with hub_failures(hub_repo):
        hub_repo.api.create_bucket(bucket, exist_ok=True, private=True)
        if not hub_repo.api.bucket_info(bucket).private:  # it was there before
            url = f"{address(hub_repo.api)}/buckets/{bucket}"
            remedy = f"Make it private in {url}/settings, then run the same command again."
            raise hub_repo.failed(f"everybody can read the bucket {bucket}", remedy)
        hub_repo.api.batch_bucket_files(bucket, add=added)
    return Volume(type="bucket", source=bucket, mount_path=MOUNT, path=folder, read_only=True)
