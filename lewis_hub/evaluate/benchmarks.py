"""The selected tasks with their data and prompts, built once for all models that are scored."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.tasks import (
    LocatedTasks,
    TaskFile,
    TaskSelection,
    compiled_once,
    locate_tasks,
    quiet_libraries,
)
from lewis_hub.hub.rows import commit_cache

FORMATS = frozenset({"arrow", "csv", "json", "parquet", "text"})

Commits = Mapping[tuple[str, str | None], str]  # (repo, revision as the task asks) -> commit sha


@dataclass(frozen=True)
class TaskData:
    """Where a task's rows come from.

    Attributes:
        repo: a dataset's repo or folder; None where `files` are named one by one.
        revision: as the task's file asks.
        files: local files, or whatever else `data_files` names.
        by_code: made by a Python function, so that nothing can be told of it.
    """

    task: str
    repo: str | None
    revision: str | None
    files: tuple[str, ...]
    by_code: bool


def task_data(located: LocatedTasks) -> tuple[TaskData, ...]:
    """The data of every single task of a selection, as the task files say."""
    return tuple(_data(file) for file in located.files if not file.is_group)


def _data(file: TaskFile) -> TaskData:
    config = file.config
    path, asked = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    by_code = "custom_dataset" in config or not isinstance(path, str)
    if path in FORMATS:
        return TaskData(file.name, None, None, tuple(_texts(asked.get("data_files"))), by_code)
    return TaskData(file.name, path, asked.get("revision"), (), by_code)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def free_split(located: LocatedTasks) -> str | None:
    """A split that all tasks of a selection give examples from and none of them scores."""
    free: list[set[str]] = []
    for config in (file.config for file in located.files if not file.is_group):
        scored = config.get("test_split") or config.get("validation_split")
        shown = {config.get("training_split"), config.get("fewshot_split")}
        free.append({split for split in shown if isinstance(split, str) and split != scored})
    common = sorted(set.intersection(*free)) if free else []
    return common[0] if common else None


def files_digest(located: LocatedTasks) -> str:
    """Over all that task files say, what they include and the Python that they name."""
    told: dict[str, Any] = {}
    for file in located.files:
        modules = {f.module for f in file.functions() if f.module.is_file()}
        texts = sorted(hashlib.sha256(module.read_bytes()).hexdigest() for module in modules)
        told[file.name] = [_without_data(file.config), texts]
    written = json.dumps(told, sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(written.encode()).hexdigest()


def _without_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """The file without where its data lie: their content has digests of its own."""
    asked = config.get("dataset_kwargs") or {}
    kept = {key: value for key, value in asked.items() if key not in ("data_files", "revision")}
    return {**config, "dataset_kwargs": kept}


@contextmanager
def at_commits(commits: Commits) -> Iterator[None]:
    """Have lm-eval load each repo at its commit; others as the task's file says.

    Each commit has a cache of its own: where a repo cannot be read, `datasets` takes whatever
    commit of it lies in its cache.
    """
    import datasets

    load: Any = datasets.load_dataset

    def load_at_commit(path: str, *args: Any, **kwargs: Any) -> Any:
        commit = commits.get((path, kwargs.get("revision")))
        if commit:
            kwargs |= {"revision": commit, "cache_dir": commit_cache(commit)}
        return load(path, *args, **kwargs)

    datasets.load_dataset = load_at_commit
    try:
        yield
    finally:
        datasets.load_dataset = load


def is_local(file: str) -> bool:
    """Whether a data file lies on this machine."""
    return "://" not in file and Path(file).is_file()


FEWSHOT_SEED = 1234  # the same examples for every model and run
UNKNOWN_KEY = re.compile(r"TaskConfig.*unexpected keyword argument '([^']+)'")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        commits: what their datasets were pinned to.
        tasks: lm-eval's task objects by name, `groups` its group objects.
    """

    selection: TaskSelection
    commits: Commits
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]


