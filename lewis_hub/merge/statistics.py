"""What was measured on the experts' own texts, and the plan of a merge that knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.merge.fitted import Fitted, taking
from lewis_hub.merge.plan import MergePlan, TensorPlan


@dataclass(frozen=True)
class Gram:
    """Where second moments of a matrix's inputs lie: (n_parts, width, width) float32.

    `transposed` says that the matrix itself lies as (in, out).
    """

    stored: TensorHeader
    transposed: bool


@dataclass(frozen=True)
class Statistics:
    """Second moments of the inputs of one expert's matrices.

    Attributes:
        label: of the files, as `folders` of the engine call theirs.
        digest: of their content.
        grams: tensor of the output -> its matrix; those that are not in it have none.
    """

    label: str
    digest: str
    grams: Mapping[str, Gram]


Known = Sequence[Statistics] | Fitted


def informed(plan: MergePlan, statistics: Known) -> MergePlan:
    """The same plan, for a method that merges by statistics.

    Args:
        plan: from headers alone.
        statistics: one an expert, in the plan's order; none at all leaves the plan as it is. Or
            what was fitted by them already.
    """
    if isinstance(statistics, Fitted):
        return taking(plan, statistics)
    if not statistics:
        return plan
    known = {one.label: one.digest for one in statistics}
    return MergePlan(
        tuple(
            replace(
                shard,
                statistics=known,
                tensors=tuple(_informed(tensor, statistics) for tensor in shard.tensors),
            )
            for shard in plan.shards
        )
    )


def _informed(tensor: TensorPlan, statistics: Sequence[Statistics]) -> TensorPlan:
    found = tuple(_gram(one, tensor) for one in statistics)
    return replace(tensor, grams=found) if any(found) and not tensor.is_copied else tensor


def _gram(one: Statistics, tensor: TensorPlan) -> Gram | None:
    gram, shape = one.grams.get(tensor.output.name), tensor.output.shape
    if gram is None or len(shape) != 2:
        return None
    n_parts, width, _ = gram.stored.shape
    n_inputs = shape[0] if gram.transposed else shape[1]
    return gram if n_parts * width == n_inputs else None  # stored otherwise than it was run


def unknown(plan: MergePlan, matrices: Sequence[str]) -> list[str]:
    """Which of the named tensors have no second moments of some expert, in the plan's order."""
    named = set(matrices)
    return [
        tensor.output.name
        for shard in plan.shards
        for tensor in shard.tensors
        if tensor.output.name in named and not (tensor.grams and all(tensor.grams))
    ]
