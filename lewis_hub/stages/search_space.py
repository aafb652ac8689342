"""What a search may change in a recipe, and how far: axes from the registries, and back again.

An axis is named by its place in the recipe: `guide.gamma`, `parameters.lambda`, `models[0].weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import yaml

from lewis_hub.errors import RecipeError, TuningError
from lewis_hub.guides import registry as guide_registry
from lewis_hub.merge.parameters import DEFAULTS
from lewis_hub.methods import registry
from lewis_hub.methods.registry import Method
from lewis_hub.recipe import Guide, ModelEntry, Recipe
from lewis_hub.recipe_file import parse_recipe
from lewis_hub.stages.reading import rules
from lewis_hub.stages.sources import needs_grams

# Numbers are searched by name; one that is not here stays as the recipe has it.
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
DENSITIES = (0.05, 1.0)  # of a guide's gamma and epsilon
ENDS = ("guide.gamma", "guide.epsilon")
USUAL = dict(zip(ENDS, (0.3, 0.8), strict=True))  # where the paper starts
METHOD, GUIDE = "merge_method", "guide.name"

Value = float | bool | str
Values = Mapping[str, Value]  # axis -> value


@dataclass(frozen=True)
class Number:
    """Any number from low to high; `start` is the recipe's own, and within."""

    name: str
    low: float
    high: float
    start: float


@dataclass(frozen=True)
class Choice:
    """One of a few; the same ones in the same order by whichever method."""

    name: str
    options: tuple[str | bool, ...]
    start: str | bool


Axis = Number | Choice


@dataclass(frozen=True)
class Space:
    """The recipes that are tried.

    Attributes:
        methods: the recipe's own is first.
        guides: the recipe's own is first; none: densities come from its `parameters`.
    """

    recipe: Recipe
    methods: tuple[str, ...]
    guides: tuple[str, ...]


def space_of(recipe: Recipe, methods: Sequence[str] = (), guides: Sequence[str] = ()) -> Space:
    """The space around a recipe.

    Args:
        recipe: what is tuned.
        methods: to try besides its own.
        guides: to try besides its own; none: `uniform` where it has one.

    Raises:
        RecipeError: one of these recipes cannot be; or it stacks slices.
        MergeError, GuideError: there is no such method or guide.
        TuningError: a method starts from other models than the recipe's own.
    """
    if recipe.slices:
        problem = "only whole models under `models` can be tuned."
        raise RecipeError("recipe", "slices", problem, "List whole models, or tune by hand.")
    own = [recipe.guide.name] if recipe.guide else []
    if own and not guides:
        guides = ["uniform"]
    space = Space(
        recipe,
        tuple(dict.fromkeys([recipe.merge_method, *methods])),
        tuple(dict.fromkeys([*own, *guides])),
    )
    takes_base = registry.find(recipe.merge_method).takes_base
    for name in space.methods:
        if registry.find(name).takes_base != takes_base:
            first, second = ("a base", "none") if takes_base else ("no base", "one")
            problem = f"`{recipe.merge_method}` takes {first}, and `{name}` {second}"
            raise TuningError("tune", problem, "Tune the two apart: what they merge differs.")
    for one in corners(space):
        parse_recipe(written(one), "the recipe to be tried", rules)
    return space


def corners(space: Space) -> tuple[Recipe, ...]:
    """The recipe with its own settings, by each method and guide; the recipe as it is comes first.

    Whatever is tried needs what one of them needs.
    """
    return tuple(candidate(space, values) for values in _corners(space))


def _corners(space: Space) -> Iterator[Values]:
    for method in space.methods:
        for guide in space.guides or ("",):
            told: dict[str, Value] = {a.name: a.start for a in axes(space, method)}
            wanted: dict[str, Value] = {METHOD: method, GUIDE: guide}
            yield told | {name: value for name, value in wanted.items() if name in told}


def warm_starts(space: Space) -> tuple[Values, ...]:
    """The recipe as it is; then with the usual gamma and epsilon, where it has others."""
    start: dict[str, Value] = {a.name: a.start for a in axes(space, space.methods[0])}
    usual = start | {name: value for name, value in USUAL.items() if name in start}
    return (start,) if usual == start else (start, usual)


def axes(space: Space, method_name: str) -> tuple[Axis, ...]:
    """What can be changed under one method; which method it is comes first."""
    method = registry.find(method_name)
    found: list[Axis] = []
    if len(space.methods) > 1:
        found.append(Choice(METHOD, space.methods, space.methods[0]))
    if method.takes_density and space.guides:
        found += _of_guide(space)
    found += _of_weights(space.recipe, method)
    guided = bool(space.guides)
    return (*found, *_of_parameters(space.recipe, method, guided=guided))


