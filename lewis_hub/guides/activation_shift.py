"""How much the outputs changed on calibration texts."""

from __future__ import annotations

from collections.abc import Mapping

from lewis_hub.guides.lewis import spread
from lewis_hub.guides.registry import Statistics, register


@register("activation_shift", needs=("output_shift",), version=2)
def activation_shift(statistics: Statistics, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Densities follow how much a module's output differs from base to expert on calibration data.

    One min-max of the relative root mean square difference, which `shifts` measures, over all
    modules spans [gamma, epsilon]. What earlier blocks changed counts too, so that it grows with
    depth. No paper.
    """
    return spread(statistics.expert["output_shift"], gamma, epsilon)
