"""Baselines: one density everywhere, simple measures, and controls of `lewis`."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

from lewis_hub.checkpoint import names
from lewis_hub.guides.lewis import importance_shifts, spread
from lewis_hub.guides.registry import Measurements, register


@register("uniform", version=2)
def uniform(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Every matrix of a block gets the midpoint of gamma and epsilon; nothing is measured."""
    return dict.fromkeys(statistics.matrices, (gamma + epsilon) / 2)


@register("magnitude", needs=("task_vector",), version=2)
def magnitude(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Densities follow the size of the task vector relative to the base's weight; no data needed.

    One min-max of ‖expert - base‖ / ‖base‖ (Frobenius) over all modules spans [gamma, epsilon]:
    modules that fine-tuning changed most have the highest densities. No paper.
    """
    return spread(statistics.expert["task_vector"], gamma, epsilon)


@register("activation_shift", needs=("output_shift",), version=2)
def activation_shift(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Densities follow how much a module's output differs from base to expert on calibration data.

    One min-max over all modules of the relative root mean square difference (`output_shift`) spans
    [gamma, epsilon]. Changes of earlier blocks count too, so it grows with depth. No paper.
    """
    return spread(statistics.expert["output_shift"], gamma, epsilon)


@register("random", needs=("lewis",), version=2)
def random(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """A control: the densities of `lewis`, shuffled among the blocks by the seed.

    Each component keeps its own densities, so the mean over parameters does not change if a
    component has one shape in all blocks.
    """
    densities = spread(importance_shifts(statistics), gamma, epsilon)
    of_component: defaultdict[tuple[str | None, str], list[str]] = defaultdict(list)
    for module in densities:
        of_component[names.stack(module), names.component(module)].append(module)
    shuffled: dict[str, float] = {}
    for modules in of_component.values():
        drawn = sorted(modules, key=lambda module: _random_key(statistics.seed, module))
        shuffled |= {to: densities[other] for to, other in zip(modules, drawn, strict=True)}
    return {module: shuffled[module] for module in densities}


@register("inverse", needs=("lewis",), version=2)
def inverse(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """A control: the densities of `lewis` upside down, gamma + epsilon - density."""
    densities = spread(importance_shifts(statistics), gamma, epsilon)
    return {
        module: min(max(gamma + epsilon - density, gamma), epsilon)
        for module, density in densities.items()
    }


def _random_key(seed: int, module: str) -> bytes:
    return hashlib.blake2b(f"{seed} {module}".encode(), digest_size=16).digest()
