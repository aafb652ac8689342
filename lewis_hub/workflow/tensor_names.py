"""Give the tensors of all sources the names of the first: files of one architecture may differ.

A file of the body alone lacks the prefix of the class with a head: GPT-2 is published with `h.0`,
and its fine-tunes have `transformer.h.0`. Older files store constants that a model computes itself,
BERT's norms as `gamma` and `beta`, and LLaVA's layers in `language_model.model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    donor, kind = sources.donor.checkpoint, sources.donor.config.get("model_type")

    def named(one: OpenedSource) -> OpenedSource:
        found = _named_like(donor, one.checkpoint)
        if one.config.get("model_type") == kind:  # others wrap, too: a text model in one of images
            found = _wrapped_like(donor, found)
        return replace(one, checkpoint=found)

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
    stored = {names.current(name): name for name in donor.tensors}

    def renamed(name: str) -> str:
        bare = name.removeprefix(prefix)
        prefixed, current = wanted + bare, names.current(wanted + bare)
        if prefixed in donor.tensors or current in stored:
            return prefixed if prefixed in donor.tensors else stored[current]
        return prefixed if names.block(bare) is not None else stored.get(names.current(bare), bare)

    return own if own.tensors.keys() == donor.tensors.keys() else _with_names(own, renamed)


def _wrapped_like(donor: Checkpoint, own: Checkpoint) -> Checkpoint:
    """Name what `own` alone has as what the donor alone has, where words and shape are the same."""
    ours, theirs = (
        _by_words([t for t in one.tensors.values() if t.name not in other.tensors])
        for one, other in ((own, donor), (donor, own))
    )
    same = {ours[key]: theirs[key] for key in ours.keys() & theirs.keys()}
    return _with_names(own, lambda name: same.get(name, name)) if same else own


def _by_words(tensors: Iterable[TensorHeader]) -> dict[tuple[str, tuple[int, ...]], str]:
    """Names by their words and shape, without those of which several have the same."""
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for tensor in tensors:
        found.setdefault((names.words(tensor.name), tensor.shape), []).append(tensor.name)
    return {key: named[0] for key, named in found.items() if len(named) == 1}


def _with_names(own: Checkpoint, renamed: Callable[[str], str]) -> Checkpoint:
    """Rename all tensors, or none if two of them would have the same name."""
    tensors = {renamed(n): replace(t, name=renamed(n)) for n, t in own.tensors.items()}
    return replace(own, tensors=tensors) if len(tensors) == len(own.tensors) else own


def _is_constant(tensor: TensorHeader) -> bool:
    """Return whether a tensor is constant: frequencies, numbers of positions, or a causal mask."""
    is_mask = tensor.name.endswith(".bias") and len(tensor.shape) == 4
    return tensor.name.endswith(CONSTANTS) or (is_mask and tensor.shape[:2] == (1, 1))
