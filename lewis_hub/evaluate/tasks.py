"""Which benchmarks a recipe names: found and checked for safety, without running anything."""

from __future__ import annotations

import difflib
import importlib.resources
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.gate import unknown_metric

_HEADER = re.compile(
    rb"""^["']?(task|group|tag)["']?\s*:[ \t]*(.*)((?:\n[ \t]*-[ \t]*.+)*)""", re.M
)
_NAME = re.compile(r"[^\s,\[\]\"'#-][^\s,\[\]\"'#]*")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FIX = "Correct the file; docs/task_guide.md of lm-evaluation-harness describes its keys."


class Function(str):
    """A `!function module.name` of a task file, not imported; `folder` is where it is written."""

    folder: Path

    @property
    def module(self) -> Path:
        """The Python file that it would be taken from, if that lies beside the task file."""
        return self.folder / (self.rpartition(".")[0].replace(".", "/") + ".py")


@dataclass(frozen=True)
class TaskFile:
    """A task or group as its file says it, with the files that it includes merged in."""

    name: str
    path: Path
    config: Mapping[str, Any]

    @property
    def is_group(self) -> bool:
        """Whether it only lists other tasks."""
        return "group" in self.config and "class" not in self.config

    @property
    def tags(self) -> tuple[str, ...]:
        """The names that stand for this task among others."""
        tags = self.config.get("tag") or ()
        return (tags,) if isinstance(tags, str) else tuple(tags)

    def functions(self) -> Iterator[Function]:
        """Every Python function that the file would have lm-eval import."""
        yield from _functions(self.config)


@dataclass(frozen=True)
class Headers:
    """Names that lm-eval brings along: files of its tasks and groups, and its tags."""

    files: Mapping[str, Path]
    tags: frozenset[str]


def read_folder(folder: Path) -> dict[str, TaskFile]:
    """Name -> file of the tasks and groups in a folder of own task files.

    Raises:
        EvaluationError: the folder is missing, or a file in it cannot be read; lm-eval itself
            would silently leave that file out.
    """
    if not folder.is_dir():
        remedy = "Name the folder that holds your task files in `evaluate.include`."
        raise EvaluationError(str(folder), "is no folder.", remedy)
    found: dict[str, TaskFile] = {}
    for path in sorted(folder.glob("**/*.yaml"), key=Path.as_posix):
        file = read_file(path)
        if file is None:
            continue
        if file.name in found:
            problem = f"task `{file.name}` is in {found[file.name].path} too."
            raise EvaluationError(str(path), problem, "Give each task its own name.")
        found[file.name] = file
    return found


