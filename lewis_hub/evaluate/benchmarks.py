"""The selected tasks with their data and prompts, built once for all models that are scored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from lewis_hub.audit_hook import opening_only
from lewis_hub.display import shortened
from lewis_hub.documents import texts_in
from lewis_hub.errors import EvaluationError, LewisHubError, SourceError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.code import named_files, with_imports
from lewis_hub.evaluate.harness import (
    GENERATE,
    LONGEST_CAUSE,
    Benchmarks,
    configure,
    library_settings,
    reset_fewshot,
)
from lewis_hub.evaluate.tasks import (
    LocatedTasks,
    TaskFile,
    TaskSelection,
    bundled_folder,
    locate_tasks,
    read_folder,
)
from lewis_hub.evaluate.text_limits import (
    TEXT_BYTES,
    TOKEN_BYTES,
    HeldTexts,
    counting_examples,
    counting_requests,
    require_short_targets,
)
from lewis_hub.files import (
    is_hidden,
    part_of,
    raise_if_of_the_disk,
    require_no_link_out,
    visible_files,
)
from lewis_hub.hub.cached_rows import computed_anew
from lewis_hub.hub.dataset_cards import CARDS, ELSEWHERE
from lewis_hub.hub.resolve import DATA_SUFFIXES, resolve_dataset
from lewis_hub.hub.rows import commit_cache, library, only_pinned, only_tables
from lewis_hub.limits import TooMuchError, limited

FORMATS = frozenset({"arrow", "csv", "json", "parquet", "text"})
CHECK_DATA = (
    "Check `dataset_path`, `dataset_name` and `data_files` (a relative path starts at the\n"
    "working folder), your network, and whether the dataset needs `hf auth login`."
)
MATCHING_S, MATCHING_BYTES = 60, 1 << 30  # of the patterns of a task: links can be in a circle
MAX_RECURSIVE = 2  # of `**` in a pattern: the time is a power of the depth of the folders
LOCK = "lock.json"  # of a merge, beside the copies of its task files
UNKNOWN_KEY = re.compile(r"TaskConfig.*unexpected keyword argument '([^']+)'")

Commits = Mapping[tuple[str, str | None], str]  # (repo, revision in the task file) -> commit sha


@dataclass(frozen=True)
class TaskData:
    """Where a task's rows come from."""

    task: str
    repo: str | None  # a dataset's repo or folder; None where the task names `files`
    revision: str | None  # as the task's file writes it
    files: tuple[str, ...]  # what `data_files` names: local files or addresses
    by_code: bool  # a Python function makes the rows, so their origin is unknown
    data_dir: str | None = None  # the folder whose files are read, if it is not that of a repo


def task_data(located: LocatedTasks) -> tuple[TaskData, ...]:
    """The data of every single task of a selection, from the task files alone."""
    return tuple(map(_data, located.tasks))


def _data(file: TaskFile) -> TaskData:
    config = file.config
    path, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    by_code = "custom_dataset" in config or not isinstance(path, str)
    files = tuple(texts_in(options.get("data_files")))
    data_dir = None if options.get("data_dir") is None else str(options["data_dir"])
    if path in FORMATS or any(map(ELSEWHERE.search, files)):  # the rows are not those of a repo
        return TaskData(file.name, None, None, files, by_code, data_dir)
    leads_out = data_dir if data_dir and ELSEWHERE.search(data_dir) else None
    return TaskData(file.name, path, options.get("revision"), (), by_code, leads_out)


def own_files(names: Collection[str], folder: Path) -> dict[str, Path]:
    """The files in a folder of own task files that tasks, groups or tags use, by path in it.

    These are the files of the tasks and groups, and what they name: included files, Python with
    the Python that it imports, and data. Other files of the folder, hidden files and data
    elsewhere are left out.

    Raises:
        EvaluationError: as `locate_tasks`; or a task uses a link out of the folder, or includes or
            imports a file outside of it, which nothing would compare or copy.
    """
    own = read_folder(folder)
    known = own.keys() | {tag for file in own.values() for tag in file.tags}
    asked = tuple(name for name in names if name in known)
    if not asked:
        return {}
    located = locate_tasks(TaskSelection(asked, folder, allow_code=True))
    used = {file for data in task_data(located) for file in _data_files(data, folder)}
    for file in located.files:
        if file.path.is_relative_to(folder):
            used |= _beside(file, folder)
    inside = {part: path for path in used if path.is_file() and (part := part_of(folder, path))}
    kept = sorted(part for part in inside if not is_hidden(part))
    return {part.as_posix(): inside[part].resolve() for part in kept}


