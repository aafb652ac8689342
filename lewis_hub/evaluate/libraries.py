"""The libraries that score models, lm-eval and mteb: what each does with a selection of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lewis_hub.evaluate import embedding_tasks
from lewis_hub.evaluate.benchmarks import (
    Commits,
    LoadedTasks,
    ScoredData,
    TaskData,
    load_tasks,
    own_files,
    require_named,
    scored_data,
    task_data,
)
from lewis_hub.evaluate.items import TaskItem, scored_items
from lewis_hub.evaluate.tasks import LibraryName, TaskSelection, locate_tasks, require_metric
from lewis_hub.files import is_hidden, sha256_of
from lewis_hub.hub.source import state_of


@dataclass(frozen=True)
class Library:
    """The functions of a library; most of them take a selection."""

    distribution: str  # its installed version is part of what scores mean
    require_tasks: Callable[[TaskSelection], object]  # refuses unknown ones; nothing is downloaded
    require_metric: Callable[[TaskSelection, str, str], None]
    data: Callable[[TaskSelection], tuple[TaskData, ...]]
    load: Callable[[TaskSelection, Commits], LoadedTasks]
    items: Callable[[LoadedTasks], Iterator[TaskItem]]  # every item of every split that is scored
    scored_data: Callable[[LoadedTasks], dict[str, ScoredData]]
    own_files: Callable[[tuple[str, ...], Path], dict[str, Path]]  # of tasks in a folder


def _embedding_items(loaded: LoadedTasks) -> Iterator[TaskItem]:
    documents = embedding_tasks.items_of(loaded.tasks)
    return (TaskItem(task, "", "", document) for task, document in documents)


LIBRARIES: Mapping[LibraryName, Library] = {
    "lm-eval": Library(
        "lm_eval",
        require_tasks=require_named,
        require_metric=require_metric,
        data=lambda selection: task_data(locate_tasks(selection)),
        load=load_tasks,
        items=scored_items,
        scored_data=scored_data,
        own_files=own_files,
    ),
    "mteb": Library(
        "mteb",
        require_tasks=embedding_tasks.locate_embedding_tasks,
        require_metric=embedding_tasks.require_embedding_metric,
        data=embedding_tasks.embedding_data,
        load=embedding_tasks.load_embedding_tasks,
        items=_embedding_items,
        scored_data=embedding_tasks.scored_embedding_data,
        own_files=embedding_tasks.own_task_files,
    ),
}


def library_of(selection: TaskSelection) -> Library:
    """Return the library that scores a selection of tasks."""
    return LIBRARIES[selection.library]


def scoring_facts(selection: TaskSelection, commits: Commits) -> list[Any]:
    """Return what decides how the answers to tasks are scored, beside their items, for a digest.

    These are the names of the tasks, the digests of the user's task files, the states of the files
    beside their Python, the commits of the data, and the version of the library.
    """
    library, own = library_of(selection), selection.include
    files = library.own_files(selection.names, own) if own else {}
    digests = {path: sha256_of(file) for path, file in files.items()}
    beside = _states_beside(own) if own and any(path.endswith(".py") for path in files) else {}
    installed = version(library.distribution)
    return [selection.names, digests, beside, sorted(commits.values()), installed]


def _states_beside(folder: Path) -> dict[str, str]:
    """Return the states of the files in a folder: its Python may read them by any library."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    seen = [path for path in files if not is_hidden(path.relative_to(folder))]
    return {str(path.relative_to(folder)): state_of(path) for path in seen if path.suffix != ".pyc"}
