"""Which bytes of which files a tensor of the plan is made of, for sources that are elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.ranges import Need
from lewis_hub.merge.plan import ShardPlan, TensorPlan


def needs_of(plan: ShardPlan, elsewhere: Collection[str]) -> list[list[Need]]:
    """What each tensor of a shard needs, in the plan's order.

    Args:
        plan: of the shard.
        elsewhere: labels of the sources, and of bases of sources, whose files are not here.
    """
    return [
        [need for need in _needs(plan, tensor) if need.source in elsewhere]
        for tensor in plan.tensors
    ]


def _needs(plan: ShardPlan, tensor: TensorPlan) -> Iterator[Need]:
    assembled = tensor.assembled or (None,) * len(tensor.inputs)
    for number, header, made in zip(tensor.sources, tensor.inputs, assembled, strict=True):
        if made is None:
            yield from stored(plan.labels[number], plan.bases[number], header)
            continue
        for source in sorted(made.rows.sources()):
            if part := made.parts[source]:
                yield from stored(plan.labels[source], plan.bases[source], part)


def stored(label: str, base: str | None, tensor: TensorHeader) -> Iterator[Need]:
    """What one tensor of a source is computed from; mostly itself.

    Args:
        label: of the source.
        base: of the checkpoint that an adapter's other tensors lie in; None: of no adapter.
        tensor: as the source's headers have it.
    """
    if tensor.adapted:
        yield from stored(base or label, None, tensor.adapted.base)
        for part in tensor.adapted.own:
            yield from stored(label, None, part)
        return
    for part in _headers_in(tensor.scaled or tensor):
        yield Need(base or label, part.shard, part.start, part.start + part.n_bytes)


def _headers_in(parts: object) -> Iterator[TensorHeader]:
    """All that a quantised tensor is stored as, however it is."""
    if isinstance(parts, TensorHeader):
        yield parts
    elif is_dataclass(parts):
        for field in fields(parts):
            yield from _headers_in(getattr(parts, field.name))