def read_file(path: Path) -> TaskFile | None:
    """The task or group in a file; None for one that only others include."""
    config = _merged(path, ())
    name = config.get("group", config.get("task")) if "class" not in config else config.get("task")
    return TaskFile(name, path, config) if isinstance(name, str) else None


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in a file over those that it includes, as lm-eval merges them."""
    if path in seen:
        raise EvaluationError(str(path), "includes itself.", _FIX)
    config = _parsed(path)
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        included = path.parent / include
        if not included.is_file():
            raise EvaluationError(str(path), f"includes {included}, which is no file.", _FIX)
        merged.update(_merged(included.resolve(), (*seen, path)))
    return {**merged, **config}


def _parsed(path: Path) -> dict[str, Any]:
    loader = type("TaskLoader", (_LOADER,), {})
    loader.add_constructor("!function", partial(_function, path.parent))  # type: ignore[attr-defined]
    try:
        config = yaml.load(path.read_bytes(), Loader=loader)  # noqa: S506 - built on a safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EvaluationError(str(path), f"is not valid YAML: {error}", _FIX) from error
    if not isinstance(config, dict):
        problem = f"holds a {type(config).__name__}, expected keys such as `task:`."
        raise EvaluationError(str(path), problem, _FIX)
    return config


def _function(folder: Path, loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Function:
    function = Function(loader.construct_scalar(node))
    function.folder = folder
    return function


def _functions(value: Any) -> Iterator[Function]:
    if isinstance(value, Function):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _functions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _functions(item)


def bundled_folder() -> Path:
    """Where lm-eval keeps its task files."""
    return Path(str(importlib.resources.files("lm_eval"))) / "tasks"


def scan_headers(folder: Path) -> Headers:
    """The names in all files of a folder, by the few lines that declare them; about a second."""
    files: dict[str, Path] = {}
    tags: set[str] = set()
    for path in _task_files(folder):
        with FileIO(path) as file:
            headers = _HEADER.findall(file.readall())
        for key, inline, listed in headers:
            names = _NAME.findall((inline + listed).decode(errors="replace"))
            if key == b"tag":
                tags.update(names)
            elif not listed and len(names) == 1 and path.endswith(".yaml"):
                files.setdefault(names[0], Path(path))
    return Headers(files, frozenset(tags))


def _task_files(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            if name.endswith(".yaml") or "." not in name:  # templates often have no suffix
                yield f"{root}/{name}"  # 14,000 of them: a Path each would double the time


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

    with quiet_libraries():
        return sorted(TaskManager().task_index[tag].tags)


NO_FILTER = "none"
BY_OUTPUT = {  # what lm-eval scores where a file names no metrics
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
}


def require_metric(selection: TaskSelection, task: str, metric: str) -> None:
    """Refuse a metric (`name,filter`) that the task cannot have; nothing is run or downloaded.

    Files that leave their metrics to Python code tell them only once they have run.

    Raises:
        EvaluationError: the task is a tag, a group without scores of its own, or has no such
            metric.
    """
    located = locate_tasks(selection)
    file = next((file for file in located.files if file.name == task), None)
    if file is None:
        problem = "it is a tag, which has no scores of its own."
        raise EvaluationError(task, problem, "Name one of its tasks, here and in `evaluate.tasks`.")
    if file.is_group and not _listed(file.config, "aggregate_metric_list"):
        problem = "it is a group without `aggregate_metric_list`, so it has no scores of its own."
        raise EvaluationError(task, problem, "Name one of its tasks, here and in `evaluate.tasks`.")
    known = _declared(file)
    if known is not None and metric not in known:
        raise unknown_metric(task, metric, known)


def _declared(file: TaskFile) -> list[str] | None:
    """Every `metric,filter`; None where only running the task tells."""
    config = file.config
    if file.is_group:
        entries = _listed(config, "aggregate_metric_list")
        if not all("filter_list" in entry for entry in entries):
            return None  # lm-eval looks for filters among the results
        return [f"{one['metric']},{name}" for one in entries for name in _names(one["filter_list"])]
    entries = _listed(config, "metric_list")
    in_code = any(isinstance(entry.get("metric"), Function) for entry in entries)
    if in_code or any(entry.get("hf_evaluate") for entry in entries):
        return None
    if "class" in config or config.get("process_results") is not None:
        return None
    default = BY_OUTPUT.get(str(config.get("output_type", "generate_until")), ())
    metrics = [str(entry["metric"]) for entry in entries if "metric" in entry] or default
    filters = [str(one.get("name")) for one in _listed(config, "filter_list")] or [NO_FILTER]
    return [f"{metric},{name}" for metric in metrics for name in filters]


def _listed(config: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = config.get(key)
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, Mapping)]


def _names(value: Any) -> list[str]:
    return [str(name) for name in (value if isinstance(value, list) else [value])]


LOGGERS = ("lm_eval", "datasets", "transformers", "accelerate", "huggingface_hub")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back warnings, log lines below an error and progress bars of lm-eval and what it calls.

    Everything is as before afterwards. Nothing of ours runs inside but the calls to lm-eval.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        _hide_bars(stack)  # imports the libraries, and with that sets their log levels
        for name in LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def _hide_bars(stack: ExitStack) -> None:
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from datasets import utils as datasets_utils
    from transformers.utils import logging as untyped

    transformers_logging: Any = untyped

    if not datasets_utils.are_progress_bars_disabled():
        datasets_utils.disable_progress_bars()
        stack.callback(datasets_utils.enable_progress_bars)
    if transformers_logging.is_progress_bar_enabled():
        transformers_logging.disable_progress_bar()
        stack.callback(transformers_logging.enable_progress_bar)
    # lm-eval has no switch for its bars: the name that each of its modules draws them by is lent
    for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
        _lend_silent_bar(stack, module)


def _lend_silent_bar(stack: ExitStack, module: ModuleType) -> None:
    bar: Any = module.tqdm

    def silent(*args: Any, **kwargs: Any) -> Any:
        return bar(*args, **{**kwargs, "disable": True})

    stack.callback(setattr, module, "tqdm", bar)
    module.tqdm = silent  # type: ignore[attr-defined]


@contextmanager
def compiled_once() -> Iterator[None]:
    """Have lm-eval reuse a template that it has compiled before.

    Compiling them anew was more than half of the time of a small model's evaluation. A template
    holds no state, so what it renders is the same.
    """
    from lm_eval import utils

    environment: Any = utils.env
    environment.from_string = lru_cache(maxsize=256)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the instance's own; the method of its class is back
