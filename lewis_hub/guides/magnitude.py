"""How far the weights moved: needs neither texts nor a model in memory."""

from __future__ import annotations

from collections.abc import Mapping

from lewis_hub.guides.lewis import spread
from lewis_hub.guides.registry import Statistics, register


@register("magnitude", needs=("task_vector",), version=2)
def magnitude(statistics: Statistics, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Densities follow the size of the task vector relative to the base's weight; no data needed.

    One min-max of ‖expert - base‖ / ‖base‖ (Frobenius) over all modules spans [gamma, epsilon]:
    what fine-tuning changed most keeps most. No paper.
    """
    return spread(statistics.expert["task_vector"], gamma, epsilon)