def candidate(space: Space, values: Values) -> Recipe:
    """The recipe with other values."""
    recipe = space.recipe
    method = registry.find(_method(space, values))
    told = settled(space, values)
    known = {*method.settings, *method.options, *method.accepted}
    common = {name: value for name, value in recipe.parameters.items() if name in known}
    common |= {
        name.removeprefix("parameters."): value
        for name, value in told.items()
        if name.startswith("parameters.")
    }
    models = []
    for index, entry in enumerate(recipe.models):
        own = {name: value for name, value in entry.parameters.items() if name in method.settings}
        weight = told.get(f"models[{index}].weight")
        own |= {} if weight is None else {"weight": weight}
        models.append(entry.model_copy(update={"parameters": own}))
    guide = _guide(space, told) if method.takes_density else None
    changed = {"merge_method": method.name, "parameters": common, "models": tuple(models)}
    tried = recipe.model_copy(update=changed | {"guide": guide})
    measures = guide or needs_grams(tried)
    return tried if measures else tried.model_copy(update={"calibration": None})


def settled(space: Space, values: Values) -> dict[str, Value]:
    """Proposed values as they are merged.

    Of gamma and epsilon the lower one is gamma. Numbers are rounded to four digits, but for the
    recipe's own.
    """
    known = {axis.name: axis for axis in axes(space, _method(space, values))}
    told = {name: _rounded(known[name], value) for name, value in values.items()}
    ends = sorted(float(told[name]) for name in ENDS if name in told)
    return told | dict(zip(ENDS, ends, strict=True) if len(ends) == 2 else {})


def _method(space: Space, values: Values) -> str:
    return str(values.get(METHOD, space.methods[0]))


def written(recipe: Recipe) -> str:
    """A recipe as YAML: what the user wrote, and what was changed."""
    told = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    return str(yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100))


def short_name(axis: str) -> str:
    """An axis for the head of a column: `lambda`, `weight[0]`, `guide.gamma`."""
    index = re.fullmatch(r"models(\[\d+\])\.weight", axis)
    return f"weight{index[1]}" if index else axis.removeprefix("parameters.")


def shown_value(value: Value | None) -> str:
    """A value for readers; a dash where a trial has none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def _guide(space: Space, told: Values) -> Guide | None:
    if not space.guides:
        return None
    changed: dict[str, Any] = {"name": told.get(GUIDE, space.guides[0])}
    changed |= {name.removeprefix("guide."): told[name] for name in ENDS}
    return (space.recipe.guide or Guide()).model_copy(update=changed)


def _rounded(axis: Axis, value: Value) -> Value:
    if isinstance(axis, Choice) or value == axis.start:
        return value
    return float(f"{value:.4g}")


def _of_guide(space: Space) -> Iterator[Axis]:
    for name in space.guides:
        guide_registry.find(name)
    if len(space.guides) > 1:
        yield Choice(GUIDE, space.guides, space.guides[0])
    own = space.recipe.guide or Guide()
    yield _number("guide.gamma", DENSITIES, own.gamma)
    yield _number("guide.epsilon", DENSITIES, own.epsilon)


def _of_weights(recipe: Recipe, method: Method) -> Iterator[Axis]:
    """A weight of each model, where none is a gradient or a list of conditions."""
    if "weight" not in method.settings:
        return
    of_all = recipe.parameters.get("weight", DEFAULTS["weight"])
    for index, entry in enumerate(recipe.models):
        weight = entry.parameters.get("weight", of_all)
        if _is_merged(recipe, method, entry) and _is_number(weight):
            yield _number(f"models[{index}].weight", RANGES["weight"], float(weight))


def _is_merged(recipe: Recipe, method: Method, entry: ModelEntry) -> bool:
    return not method.takes_base or entry in recipe.experts


def _of_parameters(recipe: Recipe, method: Method, *, guided: bool) -> Iterator[Axis]:
    """Options of the method, and settings that its models have in common."""
    common = [name for name in method.settings if name != "weight"]
    if guided and "density" in common:
        common.remove("density")
    own = {name for entry in recipe.models for name in entry.parameters}
    asked: dict[str, Any] = {name: DEFAULTS[name] for name in common if name not in own}
    asked |= method.options
    for name, default in asked.items():
        value = recipe.parameters.get(name, default)
        if isinstance(value, bool):
            yield Choice(f"parameters.{name}", (False, True), value)
        elif name in RANGES:
            low, high = RANGES[name]
            start = (low + high) / 2 if value is None else value
            if _is_number(start):
                yield _number(f"parameters.{name}", (low, high), float(start))


def _number(name: str, bounds: tuple[float, float], start: float) -> Number:
    return Number(name, min(bounds[0], start), max(bounds[1], start), start)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
