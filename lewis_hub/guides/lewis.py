"""LEWIS: keep more of a task vector where importance on calibration texts changed most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import fsum

from lewis_hub.calibration.profile import Measure
from lewis_hub.checkpoint import names
from lewis_hub.errors import GuideError
from lewis_hub.guides.registry import Measurements, register

SHARE_DECIMALS = 5  # of a share, as the published code rounds it
DECIMALS = 4  # of a density: coarser than the rounding of another CPU, so merged bytes are equal
SQUEEZED = 0.25  # of the range: below it, the other blocks hardly differ from each other

Component = tuple[str | None, str]  # list of blocks, and name in a block


@register("lewis", needs=("lewis",), paper="https://arxiv.org/abs/2503.03874", version=2)
def lewis(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Densities follow the change of importance from base to expert on calibration data.

    Importance is the Frobenius norm of |W| times the activation norm of each input. Per component,
    its change is divided by the sum over the blocks, so that budget moves between blocks and never
    between components; one min-max over all then spans [gamma, epsilon]. If nothing differs, the
    density is the midpoint.

    Source:
        LEWIS, arXiv:2503.03874. The published code uses no mask and counts padding, prunes the
        blocks that it has measured, averages sums over texts and rounds the shares to 5 decimals;
        this guide does none of that.
    """
    return spread(importance_shifts(statistics), gamma, epsilon)


@register(
    "lewis_reference",
    needs=("lewis_reference",),
    paper="https://arxiv.org/abs/2503.03874",
    version=2,
)
def lewis_reference(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """LEWIS as its authors published it: padding counts, and measured blocks are pruned.

    Shares of the change of importance are rounded to 5 decimals before the min-max.
    """
    shares = importance_shifts(statistics, "lewis_reference")
    rounded = {module: round(share, SHARE_DECIMALS) for module, share in shares.items()}
    return spread(rounded, gamma, epsilon)


def importance_shifts(statistics: Measurements, measure: Measure = "lewis") -> dict[str, float]:
    """|importance(expert) - importance(base)| per module, as a share of its component's sum.

    The routed matrices of a mixture are one component. If not every block has a component, or a
    block has several of it, its shares are scaled so that their mean is that of the others. A
    GuideError refuses a base and an expert that were not measured on the same modules.
    """
    base, expert = statistics.base[measure], statistics.expert[measure]
    if base.keys() != expert.keys():
        odd = min(base.keys() ^ expert.keys())
        side = "base" if odd in base else "expert"
        problem = f"importance of {odd} is known for the {side} only"
        raise GuideError("guide `lewis`", problem, "Base and expert must be of one architecture.")
    shifts = {module: abs(expert[module] - base[module]) for module in base}
    of_component: defaultdict[Component, list[float]] = defaultdict(list)
    blocks: defaultdict[str | None, set[int | None]] = defaultdict(set)
    for module, shift in shifts.items():
        of_component[component(module)].append(shift)
        blocks[names.stack(module)].add(names.block(module))
    sums = {component: fsum(parts) for component, parts in of_component.items()}
    a_block = {(s, c): len(parts) / len(blocks[s]) for (s, c), parts in of_component.items()}
    return {
        module: shift / total * a_block[component(module)]
        if (total := sums[component(module)])
        else 0.0
        for module, shift in shifts.items()
    }


def component(module: str) -> Component:
    """The component of a module, equal for all blocks of its list and all routed matrices."""
    return names.stack(module), names.kind(module)


def spread(shares: Mapping[str, float], gamma: float, epsilon: float) -> dict[str, float]:
    """Map shares linearly, the lowest to gamma, the highest to epsilon; equal ones to the midpoint.

    Densities between are rounded to `DECIMALS`.
    """
    low, high = min(shares.values(), default=0.0), max(shares.values(), default=0.0)
    if low == high:
        return dict.fromkeys(shares, (gamma + epsilon) / 2)
    ends = {low: gamma, high: epsilon}
    densities = {}
    for module, share in shares.items():
        density = round(gamma + (epsilon - gamma) * ((share - low) / (high - low)), DECIMALS)
        densities[module] = ends.get(share, min(max(density, gamma), epsilon))
    return densities


def dominance(statistics: Measurements, measure: Measure = "lewis") -> list[str]:
    """A note if one block alone sets the range, so that all other densities are close together."""
    shares = importance_shifts(statistics, measure)
    low, high = min(shares.values(), default=0.0), max(shares.values(), default=0.0)
    if low == high:
        return []
    top = max(shares, key=lambda module: shares[module])
    others = [s for module, s in shares.items() if names.block(module) != names.block(top)]
    reach = (max(others, default=high) - low) / (high - low)
    if reach >= SQUEEZED:
        return []
    return [
        f"{top} alone sets the range: all other blocks lie in the lowest {reach:.0%} of "
        "[gamma, epsilon]. A block with massive activations does this; the schedule then is close "
        "to gamma everywhere else."
    ]
