"""The measures of a module; most summarise its weight and the activation norms of its inputs.

`hooks` sums the norms. A summary takes whole blocks: module -> weight, and module -> activation
norms, (in_features,) for a weight (out_features, in_features), or one for each entry of the weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from lewis_hub.checkpoint import names

if TYPE_CHECKING:
    from torch import Tensor


Measure = Literal[  # a number for each module, and where it is defined
    "lewis",  # importance: `module_importance`
    "lewis_reference",  # importance with the published code's arithmetic: `reference`
    "outliers",  # the share of a block's entries far above their mean: `outlier_ratios`
    "evenness",  # of a module's input channels: `evenness`
    "output_shift",  # of a module's outputs, from base to expert: `output_shift`
    "task_vector",  # its size relative to the base's weight: `merge.task_vectors`
]
WITHOUT_TEXTS: frozenset[Measure] = frozenset({"task_vector"})  # they need weights alone
OF_PAIRS: frozenset[Measure] = frozenset({"output_shift", "task_vector"})  # they compare two models

Weighted = Mapping[str, "Tensor"]  # module -> weight, or module -> activation norms
Summary = Callable[[Weighted, Weighted], dict[str, float]]

ROWS_AT_ONCE = 512  # a squared copy of so many rows stays in the cache
FAR = 5.0  # times the mean: M in the OWL paper, which takes 5 for LLaMA


def sum_of_squares(rows: Tensor) -> Tensor:
    """Sum squares over the first of two dimensions: float32 in a slice, float64 over slices.

    MPS has no float64, so it is float32 throughout there.
    """
    import torch

    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    total = torch.zeros(rows.shape[1], dtype=wide, device=rows.device)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        total += rows[start : start + ROWS_AT_ONCE].float().square().sum(dim=0)
    return total


def module_importance(weight: Tensor, norm: Tensor) -> float:
    """The Frobenius norm of |W| · a: sqrt(Σ_ij W_ij² a_j²).

    Args:
        weight: (out_features, in_features), any floating dtype.
        norm: (in_features,) activation norms a, on the weight's device; or one for each entry of a
            weight of any shape.
    """
    if norm.dim() > 1:
        return float((weight.float() * norm).norm())
    columns = sum_of_squares(weight)
    return float((columns * norm.to(columns.dtype).square()).sum().sqrt())


def importances(weights: Weighted, norms: Weighted) -> dict[str, float]:
    """`module_importance` of each module that has norms, in the order of `norms`."""
    return {module: module_importance(weights[module], norm) for module, norm in norms.items()}


def outlier_ratios(weights: Weighted, norms: Weighted) -> dict[str, float]:
    """The share of |W_ij| · a_j above FAR times their mean, both over all matrices of a block.

    Returns:
        Module -> the share of its block, in [0, 1]: equal for all modules of a block.
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


def evenness(_: Weighted, norms: Weighted) -> dict[str, float]:
    """The mean activation norm of a module's input channels, relative to the largest.

    If there is a norm for each entry of a weight, all channels have equally many.

    Returns:
        Module -> in (0, 1]: 1 if all channels are equal, or none is active.
    """
    return {
        module: float(norm.double().mean() / largest) if (largest := float(norm.max())) else 1.0
        for module, norm in norms.items()
    }


SUMMARIES: Mapping[Measure, Summary] = {
    "lewis": importances,
    "outliers": outlier_ratios,
    "evenness": evenness,
}
