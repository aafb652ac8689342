"""Pin the data that tasks read: those that are scored, and those that calibration draws from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.benchmarks import (
    Commits,
    TaskData,
    files_digest,
    is_local,
    require_named,
    task_data,
)
from lewis_hub.evaluate.libraries import library_of
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.hub.dataset_cards import require_own_files
from lewis_hub.hub.resolve import resolve_dataset
from lewis_hub.hub.source import Source


@dataclass(frozen=True)
class PinnedTask:
    """A task or group that calibration draws from."""

    selection: TaskSelection
    digest: str  # over the task files of lm-eval or the user
    datasets: tuple[Source, ...]  # its pinned data; each local file is a source
    commits: Commits  # the commits of its repos, for lm-eval

    @property
    def facts(self) -> dict[str, str]:
        """The facts that determine its items, for a profile."""
        return {
            "dataset": ", ".join(source.pinned for source in self.datasets),
            "dataset_sha": ", ".join(source.commit_sha for source in self.datasets),
            "task_digest": self.digest,
        }


def pin_task(api: HfApi, task: str, revision: str | None, include: Path | None) -> PinnedTask:
    """Find a task's files and pin the data that they name; nothing is run or loaded.

    `revision` replaces the task's own revision of its repo; `include` holds the user's task files.
    """
    asked = TaskSelection((task,), include, allow_code=True, is_calibration=True)
    located = require_named(asked)
    every = task_data(located)
    for data in every:
        _require_pinnable(data)
    repos = dict.fromkeys((data.repo, data.revision) for data in every if data.repo)
    if revision and len(repos) != 1:
        problem = f"it reads {len(repos)} repos, but `revision` needs exactly one."
        raise EvaluationError(task, problem, "Leave `revision` out.")
    pinned = {(name, named): resolve_dataset(api, name, revision or named) for name, named in repos}
    for source in pinned.values():
        require_own_files(api, source)
    files = dict.fromkeys(file for data in every for file in data.files)
    sources = (*pinned.values(), *(resolve_dataset(api, file) for file in files))
    return PinnedTask(asked, files_digest(located), sources, commits_of(pinned))


ScoredSources = Mapping[tuple[str, str | None], Source]  # by name and revision in the task file


def scored_sources(api: HfApi, selected: TaskSelection) -> ScoredSources:
    """Return the repos and folders that scored tasks read.

    Raises:
        SourceError: a repo cannot be found, though the cache of `datasets` may have rows of it, of
            whatever commit; the card of a dataset names data elsewhere, or a folder has links out
            of it.
    """
    every = library_of(selected).data(selected)
    repos = dict.fromkeys((data.repo, data.revision) for data in every if data.repo)
    found = {(name, revision): resolve_dataset(api, name, revision) for name, revision in repos}
    for source in found.values():
        require_own_files(api, source)
    return found


def scored_commits(api: HfApi, selected: TaskSelection) -> Commits:
    """Return the commits of the repos that scored tasks read."""
    return commits_of(scored_sources(api, selected))


def commits_of(pinned: ScoredSources) -> Commits:
    """Return the commits of repos."""
    return {key: source.commit_sha for key, source in pinned.items() if source.folder is None}


def _require_pinnable(data: TaskData) -> None:
    remedy = "Calibrate on another task, or name a `dataset` with a template."
    if data.by_code:
        problem = "makes its items with Python code, so they cannot be pinned."
        raise EvaluationError(data.task, problem, remedy)
    if data.data_dir is not None or not (data.repo or data.files):
        problem = "does not name the files of its data, so they cannot be pinned."
        expected = "Name each file with its folder in `data_files`, without `data_dir`."
        raise EvaluationError(data.task, problem, expected)
    for file in data.files:
        if not is_local(file):
            problem = f"reads `{file}`, which is not a local file, so it cannot be pinned."
            raise EvaluationError(data.task, problem, remedy)
