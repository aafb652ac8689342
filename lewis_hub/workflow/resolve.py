"""Resolve models, datasets and tasks: pin each to a commit before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.lora import read_config
from lewis_hub.errors import EvaluationError, SourceError
from lewis_hub.evaluate.benchmarks import Commits, TaskData, files_digest, is_local, task_data
from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks
from lewis_hub.hub.converted import with_converted
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.resolve import is_path, missing_path_error, resolve_dataset, resolve_model
from lewis_hub.hub.source import ADAPTERS, Source
from lewis_hub.recipe.schema import Calibration, ModelReference

if TYPE_CHECKING:
    from huggingface_hub import HfApi


Locate = Callable[[str], str]  # a name as written -> the path of a local file, or the name itself


def hub_api() -> HfApi:
    """Return the Hub of `HF_ENDPOINT`, with the token of `HF_TOKEN` or `hf auth login`."""
    from huggingface_hub import HfApi

    return HfApi(library_name="lewis-hub", library_version=version("lewis-hub"))


@dataclass(frozen=True)
class Inputs:
    """The pinned models and data of a merge; the experts are in the recipe's order."""

    base: Source | None
    experts: tuple[Source, ...]
    data: Mapping[Calibration, Source | PinnedTask]

    @property
    def models(self) -> tuple[Source, ...]:
        """Base first, then the experts."""
        return (self.base, *self.experts) if self.base else self.experts

    @property
    def donor(self) -> Source:
        """The source whose configuration and tokenizer the merge carries."""
        return self.models[0]

    @property
    def datasets(self) -> tuple[Source, ...]:
        """Every dataset that calibration reads, each once."""
        named = [data for data in self.data.values() if isinstance(data, Source)]
        tasks = [data for data in self.data.values() if isinstance(data, PinnedTask)]
        every = [*named, *(source for task in tasks for source in task.datasets)]
        return tuple({source.pinned: source for source in every}.values())

    def digest(self, source: Source) -> str:
        """Return the digest of a source's weights; those of an adapter depend on its base."""
        if source.is_adapter and self.base:
            return f"{self.base.commit_sha}+{source.commit_sha}"
        return source.commit_sha


def resolve_one(
    model: ModelReference | Path | str, api: HfApi, *, allow_pickle: bool = False
) -> Source:
    """Pin a model outside of a recipe.

    Raises:
        SourceError: it cannot be found or read, or is an adapter.
    """
    reference = ModelReference.model_validate(model)
    if reference.on:
        problem = "`+` adds a LoRA adapter to a model, which only a merge can do"
        remedy = "Merge it first: a recipe with `merge_method: linear` and the adapter alone."
        raise SourceError(str(reference), problem, remedy)
    found = resolve_model(api, reference.name, reference.revision, allow_pickle=allow_pickle)
    return require_whole(api, with_converted(found, code=False))


def resolve_source(
    reference: ModelReference, api: HfApi, locate: Locate, *, allow_pickle: bool, code: bool
) -> Source:
    """Pin a model of a recipe.

    Raises:
        SourceError: it cannot be found or may not be read.
    """
    located = _located(reference.name, locate)
    source = resolve_model(api, located, reference.revision, allow_pickle=allow_pickle)
    return with_converted(replace(source, name=reference.name), code=code)


def require_whole(api: HfApi, source: Source) -> Source:
    """Return a source that is a whole model.

    Raises:
        SourceError: it is an adapter.
    """
    if not source.is_adapter:
        return source
    settings = ADAPTERS[0]
    config = read_config(f"{source.pinned}: {settings}", read_small(api, source, settings) or b"")
    problem = "this is a LoRA adapter, and its base model is not given"
    named = config.base_model_name_or_path
    said = f"Its {settings} names {named}: write `base_model: {named}`" if named else None
    said = said or "Name its base as the recipe's `base_model`"
    remedy = f"{said}, and list the adapter under `models`."
    raise SourceError(source.pinned, problem, remedy)


