"""Decide of which tasks the report shows questions and answers: only of public data, unless asked.

Data beside the user's own task files count as public, because they are published with the merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from lewis_hub.evaluate.benchmarks import TaskData, task_data
from lewis_hub.evaluate.items import first_items
from lewis_hub.evaluate.samples import Samples, collect_samples
from lewis_hub.evaluate.scores import ModelResult
from lewis_hub.evaluate.tasks import locate_tasks
from lewis_hub.files import is_hidden
from lewis_hub.workflow.task_data import ScoredSources
from lewis_hub.workflow.texts import ScoredTasks

LogSamples = Literal["public", "all", "none"]  # the tasks with questions and answers
ASK = "`evaluate.log_samples: all` in the recipe shows them."


def samples_of(
    results: Mapping[str, ModelResult], tasks: ScoredTasks, limit: int | None, shown: LogSamples
) -> Samples:
    """Return the items of a merge and its rivals; of closed data without questions and answers."""
    left_out = dict(_left_out(tasks, shown))
    hidden = shown == "none" or tasks.selection.library == "mteb"
    items = {} if hidden else first_items(tasks.loaded, limit)
    return collect_samples(results, items, left_out)


def _left_out(tasks: ScoredTasks, shown: LogSamples) -> Iterator[tuple[str, str]]:
    """Yield each task without questions and answers, and why."""
    if tasks.selection.library == "mteb":
        yield from ((name, "mteb's tasks have no answers.") for name in tasks.loaded.tasks)
    elif shown == "none":
        names = (*tasks.loaded.tasks, *tasks.loaded.groups)
        yield from ((name, "The recipe sets `log_samples: none`.") for name in names)
    elif shown == "public":
        include = tasks.selection.include
        for data in task_data(locate_tasks(tasks.selection)):
            if why := closed(data, tasks.sources, include):
                yield data.task, f"{why} {ASK}"


def closed(data: TaskData, sources: ScoredSources, include: Path | None) -> str | None:
    """Return why the data of a task may not be public; None if they are.

    Args:
        data: where the rows come from.
        sources: the pinned repos and folders.
        include: folder of the user's own task files.
    """
    if data.by_code:
        return "Python code makes its items, so it is unknown whether they are public."
    if data.repo:
        source = sources.get((data.repo, data.revision))
        if source and source.folder:
            return None if is_beside(source.folder, include) else "Its data are in a local folder."
        access = source.access if source else None
        if access is None:
            return f"It is unknown whether the dataset {data.repo} is public."
        return None if access == "public" else f"The dataset {data.repo} is {access}."
    if not data.files:
        return "It is unknown where its data come from."
    if all(is_beside(Path(file), include) for file in data.files):
        return None
    return "Its data are files outside of the folder of its task."


def is_beside(path: Path, include: Path | None) -> bool:
    """Return whether data are beside the user's own task files, which become part of a merge.

    Hidden files do not.
    """
    if include is None or not path.resolve().is_relative_to(include.resolve()):
        return False
    return not is_hidden(path.resolve().relative_to(include.resolve()))
