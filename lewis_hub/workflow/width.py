"""Put the units of models of another width in the places of those of the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lewis_hub.errors import AlignmentError
from lewis_hub.merge.aligned import MatchedWidths
from lewis_hub.merge.symmetries import MLP, RESIDUAL, Units, units_of
from lewis_hub.merge.unit_sizes import require_units
from lewis_hub.merge.width import in_widths, require_same_names
from lewis_hub.recipe.schema import ModelEntry
from lewis_hub.workflow.depth import (
    depth_notes,
    depth_problems,
    in_depth,
    require_one_family,
    require_whole,
)
from lewis_hub.workflow.open import MergeSources, OpenedSource

OTHER = (
    "Use models of one family that differ in their hidden size, the size of their MLPs or their "
    "number of groups of heads only, or remove `width`."
)


def fitted(reference: OpenedSource, source: OpenedSource, widths: MatchedWidths) -> OpenedSource:
    """Return a source with the width and the configuration of the reference."""
    units = units_of(reference.checkpoint, reference.config)
    checkpoint = in_widths(
        reference.checkpoint, source.checkpoint, units, widths.places, widths.norm_scales
    )
    digest = f"{source.digest}+{reference.digest}"
    return replace(source, checkpoint=checkpoint, config=reference.config, digest=digest)


def in_size(entries: Sequence[ModelEntry], sources: MergeSources) -> MergeSources:
    """Return the models with the headers that they will have in the size of the reference.

    Which block and unit goes where is not known yet, and makes no difference for headers.
    """
    reference = sources.donor
    others = {one.pinned for one in _of_other_width(entries, sources)}

    def placed(source: OpenedSource) -> OpenedSource:
        if source.pinned not in others:
            return source
        units = units_of(reference.checkpoint, reference.config)
        sizes = units_of(source.checkpoint, source.config).sizes
        places = {
            group: np.where(np.arange(size) < units.sizes[group], np.arange(size), -1)
            for group, size in sizes.items()
        }
        return fitted(reference, source, MatchedWidths(places, {}))

    found = in_depth(entries, sources)
    return MergeSources(found.base, tuple(map(placed, found.experts)))


def size_problems(entries: Sequence[ModelEntry], sources: MergeSources) -> list[str]:
    """Return why models cannot be brought to the size of the reference, from headers alone."""
    problems = depth_problems(entries, sources)
    try:
        for expert in _of_other_width(entries, sources):
            _require_fitting(sources.donor, expert)
    except AlignmentError as error:
        problems.append(" ".join(str(error).split("\n")))
    return problems


def size_notes(entries: Sequence[ModelEntry], sources: MergeSources) -> list[str]:
    """Return notes on models that lose blocks or units beside the reference."""
    found, reference = depth_notes(entries, sources), sources.donor
    for expert in _of_other_width(entries, sources):
        ours, theirs = (units_of(one.checkpoint, one.config) for one in (reference, expert))
        if any(size > ours.sizes[group] for group, size in theirs.sizes.items()):
            found.append(
                f"{expert.name} has {_in_words(theirs)}, {reference.name} has {_in_words(ours)}: "
                "units without a partner are left out or zipped, which changes what it computes. "
                "Name the wider model first, or as `base_model`, to keep all."
            )
    return found


def _of_other_width(entries: Sequence[ModelEntry], sources: MergeSources) -> Iterator[OpenedSource]:
    """The models whose units are matched across widths."""
    for entry, expert in zip(entries, sources.experts, strict=True):
        if entry.align and entry.align.width and sources.are_read:
            yield expert


def _require_fitting(reference: OpenedSource, expert: OpenedSource) -> None:
    require_whole("units", reference, expert)
    models = require_one_family(reference, expert, OTHER, free=("n_heads", "n_kv_heads"))
    for one, units in zip((reference, expert), models, strict=True):
        if not units.family.rotary:
            raise AlignmentError(
                one.name, "`width` matches heads with rotary positions only", OTHER
            )
        require_units(one.name, units)
    require_same_names(reference.checkpoint, expert.checkpoint, models[0])


def _in_words(units: Units) -> str:
    """The numbers of units, of MLPs in the first block."""
    n_mlp = units.sizes[f"{units.blocks[0]}.{MLP}"]
    return f"{units.sizes[RESIDUAL]} hidden units, {n_mlp} MLP units and {units.n_heads} heads"
