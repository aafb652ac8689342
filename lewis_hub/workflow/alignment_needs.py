"""The disk and the memory that matching models takes, from their headers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from lewis_hub.checkpoint.header import WIDTHS
from lewis_hub.merge.symmetries import Units, units_of
from lewis_hub.recipe.alignment import Align
from lewis_hub.recipe.schema import ModelEntry
from lewis_hub.workflow.open import MergeSources, OpenedSource
from lewis_hub.workflow.resources import TORCH_BYTES, WIDTH


@dataclass(frozen=True)
class AlignmentNeeds:
    """What matching takes; one model is matched after the other."""

    disk_bytes: int = 0  # of activations, and of aligned models that are written out to be loaded
    memory_bytes: int = 0  # while blocks or units are compared; a model that runs is not counted


def alignment_needs(
    entries: Sequence[ModelEntry],
    sources: MergeSources,
    n_tokens: Sequence[int],
    loaded: Collection[str],
) -> AlignmentNeeds:
    """Estimate what matching takes; nothing if no model is to be matched.

    Args:
        entries: the models of the recipe that are merged.
        sources: the same, opened; none is refused.
        n_tokens: the largest possible number of tokens of each model's texts; empty without texts.
        loaded: pinned sources that are loaded in their new places.
    """
    reference, activations, written, memory = sources.donor, [0], 0, [0]
    texts = n_tokens or [0] * len(entries)
    for entry, expert, n in zip(entries, sources.experts, texts, strict=True):
        if entry.align is None:
            continue
        pair = [units_of(one.checkpoint, one.config) for one in (reference, expert)]
        n_kept = _n_kept(n) if entry.align.needs_texts else 0
        widths = (units.width_at(site) for units in pair for site in kept_sites(entry.align, units))
        activations.append(WIDTH * n_kept * sum(widths))
        memory.append(_comparing_bytes(entry.align, pair, n_kept))
        if expert.pinned in loaded:
            resized = entry.align.depth or entry.align.width
            written += _weight_bytes(reference if resized else expert)
    return AlignmentNeeds(max(activations) + written, max(memory))


def _n_kept(n_tokens: int) -> int:
    from lewis_hub.calibration.units import MAX_TOKENS  # imports torch

    return min(MAX_TOKENS, n_tokens)


def kept_sites(asked: Align, units: Units) -> Iterable[str]:
    """Return the sites of a model whose activations are kept until it is matched."""
    return units.sites if asked.matches_units else units.streams[1:]


def _comparing_bytes(asked: Align, pair: Sequence[Units], n_kept: int) -> int:
    """The products over tokens of all blocks, or the correlations and two tensors of both."""
    from lewis_hub.merge.matching import HELD_BYTES

    ours, theirs = pair
    of_blocks = of_units = 0
    if asked.depth:
        of_blocks = WIDTH * n_kept**2 * sum(units.n_blocks for units in pair)
    if asked.matches_units:
        pairs = (size * theirs.sizes.get(group, 0) for group, size in ours.sizes.items())
        of_units = min(HELD_BYTES, WIDTH * sum(pairs)) + 2 * sum(map(_largest_bytes, pair))
    return TORCH_BYTES + max(of_blocks, of_units)


def _largest_bytes(units: Units) -> int:
    return WIDTH * max(map(prod, units.shapes.values()))


def _weight_bytes(source: OpenedSource) -> int:
    tensors = source.checkpoint.tensors.values()
    return sum(tensor.n_elements * WIDTHS[tensor.kept_dtype] for tensor in tensors)
