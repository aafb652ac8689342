"""Put the blocks of models of another depth in the places of those of the reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.errors import AlignmentError
from lewis_hub.merge.depth import Blocks, first_places, in_places, require_same_blocks
from lewis_hub.merge.symmetries import Units, units_of
from lewis_hub.merge.unit_sizes import require_units
from lewis_hub.recipe.schema import ModelEntry
from lewis_hub.workflow.open import MergeSources, OpenedSource

THETA = 10_000.0  # if a configuration does not say

OTHER = "Use models of one family that differ in depth only, or remove `depth`."


def placed(reference: OpenedSource, source: OpenedSource, blocks: Blocks) -> OpenedSource:
    """Return a source with its blocks in these places, and the configuration of the reference."""
    units = units_of(reference.checkpoint, reference.config)
    checkpoint = in_places(reference.checkpoint, source.checkpoint, blocks, units)
    order = hashlib.sha256(json.dumps(blocks).encode()).hexdigest()
    digest = f"{source.digest}+{reference.digest}+{order}"
    return replace(source, checkpoint=checkpoint, config=reference.config, digest=digest)


def blocks_of(source: OpenedSource) -> list[dict[str, TensorHeader]]:
    """Return the tensors of each block, by their names in block 0."""
    units = units_of(source.checkpoint, source.config)
    found: list[dict[str, TensorHeader]] = [{} for _ in range(units.n_blocks)]
    for name in units.axes:
        if (block := names.block(name)) is not None:
            found[block][names.renumbered(name, 0)] = source.checkpoint.tensors[name]
    return found


def in_depth(entries: Sequence[ModelEntry], sources: MergeSources) -> MergeSources:
    """Return the models with the headers that they will have in the depth of the reference.

    Which block goes where is not known yet, and makes no difference for headers.
    """
    reference = sources.donor
    numbers = {one.pinned: number for one, number in _of_other_depth(entries, sources)}
    if not numbers:
        return sources
    n_reference = units_of(reference.checkpoint, reference.config).n_blocks

    def fitted(source: OpenedSource) -> OpenedSource:
        if source.pinned not in numbers:
            return source
        return placed(reference, source, first_places(n_reference, numbers[source.pinned]))

    return MergeSources(sources.base, tuple(map(fitted, sources.experts)))


def depth_problems(entries: Sequence[ModelEntry], sources: MergeSources) -> list[str]:
    """Return why models cannot be brought to the depth of the reference, from headers alone."""
    problems = []
    try:
        for expert, _ in _of_other_depth(entries, sources):
            _require_same_family(sources.donor, expert)
    except AlignmentError as error:
        problems.append(" ".join(str(error).split("\n")))
    return problems


def depth_notes(entries: Sequence[ModelEntry], sources: MergeSources) -> list[str]:
    """Return notes on models that are deeper than the reference."""
    found, reference = [], sources.donor
    for expert, n_blocks in _of_other_depth(entries, sources):
        n_reference = units_of(reference.checkpoint, reference.config).n_blocks
        if n_blocks > n_reference:
            found.append(
                f"{expert.name} has {n_blocks} blocks, {reference.name} has {n_reference}: "
                f"{n_blocks - n_reference} of them are left out, which changes what it computes. "
                "Name the deeper model first, or as `base_model`, to keep all."
            )
    return found


def _of_other_depth(
    entries: Sequence[ModelEntry], sources: MergeSources
) -> Iterator[tuple[OpenedSource, int]]:
    """The models whose blocks are matched, with their numbers of blocks."""
    for entry, expert in zip(entries, sources.experts, strict=True):
        if entry.align and entry.align.depth and sources.are_read:
            yield expert, units_of(expert.checkpoint, expert.config).n_blocks


def _require_same_family(reference: OpenedSource, expert: OpenedSource) -> None:
    require_whole("blocks", reference, expert)
    models = require_one_family(reference, expert, OTHER, free=("n_blocks",))
    require_same_blocks(reference.checkpoint, expert.checkpoint)
    for one, units in zip((reference, expert), models, strict=True):
        require_units(one.name, units)


def require_whole(matched: str, *models: OpenedSource) -> None:
    """Refuse an adapter, which has the size of its base."""
    for one in models:
        if one.source.is_adapter:
            problem = f"{matched} of whole models are matched, and it is a LoRA adapter"
            remedy = "Write it out as a model first: a `linear` merge of it alone."
            raise AlignmentError(one.name, problem, remedy)


def require_one_family(
    reference: OpenedSource, expert: OpenedSource, remedy: str, free: Sequence[str] = ()
) -> tuple[Units, Units]:
    """Refuse models of two architectures or sizes; return the units of both.

    `free` are the fields of the units in which they may differ. Heads stay in groups of one size.
    """
    ours, theirs = (units_of(one.checkpoint, one.config) for one in (reference, expert))
    kinds = [one.config.get("model_type") for one in (reference, expert)]
    same = replace(ours, axes={}, shapes={}, **{name: getattr(theirs, name) for name in free})
    in_groups = ours.n_heads * theirs.n_kv_heads == theirs.n_heads * ours.n_kv_heads
    if kinds[0] != kinds[1] or not in_groups or same != replace(theirs, axes={}, shapes={}):
        problem = f"its architecture ({kinds[1]}, {theirs.in_words}) is not that of "
        problem += f"{reference.name} ({kinds[0]}, {ours.in_words})"
        raise AlignmentError(expert.name, problem, remedy)
    rotary = [_rotary(one.config) for one in (reference, expert)]
    if ours.family.rotary and rotary[0] != rotary[1]:
        found, wanted = (json.dumps(one, sort_keys=True) for one in reversed(rotary))
        problem = f"its rotary positions ({found}) are not those of {reference.name} ({wanted})"
        raise AlignmentError(expert.name, problem, remedy)
    return ours, theirs


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """What fixes the frequencies of rotary positions, in older and newer configurations."""
    stated = config.get("rope_parameters") or config.get("rope_scaling")
    found = {"rope_theta": config.get("rope_theta") or THETA}
    found |= stated if isinstance(stated, dict) else {}
    kind = found.pop("type", None)
    return found | {"rope_type": found.get("rope_type", kind) or "default"}
