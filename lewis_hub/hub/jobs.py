"""Hugging Face Jobs: run a command of this package on the Hub's machines, now or on a schedule."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import Volume
from huggingface_hub.utils import disable_progress_bars

from lewis_hub.errors import PublishError
from lewis_hub.hub.failures import Asked, hub_failures, no_token
from lewis_hub.hub.retries import complete, persist

if TYPE_CHECKING:
    from huggingface_hub import HfApi


BUCKET = "jobs-artifacts"  # as huggingface_hub calls the one in which it brings files to Jobs
MOUNT = "/recipe"
PYTHON = "3.12"
COMPLETED = "COMPLETED"
EXIT_CODE = re.compile(r"exit code:? (\d+)")


@dataclass(frozen=True)
class JobRequest:
    """What is to run, and on what.

    Attributes:
        words: of the command line after `lewis-hub`.
        files: path below `MOUNT` -> file here; they travel by a private bucket.
        package: what is installed for it, as pip names it.
        flavor: hardware as the Hub names it; None: the Hub's smallest.
        timeout: such as `2h`; None: the Hub's half hour.
        namespace: who pays; None: the token's user.
    """

    words: Sequence[str]
    files: Mapping[str, Path]
    package: str
    flavor: str | None
    timeout: str | None
    namespace: str | None


@dataclass(frozen=True)
class Submitted:
    """A Job, or with `schedule` one that runs again and again."""

    id: str
    namespace: str
    url: str
    schedule: str | None = None


def submit(api: HfApi, request: JobRequest) -> Submitted:
    """Start a Job. Its token travels as a secret, and as nothing else.

    Raises:
        PublishError: no token, no right to run Jobs there, or the Hub failed.
    """
    asked, options = _prepared(api, request)
    with hub_failures(asked), _known_to_be_experimental():
        job = api.run_uv_job("lewis-hub", **options)
    return Submitted(job.id, asked.repo, job.url)


def schedule(api: HfApi, request: JobRequest, cron: str) -> Submitted:
    """Make a Job that runs whenever `cron` says so, in UTC.

    Raises:
        PublishError: as `submit`.
    """
    asked, options = _prepared(api, request)
    with hub_failures(asked), _known_to_be_experimental():
        made = api.create_scheduled_uv_job("lewis-hub", schedule=cron, **options)
    return Submitted(made.id, asked.repo, f"{api.endpoint}/settings/jobs", cron)


def follow(api: HfApi, job: Submitted, say: Callable[[str], None]) -> int | None:
    """Hand on the lines of a Job's log until it ends, each once, whatever breaks on the way.

    Returns:
        The command's exit code; None where the Hub, which names it in the words of the Job's status
        alone, does not.

    Raises:
        PublishError: the Hub stays away. The Job goes on.
    """
    asked = Asked(api, job.namespace, kind=PublishError)
    n_said = 0

    def hand_on() -> None:
        nonlocal n_said
        lines = api.fetch_job_logs(job_id=job.id, follow=True, namespace=job.namespace)
        for line in islice(lines, n_said, None):  # a log comes from its beginning each time
            n_said += 1
            say(line)

    with hub_failures(asked):
        complete(hand_on, lambda: n_said)
        status = persist(lambda: api.wait_for_job(job.id, namespace=job.namespace)).status
        # A connection that breaks when the Job has ended is not told: read on until nothing comes.
        n_before = -1
        while n_said > n_before:
            n_before = n_said
            complete(hand_on, lambda: n_said)
    if status.stage == COMPLETED:
        return 0
    say(f"Job {status.stage}: {status.message or 'the Hub does not say why'}")
    told = EXIT_CODE.search(status.message or "")
    return int(told[1]) if told else None


def scheduled(api: HfApi, namespace: str | None) -> list[dict[str, Any]]:
    """The schedules in a namespace that run this package."""
    asked = _asked(api, namespace)
    with hub_failures(asked):
        found = persist(lambda: api.list_scheduled_jobs(namespace=asked.repo))
    return [
        {
            "id": one.id,
            "schedule": one.schedule,
            "command": " ".join(one.job_spec.command or ()),
            "flavor": one.job_spec.flavor,
        }
        for one in found
        if "lewis-hub" in (one.job_spec.command or ())
    ]


def unschedule(api: HfApi, job_id: str, namespace: str | None) -> None:
    """Remove a schedule; what it started goes on."""
    asked = _asked(api, namespace)
    with hub_failures(asked):
        api.delete_scheduled_job(scheduled_job_id=job_id, namespace=asked.repo)


def _prepared(api: HfApi, request: JobRequest) -> tuple[Asked, dict[str, Any]]:
    asked = _asked(api, request.namespace)
    options = {
        "script_args": list(request.words),
        "dependencies": [request.package],
        "python": PYTHON,
        "flavor": request.flavor,
        "timeout": request.timeout,
        "secrets": {"HF_TOKEN": asked.token},
        "volumes": [_shipped(asked, request.files)],
        "namespace": asked.repo,
    }
    return asked, options


@contextmanager
def _known_to_be_experimental() -> Iterator[None]:
    """huggingface_hub warns of its functions for uv; a user of ours can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is experimental", UserWarning)
        yield


def _asked(api: HfApi, namespace: str | None) -> Asked:
    """The namespace in which Jobs run, for messages too."""
    nobody = Asked(api, namespace or "Hugging Face Jobs", kind=PublishError)
    if nobody.token is None:
        raise no_token(nobody)
    if namespace:
        return nobody
    with hub_failures(nobody):
        return Asked(api, persist(lambda: api.whoami())["name"], kind=PublishError)


def _shipped(asked: Asked, files: Mapping[str, Path]) -> Volume:
    """Bring files to a folder of their own in the namespace's private bucket.

    huggingface_hub's own shipping takes single files and no folders.
    """
    bucket = f"{asked.repo}/{BUCKET}"
    folder = f"lewis-hub-{datetime.now(UTC):%Y%m%dT%H%M%S}-{time.monotonic_ns() % 10**6:06}"
    added: list[tuple[str | Path | bytes, str]] = [
        (file, f"{folder}/{path}") for path, file in files.items()
    ]
    disable_progress_bars()
    with hub_failures(asked):
        asked.api.create_bucket(bucket, exist_ok=True, private=True)
        asked.api.batch_bucket_files(bucket, add=added)
    return Volume(type="bucket", source=bucket, mount_path=MOUNT, path=folder, read_only=True)
