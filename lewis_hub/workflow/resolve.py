"""Read a recipe, and pin what it names: models, datasets and tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from pydantic import ValidationError

from lewis_hub.checkpoint.lora import read_config
from lewis_hub.display import SILENT, Progress
from lewis_hub.errors import GuideError, RecipeError, SourceError, SourcesError
from lewis_hub.files import path_of, visible_files
from lewis_hub.guides import registry as guides
from lewis_hub.hub.converted import with_converted
from lewis_hub.hub.failures import is_transient
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.resolve import (
    is_path,
    missing_path_error,
    read_local_folders,
    resolve_dataset,
    resolve_model,
)
from lewis_hub.hub.source import ADAPTERS, Source
from lewis_hub.methods import registry
from lewis_hub.recipe import read
from lewis_hub.recipe.parts import all_of, parts_of, references
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.recipe.rules import Complaint, aligns_by_texts, asks_for_statistics, contradictions
from lewis_hub.recipe.schema import Calibration, Guide, ModelEntry, Publishing, Recipe
from lewis_hub.workflow.task_data import PinnedTask, pin_task


def read_recipe(path: Path | str) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: a YAML file; relative paths inside it are looked up beside it, then in the
            working folder.

    Raises:
        RecipeError: the file is missing, is not YAML, or has contradictory settings.

    Example:
        >>> import lewis_hub
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> recipe.merge_method
        'ties'
    """
    return read.read_recipe(path, rules)


def allowing_overlap(recipe: Recipe) -> Recipe:
    """Return the same recipe with `allow_overlap: true` in every calibration."""
    return with_calibrations(recipe, lambda _: {"allow_overlap": True})


def with_calibrations(
    recipe: Recipe, values_of: Callable[[Calibration], Mapping[str, Any]]
) -> Recipe:
    """Return the same recipe with other values in all calibrations, in order."""

    def changed(place: Recipe | Guide | ModelEntry) -> dict[str, Calibration | None]:
        one = place.calibration
        return {"calibration": one and one.model_copy(update=values_of(one))}

    guide = recipe.guide
    return recipe.model_copy(
        update={
            **changed(recipe),
            "guide": guide and guide.model_copy(update=changed(guide)),
            "models": tuple(model.model_copy(update=changed(model)) for model in recipe.models),
        }
    )


def rules(recipe: Recipe) -> Iterator[Complaint]:
    """Yield the contradictions of a recipe, including those of its guide."""
    yield from contradictions(recipe)
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


def published_at(recipe: Recipe, repo: str) -> Recipe:
    """Return the same recipe, published in another repo."""
    asked = recipe.publish or Publishing(repo=repo)
    return recipe.model_copy(update={"publish": asked.model_copy(update={"repo": repo})})


def destination(recipe: Recipe) -> Publishing:
    """Return the publishing settings of a recipe."""
    if recipe.publish is None:
        problem = "the recipe does not say where to publish."
        remedy = "Add `publish: {repo: owner/name}`, or give --repo owner/name."
        raise RecipeError("recipe", "publish.repo", problem, remedy)
    return recipe.publish


# Models are resolved at the same time: the Hub answers slowly, and so do digests of local files.
N_RESOLVING_THREADS = 8
AnySource = TypeVar("AnySource")
Locate = Callable[[str], str]  # a name as written -> the path of a local file, or the name itself


def hub_api() -> HfApi:
    """Return the Hub of `HF_ENDPOINT`, with the token of `HF_TOKEN` or `hf auth login`."""
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


def resolve_one(
    model: ModelReference | Path | str,
    api: HfApi,
    progress: Progress = SILENT,
    *,
    allow_pickle: bool = False,
) -> Source:
    """Pin a model outside of a recipe."""
    reference = model_reference(model)
    if reference.on:
        problem = "`+` adds a LoRA adapter to a model, which only a merge can do"
        remedy = "Merge it first: a recipe with `merge_method: linear` and the adapter alone."
        raise SourceError(str(reference), problem, remedy)
    read_local_folders([reference.name], progress)
    found = resolve_model(api, reference.name, reference.revision, allow_pickle=allow_pickle)
    return require_whole(api, with_converted(found, code=False))


