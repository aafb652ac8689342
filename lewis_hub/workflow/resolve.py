"""Resolve: every model and dataset that a recipe names, pinned before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.calibration.grams import DIAGONAL, WIDEST
from lewis_hub.checkpoint.lora import read_config
from lewis_hub.errors import EvaluationError, GuideError, RecipeError, SourceError
from lewis_hub.evaluate.benchmarks import Commits, TaskData, files_digest, is_local, task_data
from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks
from lewis_hub.guides import registry as guides
from lewis_hub.hub.converted import with_converted
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.resolve import is_path, missing_path_error, resolve_dataset, resolve_model
from lewis_hub.hub.source import ADAPTERS, Source
from lewis_hub.methods import registry
from lewis_hub.recipe import read
from lewis_hub.recipe.rules import Complaint, asks_for_statistics, contradictions
from lewis_hub.recipe.schema import Calibration, ModelEntry, ModelReference, Recipe

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class PinnedTask:
    """A task or group that calibration draws from.

    Attributes:
        selection: how lm-eval is asked for it. Who loads it says whether code is allowed.
        digest: over its files, as lm-eval or the user wrote them.
        datasets: what it reads, pinned; local files stand one by one.
        commits: the same for lm-eval; folders and files have none.
    """

    selection: TaskSelection
    digest: str
    datasets: tuple[Source, ...]
    commits: Commits

    @property
    def facts(self) -> dict[str, str]:
        """What fixes its items, for a profile."""
        return {
            "dataset": ", ".join(source.pinned for source in self.datasets),
            "dataset_sha": ", ".join(source.commit_sha for source in self.datasets),
            "task_digest": self.digest,
        }


def pin_task(api: HfApi, calibration: Calibration, include: Path | None) -> PinnedTask:
    """Find a task's files and pin what they read; nothing is run or loaded.

    Args:
        api: the Hub.
        calibration: on a task.
        include: its folder of own task files, located.

    Raises:
        EvaluationError: no such task, or its data cannot be pinned.
        SourceError: a dataset cannot be found or may not be read.
    """
    assert calibration.task
    asked = TaskSelection((calibration.task,), include, allow_code=True)
    located = locate_tasks(asked)
    every = task_data(located)
    for data in every:
        _require_pinnable(data)
    repos = dict.fromkeys((data.repo, data.revision) for data in every if data.repo)
    if calibration.revision and len(repos) != 1:
        problem = f"it reads {len(repos)} repos, and `revision` names a commit of one."
        raise EvaluationError(calibration.task, problem, "Leave `revision` out.")
    pinned = {
        (name, revision): resolve_dataset(api, name, calibration.revision or revision)
        for name, revision in repos
    }
    files = dict.fromkeys(file for data in every for file in data.files)
    sources = (*pinned.values(), *(resolve_dataset(api, file) for file in files))
    return PinnedTask(asked, files_digest(located), sources, _commits(pinned))


def scored_commits(api: HfApi, selected: TaskSelection) -> Commits:
    """The commits of the repos that scored tasks read.

    One that cannot be looked up stays unpinned: lm-eval then says what is wrong with it, or has
    its rows in a cache.
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
        problem = "makes its items by Python, and what they are today cannot be pinned."
        raise EvaluationError(data.task, problem, remedy)
    for file in data.files:
        if not is_local(file):
            problem = f"reads `{file}`, which is no file here, so that it cannot be pinned."
            raise EvaluationError(data.task, problem, remedy)


