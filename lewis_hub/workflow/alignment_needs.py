"""The disk, the memory and the time that matching models takes, from their headers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from lewis_hub import display
from lewis_hub.merge.symmetries import MLP, RESIDUAL, Units, units_of
from lewis_hub.recipe.alignment import Align
from lewis_hub.recipe.schema import ModelEntry
from lewis_hub.workflow.open import MergeSources
from lewis_hub.workflow.resources import TORCH_BYTES, WIDTH, weight_bytes

# To match n units with n others takes up to n³ steps.
STEPS_PER_BYTE = 50_000  # of the weights; published models take 24,000 at most
FREE_STEPS = 2e11  # some 10 s
HEAD_STEPS = 7.5e6  # of each pair of heads, besides those for their units
PAIR_BYTES = 20  # of two units: their similarity, while it is computed, and what scipy takes
FREE_BYTES = 2 << 30  # of memory; models may take twice the bytes of their weights, too
USUAL = "Align models with blocks of the usual proportions, or remove `align`."


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
        n_kept = _n_kept(entry.align, n)
        widths = (units.width_at(site) for units in pair for site in kept_sites(entry.align, units))
        activations.append(WIDTH * n_kept * sum(widths))
        memory.append(TORCH_BYTES + _compared_bytes(entry.align, pair, n_kept))
        if expert.pinned in loaded:
            resized = entry.align.depth or entry.align.width
            written += weight_bytes((reference if resized else expert).checkpoint.tensors.values())
    return AlignmentNeeds(max(activations) + written, max(memory))


def excessive_costs(entries: Sequence[ModelEntry], sources: MergeSources) -> list[str]:
    """Return why models are not matched: small files can take hours, or far more memory."""
    problems, reference = [], sources.donor
    for entry, expert in zip(entries, sources.experts, strict=True):
        if entry.align is None:
            continue
        both = (reference, expert)
        pair = [units_of(one.checkpoint, one.config) for one in both]
        n_bytes = [weight_bytes(one.checkpoint.tensors.values()) for one in both]
        compared = _compared_bytes(entry.align, pair, _n_kept(entry.align))
        if compared > FREE_BYTES + 2 * sum(n_bytes):
            problems.append(
                f"{expert.name} takes {display.size(compared)} of memory to align with "
                f"{reference.name}: both together have {display.size(sum(n_bytes))} of weights. "
                f"{USUAL}"
            )
        if entry.align.matches_units:
            problems += [
                f"{one.name} takes very long to align: its {display.size(size)} of weights have "
                f"{units.n_blocks:,} blocks, up to {max(units.sizes.values()):,} units in a group, "
                f"and {units.n_kv_heads:,} groups of heads. {USUAL}"
                for one, units, size in zip(both, pair, n_bytes, strict=True)
                if _steps(units) > FREE_STEPS + STEPS_PER_BYTE * size
            ]
    return list(dict.fromkeys(problems))


def _steps(units: Units) -> float:
    """The steps of matching a model with one of its size, at most, in each sweep."""
    of_groups = sum(
        float(size) ** 3
        for group, size in units.sizes.items()
        if group == RESIDUAL or group.endswith(f".{MLP}")
    )
    in_group = units.n_heads // max(units.n_kv_heads, 1)
    of_pair = HEAD_STEPS + 2.0 * units.head_width**3 + float(in_group) ** 3
    return of_groups + units.n_blocks * float(units.n_kv_heads) ** 2 * of_pair


def _n_kept(asked: Align, n_tokens: int | None = None) -> int:
    """The tokens of texts that are kept, of `n_tokens`, or of any number."""
    from lewis_hub.calibration.units import MAX_TOKENS  # imports torch

    if not asked.needs_texts:
        return 0
    return MAX_TOKENS if n_tokens is None else min(MAX_TOKENS, n_tokens)


def kept_sites(asked: Align, units: Units) -> Iterable[str]:
    """Return the sites of a model whose activations are kept until it is matched."""
    return units.sites if asked.matches_units else units.streams[1:]


def _compared_bytes(asked: Align, pair: Sequence[Units], n_kept: int) -> int:
    """The products over tokens of all blocks, or what is compared of units, and two tensors."""
    from lewis_hub.merge.matching import HELD_BYTES

    ours, theirs = pair
    of_blocks = of_units = 0
    if asked.depth:
        of_blocks = WIDTH * n_kept**2 * sum(units.n_blocks for units in pair)
    if asked.matches_units:
        pairs = [size * theirs.sizes.get(group, 0) for group, size in ours.sizes.items()]
        held = min(HELD_BYTES, WIDTH * sum(pairs)) if asked.needs_texts else 0
        of_units = held + PAIR_BYTES * max(pairs) + 2 * sum(map(_largest_bytes, pair))
    return max(of_blocks, of_units)


def _largest_bytes(units: Units) -> int:
    return WIDTH * max(map(prod, units.shapes.values()))
