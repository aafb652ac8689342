"""Validation of what a guide decides, whichever package it comes from."""

from __future__ import annotations

from collections.abc import Collection
from math import isfinite
from pathlib import Path
from traceback import extract_tb

from lewis_hub.errors import GuideError, LewisHubError
from lewis_hub.guides.registry import Decision, Measurements, RegisteredGuide, Values

FAULT = "This is a fault of the guide."


def validated_decision(
    guide: RegisteredGuide, statistics: Measurements, limits: tuple[float, float], source: str
) -> Decision:
    """Call a guide for one expert, and validate its decision.

    Args:
        guide: from the registry.
        statistics: with all measures that it needs.
        limits: gamma and epsilon.
        source: the expert, for messages.

    Raises:
        GuideError: the guide fails, gives a value to a module that is not a matrix of a block, a
            density outside the limits, or a weight that is not finite.
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
    _refuse_others(where, {**densities, **weights}, statistics.matrices)
    return Decision(densities, weights)


def _numbers(values: Values) -> dict[str, float]:
    return {module: float(value) for module, value in values.items()}


def _refuse_others(where: str, values: Values, matrices: Collection[str]) -> None:
    others = values.keys() - set(matrices)
    if others:
        problem = f"it decides {min(others)}, which is no matrix of a block"
        remedy = "A guide decides the modules in `Measurements.matrices`, and those alone."
        raise GuideError(where, problem, remedy)
