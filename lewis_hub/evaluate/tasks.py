"""Which benchmarks a recipe names: found and checked for safety, without running anything."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.task_files import (
    Headers,
    TaskFile,
    bundled_folder,
    read_file,
    read_folder,
    scan_headers,
)

# What a bundled task's Python says when it runs what a model wrote, marked unsafe or not.
_RUNS_CODE = re.compile(r"\bexec\(|\bcode_eval\b|\bsubprocess\.(run|Popen|call|check_)|\bPopen\(")
_ALLOW = "Allow it with `--allow-code-execution`, best in a container without network."


@dataclass(frozen=True)
class TaskSelection:
    """The tasks, groups or tags to score, and where to look for them.

    Attributes:
        include: folder of own task files; they come before lm-eval's.
        own_include: whether that folder is the user's own. Task files are code (Python functions,
            unrestricted templates), so one that came from a Hub repo needs `allow_code`.
        allow_code: whether tasks may run what a model wrote.
    """

    names: tuple[str, ...]
    include: Path | None = None
    own_include: bool = True
    allow_code: bool = False


@dataclass(frozen=True)
class TaskFacts:
    """A single task behind a selection; `dataset` is a repo, or a format such as `json`."""

    name: str
    dataset: str | None
    config: str | None


@dataclass(frozen=True)
class LocatedTasks:
    """A selection's files.

    Attributes:
        selected: what lm-eval is asked for: tasks and groups; tags are already spelt out.
        files: every group and task that is reached.
        through_tag: whether a group lists a tag, which only lm-eval's full index can expand.
    """

    selection: TaskSelection
    selected: tuple[str, ...]
    files: tuple[TaskFile, ...]
    through_tag: bool


def check_tasks(selection: TaskSelection) -> tuple[TaskFacts, ...]:
    """Find what is selected and refuse what is missing or unsafe; nothing is run or downloaded.

    Returns:
        The single tasks that groups and tags stand for, so that their data can be checked.

    Raises:
        EvaluationError: no task, an unknown one, a broken file, or code that is not allowed.
    """
    return tuple(
        TaskFacts(file.name, file.config.get("dataset_path"), file.config.get("dataset_name"))
        for file in locate_tasks(selection).files
        if not file.is_group
    )


def locate_tasks(selection: TaskSelection) -> LocatedTasks:
    """The files of what is selected, checked as `check_tasks` says."""
    if not selection.names:
        remedy = "Name at least one in `evaluate.tasks`, or by `--task`."
        raise EvaluationError("evaluate", "no task is named.", remedy)
    if selection.include is not None and not (selection.own_include or selection.allow_code):
        problem = "task files are code, and these came from a Hub repo."
        raise EvaluationError(str(selection.include), problem, f"Read them first. {_ALLOW}")
    catalog = _Catalog(selection.include)
    files: dict[str, TaskFile] = {}
    selected: dict[str, None] = {}
    for name in selection.names:
        reached = list(catalog.expand(name))
        is_tag = reached[0].name != name
        selected.update(dict.fromkeys(file.name for file in (reached if is_tag else reached[:1])))
        files.update((file.name, file) for file in reached)
    if not selection.allow_code:
        for file in files.values():
            _refuse_code(file, selection.include)
    return LocatedTasks(selection, tuple(selected), tuple(files.values()), catalog.through_tag)


def _refuse_code(file: TaskFile, include: Path | None) -> None:
    config = file.config
    metrics = [m.get("metric") for m in config.get("metric_list") or () if isinstance(m, Mapping)]
    unsafe = config.get("unsafe_code", False) is not False or "code_eval" in metrics
    if not unsafe and (include is None or not file.path.is_relative_to(include)):
        modules = {function.module for function in file.functions()}
        unsafe = any(
            _RUNS_CODE.search(module.read_text(encoding="utf-8"))
            for module in modules
            if module.is_file()
        )
    if unsafe:
        raise EvaluationError(file.name, "runs code that the model writes.", _ALLOW)


class _Catalog:
    """Names to files: own ones first, then lm-eval's, which are only scanned when needed."""

    def __init__(self, include: Path | None) -> None:
        self.own = {} if include is None else read_folder(include)
        self.through_tag = False

    @cached_property
    def bundled(self) -> Headers:
        return scan_headers(bundled_folder())

    def expand(self, name: str, parent: TaskFile | None = None) -> Iterator[TaskFile]:
        """The task, or the group and all that it lists, or all tasks of the tag.

        Args:
            name: own names and tags hide those of lm-eval.
            parent: the group that lists it.
        """
        file = self.own.get(name)
        tagged = sorted(own.name for own in self.own.values() if name in own.tags)
        if file is None and not tagged:
            path = self.bundled.files.get(name)
            file = None if path is None else read_file(path)
            tagged = _bundled_tag(name) if file is None and name in self.bundled.tags else []
        if file is not None:
            yield file
            if file.is_group:
                yield from self._members(file, file.config.get("task"))
            return
        if not tagged:
            raise self._unknown(name, parent)
        self.through_tag |= parent is not None
        for member in tagged:
            yield from self.expand(member, parent)

    def _members(self, group: TaskFile, members: Any) -> Iterator[TaskFile]:
        for member in members if isinstance(members, list) else []:
            if isinstance(member, str):
                yield from self.expand(member, group)
                continue
            inline = TaskFile(f"{group.name}::{_name(member)}", group.path, member)
            if inline.is_group and isinstance(member.get("task"), list):
                yield from self._members(inline, member["task"])
            elif "dataset_path" in member:  # a whole task written inside the group
                yield inline
            else:
                yield from self.expand(str(_name(member)), group)

    def _unknown(self, name: str, parent: TaskFile | None) -> EvaluationError:
        known = [*self.own, *self.bundled.files, *self.bundled.tags]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        remedy = f"Nearest: {', '.join(near)}." if near else "`lm-eval ls tasks` lists all names."
        where = f"listed in {parent.path}, " if parent else ""
        return EvaluationError(
            name,
            f"{where}neither lm-eval nor your include folder has such a task.",
            f"{remedy} Own task files go into a folder that `evaluate.include` names.",
        )


def _name(member: Mapping[str, Any]) -> Any:
    return member.get("group", member.get("task"))


def _bundled_tag(tag: str) -> list[str]:
    """The tasks of one of lm-eval's tags: they may lie anywhere, so this takes its full index."""
    from lm_eval.tasks import TaskManager

    from lewis_hub.evaluate.quiet import quiet_libraries

    with quiet_libraries():
        return sorted(TaskManager().task_index[tag].tags)
