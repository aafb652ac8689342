"""Give the tensors of all sources the names of the first: files of one architecture may differ.

A file of the body alone lacks the prefix of the class with a head: GPT-2 is published with `h.0`,
and its fine-tunes have `transformer.h.0`. Older files store constants that a model computes itself.
"""

from __future__ import annotations

from dataclasses import replace

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.workflow.open import MergeSources, OpenedSource

CONSTANTS = (".inv_freq", ".masked_bias", "position_ids")  # ends of names


def with_common_names(sources: MergeSources) -> MergeSources:
    """Return the models with the first one's names, and with constants only if all store the same.

    transformers reads none of these constants, whether a file has them or not.
    """
    donor = sources.donor.checkpoint

    def named(one: OpenedSource) -> OpenedSource:
        return replace(one, checkpoint=_named_like(donor, one.checkpoint))

    def without_constants(one: OpenedSource) -> OpenedSource:
        tensors = {n: t for n, t in one.checkpoint.tensors.items() if not _is_constant(t)}
        return replace(one, checkpoint=replace(one.checkpoint, tensors=tensors))

    found = sources.replaced(named)
    stored = {
        frozenset(t.name for t in one.checkpoint.tensors.values() if _is_constant(t))
        for one in found.models
    }
    return found.replaced(without_constants) if len(stored) > 1 else found


def _named_like(donor: Checkpoint, own: Checkpoint) -> Checkpoint:
    prefix, wanted = names.prefixes(own.tensors, donor.tensors)
    if prefix == wanted:
        return own

    def renamed(name: str) -> str:
        bare = name.removeprefix(prefix)
        is_prefixed = names.block(bare) is not None or wanted + bare in donor.tensors
        return wanted + bare if is_prefixed else bare

    tensors = {renamed(n): replace(t, name=renamed(n)) for n, t in own.tensors.items()}
    return replace(own, tensors=tensors) if len(tensors) == len(own.tensors) else own


def _is_constant(tensor: TensorHeader) -> bool:
    """Return whether a tensor is constant: frequencies, numbers of positions, or a causal mask."""
    is_mask = tensor.name.endswith(".bias") and len(tensor.shape) == 4
    return tensor.name.endswith(CONSTANTS) or (is_mask and tensor.shape[:2] == (1, 1))
