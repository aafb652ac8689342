"""Bring models of another depth, width or both to the size of the reference: blocks, then units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import AlignmentError
from lewis_hub.merge.aligned import MatchedWidths
from lewis_hub.merge.depth import (
    Blocks,
    first_places,
    in_places,
    require_same_blocks,
    stored_name,
)
from lewis_hub.merge.symmetries import MLP, RESIDUAL, Units, units_of
from lewis_hub.merge.unit_sizes import require_units
from lewis_hub.merge.width import in_widths, require_same_names
from lewis_hub.recipe.alignment import Align
from lewis_hub.recipe.schema import ModelEntry
from lewis_hub.workflow.family import require_one_family, require_whole
from lewis_hub.workflow.open import MergeSources, OpenedSource

NO_ROTARY = "`width` matches heads with rotary positions only"
USE = "Use models of one family that differ in"
WIDTHS = "their hidden size, the size of their MLPs or their number of groups of heads"
OTHER_DEPTH = (
    f"{USE} depth only, or remove `depth`. For another width, add `width: neuron_matching`."
)
OTHER_WIDTH = (
    f"{USE} {WIDTHS} only, or remove `width`. For another number of blocks, add "
    "`depth: segment_wise`."
)
OTHER_SIZE = f"{USE} their number of blocks, {WIDTHS} only, or remove `align`."


def sized(
    reference: OpenedSource,
    source: OpenedSource,
    blocks: Blocks | None,
    widths: MatchedWidths | None,
) -> OpenedSource:
    """Return a source with the depth, the width and the configuration of the reference.

    Args:
        reference: the model whose size is taken.
        source: the model that is brought to it.
        blocks: its block in each place; None: it has the depth of the reference.
        widths: the places of its units; None: it has the width of the reference.
    """
    units = units_of(reference.checkpoint, reference.config)
    own = source.checkpoint
    if blocks is not None:
        own = in_places(reference.checkpoint, own, blocks, units)
    places, scales = (widths.places, widths.norm_scales) if widths else ({}, {})
    checkpoint = in_widths(reference.checkpoint, own, units, places, scales)
    digest = f"{source.digest}+{reference.digest}"
    return replace(source, checkpoint=checkpoint, config=reference.config, digest=digest)


def in_size(entries: Sequence[ModelEntry], sources: MergeSources) -> MergeSources:
    """Return the models with the headers that they will have in the size of the reference.

    Which block and unit goes where is not known yet, and makes no difference for headers.
    """
    asked = {one.pinned: align for one, align in _of_other_size(entries, sources)}

    def in_first_places(source: OpenedSource) -> OpenedSource:
        align = asked.get(source.pinned)
        return _in_first_places(sources.donor, source, align) if align else source

    return MergeSources(sources.base, tuple(map(in_first_places, sources.experts)))


def _in_first_places(reference: OpenedSource, source: OpenedSource, asked: Align) -> OpenedSource:
    ours, theirs = (units_of(one.checkpoint, one.config) for one in (reference, source))
    blocks = first_places(ours.n_blocks, theirs.n_blocks) if asked.depth else None
    if not asked.width:
        return sized(reference, source, blocks, None)
    places = {}
    for group, n_ours in ours.sizes.items():
        if (own := stored_name(group, blocks)) is not None:
            numbers = np.arange(theirs.sizes[own])
            places[group] = np.where(numbers < n_ours, numbers, -1)
    return sized(reference, source, blocks, MatchedWidths(places, {}))


def size_problems(entries: Sequence[ModelEntry], sources: MergeSources) -> list[str]:
    """Return why models cannot be brought to the size of the reference, from headers alone."""
    problems = []
    for expert, asked in _of_other_size(entries, sources):
        try:
            _require_fitting(sources.donor, expert, asked)
        except AlignmentError as error:
            problems.append(" ".join(str(error).split("\n")))
    return list(dict.fromkeys(problems))


def _require_fitting(reference: OpenedSource, expert: OpenedSource, asked: Align) -> None:
    both = bool(asked.depth and asked.width)
    require_whole(
        "blocks and units" if both else "blocks" if asked.depth else "units", reference, expert
    )
    remedy = OTHER_SIZE if both else OTHER_DEPTH if asked.depth else OTHER_WIDTH
    free = ["n_blocks"] if asked.depth else []
    free += ["n_heads", "n_kv_heads"] if asked.width else []
    models = require_one_family(reference, expert, remedy, free)
    checkpoints = [one.checkpoint for one in (reference, expert)]
    if asked.depth:
        for one in checkpoints:
            require_same_blocks(one, one if both else reference.checkpoint)
    for source, units in zip((reference, expert), models, strict=True):
        if asked.width and not units.family.rotary:
            raise AlignmentError(source.name, NO_ROTARY, remedy)
        require_units(source.name, units)
    if asked.width:  # of models whose blocks are alike the first ones suffice
        ours, theirs = map(_first_block, checkpoints) if asked.depth else checkpoints
        require_same_names(ours, theirs, models[0])


def _first_block(model: Checkpoint) -> Checkpoint:
    """The tensors of block 0 and outside the blocks."""
    tensors = model.tensors.items()
    return replace(model, tensors={n: one for n, one in tensors if names.block(n) in (None, 0)})


def size_notes(entries: Sequence[ModelEntry], sources: MergeSources) -> list[str]:
    """Return notes on models that lose blocks or units beside the reference."""
    found, reference = [], sources.donor
    for expert, asked in _of_other_size(entries, sources):
        ours, theirs = (units_of(one.checkpoint, one.config) for one in (reference, expert))
        if asked.depth and theirs.n_blocks > ours.n_blocks:
            found.append(
                f"{expert.name} has {theirs.n_blocks} blocks, {reference.name} has "
                f"{ours.n_blocks}: {theirs.n_blocks - ours.n_blocks} of them are left out, which "
                "changes what it computes. Name the deeper model first, or as `base_model`, to "
                "keep all."
            )
        if asked.width and _loses_units(ours, theirs):
            found.append(
                f"{expert.name} has {_in_words(theirs)}, {reference.name} has {_in_words(ours)}: "
                "units without a partner are left out or zipped, which changes what it computes. "
                "Name the wider model first, or as `base_model`, to keep all."
            )
    return found


def _loses_units(ours: Units, theirs: Units) -> bool:
    """Whether the model has more units than the reference; both have blocks 0 to n - 1."""
    return any(size > ours.sizes.get(group, size) for group, size in theirs.sizes.items())


def _in_words(units: Units) -> str:
    """The numbers of units, of MLPs in the first block."""
    n_mlp = units.sizes[f"{units.blocks[0]}.{MLP}"]
    return f"{units.sizes[RESIDUAL]} hidden units, {n_mlp} MLP units and {units.n_heads} heads"


def _of_other_size(
    entries: Sequence[ModelEntry], sources: MergeSources
) -> Iterator[tuple[OpenedSource, Align]]:
    """The models whose blocks are matched, or whose units are across widths."""
    for entry, expert in zip(entries, sources.experts, strict=True):
        if entry.align and (entry.align.depth or entry.align.width) and sources.are_read:
            yield expert, entry.align