def model_reference(model: ModelReference | Path | str) -> ModelReference:
    """Read the name of a model as a user writes it.

    Raises:
        SourceError: it is none.
    """
    try:
        return ModelReference.model_validate(model)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        remedy = "Write owner/name, owner/name@revision or the path of a folder."
        raise SourceError(repr(str(model)), problem, remedy) from None


def require_whole(api: HfApi, source: Source) -> Source:
    """Return a source that is a whole model."""
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
    """Pin the data of calibrations; equal datasets are looked up once."""
    datasets: dict[str, Source] = {}
    found: dict[Calibration, Source | PinnedTask] = {}
    for one in dict.fromkeys(calibrations):
        if one.dataset is not None:
            if one.dataset not in datasets:
                located = find_place(one.dataset, locate)
                name, _, revision = one.dataset.partition("@")
                datasets[one.dataset] = (
                    resolve_dataset(api, name, revision or None)
                    if located == one.dataset
                    else replace(resolve_dataset(api, located), name=one.dataset)
                )
            found[one] = datasets[one.dataset]
        elif one.task is not None:
            include = Path(locate(one.include)) if one.include else None
            found[one] = pin_task(api, one.task, one.revision, include)
    return found


def find_place(written: str, locate: Locate) -> str:
    """Return the path of a local source, or the name of a repo; a missing path is refused."""
    located = locate(written)
    if is_path(written) and not Path(located).exists():
        path = path_of(written)
        raise missing_path_error(written, [Path(locate(".")) / path, path])
    return located


def merged_entries(recipe: Recipe) -> tuple[ModelEntry, ...]:
    """Return the models that are merged: the experts, or all models if the method takes no base.

    For slices and mixtures it returns the experts; they themselves say where the base is used.
    """
    takes_base = registry.find(recipe.merge_method).takes_base
    return recipe.experts if takes_base or recipe.slices or recipe.mixed else recipe.models


def by_reference(
    recipe: Recipe, base: AnySource | None, experts: Sequence[AnySource]
) -> dict[ModelReference, AnySource]:
    """Return the base and the experts of a recipe by their names in it."""
    models = [entry.model for entry in merged_entries(recipe)]
    found = dict(zip(models, experts, strict=True))
    return found | ({recipe.base_model: base} if recipe.base_model and base else {})


def needs_moments(recipe: Recipe) -> bool:
    """Return whether the method solves or trims with second moments of the experts' inputs."""
    return registry.find(recipe.merge_method).needs_grams or asks_for_statistics(recipe)


def depends_on_processor(recipe: Recipe) -> bool:
    """Return whether processors of another kind may round the merged weights differently."""
    uses_lapack = bool(recipe.mixed) or registry.find(recipe.merge_method).uses_lapack
    return uses_lapack or needs_moments(recipe)


def calibrations_of(recipe: Recipe) -> tuple[Calibration, ...]:
    """Return the calibration of each expert, in order; empty if nothing needs texts."""
    if recipe.guide is None and not needs_moments(recipe) and not aligns_by_texts(recipe):
        return ()
    calibrations = (recipe.calibration_of(entry) for entry in merged_entries(recipe))
    return tuple(calibration for calibration in calibrations if calibration)


def calibrates_on_own_tasks(recipe: Recipe) -> bool:
    """Return whether a recipe, or a merge that it starts from, names own task files for texts."""
    return any(one.include for part in all_of(recipe) for one in calibrations_in(part))


