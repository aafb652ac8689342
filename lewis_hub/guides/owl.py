"""OWL: keep more of a block that has more outliers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lewis_hub.checkpoint import names
from lewis_hub.guides.lewis import spread
from lewis_hub.guides.registry import Statistics, register

if TYPE_CHECKING:
    from torch import Tensor


FAR = 5.0  # times the mean: M in the paper, which takes 5 for LLaMA
ROWS_AT_ONCE = 512


@register("owl", needs=("outliers",), paper="https://arxiv.org/abs/2310.05175", version=2)
def owl(statistics: Statistics, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Densities follow each block's share of outliers in the expert, as OWL prunes models.

    All modules of a block get one density. One min-max over the blocks spans [gamma, epsilon]; the
    paper's [S - λ, S + λ] about the mean S is that range with `mean_density`.

    Source:
        OWL, arXiv:2310.05175, prunes a model's weights. Here the same shares say how much of the
        expert's task vector is kept.
    """
    return spread(statistics.expert["outliers"], gamma, epsilon)


def outlier_ratios(weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of |W_ij| · a_j above FAR times their mean, both over all matrices of a block.

    Args:
        weights: module -> (out_features, in_features), any floating dtype.
        norms: module -> (in_features,) activation norms a, on the weight's device; or one for each
            entry of a weight of any shape.

    Returns:
        Module -> the share of its block, in [0, 1]: one value for all of a block.
    """
    of_block: defaultdict[tuple[str | None, int | None], list[str]] = defaultdict(list)
    for module in norms:
        of_block[names.stack(module), names.block(module)].append(module)
    ratios: dict[str, float] = {}
    for modules in of_block.values():
        n_entries = sum(weights[module].numel() for module in modules)
        total = sum(
            float(scores.double().sum())
            for module in modules
            for scores in _scores(weights[module], norms[module])
        )
        limit = FAR * total / n_entries
        n_far = sum(
            int((scores > limit).sum())
            for module in modules
            for scores in _scores(weights[module], norms[module])
        )
        ratios |= dict.fromkeys(modules, n_far / n_entries)
    return {module: ratios[module] for module in norms}


def _scores(weight: Tensor, norm: Tensor) -> Iterable[Tensor]:
    """|W_ij| · a_j in float32, some rows at a time."""
    norm = norm.expand(weight.shape)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        yield weight[rows].float().abs() * norm[rows].float()
