"""What tasks read: each dataset's repo, folder or files, and lm-eval held to one commit of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis_hub.evaluate.task_files import TaskFile
from lewis_hub.evaluate.tasks import LocatedTasks
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