def read_recipe(path: Path | str) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: a YAML file; relative paths inside it are looked up beside it, then in the
            working folder.

    Raises:
        RecipeError: the file is missing, is not YAML, or asks for something that cannot be done.

    Example:
        >>> import lewis_hub
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> recipe.merge_method
        'ties'
    """
    return read.read_recipe(path, rules)


def allowing_overlap(recipe: Recipe) -> Recipe:
    """The same recipe, `allow_overlap: true` in all that it says of calibration."""

    def allowed(calibration: Calibration | None) -> dict[str, Calibration | None]:
        kept = calibration and calibration.model_copy(update={"allow_overlap": True})
        return {"calibration": kept}

    guide = recipe.guide
    changed = {
        "models": tuple(m.model_copy(update=allowed(m.calibration)) for m in recipe.models),
        "guide": guide and guide.model_copy(update=allowed(guide.calibration)),
        **allowed(recipe.calibration),
    }
    return recipe.model_copy(update=changed)


def rules(recipe: Recipe) -> Iterator[Complaint]:
    """What the whole must obey, its guide among it."""
    yield from contradictions(recipe)
    yield from _guide_complaints(recipe)


def require_guide(recipe: Recipe) -> None:
    """Refuse a recipe from elsewhere than a file by the same rules.

    Raises:
        RecipeError: its guide is unknown, or lacks calibration data.
    """
    for where, problem, remedy in _guide_complaints(recipe):
        raise RecipeError("recipe", read.dotted(where), problem, remedy)


def _guide_complaints(recipe: Recipe) -> Iterator[Complaint]:
    if recipe.guide is None:
        return
    try:
        guide = guides.find(recipe.guide.name)
    except GuideError as error:
        yield ("guide", "name"), f"{error.where}: {error.problem}.", error.remedy
        return
    for entry in recipe.experts:
        if guide.needs_texts and recipe.calibration_of(entry) is None:
            problem = f"no calibration data for `{entry.model}`."
            yield ("guide",), problem, "Add `guide.calibration`, or `calibration` to this model."


@dataclass(frozen=True)
class Inputs:
    """All that a merge reads.

    Attributes:
        base: what task vectors start from; None for a method that takes none.
        experts: the sources that are merged, in the recipe's order.
        datasets: a calibration dataset as the recipe writes it -> what it is pinned to.
        tasks: a calibration on a task -> the task, with the data that it reads.
    """

    base: Source | None
    experts: tuple[Source, ...]
    datasets: Mapping[str, Source]
    tasks: Mapping[Calibration, PinnedTask] = field(default_factory=dict)

    def data_of(self, calibration: Calibration) -> Source | PinnedTask:
        """What a calibration draws from."""
        return (
            self.datasets[calibration.dataset] if calibration.dataset else self.tasks[calibration]
        )

    @property
    def calibration_data(self) -> tuple[Source, ...]:
        """Every dataset that calibration reads, each once."""
        of_tasks = (source for task in self.tasks.values() for source in task.datasets)
        every = (*self.datasets.values(), *of_tasks)
        return tuple({source.pinned: source for source in every}.values())

    @property
    def models(self) -> tuple[Source, ...]:
        """Base first, then the experts."""
        return (self.base, *self.experts) if self.base else self.experts

    @property
    def adapters(self) -> tuple[Source, ...]:
        """The experts that are LoRA adapters of the base."""
        return tuple(expert for expert in self.experts if expert.is_adapter)

    def content(self, source: Source) -> str:
        """What fixes the weights of a source: an adapter's are those of its base, changed."""
        if source.is_adapter and self.base:
            return f"{self.base.commit_sha}+{source.commit_sha}"
        return source.commit_sha

    @property
    def donor(self) -> Source:
        """Whose configuration and tokenizer the merge carries."""
        return self.models[0]


def hub_api() -> HfApi:
    """The Hub of `HF_ENDPOINT`, with the token of `HF_TOKEN` or of `hf auth login`."""
    from huggingface_hub import HfApi

    from lewis_hub import __version__

    return HfApi(library_name="lewis-hub", library_version=__version__)


def resolve_inputs(recipe: Recipe, api: HfApi, *, allow_pickle: bool = False) -> Inputs:
    """Pin every source of a recipe.

    Args:
        recipe: what is asked.
        api: the Hub.
        allow_pickle: whether models of pickled weights alone will do.

    Raises:
        RecipeError: its guide is unknown, or lacks calibration data.
        SourceError: one cannot be found or may not be read.
    """
    require_guide(recipe)

    def model(reference: ModelReference) -> Source:
        return _model(recipe, api, reference, allow_pickle=allow_pickle)

    base = _whole(api, model(recipe.base_model)) if recipe.base_model else None
    entries = merged_entries(recipe)
    experts = tuple(model(entry.model) for entry in entries)
    for entry, expert in zip(entries, experts, strict=True):
        if entry.model.on and not expert.is_adapter:
            problem = "this is a whole model, and `+` puts a LoRA adapter on one"
            raise SourceError(expert.pinned, problem, "List it without what is before the `+`.")
        if base is None:
            _whole(api, expert)
    asked = dict.fromkeys(calibrations(recipe))
    names = dict.fromkeys(one.dataset for one in asked if one.dataset)
    return Inputs(
        base,
        experts,
        {name: _dataset(recipe, api, name) for name in names},
        {one: pin_task(api, one, _include(recipe, one)) for one in asked if one.task},
    )


def needs_grams(recipe: Recipe) -> bool:
    """Whether the method merges by second moments of its experts' inputs, or trims by them."""
    return registry.find(recipe.merge_method).needs_grams or asks_for_statistics(recipe)


