"""Fit: sources that store the same model in different ways, brought to the base's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.merge.compare import compare, passed_over
from lewis_hub.merge.heads import settle_heads
from lewis_hub.recipe import Recipe
from lewis_hub.stages.opening import ties
from lewis_hub.stages.sources import Inputs
from lewis_hub.stages.tokenizers import Tokens

Configs = Mapping[str, Mapping[str, Any]]  # pinned source -> its config.json


def settle(
    donor: str, checkpoints: Mapping[str, Checkpoint], configs: Configs
) -> dict[str, Checkpoint]:
    """Give sources that tie head and embeddings, as the base does, a head where the base has one.

    A configuration that is silent means what its architecture means by that: to tie, where a
    source with a silent one stores no head. `donor` is the base's key in both mappings.
    """
    stated = {pinned: ties(configs[pinned]) for pinned in checkpoints}
    silent = any(
        stated[pinned] is None and not any(map(names.is_head, checkpoint.tensors))
        for pinned, checkpoint in checkpoints.items()
    )
    tied = {pinned: silent if said is None else said for pinned, said in stated.items()}
    base = checkpoints[donor]
    return {
        pinned: settle_heads(base, one) if tied[pinned] and tied[donor] else one
        for pinned, one in checkpoints.items()
    }


def misfits(
    recipe: Recipe, inputs: Inputs, checkpoints: Mapping[str, Checkpoint], tokens: Tokens
) -> list[str]:
    """What keeps the sources from being merged tensor by tensor; what tokenizers say goes first."""
    first, *others = (checkpoints[source.pinned] for source in inputs.models)
    tensors = tokens.alignment.tensors if tokens.alignment else ()
    found = compare(first, others, recipe.missing, tensors)
    return [str(one) for one in found if not (tokens.problems and one.kind == "vocabulary")]


def left_alone(
    recipe: Recipe, inputs: Inputs, checkpoints: Mapping[str, Checkpoint]
) -> tuple[str, ...]:
    """What `missing: base` keeps out of the merge, a sentence each."""
    first, *others = (checkpoints[source.pinned] for source in inputs.models)
    return passed_over(first, others) if recipe.missing == "base" else ()
