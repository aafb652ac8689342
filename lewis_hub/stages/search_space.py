"""The recipes that a search tries: from values on the axes to a recipe, and which come first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from lewis_hub.errors import CheckFailedError, RecipeError, TuningError
from lewis_hub.guides import registry as guide_registry
from lewis_hub.methods import registry
from lewis_hub.recipe import Guide, Recipe
from lewis_hub.recipe_file import dotted
from lewis_hub.recipe_settings import Parameters
from lewis_hub.stages.reading import rules
from lewis_hub.stages.refusing import guide_refusals
from lewis_hub.stages.search_axes import (
    EPSILON,
    GAMMA,
    GUIDE,
    METHOD,
    NONE,
    Axis,
    Choice,
    Space,
    Value,
    Values,
    axes,
    guide_of,
    method_of,
    sets_densities,
    takes_guide,
)
from lewis_hub.stages.sources import needs_grams

ENDS = (GAMMA, EPSILON)
USUAL = dict(zip(ENDS, (0.3, 0.8), strict=True))  # where the paper starts


def space_of(recipe: Recipe, methods: Sequence[str] = (), guides: Sequence[str] = ()) -> Space:
    """The space around a recipe.

    Args:
        recipe: what is tuned.
        methods: to try besides its own.
        guides: to try besides its own, `none` among them; none: `uniform` where it has one.

    Raises:
        RecipeError: one of these recipes cannot be; or it stacks slices.
        CheckFailedError: its own guide would do nothing.
        MergeError, GuideError: there is no such method or guide.
        TuningError: a method starts from other models than the recipe's own, or none takes a guide.
    """
    if recipe.slices:
        problem = "only whole models under `models` can be tuned."
        raise RecipeError("recipe", "slices", problem, "List whole models, or tune by hand.")
    if refused := guide_refusals(recipe):
        raise CheckFailedError(tuple(refused))
    own = recipe.guide.name if recipe.guide else NONE
    if recipe.guide and not guides:
        guides = ["uniform"]
    space = Space(
        recipe,
        tuple(dict.fromkeys([recipe.merge_method, *methods])),
        tuple(dict.fromkeys([own, *guides])),
    )
    for name in {*space.guides} - {NONE}:
        guide_registry.find(name)
    _require_alike(space)
    for values in combinations(space):
        for where, problem, remedy in rules(candidate(space, values)):
            raise RecipeError(_called(values), dotted(where), problem, remedy)
    return space


def _require_alike(space: Space) -> None:
    own, *others = map(registry.find, space.methods)
    for other in others:
        if other.takes_base != own.takes_base:
            first, second = ("a base", "none") if own.takes_base else ("no base", "one")
            problem = f"`{own.name}` takes {first}, and `{other.name}` {second}"
            raise TuningError("tune", problem, "Tune the two apart: what they merge differs.")
    if len(space.guides) > 1 and not any(takes_guide(space.recipe, m) for m in (own, *others)):
        problem = f"`{own.name}` keeps every entry, so a guide would do nothing"
        remedy = "Leave out --guide, or let --method name one that has densities, such as ties."
        raise TuningError("tune", problem, remedy)


def _called(values: Values) -> str:
    """What messages call a recipe that lies in no file."""
    told = [f"`{name}: {values[name]}`" for name in (METHOD, GUIDE) if name in values]
    return f"the recipe with {' and '.join(told)}" if told else "recipe"


def combinations(space: Space) -> tuple[Values, ...]:
    """The recipe's own settings by each method and guide; the recipe as it is comes first."""
    return tuple(
        _starts(space, {METHOD: method, GUIDE: guide})
        for method in space.methods
        for guide in (space.guides if takes_guide(space.recipe, registry.find(method)) else (NONE,))
    )


def corners(space: Space) -> tuple[Recipe, ...]:
    """The recipes of `combinations`: whatever is tried needs what one of them needs."""
    return tuple(candidate(space, values) for values in combinations(space))


def warm_starts(space: Space) -> tuple[Values, ...]:
    """The recipe as it is; then with a guide's usual gamma and epsilon, where it has others.

    The guide is its own, or else the first that is asked for.
    """
    own = _starts(space, {})
    guide = next((name for name in space.guides if name != NONE), NONE)
    chosen: Values = {GUIDE: guide, **USUAL}
    usual = _starts(space, chosen)
    fits = all(_holds(axis, usual[axis.name]) for axis in axes(space, chosen))
    return (own, usual) if fits and usual != own else (own,)


def _starts(space: Space, chosen: Values) -> dict[str, Value]:
    """What is chosen, and where each other axis starts."""
    return {axis.name: chosen.get(axis.name, axis.start) for axis in axes(space, chosen)}


def _holds(axis: Axis, value: Value) -> bool:
    if isinstance(axis, Choice):
        return value in axis.options
    return axis.low <= float(value) <= axis.high


def candidate(space: Space, values: Values) -> Recipe:
    """The recipe with other values.

    Its own method keeps all that the recipe says; another one what it knows. Where a guide sets
    the densities, those of the recipe and its models are left out.
    """
    recipe, told = space.recipe, settled(space, values)
    common = _kept(space, values, recipe.parameters) | {
        name.removeprefix("parameters."): value
        for name, value in told.items()
        if name.startswith("parameters.")
    }
    models = []
    for index, entry in enumerate(recipe.models):
        own = _kept(space, values, entry.parameters)
        weight = told.get(f"models[{index}].weight")
        own |= {} if weight is None else {"weight": weight}
        models.append(entry.model_copy(update={"parameters": own}))
    guide = _guide(space, told)
    method = method_of(space, values).name
    changed = {"merge_method": method, "parameters": common, "models": tuple(models)}
    tried = recipe.model_copy(update=changed | {"guide": guide})
    texts = recipe.calibration
    if guide is None and recipe.guide:
        texts = texts or recipe.guide.calibration
    measures = guide or needs_grams(tried)
    return tried.model_copy(update={"calibration": texts if measures else None})


def settled(space: Space, values: Values) -> dict[str, Value]:
    """Proposed values as they are merged.

    Of gamma and epsilon the lower one is gamma. Numbers are rounded to four digits, but for the
    recipe's own.
    """
    known = {axis.name: axis for axis in axes(space, values)}
    told = {name: _rounded(known[name], value) for name, value in values.items()}
    ends = sorted(float(told[name]) for name in ENDS if name in told)
    return told | dict(zip(ENDS, ends, strict=True) if len(ends) == 2 else {})


def written(recipe: Recipe) -> str:
    """A recipe as YAML: what the user wrote, and what was changed."""
    told = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    return str(yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100))


def _kept(space: Space, values: Values, parameters: Parameters) -> dict[str, Any]:
    method = method_of(space, values)
    known = {*method.settings, *method.options, *method.accepted}
    if method.name == space.recipe.merge_method:
        known |= parameters.keys()  # what it does not know is refused, as in a merge
    if sets_densities(space.recipe, guide_of(space, values)):
        known.discard("density")
    return {name: value for name, value in parameters.items() if name in known}


def _guide(space: Space, told: Values) -> Guide | None:
    name = guide_of(space, told)
    if name == NONE:
        return None
    changed = {"name": name, "gamma": told[GAMMA], "epsilon": told[EPSILON]}
    return (space.recipe.guide or Guide()).model_copy(update=changed)


def _rounded(axis: Axis, value: Value) -> Value:
    if isinstance(axis, Choice) or value == axis.start:
        return value
    return float(f"{value:.4g}")
