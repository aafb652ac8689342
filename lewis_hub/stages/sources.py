"""Resolve: every model and dataset that a recipe names, pinned before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.adapter_config import read_config
from lewis_hub.errors import SourceError
from lewis_hub.guides import registry as guides
from lewis_hub.guides.grams import DIAGONAL, WIDEST
from lewis_hub.hub.converted import with_converted
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.resolve import is_path, not_there, resolve_dataset, resolve_model
from lewis_hub.hub.source import ADAPTERS, Source
from lewis_hub.methods import registry
from lewis_hub.recipe import ModelEntry, ModelReference, Recipe
from lewis_hub.recipe_calibration import Calibration
from lewis_hub.recipe_rules import asks_for_statistics
from lewis_hub.stages.reading import require_guide
from lewis_hub.stages.task_data import PinnedTask, pin_task

if TYPE_CHECKING:
    from huggingface_hub import HfApi


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
        raise not_there(written, [Path(recipe.locate(".")) / path, path])
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
