"""What will be done: every output shard, what goes in it, and how each tensor is made.

A shard's plan can be sent to a worker; its digest fixes the bytes of the shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.ranges import SourceTensor
from lewis_hub.checkpoint.writer import OutputTensor, ShardLayout
from lewis_hub.merge.alignment import Assembled
from lewis_hub.methods import registry

VERSION = 1  # of the arithmetic: raised when the same plan would give other bytes


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is made.

    Attributes:
        inputs: one a source, the base's first; that one alone for a tensor that is copied. Of a
            slice they may be of other blocks than the output.
        sources: of the inputs, as `ShardPlan.labels` counts them.
        weights: one an expert; none for a tensor that is copied.
        densities: one an expert; none where the method takes none.
        streams: of random bits, one an expert; none where the method draws none.
        own: what else an expert has of its own, by the function's keyword: one value an expert.
        options: the method's, by the recipe's names.
        assembled: one a source, where its tensor is put together from rows of several; none where
            all lie as they are needed.
        grams: of its inputs, one an expert, None where there are none; none at all where the method
            asks for none.
    """

    output: OutputTensor
    inputs: tuple[TensorHeader, ...]
    sources: tuple[int, ...]
    weights: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    streams: tuple[int, ...] = ()
    own: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    assembled: tuple[Assembled | None, ...] = ()
    grams: tuple[Gram | None, ...] = ()

    @property
    def told(self) -> Mapping[str, Any]:
        """All that fixes its bytes, as plain JSON."""
        rows = [made and made.digest() for made in self.assembled]
        return asdict(replace(self, assembled=())) | {"assembled": rows}

    @property
    def is_transposed(self) -> bool:
        """Whether it is a matrix that lies as (in, out); known of those with second moments."""
        return any(gram.transposed for gram in self.grams if gram)

    @property
    def is_copied(self) -> bool:
        """Whether it is taken from the base as it is: counts and masks."""
        return not self.weights


@dataclass(frozen=True)
class ShardPlan:
    """One output file; complete in itself.

    Attributes:
        statistics: label of each expert's -> digest; none where the method asks for none.
    """

    method: str
    labels: tuple[str, ...]  # of the sources, as `TensorPlan.sources` counts them
    bases: tuple[str | None, ...]  # of an adapter: label of the checkpoint that it changes
    source_digests: tuple[str, ...]
    layout: ShardLayout
    tensors: tuple[TensorPlan, ...]  # in the order of the layout
    allow_nan: bool = False  # whether sources may hold NaN and infinity; see `nan`
    statistics: Mapping[str, str] = field(default_factory=dict)

    @property
    def reads(self) -> list[list[SourceTensor]]:
        """The source tensors that each tensor is made of."""
        return [list(self._reads(tensor)) for tensor in self.tensors]

    def _reads(self, tensor: TensorPlan) -> Iterator[SourceTensor]:
        assembled = tensor.assembled or (None,) * len(tensor.inputs)
        for number, header, made in zip(tensor.sources, tensor.inputs, assembled, strict=True):
            if made is None:
                yield SourceTensor(self.labels[number], header, self.bases[number])
                continue
            for source in sorted(made.rows.sources()):
                if part := made.parts[source]:
                    yield SourceTensor(self.labels[source], part, self.bases[source])

    @cached_property
    def digest(self) -> str:
        """Over all that fixes the bytes of the shard: equal digests, equal bytes."""
        told: dict[str, Any] = {
            "version": VERSION,
            "method": [self.method, registry.find(self.method).version],
            "sources": self.source_digests,
            "tensors": [tensor.told for tensor in self.tensors],
        }
        told |= {"allow_nan": True} if self.allow_nan else {}
        told |= {"statistics": list(self.statistics.values())} if self.statistics else {}
        text = json.dumps(told, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class MergePlan:
    """All output shards."""

    shards: tuple[ShardPlan, ...]

    @property
    def allowing_nan(self) -> MergePlan:
        """The same plan, whatever the sources hold."""
        return MergePlan(tuple(replace(shard, allow_nan=True) for shard in self.shards))

    @property
    def layouts(self) -> tuple[ShardLayout, ...]:
        """What the output will look like."""
        return tuple(shard.layout for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """Of all output files; what `advance` will have been called with in the end."""
        return sum(layout.n_bytes for layout in self.layouts)

    @property
    def digest(self) -> str:
        """Over the digests of all shards."""
        told = "\n".join(shard.digest for shard in self.shards)
        return "sha256:" + hashlib.sha256(told.encode()).hexdigest()


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
