"""The lm-eval tasks that a recipe names: their files are read and checked, nothing is run."""

from __future__ import annotations

import difflib
import importlib.resources
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, Literal, TypeVar

from lewis_hub.documents import (
    MAX_DEPTH,
    MAX_YAML_BYTES,
    DocumentError,
    QuickLoader,
    leaves,
    read_yaml,
)
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.code import loads_code, runs_code
from lewis_hub.evaluate.gate import unknown_metric
from lewis_hub.evaluate.harness import quiet_libraries
from lewis_hub.files import require_inside

HEADER = re.compile(rb"""^["']?(task|group|tag)["']?\s*:[ \t]*(.*)((?:\n[ \t]*-[ \t]*.+)*)""", re.M)
NAME = re.compile(r"[^\s,\[\]\"'#-][^\s,\[\]\"'#]*")
NO_FILTER = "none"
DEFAULT_METRICS = {  # by output type: what lm-eval scores where a file names no metrics
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
}
METRIC_NAMES = (  # that lm-eval has itself
    "acc acc_all acc_bytes acc_mutual_info acc_norm bits_per_byte bleu brier_score bypass "
    "byte_perplexity chrf chrf++ exact_match f1 likelihood mcc perplexity ter word_perplexity"
)
METRICS = frozenset(METRIC_NAMES.split())
CORRECT = "Correct the file; docs/task_guide.md of lm-evaluation-harness describes its keys."
ALLOW = "Allow it with `--allow-code-execution`, best in a container without network."
TEXTS = "text and no list of texts"


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(one, str) for one in value)
    )


Check = Callable[[Any], bool]
TYPES: Mapping[str, tuple[Check, str]] = {
    "tag": (_are_texts, TEXTS),
    "dataset_path": (lambda value: isinstance(value, str), "text"),
    "dataset_kwargs": (lambda value: isinstance(value, Mapping), "mapping"),
    "repeats": (lambda value: type(value) is int and value > 0, "whole number from 1 up"),
    **{
        f"{kind}_split": (lambda value: isinstance(value, str), "text")
        for kind in ("training", "validation", "test", "fewshot")
    },
}
OF_GROUPS = frozenset({"aggregate_metric_list", "group", "group_alias", "metadata", "task"})
MAX_READ = 1000  # files for one task
MAX_REACHED = 20_000  # tasks and groups of one name
NAME_A_TASK = "Name one of its tasks, here and in `evaluate.tasks`."


class Function(str):
    """A `!function module.name` of a task file in `folder`; it is not imported."""

    folder: Path

    @property
    def module(self) -> Path:
        """The Python file that lm-eval imports it from, unless it is elsewhere on the path."""
        return self.folder / (self.rpartition(".")[0].replace(".", "/") + ".py")


class TaskLoader(QuickLoader):  # type: ignore[misc, valid-type]
    """A safe YAML loader that also reads a `!function`."""


TaskLoader.add_constructor(
    "!function", lambda loader, node: Function(loader.construct_scalar(node))
)