def calibrations_in(recipe: Recipe) -> list[Calibration]:
    """Return all calibrations that a recipe has, whether it uses them or not."""
    common = (recipe.calibration, recipe.guide.calibration if recipe.guide else None)
    return [one for one in (*common, *(entry.calibration for entry in recipe.models)) if one]


def sources_inside(recipe: Recipe, folder: Path) -> list[str]:
    """Return the models and datasets of a recipe, as written, that are files in a folder."""
    models = [part for one in all_of(recipe) for ref in references(one) for part in (ref, ref.on)]
    texts = [one for part in all_of(recipe) for one in calibrations_in(part)]
    datasets = [name for one in texts if (name := one.dataset)]
    datasets += [name.partition("@")[0] for name in datasets]
    names = dict.fromkeys([*(one.name for one in models if one), *datasets])
    return [name for name in names if _is_inside(recipe.locate(name), folder)]


def named_inside(models: Iterable[str], folder: Path | None) -> list[str]:
    """Return models that are named in the working folder and are files in a folder."""
    names = [model_reference(one).name for one in models]
    return [name for name in names if folder and _is_inside(name, folder)]


def _is_inside(place: str, folder: Path) -> bool:
    """Return whether a path exists, and is in a folder."""
    path = Path(place)
    return path.exists() and path.resolve().is_relative_to(folder.resolve())


def resolve_inputs(
    recipe: Recipe, api: HfApi, progress: Progress = SILENT, *, allow_pickle: bool = False
) -> Inputs:
    """Pin every source of a recipe.

    Raises:
        RecipeError: its fields contradict each other, or its guide lacks calibration data.
        SourceError: a source cannot be found or may not be read.
    """
    for where, problem, remedy in rules(recipe):  # it may not have been read from a file
        raise RecipeError("recipe", read.dotted(where), problem, remedy)
    if missing := [str(one.name) for one in parts_of(recipe)]:
        problem = f"it uses {', '.join(f'`{name}`' for name in missing)}, which is a merge itself."
        remedy = "Only `lewis-hub merge` makes it on the way: make it first, and name its folder."
        raise RecipeError("recipe", "models", problem, remedy)

    def model(reference: ModelReference) -> Source:
        name, located = reference.name, find_place(reference.name, recipe.locate)
        source = resolve_model(api, located, reference.revision, allow_pickle=allow_pickle)
        return with_converted(replace(source, name=name), code=name in recipe.allow_code)

    entries = merged_entries(recipe)
    named = [*([recipe.base_model] if recipe.base_model else []), *(one.model for one in entries)]
    read_local_folders((find_place(one.name, recipe.locate) for one in named), progress)
    found = each_source(dict.fromkeys(named), model)
    base = require_whole(api, found[recipe.base_model]) if recipe.base_model else None
    experts = tuple(found[entry.model] for entry in entries)
    for entry, expert in zip(entries, experts, strict=True):
        if entry.model.on and not expert.is_adapter:
            problem = "this is a whole model, but `+` adds a LoRA adapter to a model"
            raise SourceError(expert.pinned, problem, "Remove the part before the `+`.")
        if base is None:
            require_whole(api, expert)
    if recipe.models:
        takes_base = registry.find(recipe.merge_method).takes_base
        merged = {entry.model for entry in entries} | ({recipe.base_model} if takes_base else set())
        _require_distinct({one: found[one] for one in found if one in merged})
    return Inputs(base, experts, resolve_data(calibrations_of(recipe), api, recipe.locate))


def _require_distinct(sources: Mapping[ModelReference, Source]) -> None:
    """Refuse a model under two names, as two experts or as the base and an expert.

    Densities, weights and orders of units are kept by the pinned name.
    """
    known: dict[object, ModelReference] = {}
    for reference, source in sources.items():
        place = source.folder.resolve() if source.folder else source.pinned
        if (first := known.setdefault(place, reference)) != reference:
            problem = f"it is `{first}` by another name, and would be merged as one more model"
            remedy = "List each model once; the base can be left out."
            raise SourceError(str(reference), problem, remedy)