def measures_on_texts(recipe: Recipe) -> bool:
    """Whether calibration texts run through any model: for the guide, or for the method."""
    guide = guides.find(recipe.guide.name) if recipe.guide else None
    return (guide is not None and guide.needs_texts) or needs_grams(recipe)


def widest_input(recipe: Recipe) -> int:
    """How many inputs one matrix of second moments covers: a trim needs the diagonal alone."""
    return WIDEST if registry.find(recipe.merge_method).needs_grams else DIAGONAL


def calibrations(recipe: Recipe) -> tuple[Calibration, ...]:
    """What each expert's texts are, in order; none where neither guide nor method wants any."""
    if recipe.guide is None and not needs_grams(recipe):
        return ()
    wanted = (recipe.calibration_of(entry) for entry in merged_entries(recipe))
    return tuple(calibration for calibration in wanted if calibration)


def merged_entries(recipe: Recipe) -> tuple[ModelEntry, ...]:
    """What is merged: the experts, or all that is listed where the method takes no base.

    Of slices the experts: which of them the base goes into, the slices say.
    """
    takes_base = registry.find(recipe.merge_method).takes_base
    return recipe.experts if takes_base or recipe.slices else recipe.models


def by_reference(recipe: Recipe, inputs: Inputs) -> dict[ModelReference, Source]:
    """What each model of a recipe is pinned to."""
    models = [entry.model for entry in merged_entries(recipe)]
    found = dict(zip(models, inputs.experts, strict=True))
    if recipe.base_model and inputs.base:
        found[recipe.base_model] = inputs.base
    return found


def source_of(recipe: Recipe, inputs: Inputs, name: str) -> Source:
    """The source of a model that the recipe names a second time, such as for its tokenizer."""
    reference = recipe.reference(name)
    if inputs.base and reference == recipe.base_model:
        return inputs.base
    entries = zip(merged_entries(recipe), inputs.experts, strict=True)
    return next(expert for entry, expert in entries if entry.model == reference)


def resolve_one(reference: ModelReference, api: HfApi, *, allow_pickle: bool = False) -> Source:
    """Pin one model that is named on its own.

    Raises:
        SourceError: it cannot be found or read, or is an adapter.
    """
    if reference.on:
        problem = "this puts a LoRA adapter on a model, which only a merge does"
        remedy = "Merge it first: a recipe with `merge_method: linear` and the adapter alone."
        raise SourceError(str(reference), problem, remedy)
    found = resolve_model(api, reference.name, reference.revision, allow_pickle=allow_pickle)
    return _whole(api, with_converted(found, code=False))


def _whole(api: HfApi, source: Source) -> Source:
    if not source.is_adapter:
        return source
    settings = ADAPTERS[0]
    told = read_config(f"{source.pinned}: {settings}", read_small(api, source, settings) or b"")
    problem = "this is a LoRA adapter, and there is no whole model to put it on"
    named = told.base_model_name_or_path
    said = f"Its {settings} names {named}: write `base_model: {named}`" if named else None
    said = said or "Name its base as the recipe's `base_model`"
    remedy = f"{said}, and list the adapter under `models`."
    raise SourceError(source.pinned, problem, remedy)


def _model(recipe: Recipe, api: HfApi, reference: ModelReference, *, allow_pickle: bool) -> Source:
    located = _located(recipe, reference.name)
    source = resolve_model(api, located, reference.revision, allow_pickle=allow_pickle)
    source = replace(source, name=reference.name)
    return with_converted(source, code=reference.name in recipe.allow_code)


def _include(recipe: Recipe, calibration: Calibration) -> Path | None:
    return Path(recipe.locate(calibration.include)) if calibration.include else None


def _located(recipe: Recipe, written: str) -> str:
    located = recipe.locate(written)
    if is_path(written) and not Path(located).exists():
        path = Path(written).expanduser()
        raise missing_path_error(written, [Path(recipe.locate(".")) / path, path])
    return located


def _dataset(recipe: Recipe, api: HfApi, written: str) -> Source:
    located = _located(recipe, written)
    if located != written:
        return replace(resolve_dataset(api, located), name=written)
    return named_dataset(api, written)


def named_dataset(api: HfApi, written: str) -> Source:
    """Pin a dataset that is written owner/name or owner/name@revision.

    Raises:
        SourceError: it cannot be found or may not be read.
    """
    name, _, revision = written.partition("@")
    return resolve_dataset(api, name, revision or None)
