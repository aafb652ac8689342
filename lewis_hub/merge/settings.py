"""The settings of each tensor: weights, densities and options, from a recipe's parameters.

The rules are mergekit's. A list of numbers is a gradient: its first value is that of the first
block, its last that of the last block. Tensors before the blocks get the first value, tensors after
them the last (in mergekit also the first). In a list of {filter, value}, the first filter that is
part of the tensor's name applies. A source's own parameters override the recipe's, and these the
defaults.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lewis_hub.checkpoint import names
from lewis_hub.errors import MergeError
from lewis_hub.methods.registry import Method
from lewis_hub.recipe.schema import Conditional, Scalar, Setting, Settings

DEFAULTS = {"weight": 1.0, "density": 1.0, "gamma": 0.01, "epsilon": 0.15, "scale": 1.0}
RANGES = {  # lowest and highest value
    "density": (0, 1),
    "gamma": (0, 1),
    "off_diagonal": (0, 1),
    "ridge": (0, math.inf),
    "anchor_density": (0, 1),
    "prior": (0, 1),
    "interpolation": (0, 1),
    "trim_exponent": (0, math.inf),
    "select_topk": (0, 1),
    "epsilon": (0, 0.5),
}
MEANINGS = {  # of names that mean the same in all methods whose docstrings do not describe them
    "weight": "the factor of a model",
    "density": "the fraction of entries kept",
    "gamma": "the fraction of entries that are dropped for being the largest",
    "epsilon": "how far an entry's probability of being kept is from the density",
    "scale": "the factor of all tensors",
    "lambda": "the factor of the merged update",
    "normalize": "whether to divide by the sum of the weights",
    "rescale": "whether to enlarge what is kept, to make up for what is dropped",
    "trim": "what ranks entries: magnitude, or magnitude times the activation norm of the input",
    "trim_exponent": "the power of the activation norm",
    "ridge": "how strongly a matrix is pulled towards the anchor",
    "anchor_scale": "the factor of the anchor",
}
KINDS = {  # of an option that is no float: expected value, remedy
    bool: ("true or false", "Write true or false."),
    int: ("a whole number of at least 1", "Give one number: it has no gradient."),
    str: ("a word", "Give a word."),
}
ANY = (None, "*")
ANY_VALUE = (-math.inf, math.inf)
NOTHING = 1e-6  # a sum of weights below this share of their magnitudes is zero in float32


@dataclass(frozen=True)
class MethodParameter:
    """A parameter of a method in a recipe."""

    name: str
    default: Scalar | None  # None: the recipe must set it
    values: str  # those that a recipe may give, in words
    meaning: str  # a phrase; empty if the method's docstring has none
    per_source: bool  # whether each model may have its own value

    @property
    def description(self) -> str:
        """The meaning, and whether models may have different values."""
        own = "may differ by model" if self.per_source else ""
        return "; ".join(filter(None, (self.meaning, own)))


def parameters_of(method: Method) -> tuple[MethodParameter, ...]:
    """The parameters of a method: those of each model, then those of all models."""
    own = [
        MethodParameter(
            name, DEFAULTS[name], _allowed(name, method), _meaning(name, method), per_source=True
        )
        for name in method.settings
    ]
    common = [
        MethodParameter(
            name, default, _allowed(name, method), _meaning(name, method), per_source=False
        )
        for name, default in method.options.items()
    ]
    return (*own, *common)


def _meaning(name: str, method: Method) -> str:
    """What a parameter is, by the docstring of the method or as in all methods."""
    return method.meanings.get(name) or MEANINGS.get(name, "")


def _range(name: str, method: Method) -> tuple[float, float]:
    """The lowest and the highest value; a setting's limits are not those of an option."""
    is_limited = name in method.settings or name not in DEFAULTS
    return RANGES.get(name, ANY_VALUE) if is_limited else ANY_VALUE


def _allowed(name: str, method: Method) -> str:
    """The values that a parameter takes, in words."""
    if name in method.accepted:
        return " or ".join(map(str, method.accepted[name]))
    if type(default := method.options.get(name)) in KINDS:
        return KINDS[type(default)][0]
    low, high = _range(name, method)
    if math.isinf(low):
        return "a number"
    return f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"


def depths(tensors: Collection[str], first: int = 0) -> dict[str, float]:
    """The depth of each tensor in its stack of blocks: 0 at the first block, 1 at the last.

    Tensors outside the blocks: 0 for embeddings, 1 for the rest (final norm, head). A single block
    has depth 1. `first` is the number of the first block.
    """
    last, found = names.last_blocks(tensors), {}
    for name in tensors:
        stack, block = names.stack(name), names.block(name)
        if stack is None or block is None:
            found[name] = 0.0 if names.is_input_side(name) else 1.0
        else:
            n_steps = last[stack] - first
            found[name] = (block - first) / n_steps if n_steps else 1.0
    return found


def evaluate(setting: Setting, name: str, depth: float) -> Scalar | None:
    """The value of a setting for one tensor; None if none of its filters fits."""
    if not isinstance(setting, tuple):
        return setting
    gradient = [value for value in setting if not isinstance(value, Conditional)]
    if gradient:
        place = depth * (len(gradient) - 1)
        left = int(place)
        right = min(left + 1, len(gradient) - 1)
        return (1 - (place - left)) * gradient[left] + (place - left) * gradient[right]
    for conditional in setting:
        assert isinstance(conditional, Conditional)
        if conditional.filter in ANY or conditional.filter in name:
            return evaluate(conditional.value, name, depth)
    return None