def _beside(file: TaskFile, folder: Path) -> set[Path]:
    """The files that an own task needs beside its data; those of lm-eval are left out."""
    used = {file.path, *file.included, *_python(file, folder)}
    bundled = {bundled_folder(), bundled_folder().resolve()}
    own = {path for path in used if not any(map(path.is_relative_to, bundled))}
    for path in sorted(own):
        if not path.resolve().is_relative_to(folder.resolve()):
            problem = f"uses {path}, which is outside of {folder} or a link to outside of it."
            raise EvaluationError(str(file.path), problem, "Put the file itself into the folder.")
    return own


def _data_files(data: TaskData, folder: Path) -> Iterable[Path]:
    within = data.repo or (None if data.files else data.data_dir)
    if within is not None:
        if "\0" in within:
            problem = "the path of its data has a null character."
            raise EvaluationError(data.task, problem, "Correct `dataset_path` or `data_dir`.")
        return tables_beside(within, folder)
    names = [str(Path(data.data_dir or "") / file) for file in data.files]
    try:
        with limited(MATCHING_S, "the patterns of `data_files`", max_bytes=MATCHING_BYTES):
            files = [Path(file) for name in names for file in (name, *_matching(name, data.task))]
            for file in files:
                require_no_link_out(folder, file, EvaluationError)
            return files
    except TooMuchError as error:
        remedy = "Name the files, or fewer folders; links to folders are followed."
        raise EvaluationError(data.task, f"{error}.", remedy) from None


def _matching(name: str, task: str) -> list[str]:
    """The files that a pattern matches; of one that tries the same folders very often, an error."""
    parts = Path(name).parts
    first = next((n for n, part in enumerate(parts) if has_magic(part)), len(parts))
    if ".." in parts[first:] or parts.count("**") > MAX_RECURSIVE:
        problem = (
            f"`data_files` has the pattern `{shortened(name)}`, which finds a file in many ways"
        )
        remedy = f"Write `..` before the first wildcard, and `**` at most {MAX_RECURSIVE} times."
        raise EvaluationError(task, problem, remedy)
    return glob(name, recursive=True)  # noqa: PTH207 - a Path takes no absolute pattern


def tables_beside(dataset: str, around: Path) -> list[Path]:
    """The files of a dataset that is a folder of own task files, or in it; none of others.

    Of the folder of task files itself these are tables only.

    Raises:
        EvaluationError: it is a link out of that folder.
    """
    require_no_link_out(around, Path(dataset), EvaluationError)
    folder = Path(dataset).resolve()
    if not folder.is_dir() or not folder.is_relative_to(around.resolve()):
        return []
    files = visible_files(folder, SourceError)
    tables = [file for file in files if file.suffix in DATA_SUFFIXES or file.name in CARDS]
    return tables or (files if folder != around.resolve() else [])


def _python(file: TaskFile, folder: Path | None) -> list[Path]:
    """The Python of a task's file, and the Python in the folder of own tasks that it imports."""
    imported = with_imports(file.modules, folder) if folder else set()
    return sorted({*file.modules, *imported})


def free_split(located: LocatedTasks) -> str | None:
    """A split with examples for all tasks of a selection that none of them scores."""
    free: list[set[str]] = []
    for config in (file.config for file in located.tasks):
        scored = config.get("test_split") or config.get("validation_split")
        shown = {config.get("training_split"), config.get("fewshot_split")}
        free.append({split for split in shown if isinstance(split, str) and split != scored})
    common = sorted(set.intersection(*free)) if free else []
    return common[0] if common else None


