"""Tensors that were made before the merge, on its way to be measured: the plan takes them over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.merge.plan import MergePlan, ShardPlan, TensorPlan


@dataclass(frozen=True)
class Fitted:
    """Tensors of the output, as it has them.

    Attributes:
        label: of the files, as `folders` of the engine call theirs.
        digest: of their content.
        tensors: by the names of the output; all others are made as the plan says.
    """

    label: str
    digest: str
    tensors: Mapping[str, TensorHeader]


def taking(plan: MergePlan, fitted: Fitted) -> MergePlan:
    """The same plan, that copies what is fitted."""
    return MergePlan(tuple(_taking(shard, fitted) for shard in plan.shards))


def _taking(shard: ShardPlan, fitted: Fitted) -> ShardPlan:
    number = len(shard.labels)  # of the fitted tensors among the sources

    def taken(tensor: TensorPlan) -> TensorPlan:
        found = fitted.tensors.get(tensor.output.name)
        return TensorPlan(tensor.output, (found,), (number,)) if found else tensor

    return replace(
        shard,
        labels=(*shard.labels, fitted.label),
        bases=(*shard.bases, None),
        source_digests=(*shard.source_digests, fitted.digest),
        tensors=tuple(map(taken, shard.tensors)),
    )
