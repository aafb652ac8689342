"""A mean density that is kept exactly, so that guides are compared at equal cost."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import fsum
from typing import TypeVar

from lewis_hub.errors import GuideError

Key = TypeVar("Key", bound=Hashable)


def weighted_mean(values: Mapping[Key, float], sizes: Mapping[Key, int]) -> float:
    """The mean over parameters: each tensor counts as often as it has any.

    Args:
        values: tensor -> value; not empty.
        sizes: tensor -> number of parameters.
    """
    total = sum(sizes[tensor] for tensor in values)
    mean = fsum(sizes[tensor] * value for tensor, value in values.items()) / total
    return min(max(mean, min(values.values())), max(values.values()))  # rounding may step outside


def shifted(
    densities: Mapping[str, float], sizes: Mapping[str, int], mean: float
) -> dict[str, float]:
    """Move all densities by one amount, so that their mean over parameters is `mean`.

    Args:
        densities: tensor -> density, in (0, 1].
        sizes: tensor -> number of parameters.
        mean: in (0, 1]; reached to rounding.

    Raises:
        GuideError: a density would leave (0, 1]; the message says which range would fit.
    """
    if not densities:
        return {}
    low, high = min(densities.values()), max(densities.values())
    centre = weighted_mean(densities, sizes)
    if low == high:
        return dict.fromkeys(densities, mean)
    moved = {tensor: mean + (density - centre) for tensor, density in densities.items()}
    if min(moved.values()) > 0 and max(moved.values()) <= 1:
        return moved
    room = min(mean / (centre - low), (1 - mean) / (high - centre))  # of the range that was spanned
    problem = (
        f"a mean density of {mean:g} is out of reach: densities from {low:.3g} to {high:.3g}, of "
        f"mean {centre:.3g}, would lie from {mean + low - centre:.3g} to "
        f"{mean + high - centre:.3g}, and a density lies in (0, 1]"
    )
    fits = f"less than {room * (high - low):.3g}" if room else "0"
    remedy = f"Bring gamma and epsilon closer together: epsilon - gamma of {fits} fits."
    raise GuideError("guide.mean_density", problem, remedy)
