"""Numbers for each module, made of its weight and the activation norms of its inputs.

Weights and norms are assigned to the tensors of the checkpoint first. A summary takes whole blocks:
module -> weight, and module -> activation norms, (in_features,) for a weight (out_features,
in_features), or one for each entry of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lewis_hub.calibration.grams import (
    ROWS_AT_ONCE,
    InputSum,
    group_by_block,
    sum_of_squares,
    widest_float,
)
from lewis_hub.calibration.meta_model import as_stored, unknown_like
from lewis_hub.calibration.model import matrix
from lewis_hub.calibration.passes import BlockInputs
from lewis_hub.calibration.profile import Measure
from lewis_hub.checkpoint import names

Weighted = Mapping[str, Tensor]  # module -> weight, or module -> activation norms
Summary = Callable[[Weighted, Weighted], dict[str, float]]

FAR = 5.0  # times the mean: M in the OWL paper, which takes 5 for LLaMA


def norms_of(totals: Mapping[str, InputSum], n_tokens: int) -> dict[str, Tensor]:
    """The activation norms of sums of squares, by the path of a module: a_j = sqrt(mean_t x_tj²).

    A token that a module does not see counts as zero, so that a routed matrix has weight according
    to its tokens.

    Source:
        Wanda, arXiv:2306.11695, measures the same up to a factor; padding counts in the published
        LEWIS code and does not here.
    """
    return {path: (one.total / n_tokens).sqrt().float() for path, one in totals.items()}


def stored_blocks(
    model: PreTrainedModel,
    stored_as: Mapping[str, str],
    inputs: BlockInputs,
    n_set: int,
    n_tokens: int,
) -> Iterator[tuple[Weighted, Weighted]]:
    """Assign weights and norms to the tensors of the checkpoint, block by block.

    Copies are made only of parameters that the checkpoint stores otherwise, one block at a time.
    Tensors that no token reached are left out; a norm for an entry that none reached is 0. The
    first statistic of the `inputs` is the sum of squares; `n_tokens` are those of set `n_set`.
    """
    by_path, products = norms_of(inputs.sums[n_set][0], n_tokens), inputs.products[n_set]
    used = products.used if products else {}

    def of_entries(name: str, parameter: Tensor) -> Tensor:
        """A norm for each entry of a parameter; NaN if no token was multiplied with it."""
        path = name.removesuffix(".weight")
        if path in by_path:
            is_transposed = isinstance(inputs.modules[path], Conv1D)
            norm = by_path[path][:, None] if is_transposed else by_path[path]
            return norm.expand(parameter.shape)
        if products and name in used:
            return products.norms(name, n_tokens)
        return unknown_like(parameter, parameter.device)

    def stored(name: str, parameter: Tensor) -> tuple[Tensor, Tensor]:
        path = name.removesuffix(".weight")
        if path in by_path and name != path:  # without a norm for each entry
            return matrix(inputs.modules[path]), by_path[path]
        return parameter, of_entries(name, parameter)

    reached = {f"{path}.weight" for path in by_path} | used.keys()
    for block in group_by_block(inputs.module.named_parameters(prefix=inputs.path)):
        parameters = {name: parameter.detach() for name, parameter in block.items()}
        pairs = {
            stored_as[name]: stored(name, parameter)
            for name, parameter in parameters.items()
            if name in stored_as and name in reached
        }
        fused = {name: p for name, p in parameters.items() if name not in stored_as}
        if reached & fused.keys():
            weights = as_stored(model, fused)
            norms = as_stored(model, {name: of_entries(name, p) for name, p in fused.items()})
            pairs |= {name: (weights[name], norm) for name, norm in norms.items()}
        known = {names.module(t): both for t, both in pairs.items() if not both[1].isnan().all()}
        if known:
            yield (
                {module: weight for module, (weight, _) in known.items()},
                {module: norm.nan_to_num(0.0) for module, (_, norm) in known.items()},
            )


def module_importance(weight: Tensor, norm: Tensor) -> float:
    """The Frobenius norm of |W| · a: sqrt(Σ_ij W_ij² a_j²).

    The activation norms a are (in_features,), or one for each entry of a weight of any shape.
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

    It is in [0, 1], and equal for all modules of a block.
    """
    ratios: dict[str, float] = {}
    for block in group_by_block(norms.items()):
        pairs = [(weights[module], norm) for module, norm in block.items()]
        n_entries = sum(weight.numel() for weight, _ in pairs)
        total = sum(float(_wide(scores).sum()) for scores in _scores(pairs))
        limit = FAR * total / n_entries
        n_far = sum(int((scores > limit).sum()) for scores in _scores(pairs))
        ratios |= dict.fromkeys(block, n_far / n_entries)
    return {module: ratios[module] for module in norms}


def _scores(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """|W_ij| · a_j in float32, some rows at a time."""
    for weight, norm in pairs:
        by_entry = norm.expand(weight.shape)
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            yield weight[rows].float().abs() * by_entry[rows].float()


def evenness(_: Weighted, norms: Weighted) -> dict[str, float]:
    """The mean activation norm of a module's input channels, relative to the largest: in (0, 1].

    1 if no channel is active. All channels have equally many norms.
    """
    return {
        module: float(_wide(norm).mean() / largest) if (largest := float(norm.max())) else 1.0
        for module, norm in norms.items()
    }


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(widest_float(tensor.device))


SUMMARIES: Mapping[Measure, Summary] = {
    "lewis": importances,
    "outliers": outlier_ratios,
    "evenness": evenness,
}
