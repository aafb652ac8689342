"""Slices of a stack: their pinned sources, and the `config.json` and headers of the stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import MergeError
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.hub.source import Source
from lewis_hub.merge.plan import MergePlan
from lewis_hub.merge.planning import MergeSource
from lewis_hub.merge.slices import (
    Blocks,
    MergeSlice,
    Model,
    Origin,
    StackSettings,
    count_blocks,
    make_stacked_plan,
    stacked_config,
)
from lewis_hub.recipe.schema import ModelReference, Settings, Slice, SliceSource
from lewis_hub.report.facts import StackedBlocks
from lewis_hub.workflow.open import MergeSources, OpenedSource


@dataclass(frozen=True)
class SourceBlocks:
    """Consecutive blocks of a source, by their numbers there, and their settings."""

    source: Source
    blocks: range
    parameters: Settings


@dataclass(frozen=True)
class PinnedSlice:
    """A slice of a stack with pinned sources.

    Attributes:
        base: one of the listed sources; None for a method without a base.
        experts: the other sources.
        listed: all sources, in the recipe's order.
    """

    base: SourceBlocks | None
    experts: tuple[SourceBlocks, ...]
    listed: tuple[SourceBlocks, ...]
    parameters: Settings


def pin_slices(
    slices: Sequence[Slice],
    base_model: ModelReference | None,
    sources: Mapping[ModelReference, Source],
    *,
    takes_base: bool,
) -> tuple[PinnedSlice, ...]:
    """Pin the sources of slices; `base_model` is the base of a slice that names no base.

    Raises:
        MergeError: a slice does not list its base.
    """

    def blocks(one: SliceSource) -> SourceBlocks:
        return SourceBlocks(sources[one.model], one.blocks, one.parameters)

    found = []
    for index, one in enumerate(slices):
        base = (one.base_model or base_model) if takes_base else None
        listed = tuple(blocks(source) for source in one.sources)
        if base is None:
            found.append(PinnedSlice(None, listed, listed, one.parameters))
            continue
        bases = [blocks(source) for source in one.sources if source.model == base]
        if not bases:
            problem = f"the base `{base}` is not among the slice's sources"
            remedy = "Add it to `sources` with its `layer_range`."
            raise MergeError(f"slices[{index}]", problem, remedy)
        experts = tuple(blocks(source) for source in one.sources if source.model != base)
        found.append(PinnedSlice(bases[0], experts, listed, one.parameters))
    return tuple(found)


def merge_slices(slices: Sequence[PinnedSlice], sources: MergeSources) -> tuple[MergeSlice, ...]:
    """Return the slices with the headers of their sources."""
    opened = {one.source: one for one in sources.models}

    def blocks(one: SourceBlocks) -> Blocks:
        source = opened[one.source]
        return Blocks(MergeSource(source.checkpoint, source.digest, one.parameters), one.blocks)

    return tuple(
        MergeSlice(
            blocks(one.base) if one.base else None,
            tuple(blocks(expert) for expert in one.experts),
            one.parameters,
        )
        for one in slices
    )


def stack_config(slices: Sequence[PinnedSlice], sources: MergeSources) -> dict[str, Any]:
    """Return the stack's `config.json`.

    Raises:
        MergeError: the number of blocks in the donor's configuration cannot be changed.
    """
    opened = {one.source: one for one in sources.models}

    def model(source: OpenedSource) -> Model:
        return Model(source.pinned, source.config, count_blocks(source.checkpoint))

    origins = []
    for one in slices:
        first = one.base or one.experts[0]
        made_from = model(opened[first.source])
        origins += [Origin(made_from, block) for block in first.blocks]
    return stacked_config(model(sources.donor), origins)


def stack_headers(settings: StackSettings) -> Checkpoint:
    """Return the headers of the stack.

    Raises:
        MergeError: it cannot be made.
    """
    planned = make_stacked_plan(settings, 1 << 40)
    made = [(layout.name, tensor) for layout in planned.layouts for tensor in layout.tensors]
    headers = [
        TensorHeader(tensor.name, tensor.dtype, tensor.shape, shard, 0, tensor.n_bytes)
        for shard, tensor in made
    ]
    return Checkpoint("the stack", {header.name: header for header in headers})


def restacked(schedule: DensitySchedule, planned: MergePlan) -> DensitySchedule:
    """Return a schedule of whole models by the names of the stack's tensors."""
    found: dict[str, dict[str, float]] = {one.source: {} for one in schedule.experts}
    given = {one.source: one.tensors for one in schedule.experts}
    for shard in planned.shards:
        for tensor in shard.tensors:
            for header, i in zip(tensor.inputs, tensor.sources, strict=True):
                source = shard.labels[i]
                if header.name in given.get(source, {}):
                    found[source][tensor.output.name] = given[source][header.name]
    return DensitySchedule(
        tuple(replace(one, tensors=found[one.source]) for one in schedule.experts)
    )


def depth_refusals(sources: MergeSources) -> list[str]:
    """Refuse experts whose blocks a guide cannot compare with those of the base."""
    donor = count_blocks(sources.donor.checkpoint)
    depths = [(expert.name, count_blocks(expert.checkpoint)) for expert in sources.experts]
    return [
        f"guide: {name} has {depth} blocks and the base {donor}, so their importance cannot be "
        "compared block by block. Use guide `uniform`, or set `density`."
        for name, depth in depths
        if depth != donor
    ]


def stacked_blocks(slices: Sequence[PinnedSlice]) -> tuple[StackedBlocks, ...]:
    """Return the blocks of a stack and their sources, for the card."""
    rows, first = [], 0
    for one in slices:
        blocks = range(first, first + len(one.listed[0].blocks))
        made_from = tuple((source.source, source.blocks) for source in one.listed)
        rows.append(StackedBlocks(blocks, made_from, one.base.source if one.base else None))
        first = blocks.stop
    return tuple(rows)


def name_by_pin(
    slices: Sequence[Slice], sources: Mapping[ModelReference, Source]
) -> tuple[Slice, ...]:
    """Return slices with the pinned name of every model."""

    def pinned(model: ModelReference) -> ModelReference:
        return ModelReference(name=sources[model].pinned)

    return tuple(
        one.model_copy(
            update={
                "base_model": pinned(one.base_model) if one.base_model else None,
                "sources": tuple(
                    source.model_copy(update={"model": pinned(source.model)})
                    for source in one.sources
                ),
            }
        )
        for one in slices
    )
