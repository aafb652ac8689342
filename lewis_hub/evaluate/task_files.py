"""lm-eval's task files read as data: what a name stands for, without running anything in them.

lm-eval's own index of its 14,000 files takes several seconds and imports torch. Here the files'
headers are scanned for names, and only the few files that matter are parsed.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import yaml

from lewis_hub.errors import EvaluationError

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
