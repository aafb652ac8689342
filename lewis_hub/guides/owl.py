"""OWL: keep more of a block that has more outliers."""

from __future__ import annotations

from collections.abc import Mapping

from lewis_hub.guides.lewis import spread
from lewis_hub.guides.registry import Measurements, register


@register("owl", needs=("outliers",), paper="https://arxiv.org/abs/2310.05175", version=2)
def owl(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Densities follow each block's share of outliers in the expert, as OWL prunes models.

    All modules of a block get one density. One min-max over the blocks spans [gamma, epsilon]; the
    paper's [S - λ, S + λ] about the mean S is that range with `mean_density`.

    Source:
        OWL, arXiv:2310.05175, prunes a model's weights. Here the same shares set the density of the
        expert's task vector.
    """
    return spread(statistics.expert["outliers"], gamma, epsilon)
