"""The merges that a recipe starts from: those that it names, and adapters on bases of their own.

A file of several YAML documents is a recipe whose `intermediate` are the other documents.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from lewis_hub.errors import RecipeError
from lewis_hub.recipe.mixture import RoutedExpert
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.recipe.schema import ModelEntry, Recipe, Slice

ONE_EACH = "Give each merge that others use its own `name`; one may have none: the last."
LAST_ONLY = ("evaluate", "publish")  # sections of a recipe
ADAPTED = "linear"  # the average of one model: the adapter on its base


def arranged(recipes: Sequence[Recipe], file: str) -> Recipe:
    """Join merges of one file: the last, or the one without a name, with those that it needs.

    Raises:
        RecipeError: names are missing or repeated, merges need each other, or no other merge needs
            one of them.
    """
    unnamed = [one for one in recipes if one.name is None]
    last = unnamed[0] if unnamed else recipes[-1]
    others = {one.name: one for one in recipes if one is not last and one.name is not None}
    if len(others) < len(recipes) - 1:
        raise RecipeError(file, "name", "two of its merges have the same name, or none.", ONE_EACH)
    ordered: dict[str, Recipe] = {}
    if circle := _add_needed(last, others, ordered, ()):
        remedy = "A merge can only use merges that do not need it."
        raise RecipeError(file, "name", f"the merges use each other: {circle}.", remedy)
    for name in others:
        if name not in ordered:
            remedy = "Only the last merge is kept: use it there, or move it to a file of its own."
            raise RecipeError(file, "name", f"no other merge uses `{name}`.", remedy)
    whole = last.model_copy(update={"intermediate": (*last.intermediate, *ordered.values())})
    for _, section, problem, remedy in last_sections(whole):
        raise RecipeError(file, section, problem, remedy)
    return whole


def last_sections(recipe: Recipe) -> Iterator[tuple[int, str, str, str]]:
    """Yield each section of an `intermediate` merge that only the last merge may have.

    Yields:
        The number of the merge, the section, the problem, and what to do.
    """
    for number, part in enumerate(recipe.intermediate):
        for one in all_of(part):
            for section in LAST_ONLY:
                if getattr(one, section) is not None:
                    problem = f"`{one.name}` has `{section}`, but it is only a step to another "
                    remedy = f"Move `{section}` to the last merge."
                    yield number, section, f"{problem}merge.", remedy


def _add_needed(
    recipe: Recipe,
    others: Mapping[str, Recipe],
    ordered: dict[str, Recipe],
    above: tuple[str, ...],
) -> str | None:
    """Add the merges that a recipe uses, each after those that it uses; a circle is returned."""
    for name in used(recipe, others):
        if name in above:
            return " -> ".join((*above, name))
        if name not in ordered:
            if circle := _add_needed(others[name], others, ordered, (*above, name)):
                return circle
            ordered[name] = others[name]
    return None


def all_of(recipe: Recipe) -> Iterator[Recipe]:
    """Yield a recipe and the merges that it starts from, and those that they start from."""
    yield recipe
    for part in recipe.intermediate:
        yield from all_of(part)


def references(recipe: Recipe) -> Iterator[ModelReference]:
    """Yield all models that a recipe names, with repetitions."""
    bases = (recipe.base_model, *(part.base_model for part in recipe.slices))
    yield from (base for base in bases if base)
    yield from (entry.model for entry in recipe.models)
    yield from (source.model for part in recipe.slices for source in part.sources)
    yield from (expert.source_model for expert in recipe.mixed)


def used(recipe: Recipe, names: Collection[str]) -> list[str]:
    """Return which of some merges a recipe names, in order, each once."""
    found = dict.fromkeys(
        str(model) for one in references(recipe) for model in (one, one.on) if model
    )
    return [name for name in found if name in names]


def parts_of(recipe: Recipe) -> tuple[Recipe, ...]:
    """Return the merges that must be made before a recipe, in order.

    These are its `intermediate` merges, and a merge for each adapter whose base is not the
    recipe's `base_model`; without those that it reads from folders already. Rules refuse such an
    adapter in a mixture of experts.
    """
    known = {one.name for one in recipe.intermediate}
    adapters = {
        str(model): model
        for model in references(recipe)
        if model.on
        and str(model) not in known
        and model.on != recipe.base_model
        and not recipe.mixed
    }
    waiting = [one for one in recipe.intermediate if one.name not in recipe.made]
    return (
        *(one.placed_as(recipe) for one in waiting),
        *(_on_its_base(name, model).placed_as(recipe) for name, model in adapters.items()),
    )


def not_needed(recipe: Recipe, later: Sequence[Recipe]) -> list[str]:
    """Return the merges made for a recipe that neither it nor later parts use."""
    needed = {name for one in (recipe, *later) for name in used(one, recipe.made)}
    return [name for name in recipe.made if name not in needed]


def _on_its_base(name: str, adapter: ModelReference) -> Recipe:
    alone = adapter.model_copy(update={"on": None})
    return Recipe(
        name=name, base_model=adapter.on, models=(ModelEntry(model=alone),), merge_method=ADAPTED
    )


def with_made(recipe: Recipe, folders: Mapping[str, Path]) -> Recipe:
    """Return the same recipe; merges of these names are read from their folders."""

    def found(model: ModelReference) -> ModelReference:
        if str(model) not in folders:
            return model
        return model.model_copy(update={"name": str(model), "revision": None, "on": None})

    def base_of(place: Recipe | Slice) -> dict[str, ModelReference | None]:
        return {"base_model": found(place.base_model) if place.base_model else None}

    models = [one.model_copy(update={"model": found(one.model)}) for one in recipe.models]
    slices = []
    for part in recipe.slices:
        sources = [one.model_copy(update={"model": found(one.model)}) for one in part.sources]
        slices.append(part.model_copy(update={"sources": tuple(sources), **base_of(part)}))
    changed: dict[str, object] = {
        "models": tuple(models),
        "slices": tuple(slices),
        **base_of(recipe),
    }
    for key in ("routed", "shared_experts"):
        experts: tuple[RoutedExpert, ...] | None = getattr(recipe, key)
        if experts is not None:
            changed[key] = tuple(
                one.model_copy(update={"source_model": found(one.source_model)}) for one in experts
            )
    return recipe.model_copy(update=changed).reading(folders)