def each_source(
    named: Iterable[ModelReference], resolved: Callable[[ModelReference], Source]
) -> dict[ModelReference, Source]:
    """Pin all models, and report all that cannot be found or read in one error.

    A Hub that does not answer is reported at once.
    """
    found, failed = dict[ModelReference, Source](), list[SourceError]()
    pool = ThreadPoolExecutor(N_RESOLVING_THREADS)
    try:
        for reference, future in [(one, pool.submit(resolved, one)) for one in named]:
            try:
                found[reference] = future.result()
            except SourceError as error:
                if error.__cause__ and is_transient(error.__cause__):
                    raise
                failed.append(error)
    finally:
        pool.shutdown(cancel_futures=True)
    if len(told := dict.fromkeys(map(str, failed))) > 1:
        raise SourcesError(tuple(one.replace("\n", "\n  ") for one in told))
    if failed:
        raise failed[0]
    return found


def local_files(file: Path, recipe: Recipe) -> Mapping[str, Path]:
    """Return the local files that a recipe names, by their path beside it."""
    made = {one.name for one in recipe.intermediate}
    listed = [model for one in (recipe, *recipe.intermediate) for model in references(one)]
    for model in (part for one in listed for part in (one, one.on) if part):
        if model.name not in made and Path(recipe.locate(model.name)).exists():
            problem = f"`{model.name}` is a local folder, but a Job reads models from the Hub."
            remedy = f"Push it: `lewis-hub push {model.name} OWNER/NAME`."
            raise RecipeError(str(file), "models", problem, remedy)
    named = [recipe.evaluate.include if recipe.evaluate else None]
    for calibration in (one for part in all_of(recipe) for one in calibrations_in(part)):
        named += [calibration.dataset, calibration.include]
    found: dict[str, Path] = {}
    beside = file.resolve().parent
    for name in filter(None, named):
        place = Path(recipe.locate(name))
        if not place.exists():
            continue  # a repo, or a missing file, which the check reports
        if Path(name).is_absolute() or not place.is_relative_to(beside):
            problem = f"`{name}` is not beside the recipe, so a Job cannot read it."
            raise RecipeError(str(file), "", problem, "Move it there, or to a repo on the Hub.")
        inside = visible_files(place, SourceError) if place.is_dir() else [place]
        found |= {
            path.relative_to(beside).as_posix(): path
            for path in inside
            if "__pycache__" not in path.parts
        }
    return found


def require_streamable(recipe: Recipe) -> None:
    """Refuse a recipe that scores or uses other merges, which need whole models on the disk."""
    if parts := [str(one.name) for one in parts_of(recipe)]:
        problem = f"--stream keeps no model on this disk, but {parts[0]} is merged before."
        raise RecipeError("recipe", "models", problem, "Merge without --stream.")
    if any(one.align for one in recipe.models):
        problem = "`align` runs whole models, and --stream keeps none on this disk."
        raise RecipeError("recipe", "models", problem, "Merge without --stream.")
    if recipe.export:
        problem = "an export reads the merged weights on the disk, and --stream keeps none."
        remedy = "Leave it out, and convert the result on a larger disk: `lewis-hub export --to "
        raise RecipeError("recipe", "export", problem, f"{remedy}{recipe.export[0]} REPO`.")
    if recipe.evaluate is None:
        return
    problem = "scoring needs whole models on the disk, and --stream keeps none."
    where = "evaluate"
    remedy = "Add --no-eval, and score the result on a larger disk: `lewis-hub evaluate REPO`."
    if recipe.evaluate.gate:
        where = "evaluate.gate"
        remedy = (
            "A gate needs the scores before the push. Merge without --stream on a machine with "
            "enough disk, for example with `--on jobs`; or remove the gate, then add --no-eval."
        )
    raise RecipeError("recipe", where, problem, remedy)