@dataclass(frozen=True)
class TaskFile:
    """A task or group as its file defines it, merged with the files that it includes."""

    name: str
    path: Path
    config: Mapping[str, Any]
    included: tuple[Path, ...] = ()  # the files that it includes, and those that they include

    def __post_init__(self) -> None:
        """Refuse values of another type, where this program reads them."""
        for key, (are_right, expected) in TYPES.items():
            value = self.config.get(key)
            if not (value is None or are_right(value)):
                raise EvaluationError(str(self.path), f"`{key}` is no {expected}.", CORRECT)

    @property
    def is_group(self) -> bool:
        """Whether it only lists other tasks."""
        return "group" in self.config and "class" not in self.config

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that select this task among others."""
        return tuple(_as_list(self.config.get("tag") or []))

    @property
    def modules(self) -> list[Path]:
        """The files of all Python functions that lm-eval would import for this file."""
        functions = (leaf for leaf in leaves(self.config) if isinstance(leaf, Function))
        return sorted({each.module for each in functions if each.module.is_file()})


@dataclass(frozen=True)
class TaskIndex:
    """Names that lm-eval knows: the files of its tasks and groups, and its tags."""

    files: Mapping[str, Path]
    tags: frozenset[str]


def read_folder(folder: Path) -> dict[str, TaskFile]:
    """Read the tasks and groups in a folder of own task files: name -> file.

    Raises:
        EvaluationError: the folder is missing, or a file in it cannot be read. lm-eval itself
            ignores such a file without a message.
    """
    if not folder.is_dir():
        remedy = "Set `evaluate.include` to the folder with your task files."
        raise EvaluationError(str(folder), "is not a folder.", remedy)
    found: dict[str, TaskFile] = {}
    for path in sorted(folder.glob("**/*.yaml"), key=Path.as_posix):
        require_inside(folder, path, EvaluationError)
        file = read_file(path)
        if file is None:
            continue
        if file.name in found:
            problem = f"task `{file.name}` is also defined in {found[file.name].path}."
            raise EvaluationError(str(path), problem, "Give each task its own name.")
        found[file.name] = file
    return found


def read_file(path: Path) -> TaskFile | None:
    """Read the task or group in a file; None for a file that only others include."""
    included: dict[Path, _Included] = {}
    config = _merged(path, (), included).config
    name = config.get("task") if "class" in config else _name(config)
    return TaskFile(name, path, config, tuple(included)) if isinstance(name, str) else None


@dataclass(frozen=True)
class _Included:
    """The keys of a file, and the number of files that lm-eval reads for it."""

    config: dict[str, Any]
    n_read: int


def _merged(path: Path, above: tuple[Path, ...], known: dict[Path, _Included]) -> _Included:
    """The file's keys over the keys of the files that it includes, as lm-eval merges them.

    `known` gets the included files.
    """
    _require_no_circle(str(path), path, above, "includes")
    config = _parsed(path)
    includes = config.pop("include", None) or []
    if not _are_texts(includes):
        raise EvaluationError(str(path), f"`include` is no {TEXTS}.", CORRECT)
    merged: dict[str, Any] = {}
    n_read = 1
    for include in _as_list(includes):
        included = path.parent / include
        if not _is_file(included):
            raise EvaluationError(str(path), f"includes {included}, which is not a file.", CORRECT)
        place = included.resolve()
        if place not in known:
            known[place] = _merged(place, (*above, path), known)
        merged.update(known[place].config)
        n_read += known[place].n_read
    if n_read > MAX_READ:
        problem = f"leads to {n_read:,} included files, the limit is {MAX_READ:,}."
        raise EvaluationError(str(path), problem, CORRECT)
    return _Included({**merged, **config}, n_read)


def _is_file(path: Path) -> bool:
    with suppress(OSError):  # a name that is too long
        return path.is_file()
    return False


Place = TypeVar("Place")


def _require_no_circle(where: str, place: Place, above: Collection[Place], verb: str) -> None:
    """Refuse what is in itself, or in others more than MAX_DEPTH deep."""
    if place in above:
        raise EvaluationError(where, f"{verb} itself.", CORRECT)
    if len(above) > MAX_DEPTH:
        problem = f"is in others that {verb.removesuffix('s')} each other, {MAX_DEPTH} deep."
        raise EvaluationError(where, problem, CORRECT)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            config = read_yaml(file.read(MAX_YAML_BYTES + 1), TaskLoader)
    except DocumentError as error:
        raise EvaluationError(str(path), f"is not valid YAML: {error}", CORRECT) from error
    if not isinstance(config, dict):
        problem = f"contains a {type(config).__name__}, expected keys such as `task:`."
        raise EvaluationError(str(path), problem, CORRECT)
    for leaf in leaves(config):
        if isinstance(leaf, Function):
            leaf.folder = path.parent
    return config


def bundled_folder() -> Path:
    """The folder of lm-eval's own task files."""
    return Path(str(importlib.resources.files("lm_eval"))) / "tasks"


def scan_headers(folder: Path) -> TaskIndex:
    """Find the names that all files of a folder declare, without parsing them; about a second."""
    files: dict[str, Path] = {}
    tags: set[str] = set()
    for path in _task_files(folder):
        with FileIO(path) as file:
            headers = HEADER.findall(file.readall())
        for key, inline, listed in headers:
            names = NAME.findall((inline + listed).decode(errors="replace"))
            if key == b"tag":
                tags.update(names)
            elif not listed and len(names) == 1 and path.endswith(".yaml"):
                files.setdefault(names[0], Path(path))
    return TaskIndex(files, frozenset(tags))


