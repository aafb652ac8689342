"""The registry of merge methods. A method is one function over float tensors.

It takes `base` and `task_vectors`, `base` and the other sources as `tensors`, or `tensors` alone,
and keyword arguments. The merge supplies these keywords:

- those of PER_SOURCE, one value per source, and `streams` of random bits;
- `grams`: second moments E[x x^T] of a Linear's inputs on each source's calibration texts, or None.
  If `grams` has a default, the method needs them only for `trim: activation`;
- `transposed`: whether the weight is stored as (in, out);
- `cross_covariances`: E[z x^T], where x is the input in the merged model and z in the source;
- `residual_covariances`: E[d x^T], where d is the rest of the difference between the block's
  outputs, which the matrix can compensate.

The sections `Formula` and `Options` of its docstring are shown by `lewis-hub methods NAME`. In a
formula x_i is a source, v_i its task vector, w_i its weight and d_i its density.

All other keywords are options of the recipe with the same name, without a trailing underscore
(`lambda_`). The recipe must set an option that has no default, to a number.

A package adds its own by an entry point in the group `lewis_hub.methods`, named as the method,
that loads a function under `@register`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lewis_hub.errors import MergeError
from lewis_hub.registry import Registry, choices

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "lewis_hub.methods"
PER_SOURCE = {  # keyword -> the recipe's name
    "weights": "weight",
    "densities": "density",
    "outliers": "gamma",  # of breadcrumbs: the fraction of largest entries that is dropped
    "spreads": "epsilon",  # of della: how far an entry's probability lies from the density
    "scales": "scale",
}
MOMENTS = {"grams", "cross_covariances", "residual_covariances", "transposed"}
GIVEN = {"base", "task_vectors", "tensors", "streams", *MOMENTS, *PER_SOURCE}
ANY_NUMBER = (1, None)
INT8_MASK = {"int8_mask": (True, False)}  # an option of mergekit that changes nothing here
MERGEKIT = frozenset(  # parameters of its methods; a method that does not use one ignores it
    {"alpha", "density", "embed_slerp", "eps", "epsilon", "filter_wise", "gamma", "int8_mask"}
    | {"lambda", "max_iter", "normalize", "normalize_weights", "nuslerp_flatten"}
    | {"nuslerp_row_wise", "r", "rescale", "scale", "select_topk", "t", "tol", "weight"}
)

MethodFunction = Callable[..., "Tensor"]


@dataclass(frozen=True)
class Method:
    """A registered method.

    `accepted` has the values that a recipe may give, by option: of mergekit's options that change
    nothing here, and of options that are words.
    """

    name: str
    function: MethodFunction
    parameters: Mapping[str, inspect.Parameter]  # of the function
    paper: str | None = None
    accepted: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    n_experts: tuple[int, int | None] = ANY_NUMBER  # sources beside the base; None for no limit
    base_is_optional: bool = False  # without a base its `base` is zero
    uses_lapack: bool = False  # processors of another kind may round its results differently
    makes_squares: bool = False  # matrices of all inputs of a matrix by all, from its task vectors
    weighs_squares: bool = False  # weights are of squares: none may be negative, nor all zero
    version: int = 1  # raised when the same inputs give other numbers, so that locks differ

    @property
    def summary(self) -> str:
        """One sentence for a list of methods."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    @property
    def formula(self) -> str:
        """The section `Formula` of its docstring; empty if it has none."""
        return self._section("Formula")

    @property
    def meanings(self) -> Mapping[str, str]:
        """The recipe's name of an option -> what it is, by the section `Options` of its docstring.

        Each line is `name: phrase`; a line that is indented goes on with the phrase before it.
        """
        lines = self._section("Options").replace("\n    ", " ").splitlines()
        return {name: phrase.strip() for name, _, phrase in (s.partition(":") for s in lines)}

    def _section(self, name: str) -> str:
        text = inspect.getdoc(self.function) or ""
        section = text.partition(f"\n{name}:\n")[2].partition("\n\n")[0]
        return inspect.cleandoc(f"\n{section}")

    @property
    def takes_base(self) -> bool:
        """Whether its function takes a base."""
        return self.takes("base")

    @property
    def takes_task_vectors(self) -> bool:
        """Whether it merges task vectors, source minus base, rather than the sources."""
        return self.takes("task_vectors")

    @property
    def takes_density(self) -> bool:
        """Whether it keeps a fraction of each task vector, which a guide can set."""
        return self.takes("densities")

    @property
    def needs_grams(self) -> bool:
        """Whether it requires second moments of its sources' activations."""
        return self.takes("grams") and self.parameters["grams"].default is inspect.Parameter.empty

    @property
    def options(self) -> Mapping[str, Any]:
        """The recipe's name of each option -> its default; None for a required option."""
        return {
            name.removesuffix("_"): None
            if parameter.default is parameter.empty
            else parameter.default
            for name, parameter in self.parameters.items()
            if name not in GIVEN
        }

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that each source may have."""
        return tuple(name for keyword, name in PER_SOURCE.items() if self.takes(keyword))

    def takes(self, keyword: str) -> bool:
        """Whether its function has this parameter."""
        return keyword in self.parameters

    def keyword(self, option: str) -> str:
        """The function's name for an option of the recipe."""
        return option if self.takes(option) else f"{option}_"

    @property
    def known(self) -> tuple[str, ...]:
        """All its settings and options, by the recipe's names."""
        return tuple(dict.fromkeys([*self.settings, *self.options, *self.accepted]))

    def uses(self, name: str, *, per_source: bool) -> bool:
        """Whether a setting of a source, or one of the recipe's `parameters`, has an effect."""
        return name in self.settings or (not per_source and name in self.known)

    def require_known(self, names: Iterable[str], *, per_source: bool) -> None:
        """Raise a MergeError for settings that are unknown, or in the wrong place.

        Those of MERGEKIT are accepted without effect. With `per_source` they are settings of a
        source, else of the recipe's `parameters`.
        """
        for name in names:
            if name in MERGEKIT or self.uses(name, per_source=per_source):
                continue
            where = f"parameter `{name}`"
            if name in self.known:
                problem = f"`{self.name}` takes one value for all models, not one per model"
                raise MergeError(where, problem, "Move it to the recipe's own `parameters`.")
            remedy = f"It knows {choices(name, self.known)}"
            raise MergeError(where, f"`{self.name}` has no such parameter", remedy)


_registry: Registry[Method] = Registry("method", GROUP, MergeError)
find, methods, broken = _registry.find, _registry.all, _registry.broken


def register(  # noqa: PLR0913 (the fields of `Method`)
    name: str,
    *,
    paper: str | None = None,
    accepted: Mapping[str, tuple[object, ...]] | None = None,
    n_experts: tuple[int, int | None] = ANY_NUMBER,
    base_is_optional: bool = False,
    uses_lapack: bool = False,
    makes_squares: bool = False,
    weighs_squares: bool = False,
    version: int = 1,
) -> Callable[[MethodFunction], MethodFunction]:
    """Add the decorated function to the methods; the arguments are those of `Method`."""

    def add(function: MethodFunction) -> MethodFunction:
        parameters = inspect.signature(function).parameters
        method = Method(
            name,
            function,
            parameters,
            paper,
            accepted or {},
            n_experts,
            base_is_optional,
            uses_lapack,
            makes_squares,
            weighs_squares,
            version,
        )
        _registry.add(name, method, function)
        return function

    return add
