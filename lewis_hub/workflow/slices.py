"""A recipe's `slices` in the words of the merge: what is stacked, and what `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import MergeError
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.merge.alignment import Alignment
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
from lewis_hub.methods import registry
from lewis_hub.recipe.schema import ModelReference, Recipe, Slice, SliceSource
from lewis_hub.report.facts import StackedBlocks
from lewis_hub.workflow.resolve import Inputs, by_reference


def stack(
    recipe: Recipe,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    alignment: Alignment | None,
) -> StackSettings:
    """Say what is stacked.

    Args:
        recipe: with slices.
        inputs: pinned.
        checkpoints: pinned source -> its headers.
        alignment: of vocabularies that differ.

    Raises:
        MergeError: a slice does not list the base that its method starts from.
    """
    sources = by_reference(recipe, inputs)

    def blocks(one: SliceSource) -> Blocks:
        source = sources[one.model]
        headers = checkpoints[source.pinned]
        return Blocks(MergeSource(headers, inputs.content(source), one.parameters), one.blocks)

    slices = []
    for index, one in enumerate(recipe.slices):
        base, experts = _divided(recipe, index, one)
        slices.append(
            MergeSlice(
                blocks(base) if base else None,
                tuple(blocks(source) for source in experts),
                one.parameters,
            )
        )
    return StackSettings(
        method=recipe.merge_method,
        slices=tuple(slices),
        donor=checkpoints[inputs.donor.pinned],
        parameters=recipe.parameters,
        dtype=recipe.output_dtype,
        seed=recipe.seed,
        alignment=alignment,
    )


def at_the_ends(recipe: Recipe, inputs: Inputs) -> Inputs:
    """The models whose embeddings, final norm or head become the stack's, and the donor."""
    sources = by_reference(recipe, inputs)
    ends = [one.model for piece in (recipe.slices[0], recipe.slices[-1]) for one in piece.sources]
    used = {inputs.donor, *(sources[model] for model in ends)}
    return replace(inputs, experts=tuple(one for one in inputs.experts if one in used))


def restacked(schedule: DensitySchedule, planned: MergePlan) -> DensitySchedule:
    """Densities of whole models as those of a stack: by the names in the output.

    Args:
        schedule: by the names that tensors have in the sources.
        planned: of the stack.
    """
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


def uncompared(inputs: Inputs, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """Models that a guide cannot hold against the base, block by block."""
    depths = {source: count_blocks(checkpoints[source.pinned]) for source in inputs.models}
    return [
        f"guide: {expert.name} has {depths[expert]} blocks, its base {depths[inputs.donor]}: their "
        "importance cannot be compared block by block. Use guide `uniform`, or give `density`."
        for expert in inputs.experts
        if depths[expert] != depths[inputs.donor]
    ]


def stacked_blocks(recipe: Recipe, inputs: Inputs) -> tuple[StackedBlocks, ...]:
    """Which blocks became which, for the card; none where whole models were merged."""
    sources = by_reference(recipe, inputs)
    rows, first = [], 0
    for index, one in enumerate(recipe.slices):
        base, _ = _divided(recipe, index, one)
        blocks = range(first, first + len(one.sources[0].blocks))
        made_from = tuple((sources[source.model], source.blocks) for source in one.sources)
        rows.append(StackedBlocks(blocks, made_from, sources[base.model] if base else None))
        first = blocks.stop
    return tuple(rows)


def pinned_slices(recipe: Recipe, inputs: Inputs) -> tuple[Slice, ...]:
    """The slices with every model named by what it is pinned to."""
    sources = by_reference(recipe, inputs)

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
        for one in recipe.slices
    )


def outline(
    recipe: Recipe,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    configs: Mapping[str, Mapping[str, Any]],
    alignment: Alignment | None,
) -> Checkpoint:
    """The stack as a checkpoint that is not there yet; the arguments are those of `configuration`.

    Beside them `alignment`, of vocabularies that differ.

    Raises:
        MergeError: it cannot be made, or not be told in a `config.json`.
    """
    configuration(recipe, inputs, checkpoints, configs)
    planned = make_stacked_plan(stack(recipe, inputs, checkpoints, alignment), 1 << 40)
    made = [(layout.name, tensor) for layout in planned.layouts for tensor in layout.tensors]
    headers = [
        TensorHeader(tensor.name, tensor.dtype, tensor.shape, shard, 0, tensor.n_bytes)
        for shard, tensor in made
    ]
    return Checkpoint("the stack", {header.name: header for header in headers})


def configuration(
    recipe: Recipe,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    configs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The stack's `config.json`.

    Args:
        recipe: with slices.
        inputs: pinned.
        checkpoints: pinned source -> its headers.
        configs: pinned source -> its `config.json`; an adapter's is that of its base.

    Raises:
        MergeError: the donor's configuration cannot be given another number of blocks.
    """
    sources = by_reference(recipe, inputs)

    def model(pinned: str) -> Model:
        return Model(pinned, configs[pinned], count_blocks(checkpoints[pinned]))

    origins = []
    for index, one in enumerate(recipe.slices):
        base, experts = _divided(recipe, index, one)
        first = base or experts[0]
        made_from = model(sources[first.model].pinned)
        origins += [Origin(made_from, block) for block in first.blocks]
    return stacked_config(model(inputs.donor.pinned), origins)


def _divided(
    recipe: Recipe, index: int, one: Slice
) -> tuple[SliceSource | None, tuple[SliceSource, ...]]:
    """The slice's base, where the method takes one, and its experts."""
    base = one.base_model or recipe.base_model
    if base is None or not registry.find(recipe.merge_method).takes_base:
        return None, one.sources
    listed = [source for source in one.sources if source.model == base]
    if not listed:
        problem = f"the base `{base}` is not among the slice's sources"
        remedy = "Add it to `sources` with its `layer_range`."
        raise MergeError(f"slices[{index}]", problem, remedy)
    return listed[0], tuple(source for source in one.sources if source.model != base)