def look_up(setting_name: str, places: Sequence[Settings], name: str, depth: float) -> Any:
    """The value for one tensor in the first of `places` that has one; None if none has."""
    for settings in places:
        if setting_name in settings:
            value = evaluate(settings[setting_name], name, depth)
            if value is not None:
                return value
    return None


def require_valid(method: Method, common: Settings, per_source: Sequence[Settings]) -> None:
    """Raise a MergeError for unknown parameters and invalid values; no checkpoint is needed."""
    method.require_known(common, per_source=False)
    for settings in per_source:
        method.require_known(settings, per_source=True)
        for name in filter(method.settings.__contains__, settings):
            _require_number(method, name, settings[name])
    for name, setting in common.items():
        if not method.uses(name, per_source=False):
            continue
        if name in method.accepted:
            _require_among(name, setting, method)
        elif type(default := method.options.get(name)) in KINDS:
            _require_kind(name, setting, type(default))
        else:
            _require_number(method, name, setting)
    for name, default in method.options.items():
        if default is None and name not in common:
            problem = f"`{method.name}` needs this parameter, and the recipe does not set it"
            remedy = "Give it in the recipe's `parameters`."
            raise MergeError(f"parameter `{name}`", problem, remedy)


def require_filters_fit(
    common: Settings, per_source: Sequence[Settings], tensors: Collection[str]
) -> None:
    """Raise a MergeError for a filter that is part of no tensor's name."""
    for settings in (common, *per_source):
        for name, setting in settings.items():
            for conditional in setting if isinstance(setting, tuple) else ():
                if not isinstance(conditional, Conditional) or conditional.filter in ANY:
                    continue
                if not any(conditional.filter in tensor for tensor in tensors):
                    raise _unused(name, conditional.filter, tensors)


def _unused(name: str, given: str, tensors: Collection[str]) -> MergeError:
    components = dict.fromkeys(names.component(tensor) for tensor in tensors)
    parts = dict.fromkeys(part for c in components for part in (c, *c.split(".")))
    near = names.nearest(given, parts, cutoff=0.4)
    hint = f"Did you mean `{near}`?" if near else f"Components: {', '.join(components)}."
    problem = f"the filter `{given}` is part of no tensor's name"
    return MergeError(f"parameter `{name}`", problem, hint)


def _values(setting: Any) -> list[Scalar]:
    if isinstance(setting, tuple):
        return [value for item in setting for value in _values(getattr(item, "value", item))]
    return [setting]


def _require_number(method: Method, name: str, setting: Setting) -> None:
    low, high = _range(name, method)
    for value in _values(setting):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MergeError(f"parameter `{name}`", f"{value!r} is no number", "Give a number.")
        if not low <= value <= high:
            problem = f"expected a value from {low:g} to {high:g}, found {value:g}"
            raise MergeError(f"parameter `{name}`", problem, f"It is {_meaning(name, method)}.")


def _require_kind(name: str, setting: Setting, kind: type) -> None:
    expected, remedy = KINDS[kind]
    conditions = setting if isinstance(setting, tuple) else (Conditional(value=setting),)
    if kind is bool and all(getattr(one, "value", None) in (0, 1) for one in conditions):
        return  # also numbers, as in mergekit, but no gradients
    for value in _values(setting):
        if type(value) is not kind or (type(value) is int and value < 1):
            problem = f"expected {expected}, found {value!r}"
            raise MergeError(f"parameter `{name}`", problem, remedy)


def _require_among(name: str, setting: Setting, method: Method) -> None:
    allowed = method.accepted[name]
    for value in _values(setting):
        if value not in allowed:
            problem = f"`{method.name}` does not do `{name}: {str(value).lower()}` in this version"
            words = " or ".join(f"`{word}`" for word in allowed)
            remedy = f"Write {words}." if name in method.options else "Remove it."
            raise MergeError(f"parameter `{name}`", problem, remedy)


def options_of(method: Method, common: Settings, name: str, depth: float) -> Mapping[str, Any]:
    """The method's options for one tensor, by the recipe's names; a missing one is refused."""
    found = {}
    for option, default in method.options.items():
        value = look_up(option, (common,), name, depth)
        if value is None and default is None:
            problem = f"none of its filters fits {name}"
            raise MergeError(f"parameter `{option}`", problem, "Add a value without a filter.")
        kind = float if default is None else type(default)
        found[option] = default if value is None else kind(value)
    return found


def require_divisor(
    method: Method, options: Mapping[str, Any], weights: Sequence[float], name: str
) -> None:
    """Refuse weights whose sum is a divisor and zero, and negative weights of squares."""
    if method.weighs_squares and (min(weights) < 0 or not sum(weights)):
        listed = ", ".join(f"{w:g}" for w in weights)
        problem = f"`{method.name}` cannot merge {name} with the weights {listed}"
        remedy = "Set all weights to 0 or more, and at least one above 0."
        raise MergeError("parameter `weight`", problem, remedy)
    for option in () if method.takes_task_vectors else ("normalize", "normalize_weights"):
        if options.get(option) and abs(sum(weights)) <= NOTHING * sum(map(abs, weights)):
            problem = f"the weights of {name} add up to zero"
            remedy = f"Change one, or set `{option}: false`."
            raise MergeError("parameter `weight`", problem, remedy)