def files_digest(located: LocatedTasks) -> str:
    """Digest of the task files, of the files that they include and of the Python that they use."""
    contents: dict[str, Any] = {}
    for file in located.files:
        python = _python(file, located.selection.include)
        digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in python)
        contents[file.name] = [_without_data(file.config), digests]
    text = json.dumps(contents, sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _without_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """The file without the place of its data, whose content has digests of its own."""
    options = config.get("dataset_kwargs") or {}
    kept = {key: value for key, value in options.items() if key not in ("data_files", "revision")}
    return {**config, "dataset_kwargs": kept}


@contextmanager
def at_commits(commits: Commits) -> Iterator[None]:
    """Have lm-eval load each repo at its commit; other repos as the task's file says.

    lm-eval calls `datasets.load_dataset` and takes no revision from its caller, so the function is
    replaced meanwhile. Each commit has its own cache: where a repo cannot be read, `datasets` takes
    any commit of it that is in the cache. What a task's file wants to stream is loaded whole, since
    nothing would compare its digests.
    """
    datasets = library()
    load: Any = datasets.load_dataset

    def load_at_commit(path: str, *args: Any, **kwargs: Any) -> Any:
        commit = commits.get((path, kwargs.get("revision")))
        own_files: AbstractContextManager[None] = only_tables()
        kwargs.pop("streaming", None)
        if commit:
            kwargs |= {"revision": commit, "cache_dir": commit_cache(commit)}
            api = HfApi(token=kwargs.get("token"))
            own_files = only_pinned(api, resolve_dataset(api, path, commit))
        with own_files:
            return load(path, *args, **kwargs)

    datasets.load_dataset = load_at_commit
    try:
        yield
    finally:
        datasets.load_dataset = load


def is_local(file: str) -> bool:
    """Whether a data file is on this machine."""
    return "://" not in file and Path(file).is_file()


@dataclass(frozen=True)
class LoadedTasks:
    """lm-eval's task and group objects by name, with their data at these commits."""

    selection: TaskSelection
    commits: Commits
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    rows_bytes: int = 0  # of memory, that the rows may take


@dataclass(frozen=True)
class ScoredData:
    """The dataset that a task scores."""

    repo: str
    config: str | None
    split: str | None
    commit_sha: str | None


def scored_data(loaded: LoadedTasks) -> dict[str, ScoredData]:
    """Task -> its dataset; tasks on local files have none, nor have groups of several datasets."""
    found = {
        name: data for name, task in loaded.tasks.items() if (data := _scored(task, loaded.commits))
    }
    for name, group in loaded.groups.items():
        parts = {found.get(task.task_name) for task in group.get_all_tasks()}
        repos = {part.repo if part else None for part in parts}
        if len(repos) == 1 and (repo := repos.pop()):
            shas = {part.commit_sha for part in parts if part}
            found[name] = ScoredData(repo, None, None, shas.pop() if len(shas) == 1 else None)
    return found


def _scored(task: Any, commits: Commits) -> ScoredData | None:
    path, options = task.get_config("dataset_path"), task.get_config("dataset_kwargs") or {}
    if not isinstance(path, str) or path in FORMATS or Path(path).exists():
        return None
    split = task.get_config("test_split") or task.get_config("validation_split")
    commit = commits.get((path, options.get("revision")))
    return ScoredData(path, task.get_config("dataset_name"), split, commit)


def load_tasks(selection: TaskSelection, commits: Commits) -> LoadedTasks:
    """Build the tasks and fetch their data; a dataset without a commit is loaded at its newest.

    Raises:
        EvaluationError: as `locate_tasks`; data are missing or do not fit the task; or their texts
            are very long, or very many.
    """
    located = locate_tasks(selection)
    with prepared(selection, commits):
        held = HeldTexts()
        with counting_examples(held):
            tasks, groups = build(located)
        for name, task in tasks.items():
            with errors_named(name):
                rows = getattr(task, "task_docs", None)  # that lm-eval read to build the task
                held.add_rows(name, task.eval_docs if rows is None else rows)
    return LoadedTasks(selection, commits, tasks, groups, held.n_bytes)


def with_prompts(
    loaded: LoadedTasks,
    limit: int | None = None,
    settings: EvaluationSettings | None = None,
) -> Benchmarks:
    """Build the prompts of the first `limit` items of each task; None: of all items.

    Raises:
        EvaluationError: a task is empty or not a text task, its prompts do not fit its data, or
            they are very long.
    """
    tasks, selection = loaded.tasks, loaded.selection
    settings, held = settings or EvaluationSettings(), HeldTexts(loaded.rows_bytes)
    with prepared(selection, {}):
        for name, task in tasks.items():
            configure(task, settings)
            generates = task.get_config("output_type") == GENERATE
            per_letter = TEXT_BYTES if generates and settings.backend == "hf" else TOKEN_BYTES
            with counting_requests(name, task, held, per_letter):
                build_requests(name, task, limit)
            with errors_named(name):
                require_short_targets(name, task)
    return Benchmarks(tasks, loaded.groups, limit, selection.allow_code)


@contextmanager
def prepared(selection: TaskSelection, commits: Commits) -> Iterator[None]:
    """The settings under which lm-eval builds tasks and renders their items."""
    settings = library_settings(allow_code=selection.allow_code)
    with settings, at_commits(commits), computed_anew(), reading_only_named(selection):
        yield


def require_named(selection: TaskSelection) -> LocatedTasks:
    """Find tasks as `locate_tasks`, and refuse own ones whose Python names other files beside it.

    So they are found before anything runs, and where a library reads them that no hook sees.

    Raises:
        EvaluationError: as `locate_tasks`; or its Python names a file that no task does.
    """
    located, folder = locate_tasks(selection), selection.include
    if folder is None:
        return located
    known = _named(located, folder)
    near = [folder.resolve().parent] if selection.is_calibration else []
    python = {module for file in located.files for module in _python(file, folder)}
    for module in sorted(module for module in python if module.is_relative_to(folder)):
        for file in named_files(module, [folder, Path.cwd()]):
            if file not in known and any(map(file.is_relative_to, [folder.resolve(), *near])):
                raise _unnamed(selection, str(file))
    return located


@contextmanager
def reading_only_named(selection: TaskSelection) -> Iterator[None]:
    """Inside the block the Python of own tasks reads no file beside it that no task names.

    Such a file would be neither compared nor published with them. What a calibration reads
    elsewhere would not be, either.

    Raises:
        EvaluationError: it reads one.
    """
    folder = selection.include
    if folder is None:
        yield
        return

    def named() -> set[Path]:
        return _named(locate_tasks(selection), folder)

    with opening_only(named, folder, elsewhere=not selection.is_calibration) as refused:
        try:
            yield
        except Exception as error:
            if refused:
                raise _unnamed(selection, refused[0]) from error
            raise
    if refused:
        raise _unnamed(selection, refused[0])


def _named(located: LocatedTasks, folder: Path) -> set[Path]:
    """The files that the Python of own tasks may read: task files, and data wherever they are.

    Of the copies in a merge these are all, because its lock lists them.
    """
    if (folder.parent / LOCK).is_file():
        return {path.resolve() for path in folder.rglob("*") if path.is_file()}
    files = {*own_files(located.selection.names, folder).values()}
    files |= {Path(file) for one in task_data(located) for file in one.files if is_local(file)}
    return {path.resolve() for path in files}


def _unnamed(selection: TaskSelection, file: str) -> EvaluationError:
    problem = f"its Python reads {file}, which no task names, so that it is not part of the merge."
    remedy = "Write its content into a Python file that this one imports, or name it in "
    remedy += "`data_files`."
    if not selection.is_calibration:
        remedy += f"\nOr move it out of {selection.include}: then nothing compares it."
    return EvaluationError(", ".join(selection.names), problem, remedy)


def build(located: LocatedTasks) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build lm-eval's task and group objects, with their data, by their names."""
    from lm_eval.tasks import TaskManager

    include = located.selection.include
    own = [] if include is None else [include]
    bundled = {file.path.parent for file in located.files} if not located.through_tag else set()
    folders = sorted(folder for folder in bundled if not any(map(folder.is_relative_to, own)))
    manager = TaskManager(include_path=[*folders, *own], include_defaults=located.through_tag)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in located.selected:
        with errors_named(name, located):
            loaded = manager.load([name])
        tasks.update(loaded["tasks"])
        groups.update(loaded["groups"])
    return tasks, groups


def build_requests(name: str, task: Any, limit: int | None) -> None:
    """Build the requests of a task's items as the run of each model does."""
    if getattr(task, "MULTIMODAL", False):
        problem = "asks about images or sound, but a merged language model reads only text."
        raise EvaluationError(name, problem, "Choose a text task.")
    with errors_named(name):
        reset_fewshot(task)
        task.build_all_requests(limit=limit)
        for steps in getattr(
            task, "_filters", ()
        ):  # lm-eval makes them again, once the model has answered
            for make in steps.filters:
                make()


@contextmanager
def errors_named(name: str, located: LocatedTasks | None = None) -> Iterator[None]:
    """Turn errors of lm-eval and datasets into one message that names the task."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except LewisHubError:
        raise
    except (OSError, DatasetsError) as error:
        raise_if_of_the_disk(error)
        files = {file.name: file for file in located.files} if located else {}
        dataset = files[name].config.get("dataset_path") if name in files else None
        data = f"its data `{dataset}`" if dataset else "its data"
        is_general = type(error).__name__ == "DatasetGenerationError"  # its cause says what it was
        line = str((is_general and error.__cause__) or error).partition("\n")[0]
        problem = f"{data} cannot be loaded: {line}"
        raise EvaluationError(name, problem, CHECK_DATA) from error
    except ImportError as error:
        remedy = "Install what the task needs, or choose another task."
        raise EvaluationError(name, f"cannot be loaded: {error}.", remedy) from error
    except (IndexError, StopIteration) as error:  # an empty split, an empty file
        remedy = "Check its `test_split` (or `validation_split`) and its data."
        raise EvaluationError(name, "has no items to score.", remedy) from error
    except Exception as error:  # of any class: a row that is no Python is a SyntaxError
        key, said = UNKNOWN_KEY.search(str(error)), " ".join(str(error).split())[:LONGEST_CAUSE]
        cause = f"lm-eval has no key `{key[1]}`." if key else f"{type(error).__name__}: {said}"
        problem = f"cannot be built: {cause}"
        remedy = "Check the task's file: its keys, splits, columns and metrics."
        raise EvaluationError(name, problem, remedy) from error
