"""The search space around a recipe: its axes, and the recipe for values on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import yaml

from lewis_hub.errors import CheckFailedError, RecipeError, TuningError
from lewis_hub.guides import registry as guide_registry
from lewis_hub.merge.settings import DEFAULTS
from lewis_hub.methods import registry
from lewis_hub.methods.registry import Method
from lewis_hub.recipe.read import dotted
from lewis_hub.recipe.schema import Calibration, Guide, ModelEntry, Parameters, Recipe
from lewis_hub.workflow.check import guide_refusals
from lewis_hub.workflow.resolve import merged_entries, needs_moments, rules

# Ranges of numbers by name; other numbers are not searched.
RANGES: Mapping[str, tuple[float, float]] = {
    "weight": (0.1, 1.5),
    "density": (0.05, 1.0),
    "gamma": (0.0, 0.05),  # breadcrumbs: the fraction of largest entries that is dropped
    "epsilon": (0.0, 0.2),  # della: how far a probability lies from the density
    "lambda": (0.3, 2.0),
    "t": (0.0, 1.0),
    "select_topk": (0.05, 1.0),
    "off_diagonal": (0.0, 1.0),
}
UNSEARCHED = {"affine", "embeddings"}  # they fit other tensors than matrices of the blocks
GAMMA, EPSILON = "guide.gamma", "guide.epsilon"
USUAL = {GAMMA: 0.3, EPSILON: 0.8}  # values of the paper
METHOD, GUIDE = "merge_method", "guide.name"
NONE = "none"  # no guide: densities come from the recipe's `parameters`

Value = float | bool | str
Values = Mapping[str, Value]  # axis -> value


@dataclass(frozen=True)
class Number:
    """An axis of numbers from low to high; `start` is the recipe's value."""

    name: str
    low: float
    high: float
    start: float


@dataclass(frozen=True)
class Choice:
    """An axis of options, which do not depend on other axes; `start` is the recipe's value."""

    name: str
    options: tuple[str | bool, ...]
    start: str | bool


Axis = Number | Choice


@dataclass(frozen=True)
class Space:
    """A recipe, and the methods and guides to try; the recipe's own are first.

    A recipe without a guide has the guide `none`.
    """

    recipe: Recipe
    methods: tuple[str, ...]
    guides: tuple[str, ...]


def axes(space: Space, chosen: Values) -> tuple[Axis, ...]:
    """Return the axes for the chosen method and guide, by default the recipe's own.

    Method and guide come first, because the other axes depend on them.
    """
    recipe, method, guide = space.recipe, _method(space, chosen), _guide_name(space, chosen)
    found: list[Axis] = []
    if len(space.methods) > 1:
        found.append(Choice(METHOD, space.methods, space.methods[0]))
    if len(space.guides) > 1 and _takes_guide(recipe, method):
        found.append(Choice(GUIDE, space.guides, space.guides[0]))
    if guide != NONE:
        found += _ends(recipe.guide or Guide())
    found += _of_weights(recipe, method)
    has_density = not _sets_densities(recipe, guide)
    return (*found, *_of_parameters(recipe, method, has_density=has_density))


def _method(space: Space, chosen: Values) -> Method:
    return registry.find(str(chosen.get(METHOD, space.methods[0])))


def _guide_name(space: Space, chosen: Values) -> str:
    """Return the chosen guide; `none` if a guide has no effect with the method."""
    if not _takes_guide(space.recipe, _method(space, chosen)):
        return NONE
    return str(chosen.get(GUIDE, space.guides[0]))


def declared_calibrations(
    recipe: Recipe,
) -> tuple[tuple[ModelEntry, Calibration | None], ...]:
    """Return each expert with its calibration, whether or not the merge is fitted on texts."""
    return tuple((entry, recipe.calibration_of(entry)) for entry in merged_entries(recipe))


def _takes_guide(recipe: Recipe, method: Method) -> bool:
    apply_to = (recipe.guide or Guide()).apply_to
    return not guide_refusals(apply_to, method, is_stack=False)


def _sets_densities(recipe: Recipe, guide: str) -> bool:
    return guide != NONE and (recipe.guide or Guide()).apply_to != "weight"


