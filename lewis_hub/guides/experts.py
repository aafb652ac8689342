"""Routed experts that calibration texts did not reach: of those nothing was measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from math import fsum

from lewis_hub.checkpoint import names


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


def unseen(matrices: Collection[str], densities: Mapping[str, float]) -> dict[str, float]:
    """The mean density of their component for routed experts that have none.

    Args:
        matrices: modules of all weight matrices in the blocks of the checkpoint.
        densities: module -> density, of what was measured.

    Returns:
        Module -> density, of the others of the same components. A component of which nothing was
        measured is not in it.
    """
    known: defaultdict[tuple[str | None, str], list[float]] = defaultdict(list)
    for module, density in densities.items():
        known[names.stack(module), names.kind(module)].append(density)
    found = {}
    for module in matrices:
        same = known.get((names.stack(module), names.kind(module)))
        if same and module not in densities and names.is_routed(module):
            found[module] = min(max(fsum(same) / len(same), min(same)), max(same))
    return found
