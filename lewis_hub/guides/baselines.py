"""One density everywhere: what a guide has to beat."""

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
    what fine-tuning changed most keeps most. No paper.
    """
    return spread(statistics.expert["task_vector"], gamma, epsilon)


@register("activation_shift", needs=("output_shift",), version=2)
def activation_shift(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Densities follow how much a module's output differs from base to expert on calibration data.

    One min-max of the relative root mean square difference, which `shifts` measures, over all
    modules spans [gamma, epsilon]. What earlier blocks changed counts too, so that it grows with
    depth. No paper.
    """
    return spread(statistics.expert["output_shift"], gamma, epsilon)


@register("random", needs=("lewis",), version=2)
def random(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
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
def inverse(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """A control: the densities of `lewis` upside down, gamma + epsilon - density."""
    densities = spread(importance_shifts(statistics), gamma, epsilon)
    return {
        module: min(max(gamma + epsilon - density, gamma), epsilon)
        for module, density in densities.items()
    }


def _lot(seed: int, module: str) -> bytes:
    return hashlib.blake2b(f"{seed} {module}".encode(), digest_size=16).digest()