def resolve_data(
    calibrations: Iterable[Calibration], api: HfApi, locate: Locate
) -> dict[Calibration, Source | PinnedTask]:
    """Pin the data of calibrations; equal datasets are looked up once.

    Raises:
        EvaluationError: a task is unknown, or its data cannot be pinned.
        SourceError: a dataset cannot be found or may not be read.
    """
    datasets: dict[str, Source] = {}
    found: dict[Calibration, Source | PinnedTask] = {}
    for one in dict.fromkeys(calibrations):
        if one.dataset is not None:
            if one.dataset not in datasets:
                datasets[one.dataset] = _resolve_dataset(one.dataset, api, locate)
            found[one] = datasets[one.dataset]
        elif one.task is not None:
            include = Path(locate(one.include)) if one.include else None
            found[one] = pin_task(api, one.task, one.revision, include)
    return found


def _resolve_dataset(written: str, api: HfApi, locate: Locate) -> Source:
    located = _located(written, locate)
    if located != written:
        return replace(resolve_dataset(api, located), name=written)
    name, _, revision = written.partition("@")
    return resolve_dataset(api, name, revision or None)


def _located(written: str, locate: Locate) -> str:
    located = locate(written)
    if is_path(written) and not Path(located).exists():
        path = Path(written).expanduser()
        raise missing_path_error(written, [Path(locate(".")) / path, path])
    return located


@dataclass(frozen=True)
class PinnedTask:
    """A task or group that calibration draws from.

    Attributes:
        digest: over the task files of lm-eval or the user.
        datasets: its pinned data; each local file is a source.
        commits: the commits of its repos, for lm-eval.
    """

    selection: TaskSelection
    digest: str
    datasets: tuple[Source, ...]
    commits: Commits

    @property
    def facts(self) -> dict[str, str]:
        """The facts that determine its items, for a profile."""
        return {
            "dataset": ", ".join(source.pinned for source in self.datasets),
            "dataset_sha": ", ".join(source.commit_sha for source in self.datasets),
            "task_digest": self.digest,
        }


def pin_task(api: HfApi, task: str, revision: str | None, include: Path | None) -> PinnedTask:
    """Find a task's files and pin the data that they name; nothing is run or loaded.

    `revision` replaces the task's own revision of its repo; `include` holds the user's task files.

    Raises:
        EvaluationError: the task is unknown, or its data cannot be pinned.
        SourceError: a dataset cannot be found or may not be read.
    """
    asked = TaskSelection((task,), include, allow_code=True)
    located = locate_tasks(asked)
    every = task_data(located)
    for data in every:
        _require_pinnable(data)
    repos = dict.fromkeys((data.repo, data.revision) for data in every if data.repo)
    if revision and len(repos) != 1:
        problem = f"it reads {len(repos)} repos, but `revision` needs exactly one."
        raise EvaluationError(task, problem, "Leave `revision` out.")
    pinned = {(name, named): resolve_dataset(api, name, revision or named) for name, named in repos}
    files = dict.fromkeys(file for data in every for file in data.files)
    sources = (*pinned.values(), *(resolve_dataset(api, file) for file in files))
    return PinnedTask(asked, files_digest(located), sources, _commits(pinned))


def scored_commits(api: HfApi, selected: TaskSelection) -> Commits:
    """Return the commits of the repos that scored tasks read.

    A repo that cannot be found is not pinned: lm-eval reports the error, or has its rows in a
    cache.
    """
    asked = ((data.repo, data.revision) for data in task_data(locate_tasks(selected)))
    repos = dict.fromkeys((name, revision) for name, revision in asked if name)
    return _commits(dict(_found(api, repos)))


def _found(
    api: HfApi, repos: dict[tuple[str, str | None], None]
) -> Iterator[tuple[tuple[str, str | None], Source]]:
    for name, revision in repos:
        try:
            yield (name, revision), resolve_dataset(api, name, revision)
        except SourceError:
            continue


def _commits(pinned: dict[tuple[str, str | None], Source]) -> Commits:
    return {key: source.commit_sha for key, source in pinned.items() if source.folder is None}


def _require_pinnable(data: TaskData) -> None:
    remedy = "Calibrate on another task, or name a `dataset` with a template."
    if data.by_code:
        problem = "makes its items with Python code, so they cannot be pinned."
        raise EvaluationError(data.task, problem, remedy)
    for file in data.files:
        if not is_local(file):
            problem = f"reads `{file}`, which is not a local file, so it cannot be pinned."
            raise EvaluationError(data.task, problem, remedy)
