"""What a search may change in a recipe, and how far: axes from the registries.

An axis is named by its place in the recipe: `guide.gamma`, `parameters.lambda`, `models[0].weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from lewis_hub.merge.parameters import DEFAULTS
from lewis_hub.methods import registry
from lewis_hub.methods.registry import Method
from lewis_hub.recipe import Guide, ModelEntry, Recipe
from lewis_hub.stages.refusing import guide_refusals

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
GAMMA, EPSILON = "guide.gamma", "guide.epsilon"
METHOD, GUIDE = "merge_method", "guide.name"
NONE = "none"  # in the place of a guide: densities come from the recipe's `parameters`

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
    """One of a few; the same ones in the same order whatever else is chosen."""

    name: str
    options: tuple[str | bool, ...]
    start: str | bool


Axis = Number | Choice


@dataclass(frozen=True)
class Space:
    """The recipes that are tried.

    Attributes:
        methods: the recipe's own is first.
        guides: the recipe's own is first, which is `none` where it has no guide.
    """

    recipe: Recipe
    methods: tuple[str, ...]
    guides: tuple[str, ...]


def axes(space: Space, chosen: Values) -> tuple[Axis, ...]:
    """What can be changed under the method and the guide that are chosen, or else the recipe's own.

    Which method it is comes first, then which guide: what else there is depends on them.
    """
    recipe, method, guide = space.recipe, method_of(space, chosen), guide_of(space, chosen)
    found: list[Axis] = []
    if len(space.methods) > 1:
        found.append(Choice(METHOD, space.methods, space.methods[0]))
    if len(space.guides) > 1 and takes_guide(recipe, method):
        found.append(Choice(GUIDE, space.guides, space.guides[0]))
    if guide != NONE:
        found += _ends(recipe.guide or Guide())
    found += _of_weights(recipe, method)
    has_density = not sets_densities(recipe, guide)
    return (*found, *_of_parameters(recipe, method, has_density=has_density))


def method_of(space: Space, chosen: Values) -> Method:
    """The method that is chosen."""
    return registry.find(str(chosen.get(METHOD, space.methods[0])))


def guide_of(space: Space, chosen: Values) -> str:
    """The guide that is chosen; `none` where it would do nothing."""
    if not takes_guide(space.recipe, method_of(space, chosen)):
        return NONE
    return str(chosen.get(GUIDE, space.guides[0]))


def takes_guide(recipe: Recipe, method: Method) -> bool:
    """Whether a guide that is used as the recipe says does something under a method."""
    guided = {"merge_method": method.name, "guide": recipe.guide or Guide()}
    return not guide_refusals(recipe.model_copy(update=guided))


def sets_densities(recipe: Recipe, guide: str) -> bool:
    """Whether densities are a guide's, and no settings."""
    return guide != NONE and (recipe.guide or Guide()).apply_to != "weight"


def short_name(axis: str) -> str:
    """An axis for the head of a column: `lambda`, `weight[0]`, `guide.gamma`."""
    index = re.fullmatch(r"models(\[\d+\])\.weight", axis)
    return f"weight{index[1]}" if index else axis.removeprefix("parameters.")


def shown_value(value: Value | None) -> str:
    """A value for readers; a dash where a trial has none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def _ends(guide: Guide) -> Iterator[Number]:
    """Gamma and epsilon; about a mean density as far as both may lie from it at once.

    A guide's densities then are moved to that mean, so that what counts is how far they spread.
    """
    (low, high), mean = DENSITIES, guide.mean_density
    below = above = (low, high)
    if mean is not None:
        reach = max(0.0, min(mean - low, high - mean))
        below, above = (round(mean - reach, 4), mean), (mean, round(mean + reach, 4))
    yield _number(GAMMA, below, guide.gamma)
    yield _number(EPSILON, above, guide.epsilon)


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


def _of_parameters(recipe: Recipe, method: Method, *, has_density: bool) -> Iterator[Axis]:
    """Options of the method, and settings that its models have in common."""
    passed = {"weight"} if has_density else {"weight", "density"}
    own = {name for entry in recipe.models for name in entry.parameters}
    asked: dict[str, Any] = {
        name: DEFAULTS[name] for name in method.settings if name not in passed | own
    }
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
