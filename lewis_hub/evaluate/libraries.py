"""The libraries that score models, lm-eval and mteb: what each does with a selection of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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
