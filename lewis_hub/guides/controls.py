"""What guidance by LEWIS has to beat, beside `uniform`: its densities elsewhere, or upside down."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

from lewis_hub.checkpoint import names
from lewis_hub.guides.lewis import importance_shifts, spread
from lewis_hub.guides.registry import Statistics, register


@register("random", needs=("lewis",), version=2)
def random(statistics: Statistics, gamma: float, epsilon: float) -> Mapping[str, float]:
    """A control: the densities of `lewis`, dealt out anew among the blocks by the seed.

    Each component keeps its own densities, so that the mean over parameters stays what it was
    where a component has one shape in all blocks.
    """
    densities = spread(importance_shifts(statistics), gamma, epsilon)
    of_component: defaultdict[tuple[str | None, str], list[str]] = defaultdict(list)
    for module in densities:
        of_component[names.stack(module), names.component(module)].append(module)
    dealt: dict[str, float] = {}
    for modules in of_component.values():
        givers = sorted(modules, key=lambda module: _lot(statistics.seed, module))
        dealt |= {to: densities[giver] for to, giver in zip(modules, givers, strict=True)}
    return {module: dealt[module] for module in densities}


@register("inverse", needs=("lewis",), version=2)
def inverse(statistics: Statistics, gamma: float, epsilon: float) -> Mapping[str, float]:
    """A control: the densities of `lewis` upside down, gamma + epsilon - density."""
    densities = spread(importance_shifts(statistics), gamma, epsilon)
    return {
        module: min(max(gamma + epsilon - density, gamma), epsilon)
        for module, density in densities.items()
    }


def _lot(seed: int, module: str) -> bytes:
    return hashlib.blake2b(f"{seed} {module}".encode(), digest_size=16).digest()
