"""Name to guide. A guide is a function from what was measured of an expert to densities.

A package adds its own by an entry point in the group `lewis_hub.guides`, named as the guide, that
loads a function under `@register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

from lewis_hub.calibration.summaries import WITHOUT_TEXTS, Measure
from lewis_hub.errors import GuideError
from lewis_hub.registry import Registry, choices

GROUP = "lewis_hub.guides"

Values = Mapping[str, float]  # module -> value


@dataclass(frozen=True)
class Measurements:
    """What a guide decides from, for one expert: only the measures that it needs are there.

    Attributes:
        matrices: modules that a guide decides, from `matrices.block_matrices`; no measure has
            others, and some have fewer. One that the guide leaves out gets a mean.
        base: measure -> module -> value, on the expert's calibration texts; none of OF_PAIRS.
        expert: likewise, of the expert; those of OF_PAIRS hold it against the base.
        seed: from the recipe's; another one for each expert.
    """

    matrices: tuple[str, ...]
    base: Mapping[Measure, Values]
    expert: Mapping[Measure, Values]
    seed: int = 0


@dataclass(frozen=True)
class Decision:
    """What a guide hands on that has weights of its own, beside densities.

    Attributes:
        densities: module -> density, each in [gamma, epsilon].
        weights: module -> what the expert's weight is multiplied by there, where the recipe
            applies the guide to weights. A guide without any has its densities taken for them.
    """

    densities: Values
    weights: Values


# (statistics, gamma, epsilon) -> module -> density, each in [gamma, epsilon]
GuideFunction = Callable[[Measurements, float, float], "Values | Decision"]


@dataclass(frozen=True)
class Guide:
    """A registered guide; `needs` says what has to be measured before it is called.

    `version` is raised when the same measurements give other densities, so that locks differ.
    """

    name: str
    decide: GuideFunction
    needs: tuple[Measure, ...] = ()
    paper: str | None = None
    version: int = 1

    @property
    def summary(self) -> str:
        """One sentence for a list of guides."""
        return (self.decide.__doc__ or "").strip().partition("\n")[0]

    @property
    def needs_texts(self) -> bool:
        """Whether models are loaded, and calibration texts run through them."""
        return not WITHOUT_TEXTS.issuperset(self.needs)


_registry: Registry[Guide] = Registry("guide", GROUP, GuideError)
find, guides, broken = _registry.find, _registry.all, _registry.broken


def register(
    name: str,
    *,
    needs: tuple[Measure, ...] = (),
    paper: str | None = None,
    version: int = 1,
) -> Callable[[GuideFunction], GuideFunction]:
    """Add the decorated function to the guides.

    Raises:
        GuideError: another function already has the name, or what it needs nothing measures.
    """
    for measure in needs:
        if measure not in get_args(Measure):
            problem = f"it needs `{measure}`, which nothing measures"
            remedy = f"Measures: {choices(measure, get_args(Measure))}"
            raise GuideError(f"guide `{name}`", problem, remedy)

    def add(decide: GuideFunction) -> GuideFunction:
        _registry.add(name, Guide(name, decide, needs, paper, version), decide)
        return decide

    return add