def short_name(axis: str) -> str:
    """Return the name of an axis for a column: `lambda`, `weight[0]`, `guide.gamma`."""
    index = re.fullmatch(r"models(\[\d+\])\.weight", axis)
    return f"weight{index[1]}" if index else axis.removeprefix("parameters.")


def shown_value(value: Value | None) -> str:
    """Return a value as text; a dash if a trial has none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def _ends(guide: Guide) -> Iterator[Number]:
    """Yield gamma and epsilon; with a mean density their ranges are symmetric around it.

    The densities are shifted to that mean, so only their spread matters.
    """
    (low, high), mean = RANGES["density"], guide.mean_density
    below = above = (low, high)
    if mean is not None:
        reach = max(0.0, min(mean - low, high - mean))
        below, above = (round(mean - reach, 4), mean), (mean, round(mean + reach, 4))
    yield _number(GAMMA, below, guide.gamma)
    yield _number(EPSILON, above, guide.epsilon)


def _of_weights(recipe: Recipe, method: Method) -> Iterator[Axis]:
    """Yield the weight of each model that is a number, not a gradient or list of conditions."""
    if "weight" not in method.settings:
        return
    of_all = recipe.parameters.get("weight", DEFAULTS["weight"])
    for index, entry in enumerate(recipe.models):
        weight = entry.parameters.get("weight", of_all)
        is_merged = not method.takes_base or entry in recipe.experts
        if is_merged and _is_number(weight):
            yield _number(f"models[{index}].weight", RANGES["weight"], float(weight))


def _of_parameters(recipe: Recipe, method: Method, *, has_density: bool) -> Iterator[Axis]:
    """Yield options of the method, and settings that no model sets by itself."""
    skipped = {"weight"} if has_density else {"weight", "density"}
    own = {name for entry in recipe.models for name in entry.parameters}
    asked: dict[str, Any] = {
        name: DEFAULTS[name] for name in method.settings if name not in skipped | own
    }
    asked |= {name: value for name, value in method.options.items() if name not in UNSEARCHED}
    for name, default in asked.items():
        value = recipe.parameters.get(name, default)
        if isinstance(value, bool):
            yield Choice(f"parameters.{name}", (False, True), value)
        elif name in RANGES and (name in method.settings or name not in DEFAULTS):
            low, high = RANGES[name]
            start = (low + high) / 2 if value is None else value
            if _is_number(start):
                yield _number(f"parameters.{name}", (low, high), float(start))


def _number(name: str, bounds: tuple[float, float], start: float) -> Number:
    return Number(name, min(bounds[0], start), max(bounds[1], start), start)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def space_of(recipe: Recipe, methods: Sequence[str] = (), guides: Sequence[str] = ()) -> Space:
    """Return the search space around a recipe; `methods` and `guides` are tried besides its own.

    Without `guides`, `uniform` is tried if the recipe has a guide.

    Raises:
        RecipeError: one of the recipes is contradictory, or it stacks slices.
        CheckFailedError: its own guide has no effect.
        MergeError, GuideError: a method or guide is unknown.
        TuningError: a method needs a base and another takes none, or no method takes a guide.
    """
    if recipe.slices or recipe.mixed:
        problem = "only whole models under `models` can be tuned."
        listed = "slices" if recipe.slices else "experts"
        raise RecipeError("recipe", listed, problem, "List whole models, or tune by hand.")
    if recipe.guide:
        method = registry.find(recipe.merge_method)
        if refused := guide_refusals(recipe.guide.apply_to, method, is_stack=False):
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
            first, second = ("a base", "no base") if own.takes_base else ("no base", "a base")
            problem = f"`{own.name}` takes {first}, but `{other.name}` takes {second}"
            raise TuningError("tune", problem, "Tune them separately: they merge other models.")
    if len(space.guides) > 1 and not any(_takes_guide(space.recipe, m) for m in (own, *others)):
        problem = f"`{own.name}` keeps every entry, so a guide would have no effect"
        remedy = "Remove --guide, or add a --method that has densities, such as ties."
        raise TuningError("tune", problem, remedy)


def _called(values: Values) -> str:
    """Return the name of a recipe without a file, for messages."""
    changes = [f"`{name}: {values[name]}`" for name in (METHOD, GUIDE) if name in values]
    return f"the recipe with {' and '.join(changes)}" if changes else "recipe"


def combinations(space: Space) -> tuple[Values, ...]:
    """Return the recipe's settings with each method and guide; its own come first."""
    return tuple(
        _starts(space, {METHOD: method, GUIDE: guide})
        for method in space.methods
        for guide in (
            space.guides if _takes_guide(space.recipe, registry.find(method)) else (NONE,)
        )
    )


