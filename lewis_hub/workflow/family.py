"""Which models can be matched: those of one architecture, whose heads and positions agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from lewis_hub.errors import AlignmentError
from lewis_hub.merge.symmetries import Units, units_of
from lewis_hub.workflow.configurations import rotary_positions
from lewis_hub.workflow.open import OpenedSource


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
    rotary = [rotary_positions(one.config) for one in (reference, expert)]
    if ours.family.rotary and rotary[0] != rotary[1]:
        found, wanted = (json.dumps(one, sort_keys=True) for one in reversed(rotary))
        problem = f"its rotary positions ({found}) are not those of {reference.name} ({wanted})"
        raise AlignmentError(expert.name, problem, remedy)
    return ours, theirs