def _task_files(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            if name.endswith(".yaml") or "." not in name:  # templates often have no suffix
                yield f"{root}/{name}"  # 14,000 files: a Path each doubles the time


LibraryName = Literal["lm-eval", "mteb"]


@dataclass(frozen=True)
class TaskSelection:
    """The tasks, groups or tags to score, and where to look for them.

    Task files are code (functions, templates): a folder from a Hub repo needs `allow_code`.
    """

    names: tuple[str, ...]
    include: Path | None = None  # folder of own task files; they come before lm-eval's
    own_include: bool = True  # it is the user's own
    allow_code: bool = False  # whether tasks may run code that the model writes
    library: LibraryName = "lm-eval"
    is_calibration: bool = False  # whether texts are drawn from them


@dataclass(frozen=True)
class LocatedTasks:
    """The files of a selection."""

    selection: TaskSelection
    selected: tuple[str, ...]  # the tasks and groups that lm-eval loads; tags are expanded
    files: tuple[TaskFile, ...]  # every group and task
    through_tag: bool  # a group lists a tag, which only lm-eval's full index can expand

    @property
    def tasks(self) -> tuple[TaskFile, ...]:
        """The files of the single tasks."""
        return tuple(file for file in self.files if not file.is_group)


def locate_tasks(selection: TaskSelection) -> LocatedTasks:
    """Find the selected tasks and refuse unsafe ones; nothing is run or downloaded.

    Raises:
        EvaluationError: no task, an unknown task, a broken file, or code that is not allowed.
    """
    if not selection.names:
        remedy = "Name at least one in `evaluate.tasks`, or with `--task`."
        raise EvaluationError("evaluate", "no task is named.", remedy)
    if selection.include is not None and not (selection.own_include or selection.allow_code):
        problem = "task files are code, and these come from a Hub repo."
        raise EvaluationError(str(selection.include), problem, f"Read them first. {ALLOW}")
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
    metrics = [metric.get("metric") for metric in _listed(config, "metric_list")]
    unsafe = config.get("unsafe_code", False) is not False or "code_eval" in metrics
    bundled = [m for m in file.modules if include not in {*m.parents, *file.path.parents}]
    if unsafe or runs_code(bundled, bundled_folder()):
        raise EvaluationError(file.name, "runs code that the model writes.", ALLOW)
    if _loads_metric(config) or loads_code(bundled, bundled_folder()):
        raise EvaluationError(file.name, "runs code of a metric that the Hub has.", ALLOW)


def _loads_metric(config: Mapping[str, Any]) -> bool:
    """Whether lm-eval loads a metric by `evaluate`, because it is asked to or has none itself."""
    if "class" in config or config.get("process_results") is not None:
        return False
    return any(
        entry.get("hf_evaluate") is True or entry["metric"] not in METRICS
        for entry in _listed(config, "metric_list")
        if isinstance(entry.get("metric"), str) and not isinstance(entry["metric"], Function)
    )


class _Catalog:
    """Files by name: own files first, then lm-eval's, which are scanned only if they are needed."""

    def __init__(self, include: Path | None) -> None:
        self.own = {} if include is None else read_folder(include)
        self.through_tag = False

    @cached_property
    def bundled(self) -> TaskIndex:
        return scan_headers(bundled_folder())

    @cached_property
    def full_index(self) -> Mapping[str, Any]:
        """lm-eval's own, which takes many seconds: the tasks of a tag may be in any file."""
        from lm_eval.tasks import TaskManager

        with quiet_libraries():
            index: Mapping[str, Any] = TaskManager().task_index
        return index

    def expand(self, name: str) -> Iterator[TaskFile]:
        """The task, or the group and its members, or all tasks of the tag; own ones come first."""
        for n_reached, file in enumerate(self._expand(name, (), {}), start=1):
            if n_reached > MAX_REACHED:
                problem = f"leads to more than {MAX_REACHED:,} tasks and groups."
                raise EvaluationError(name, problem, CORRECT)
            yield file

    def _expand(
        self, name: str, above: tuple[TaskFile, ...], overrides: Mapping[str, Any]
    ) -> Iterator[TaskFile]:
        """The files of a name that the last of the groups `above` lists, with its own keys."""
        parent = above[-1] if above else None
        _require_no_circle(name, name, [group.name for group in above], "lists")
        file = self.own.get(name)
        tagged = sorted(own.name for own in self.own.values() if name in own.tags)
        if file is None and not tagged:
            path = self.bundled.files.get(name)
            file = None if path is None else read_file(path)
            is_tag = file is None and name in self.bundled.tags
            tagged = sorted(self.full_index[name].tags) if is_tag else []
        if file is not None and file.is_group:
            yield file
            inner = {**_for_members(file.config), **overrides}
            yield from self._members((*above, file), file.config.get("task"), inner)
        elif file is not None:
            yield replace(file, config={**file.config, **overrides, "task": name})
        elif not tagged:
            raise self._unknown(name, parent)
        else:
            self.through_tag |= parent is not None
            for member in tagged:
                yield from self._expand(member, above, overrides)

    def _members(
        self, groups: tuple[TaskFile, ...], members: Any, overrides: Mapping[str, Any]
    ) -> Iterator[TaskFile]:
        """The files of what a group lists; as in lm-eval, the keys of a member are over its own."""
        group = groups[-1]
        for member in members if isinstance(members, list) else []:
            if isinstance(member, str):
                yield from self._expand(member, groups, overrides)
                continue
            if not isinstance(member, Mapping):
                problem = f"a member of `{group.name}` is neither a name nor a mapping."
                raise EvaluationError(str(group.path), problem, CORRECT)
            name, keys = _name(member), {**overrides, **_for_members(member)}
            inline = TaskFile(f"{group.name}::{name}", group.path, {**member, **keys})
            if inline.is_group and isinstance(member.get("task"), list):
                yield from self._members((*groups, inline), member["task"], keys)
            elif "dataset_path" in member and name not in [*self.own, *self.bundled.files]:
                yield inline  # a whole task written inside the group
            else:
                yield from self._expand(str(name), groups, keys)

    def _unknown(self, name: str, parent: TaskFile | None) -> EvaluationError:
        known = [*self.own, *self.bundled.files, *self.bundled.tags]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        remedy = f"Nearest: {', '.join(near)}." if near else "`lm-eval ls tasks` lists all names."
        where = f"listed in {parent.path}, " if parent else ""
        return EvaluationError(
            name,
            f"{where}neither lm-eval nor your include folder has such a task.",
            f"{remedy} Put your own task files into the folder that `evaluate.include` names.",
        )


def _name(member: Mapping[str, Any]) -> Any:
    return member.get("group", member.get("task"))


def _for_members(group: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a group, or of a member of one, that replace those of the tasks in it."""
    return {key: value for key, value in group.items() if key not in OF_GROUPS}


def require_metric(selection: TaskSelection, task: str, metric: str) -> None:
    """Refuse a metric (`name,filter`) that the task cannot have; nothing is run or downloaded.

    Metrics that Python code of a task computes are known only after a run, and are not checked.

    Raises:
        EvaluationError: the task is a tag, a group without scores of its own, or has no such
            metric.
    """
    located = locate_tasks(selection)
    file = next((file for file in located.files if file.name == task), None)
    if file is None:
        problem = "it is a tag, which has no scores of its own."
        raise EvaluationError(task, problem, NAME_A_TASK)
    if file.is_group and not _listed(file.config, "aggregate_metric_list"):
        problem = "it is a group without `aggregate_metric_list`, so it has no scores of its own."
        raise EvaluationError(task, problem, NAME_A_TASK)
    known = _declared(file)
    if known is not None and metric not in known:
        raise unknown_metric(task, metric, known)


def declared_metrics(located: LocatedTasks, task: str) -> list[str]:
    """Every `metric,filter` that a gate may name of a task; empty if only a run shows them."""
    file = next((file for file in located.files if file.name == task), None)
    if file is None or (file.is_group and not _listed(file.config, "aggregate_metric_list")):
        return []
    return _declared(file) or []


def _declared(file: TaskFile) -> list[str] | None:
    """Every `metric,filter` of the task; None if only a run shows them."""
    config = file.config
    if file.is_group:
        entries = _listed(config, "aggregate_metric_list")
        if not all("filter_list" in entry for entry in entries):
            return None  # lm-eval looks for filters among the results
        return [
            f"{entry['metric']},{name}"
            for entry in entries
            for name in _as_list(entry["filter_list"])
        ]
    entries = _listed(config, "metric_list")
    in_code = any(isinstance(entry.get("metric"), Function) for entry in entries)
    if in_code or any(entry.get("hf_evaluate") for entry in entries):
        return None
    if "class" in config or config.get("process_results") is not None:
        return None
    default = DEFAULT_METRICS.get(str(config.get("output_type", "generate_until")), ())
    metrics = [str(entry["metric"]) for entry in entries if "metric" in entry] or default
    filters = [str(entry.get("name")) for entry in _listed(config, "filter_list")] or [NO_FILTER]
    return [f"{metric},{name}" for metric in metrics for name in filters]


def _listed(config: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    return [item for item in _as_list(config.get(key)) if isinstance(item, Mapping)]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
