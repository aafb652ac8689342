"""Matrices of which nothing was measured, such as a routed expert that no text reached."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from lewis_hub.checkpoint import names
from lewis_hub.guides.budget import weighted_mean

Component = tuple[str | None, str]  # its list of blocks; its name there, one for all experts


def seen_by_both(
    base: Mapping[str, float], expert: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Leave out routed experts that a token reached in one of two models only.

    Args:
        base: module -> importance.
        expert: likewise.
    """
    alone = {module for module in base.keys() ^ expert.keys() if names.is_routed(module)}
    return (
        {module: value for module, value in base.items() if module not in alone},
        {module: value for module, value in expert.items() if module not in alone},
    )


def completed(values: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Values for all matrices: those that have none get the mean of their component.

    Where their component has none either, that of all; means are over parameters.

    Args:
        values: module -> value, of some of the matrices.
        sizes: matrix -> number of parameters.

    Returns:
        What was there first, in its order. Nothing, where there is no value at all.
    """
    if not values:
        return {}
    known: defaultdict[Component, dict[str, float]] = defaultdict(dict)
    for module, value in values.items():
        known[component(module)][module] = value
    every = weighted_mean(values, sizes)
    means = {one: weighted_mean(found, sizes) for one, found in known.items()}
    return {
        **values,
        **{m: means.get(component(m), every) for m in sizes if m not in values},
    }


def notes(values: Mapping[str, float], matrices: Iterable[str]) -> tuple[str, ...]:
    """What to say of the matrices that `completed` gave a mean."""
    known = {component(module) for module in values}
    rest = [module for module in matrices if module not in values]
    unseen = [m for m in rest if names.is_routed(m) and component(m) in known]
    others = [module for module in rest if module not in set(unseen)]
    told = []
    if unseen:
        told.append(
            f"no calibration token reached {len(unseen)} of the matrices of routed experts, in it "
            "or in the base: they get the mean density of their component."
        )
    if others:
        n_all = len(values) + len(rest)
        told.append(
            f"the guide measures nothing of {len(others)} of the {n_all} matrices of the blocks, "
            f"such as {others[0]}: they get the mean density of their component, or of all where "
            "that has none."
        )
    return tuple(told)


def component(module: str) -> Component:
    """What a module is, in whichever block of its list, and as whichever expert."""
    return names.stack(module), names.kind(module)
