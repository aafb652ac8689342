"""The registry of guides. A guide is a function from measurements of an expert to densities.

A package adds its own by an entry point in the group `lewis_hub.guides`, named as the guide, that
loads a function under `@register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from traceback import extract_tb
from typing import get_args

from lewis_hub.calibration.profile import WITHOUT_TEXTS, Measure
from lewis_hub.errors import GuideError, LewisHubError
from lewis_hub.registry import Registry, choices

GROUP = "lewis_hub.guides"
FAULT = "This is a fault of the guide."

Values = Mapping[str, float]  # module -> value


@dataclass(frozen=True)
class Measurements:
    """The measurements that a guide needs, of one expert and its base on the expert's texts.

    A guide may give a density to each of the `matrices`, of which some measures have fewer; a
    module that it leaves out gets a mean.
    """

    matrices: tuple[str, ...]  # modules, from `schedule.block_matrices`
    base: Mapping[Measure, Values]  # without OF_PAIRS
    expert: Mapping[Measure, Values]  # those of OF_PAIRS compare it with the base
    seed: int = 0  # derived from the recipe's seed, different for each expert


@dataclass(frozen=True)
class Decision:
    """Densities in [gamma, epsilon], and factors of the expert's weight, by module.

    A guide that returns densities alone uses them as weights.
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
    """Add the decorated function to the guides; a GuideError refuses its name or measures."""
    for measure in needs:
        if measure not in get_args(Measure):
            problem = f"it needs `{measure}`, which nothing measures"
            remedy = f"Measures: {choices(measure, get_args(Measure))}"
            raise GuideError(f"guide `{name}`", problem, remedy)

    def add(decide: GuideFunction) -> GuideFunction:
        _registry.add(name, RegisteredGuide(name, decide, needs, paper, version), decide)
        return decide

    return add


def validated_decision(
    guide: RegisteredGuide, statistics: Measurements, limits: tuple[float, float], source: str
) -> Decision:
    """Call a guide for one expert, the `source`, and validate its decision.

    A GuideError says that the guide fails, gives a value to a module that is not a matrix of a
    block, a density outside the `limits`, gamma and epsilon, or a weight that is not finite.
    """
    where = f"guide `{guide.name}`"
    try:
        decided = guide.decide(statistics, *limits)
        if not isinstance(decided, Decision):
            decided = Decision(decided, decided)
        densities, weights = _numbers(decided.densities), _numbers(decided.weights)
    except LewisHubError:
        raise
    except Exception as error:  # noqa: BLE001 - a guide of another package may raise anything
        at = extract_tb(error.__traceback__)[-1]
        raised = f"{type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"
        raise GuideError(where, f"it failed on {source}: {raised}", FAULT) from error
    for module, density in densities.items():
        if not limits[0] <= density <= limits[1]:
            problem = f"it gives {module} the density {density:g}, outside gamma and epsilon"
            raise GuideError(where, problem, FAULT)
    for module, weight in weights.items():
        if not isfinite(weight):
            raise GuideError(where, f"it gives {module} the weight {weight:g}", FAULT)
    others = {*densities, *weights} - {*statistics.matrices}
    if others:
        problem = f"it decides {min(others)}, which is no matrix of a block"
        remedy = "A guide decides the modules in `Measurements.matrices`, and those alone."
        raise GuideError(where, problem, remedy)
    return Decision(densities, weights)


def _numbers(values: Values) -> dict[str, float]:
    return {module: float(value) for module, value in values.items()}
