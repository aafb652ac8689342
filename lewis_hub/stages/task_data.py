"""Pin what lm-eval's tasks read: each dataset at one commit, each local file by its content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.errors import EvaluationError, SourceError
from lewis_hub.evaluate.data import Commits, TaskData, files_digest, is_local, task_data
from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks
from lewis_hub.hub.resolve import resolve_dataset
from lewis_hub.hub.source import Source
from lewis_hub.recipe_calibration import Calibration

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class PinnedTask:
    """A task or group that calibration draws from.

    Attributes:
        selection: how lm-eval is asked for it. Who loads it says whether code is allowed.
        digest: over its files, as lm-eval or the user wrote them.
        datasets: what it reads, pinned; local files stand one by one.
        commits: the same for lm-eval; folders and files have none.
    """

    selection: TaskSelection
    digest: str
    datasets: tuple[Source, ...]
    commits: Commits

    @property
    def facts(self) -> dict[str, str]:
        """What fixes its items, for a profile."""
        return {
            "dataset": ", ".join(source.pinned for source in self.datasets),
            "dataset_sha": ", ".join(source.commit_sha for source in self.datasets),
            "task_digest": self.digest,
        }


def pin_task(api: HfApi, calibration: Calibration, include: Path | None) -> PinnedTask:
    """Find a task's files and pin what they read; nothing is run or loaded.

    Args:
        api: the Hub.
        calibration: on a task.
        include: its folder of own task files, located.

    Raises:
        EvaluationError: no such task, or its data cannot be pinned.
        SourceError: a dataset cannot be found or may not be read.
    """
    assert calibration.task
    asked = TaskSelection((calibration.task,), include, allow_code=True)
    located = locate_tasks(asked)
    every = task_data(located)
    for data in every:
        _require_pinnable(data)
    repos = dict.fromkeys((data.repo, data.revision) for data in every if data.repo)
    if calibration.revision and len(repos) != 1:
        problem = f"it reads {len(repos)} repos, and `revision` names a commit of one."
        raise EvaluationError(calibration.task, problem, "Leave `revision` out.")
    pinned = {
        (name, revision): resolve_dataset(api, name, calibration.revision or revision)
        for name, revision in repos
    }
    files = dict.fromkeys(file for data in every for file in data.files)
    sources = (*pinned.values(), *(resolve_dataset(api, file) for file in files))
    return PinnedTask(asked, files_digest(located), sources, _commits(pinned))


def scored_commits(api: HfApi, selected: TaskSelection) -> Commits:
    """The commits of the repos that scored tasks read.

    One that cannot be looked up stays unpinned: lm-eval then says what is wrong with it, or has
    its rows in a cache.
    """
    asked = ((data.repo, data.revision) for data in task_data(locate_tasks(selected)))
    repos = dict.fromkeys((name, revision) for name, revision in asked if name)
    return _commits(dict(_found(api, repos)))


def _found(
    api: HfApi, repos: dict[tuple[str, str | None], None]
) -> Iterator[tuple[tuple[str, str | None], Source]]:
    for name, revision in repos:
        try:
            yield (name, revision), resolve_dataset(api, name, revision)
        except SourceError:
            continue


def _commits(pinned: dict[tuple[str, str | None], Source]) -> Commits:
    return {key: source.commit_sha for key, source in pinned.items() if source.folder is None}


def _require_pinnable(data: TaskData) -> None:
    remedy = "Calibrate on another task, or name a `dataset` with a template."
    if data.by_code:
        problem = "makes its items by Python, and what they are today cannot be pinned."
        raise EvaluationError(data.task, problem, remedy)
    for file in data.files:
        if not is_local(file):
            problem = f"reads `{file}`, which is no file here, so that it cannot be pinned."
            raise EvaluationError(data.task, problem, remedy)