def corners(space: Space) -> tuple[Recipe, ...]:
    """Return the recipes of `combinations`; every trial has the needs of one of them."""
    return tuple(candidate(space, values) for values in combinations(space))


def warm_starts(space: Space) -> tuple[Values, ...]:
    """Return the recipe's settings, and those with the usual gamma and epsilon if they differ.

    The guide is the recipe's own, or else the first in the space.
    """
    own = _starts(space, {})
    guide = next((name for name in space.guides if name != NONE), NONE)
    chosen: Values = {GUIDE: guide, **USUAL}
    usual = _starts(space, chosen)
    fits = all(_holds(axis, usual[axis.name]) for axis in axes(space, chosen))
    return (own, usual) if fits and usual != own else (own,)


def _starts(space: Space, chosen: Values) -> dict[str, Value]:
    """Return the chosen values, and the start of every other axis."""
    return {axis.name: chosen.get(axis.name, axis.start) for axis in axes(space, chosen)}


def _holds(axis: Axis, value: Value) -> bool:
    if isinstance(axis, Choice):
        return value in axis.options
    return axis.low <= float(value) <= axis.high


def candidate(space: Space, values: Values) -> Recipe:
    """Return the recipe with other values.

    The recipe's own method keeps all settings; another method keeps those that it knows. If a
    guide sets the densities, the recipe's densities are removed.
    """
    recipe, chosen = space.recipe, settled(space, values)
    common = _kept(space, values, recipe.parameters) | {
        name.removeprefix("parameters."): value
        for name, value in chosen.items()
        if name.startswith("parameters.")
    }
    models = []
    for index, entry in enumerate(recipe.models):
        own = _kept(space, values, entry.parameters)
        weight = chosen.get(f"models[{index}].weight")
        own |= {} if weight is None else {"weight": weight}
        models.append(entry.model_copy(update={"parameters": own}))
    guide = _guide(space, chosen)
    method = _method(space, values).name
    changed = {"merge_method": method, "parameters": common, "models": tuple(models)}
    tried = recipe.model_copy(update=changed | {"guide": guide})
    texts = recipe.calibration
    if guide is None and recipe.guide:
        texts = texts or recipe.guide.calibration
    measures = guide or needs_moments(tried)
    return tried.model_copy(update={"calibration": texts if measures else None})


def settled(space: Space, values: Values) -> dict[str, Value]:
    """Return proposed values as they are merged.

    Gamma is the lower of both ends. Numbers are rounded to four digits, except the recipe's own.
    """
    known = {axis.name: axis for axis in axes(space, values)}
    chosen = {name: _rounded(known[name], value) for name, value in values.items()}
    ends = sorted(float(chosen[name]) for name in USUAL if name in chosen)
    return chosen | (dict(zip(USUAL, ends, strict=True)) if ends else {})


def written(recipe: Recipe) -> str:
    """Return a recipe as YAML, without defaults that the user did not write."""
    document = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100))


def _kept(space: Space, values: Values, parameters: Parameters) -> dict[str, Any]:
    method = _method(space, values)
    known = {*method.settings, *method.options, *method.accepted}
    if method.name == space.recipe.merge_method:
        known |= parameters.keys()  # unknown settings are refused, as in a merge
    if _sets_densities(space.recipe, _guide_name(space, values)):
        known.discard("density")
    return {name: value for name, value in parameters.items() if name in known}


def _guide(space: Space, chosen: Values) -> Guide | None:
    name = _guide_name(space, chosen)
    if name == NONE:
        return None
    changed = {"name": name, "gamma": chosen[GAMMA], "epsilon": chosen[EPSILON]}
    return (space.recipe.guide or Guide()).model_copy(update=changed)


def _rounded(axis: Axis, value: Value) -> Value:
    if isinstance(axis, Choice) or value == axis.start:
        return value
    return float(f"{value:.4g}")
