"""The registry of guides. A guide is a function from measurements of an expert to densities.

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
    """The measurements that a guide needs, of one expert and its base.

    Attributes:
        matrices: the modules that a guide may give a density, from `schedule.block_matrices`.
            Measures have no others, and some have fewer. A module that the guide leaves out gets a
            mean.
        base: measure -> module -> value, on the expert's calibration texts; without OF_PAIRS.
        expert: the same for the expert; those of OF_PAIRS compare it with the base.
        seed: derived from the recipe's seed, different for each expert.
    """

    matrices: tuple[str, ...]
    base: Mapping[Measure, Values]
    expert: Mapping[Measure, Values]
    seed: int = 0


@dataclass(frozen=True)
class Decision:
    """Densities and weights of a guide. A guide that returns densities alone uses them as weights.

    Attributes:
        densities: module -> density, each in [gamma, epsilon].
        weights: module -> factor of the expert's weight, if the guide applies to weights.
    """

    densities: Values
    weights: Values


# (statistics, gamma, epsilon) -> module -> density, each in [gamma, epsilon]
GuideFunction = Callable[[Measurements, float, float], "Values | Decision"]


@dataclass(frozen=True)
class RegisteredGuide:
    """A registered guide; `needs` are the measures that it uses.

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
        """Whether calibration texts run through the models."""
        return not WITHOUT_TEXTS.issuperset(self.needs)


_registry: Registry[RegisteredGuide] = Registry("guide", GROUP, GuideError)
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
        GuideError: another function already has the name, or a needed measure does not exist.
    """
    for measure in needs:
        if measure not in get_args(Measure):
            problem = f"it needs `{measure}`, which nothing measures"
            remedy = f"Measures: {choices(measure, get_args(Measure))}"
            raise GuideError(f"guide `{name}`", problem, remedy)

    def add(decide: GuideFunction) -> GuideFunction:
        _registry.add(name, RegisteredGuide(name, decide, needs, paper, version), decide)
        return decide

    return add
