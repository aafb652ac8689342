"""Make the merges that a recipe uses, and hand them to it as sources, without their reports.

A report has dates, costs and the revisions as they were written. Without it the files are the same
whenever the merge is made, and so are the digests of the next merge.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from shutil import rmtree
from typing import TypeVar

from huggingface_hub import HfApi

from lewis_hub.display import Progress
from lewis_hub.documents import read_yaml
from lewis_hub.errors import CheckFailedError, MergeError, OtherOutputError, SourceError
from lewis_hub.files import require_no_links, sha256_of, write_whole
from lewis_hub.hub.changes import is_unchanged
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.hub.source import Source, state_of
from lewis_hub.merge.settings import require_valid
from lewis_hub.merge.workspace import alone_at, lock_beside, parts_folder, unfinished
from lewis_hub.methods import registry
from lewis_hub.recipe.parts import all_of, not_needed, parts_of, references, used, with_made
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.recipe.rules import all_parameters
from lewis_hub.recipe.schema import Recipe
from lewis_hub.workflow.resolve import (
    Inputs,
    calibrations_in,
    calibrations_of,
    each_source,
    find_place,
    resolve_data,
    with_calibrations,
)
from lewis_hub.workflow.snapshot import task_files

MERGE_AGAIN = "Run the same command again: steps that used it are made anew."
METADATA = re.compile(r"---\n.*?\n---\n", re.DOTALL)  # of a model card
REPORT, HIDDEN = "lewis", ".lewis"  # hidden files are not part of a source


@contextmanager
def with_parts(
    recipe: Recipe,
    output: Path,
    merge: Callable[[Recipe, Path], object],
    progress: Progress,
) -> Iterator[Recipe]:
    """Make the merges that a recipe uses, each kept in OUTPUT.parts as long as it is needed.

    Yields the recipe, which reads them from their folders. After an error the finished ones stay
    for the next run. `merge` makes a part in a folder.

    Raises:
        OutputError: another run makes parts for this output.
    """
    parts, folder = parts_of(recipe), parts_folder(output)
    if not parts:
        yield recipe
        return
    if problems := examine_parameters((*parts, recipe)):
        raise CheckFailedError(tuple(problems))
    require_no_links(folder)
    with alone_at(lock_beside(folder), output):  # at the end they are deleted
        yield _with_made(recipe, parts, folder, merge, progress)
        rmtree(folder)


def _with_made(
    recipe: Recipe,
    parts: Sequence[Recipe],
    folder: Path,
    merge: Callable[[Recipe, Path], object],
    progress: Progress,
) -> Recipe:
    """Make the parts of a recipe in a folder; return the recipe, which reads them there."""
    whole, made = recipe, list[Recipe]()
    for number, part in enumerate(parts, start=1):
        name, place = str(part.name), folder / _folder_name(number, part, whole.made)
        progress.say(f"Merging {name} ({number} of {len(parts)} before the last merge)")
        _show_report(place)
        try:
            merge(with_made(part, whole.made), place)
        except OtherOutputError:  # of an interrupted run, before a source got a new commit
            rmtree(place)
            merge(with_made(part, whole.made), place)
        made.append(_with_includes(_hide_report(place), part))
        whole = with_made(whole, {name: place})
        own = {str(one.name) for one in parts}  # others belong to the merge that this is a part of
        for unused in own.intersection(not_needed(whole, parts[number:])):
            rmtree(whole.made[unused], ignore_errors=True)
    return whole.model_copy(update={"intermediate": tuple(made)})


@dataclass(frozen=True)
class StepSources:
    """All that a merge in steps starts from, pinned together."""

    models: Mapping[ModelReference, Source]
    datasets: Mapping[tuple[str, str | None], Source]  # of calibrations, by name and revision
    task_files: Mapping[str, str]  # the user's, by path -> digest and state

    def changed(self, before: StepSources, output: Path) -> Iterator[str]:
        """The names of what is not as it was pinned before; what is made for `output` is none."""
        yield from _changed(self.models, before.models, output)
        yield from _changed(self.datasets, before.datasets, output)
        for path in sorted(self.task_files.keys() | before.task_files.keys()):
            if self.task_files.get(path) != before.task_files.get(path):
                yield path


Key = TypeVar("Key")


def _changed(
    sources: Mapping[Key, Source], before: Mapping[Key, Source], output: Path
) -> Iterator[str]:
    own = [place.resolve() for place in (output, unfinished(output), parts_folder(output))]
    for key, source in sources.items():
        if key not in before or not is_unchanged(source, before[key], own):
            yield source.name


def _read_otherwise(recipe: Recipe, before: StepSources) -> Iterator[str]:
    """The repos of which a finished step read another commit, as when a tag was moved and back."""
    pinned = {source.pinned for source in (*before.models.values(), *before.datasets.values())}
    repos = {name.partition("@")[0] for name in pinned}
    made = {one.name for one in all_of(recipe)}  # an adapter on a base of its own is named by both
    for one in recipe.intermediate:
        for step in all_of(one):
            read = [one for one in references(step) if str(one) not in made]
            models = [str(part) for ref in read for part in (ref, ref.on) if part]
            datasets = [text.dataset for text in calibrations_of(step) if text.dataset]
            for name in (*models, *datasets):
                if "@" in name and name not in pinned and name.partition("@")[0] in repos:
                    yield name


def require_sources(recipe: Recipe, api: HfApi) -> StepSources:
    """Pin all that a recipe and the merges that it uses start from; nothing is opened.

    Raises:
        SourceError: a model or dataset cannot be found.
        SourcesError: several models cannot.
        EvaluationError: a task cannot be found.
    """
    recipes = [one for part in (*parts_of(recipe), recipe) for one in all_of(part)]
    made = {one.name for one in recipes} | recipe.made.keys()
    named = [model for one in recipes for model in references(one) if str(model) not in made]

    def resolved(model: ModelReference) -> Source:
        place = find_place(model.name, recipe.locate)
        return resolve_model(api, place, model.revision, allow_pickle=True)

    models = dict.fromkeys(part for one in named for part in (one, one.on) if part)
    found = each_source([model for model in models if str(model) not in made], resolved)
    texts = [calibration for one in recipes for calibration in calibrations_of(one)]
    data = Inputs(None, (), resolve_data(texts, api, recipe.locate))
    datasets = {(one.name, one.revision): one for one in data.datasets}
    own = {str(file): f"{sha256_of(file)} {state_of(file)}" for file in task_files(recipe).values()}
    return StepSources(found, datasets, own)


def require_same_sources(
    recipe: Recipe, before: StepSources, made: Recipe, output: Path, api: HfApi
) -> None:
    """Refuse a merge in steps that read different states of a source: no lock could name both.

    Each step finds its own sources unchanged from its beginning to its end. Called when the last
    step has pinned its sources, this compares all of them with those `before` the first step, and
    with the commits that the steps of the recipe that was `made` of it name.

    Raises:
        SourceError: a source changed.
    """
    changed = require_sources(recipe, api).changed(before, output)
    for name in chain(changed, _read_otherwise(made, before)):
        raise SourceError(name, "it changed while the steps of the merge were made", MERGE_AGAIN)


def examine_parameters(recipes: Sequence[Recipe]) -> list[str]:
    """Return what is wrong with the methods and parameters of recipes, without their sources."""
    problems = []
    for recipe in recipes:
        places = dict(all_parameters(recipe))
        common = [s for where, s in places.items() if not {"models", "sources"} & {*where}]
        own = [s for where, s in places.items() if {"models", "sources"} & {*where}]
        try:
            method = registry.find(recipe.merge_method)
            require_valid(method, {k: v for s in common for k, v in s.items()}, own)
        except MergeError as error:
            problems.append(f"{recipe.name or 'the last merge'}: {error}")
    return problems


def _folder_name(number: int, part: Recipe, made: Mapping[str, Path]) -> str:
    """Return the name of a part's folder; an edited part has another one, and what uses it too."""
    facts = [part.model_dump_json(by_alias=True), *(made[one].name for one in used(part, made))]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return f"{number}-{digest[:8]}"


def _hide_report(folder: Path) -> Recipe:
    """Hide the report of a finished merge; return its recipe, with pinned revisions."""
    card = folder / "README.md"
    found = METADATA.match(card.read_text(encoding="utf-8"))
    write_whole(card, found[0] if found else "")
    (folder / REPORT).rename(folder / HIDDEN)
    text = (folder / HIDDEN / "recipe.yaml").read_text(encoding="utf-8")
    return Recipe.model_validate(read_yaml(text))


def _with_includes(made: Recipe, written: Recipe) -> Recipe:
    """The recipe of a finished step, with its folders of task files in place of their copies."""
    includes = iter([one.include for one in calibrations_in(written)])
    named = {one.name: one for one in written.intermediate}
    inner = [
        _with_includes(one, named[one.name]) if one.name in named else one
        for one in made.intermediate
    ]
    found = with_calibrations(made, lambda _: {"include": next(includes)})
    return found.model_copy(update={"intermediate": tuple(inner)})


def _show_report(folder: Path) -> None:
    """Show the report of a merge again that an interrupted run left, so that it may be kept."""
    if (folder / HIDDEN).exists():
        (folder / HIDDEN).rename(folder / REPORT)