@dataclass(frozen=True)
class Benchmarks:
    """Tasks that are ready for any number of models.

    Attributes:
        tasks: lm-eval's task objects by name, `groups` its group objects.
        n_requests: what one model has to answer, the total for `advance`.
        limit: only so many first items of each task are scored; None: all.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    n_requests: int
    limit: int | None
    allow_code: bool


def load_tasks(selection: TaskSelection, commits: Commits) -> LoadedTasks:
    """Build the tasks and fetch their data.

    Args:
        selection: which tasks.
        commits: what datasets are pinned to; others are loaded at their newest.

    Raises:
        EvaluationError: as `check_tasks`; or data that are missing or do not fit the task.
    """
    located = locate_tasks(selection)
    with prepared(selection, commits):
        return LoadedTasks(selection, commits, *build(located))


def with_prompts(loaded: LoadedTasks, limit: int | None = None) -> Benchmarks:
    """Make the prompts of the first `limit` items of each task; None: of all.

    Raises:
        EvaluationError: a task is empty, no text, or its prompts do not fit its data.
    """
    tasks, selection = loaded.tasks, loaded.selection
    with prepared(selection, {}):
        n_requests = sum(count_requests(name, task, limit) for name, task in tasks.items())
    return Benchmarks(tasks, loaded.groups, n_requests, limit, selection.allow_code)


@contextmanager
def prepared(selection: TaskSelection, commits: Commits) -> Iterator[None]:
    """All that lm-eval needs around it while tasks are built or their items rendered."""
    code = code_allowed(allowed=selection.allow_code)
    with quiet_libraries(), code, compiled_once(), at_commits(commits):
        yield


@contextmanager
def code_allowed(*, allowed: bool) -> Iterator[None]:
    """Let the `evaluate` library run generated code meanwhile, if the user allowed it."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    os.environ["HF_ALLOW_CODE_EVAL"] = "1" if allowed else "0"
    try:
        yield
    finally:
        del os.environ["HF_ALLOW_CODE_EVAL"]
        if before is not None:
            os.environ["HF_ALLOW_CODE_EVAL"] = before


def reset_fewshot(task: Any) -> None:
    """Draw the same few-shot examples again: lm-eval's sampler moves on with every model."""
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(FEWSHOT_SEED)


def build(located: LocatedTasks) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm-eval's task and group objects by their names, with their data."""
    from lm_eval.tasks import TaskManager

    include = located.selection.include
    own = [] if include is None else [include]
    bundled = {file.path.parent for file in located.files} if not located.through_tag else set()
    folders = sorted(folder for folder in bundled if not any(map(folder.is_relative_to, own)))
    manager = TaskManager(include_path=[*folders, *own], include_defaults=located.through_tag)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in located.selected:
        with told_of(name, located):
            loaded = manager.load([name])
        tasks.update(loaded["tasks"])
        groups.update(loaded["groups"])
    return tasks, groups


def count_requests(name: str, task: Any, limit: int | None) -> int:
    """Requests of the task's items, by building them once as every model's run will."""
    if getattr(task, "MULTIMODAL", False):
        problem = "asks about pictures or sound, and a merged language model reads text."
        raise EvaluationError(name, problem, "Choose a text task.")
    with told_of(name):
        reset_fewshot(task)
        task.build_all_requests(limit=limit)
    return sum(request.repeats for request in task.instances)


@contextmanager
def told_of(name: str, located: LocatedTasks | None = None) -> Iterator[None]:
    """Turn what lm-eval and datasets raise over a task into one message about that task."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        yield
    except (OSError, DatasetsError) as error:
        raise _data_error(name, located, error) from error
    except ImportError as error:
        remedy = "Install what the task needs, or choose another task."
        raise EvaluationError(name, f"cannot be loaded: {error}.", remedy) from error
    except (IndexError, StopIteration) as error:  # an empty split, an empty file
        remedy = "Check its `test_split` (or `validation_split`) and its data."
        raise EvaluationError(name, "has no items to score.", remedy) from error
    except (ValueError, KeyError, TypeError, AttributeError, TemplateError) as error:
        key = UNKNOWN_KEY.search(str(error))
        told = f"lm-eval has no key `{key[1]}`." if key else f"{type(error).__name__}: {error}"
        problem = f"cannot be built: {told}"
        remedy = "Check the task's file: its keys, splits, columns and metrics."
        raise EvaluationError(name, problem, remedy) from error


def _data_error(name: str, located: LocatedTasks | None, error: Exception) -> EvaluationError:
    files = {file.name: file for file in located.files} if located else {}
    dataset = files[name].config.get("dataset_path") if name in files else None
    data = f"its data `{dataset}`" if dataset else "its data"
    first_line = str(error).partition("\n")[0]
    return EvaluationError(
        name,
        f"{data} cannot be loaded: {first_line}",
        "Check `dataset_path`, `dataset_name` and `data_files` (a relative one starts at the\n"
        "working folder), your network, and whether the dataset needs `hf auth login`.",
    )
