"""How models are brought into memory to be measured: whole, or block by block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lewis_hub.calibration.measure import SUMMARIES
from lewis_hub.calibration.meta_model import HELD_BYTES
from lewis_hub.calibration.texts import TOGETHER
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import WIDTHS
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.guides import registry
from lewis_hub.guides.registry import WITHOUT_TEXTS
from lewis_hub.recipe.rules import fits_in_sequence
from lewis_hub.recipe.schema import Calibration, Recipe
from lewis_hub.workflow.resolve import Inputs, calibrations, measures_on_texts, needs_grams

WIDTH = 4  # bytes of a float32
EVEN_SO = (
    "more than `--max-memory`: embeddings and all else before the blocks, and a block twice while "
    "it is put together"
)
ALLOW = "Allow as many, or leave the option out where there is memory for the whole model."
ROWS = 8  # of the widest matrix's inputs or outputs, that a token takes at most on its way


@dataclass(frozen=True)
class Loading:
    """Where models are measured, and how much of one may be in memory there.

    Attributes:
        device: as torch names it.
        max_memory_bytes: a model that takes more is never loaded whole; None: any may be.
    """

    device: str = "cpu"
    max_memory_bytes: int | None = None

    def model_bytes(self, checkpoint: Checkpoint) -> int:
        """Bytes of a model as it is loaded: in float32 on a CPU, elsewhere in its own dtypes."""
        return sum(
            tensor.n_elements * (WIDTH if self.device == "cpu" else WIDTHS[tensor.kept_dtype])
            for tensor in checkpoint.tensors.values()
        )

    def is_by_block(self, checkpoint: Checkpoint) -> bool:
        """Whether a model is too large to be in memory as a whole."""
        limit = self.max_memory_bytes
        return limit is not None and self.model_bytes(checkpoint) > limit

    def has_room_for_blocks(self, checkpoint: Checkpoint) -> bool:
        """Whether a model may be in memory as a whole, or at least as it is block by block."""
        limit = self.max_memory_bytes
        return not self.is_by_block(checkpoint) or blocks_bytes(checkpoint) <= (limit or 0)

    def is_less_by_block(self, checkpoint: Checkpoint, n_tokens: int) -> bool:
        """Whether a model that may be loaded whole takes less memory block by block.

        Not asked but on a CPU: to bring a block into another memory goes through this one, in
        float32, which takes longer than to load the model there.

        Args:
            checkpoint: of the model.
            n_tokens: that run through it, of all texts.
        """
        blocks = blocks_bytes(checkpoint) + min(states_bytes(checkpoint, n_tokens), HELD_BYTES)
        return self.device == "cpu" and blocks < self.model_bytes(checkpoint)


def blocks_bytes(checkpoint: Checkpoint) -> int:
    """Bytes in float32 of what is in memory at most, block by block, but for the texts.

    Embeddings and all else outside the blocks but the head, and the largest block twice.
    """
    blocks: defaultdict[tuple[str | None, int], int] = defaultdict(int)
    outside = 0
    for name, tensor in checkpoint.tensors.items():
        number = names.block(name)
        if number is not None:
            blocks[names.stack(name), number] += WIDTH * tensor.n_elements
        elif not names.is_head(name):
            outside += WIDTH * tensor.n_elements
    return outside + 2 * max(blocks.values(), default=0)


def states_bytes(checkpoint: Checkpoint, n_tokens: int) -> int:
    """Bytes in float32 of the hidden states of texts, block by block: on the disk if they are many.

    As many as `HELD_BYTES` are in memory.
    """
    return WIDTH * _width(checkpoint) * n_tokens


def batch_bytes(drawn: Iterable[Calibration], checkpoint: Checkpoint) -> int:
    """Bytes in float32, at most, of what one batch of texts takes on its way through a block."""
    n_tokens = max(
        (min(one.samples * one.max_tokens, max(one.max_tokens, TOGETHER)) for one in drawn),
        default=0,
    )
    shapes = (t.shape for name, t in checkpoint.tensors.items() if names.block(name) is not None)
    return WIDTH * ROWS * n_tokens * max((max(s[-2:]) for s in shapes if len(s) > 1), default=0)


def on_disk_bytes(
    recipe: Recipe,
    n_tokens: Mapping[Calibration, int],
    checkpoints: Iterable[Checkpoint],
    loading: Loading,
) -> int:
    """Bytes of hidden states that wait on the disk, of the largest step that measures.

    Args:
        recipe: what is asked.
        n_tokens: of the texts of each calibration.
        checkpoints: of all sources.
        loading: whether they are measured whole.
    """
    guide = registry.find(recipe.guide.name) if recipe.guide else None
    if not n_tokens or not (needs_grams(recipe) or (guide and {*guide.needs} & {*SUMMARIES})):
        return 0
    in_sequence = fits_in_sequence(recipe)
    n_measured = sum(n_tokens.values())
    n_fitted = 2 * sum(n_tokens[one] for one in calibrations(recipe)) if in_sequence else 0
    found = [
        states_bytes(one, max(n_fitted, n_measured))
        for one in checkpoints
        if in_sequence or loading.is_by_block(one) or loading.is_less_by_block(one, n_measured)
    ]
    most = max(found, default=0)
    return most if most > HELD_BYTES else 0


def most_tokens(recipe: Recipe) -> dict[Calibration, int]:
    """Of the texts of each calibration, where each is as long as it may be."""
    return {one: one.samples * one.max_tokens for one in calibrations(recipe)}


def _width(checkpoint: Checkpoint) -> int:
    """Of hidden states, by the embedding of tokens; 0 where none is called so."""
    widths = (
        tensor.shape[-1]
        for name, tensor in checkpoint.tensors.items()
        if names.is_token_embedding(name)
    )
    return max(widths, default=0)


def loading_problems(
    recipe: Recipe, inputs: Inputs, checkpoints: Mapping[str, Checkpoint], loading: Loading
) -> list[str]:
    """Measures that look at a whole model, asked of one that does not fit; or not even a part."""
    guide = registry.find(recipe.guide.name) if recipe.guide else None
    whole = [m for m in guide.needs if m not in {*SUMMARIES, *WITHOUT_TEXTS}] if guide else []
    if guide is None or not whole:
        return _block_problems(recipe, inputs, checkpoints, loading)
    return [
        f"guide `{guide.name}` runs whole models, and {label} takes {size:,} bytes in memory, "
        f"more than `--max-memory`. Allow more, or take a guide that measures block by block, such "
        "as `lewis`."
        for label, size in _too_large(inputs, checkpoints, loading)
    ]


def _block_problems(
    recipe: Recipe, inputs: Inputs, checkpoints: Mapping[str, Checkpoint], loading: Loading
) -> list[str]:
    """Models of which a part takes more than is allowed for a model."""
    limit = loading.max_memory_bytes
    if limit is None or not measures_on_texts(recipe):
        return []
    if fits_in_sequence(recipe):
        experts = [checkpoints[one.pinned] for one in inputs.experts]
        merged = checkpoints[inputs.donor.pinned]
        n_bytes = sum(map(blocks_bytes, (merged, *experts)))
        whose = "`inputs: merged` fits the merge beside all experts, block by block, which"
        return [_too_small(whose, n_bytes)] if n_bytes > limit else []
    return [
        _too_small(f"block by block {source.name}", blocks_bytes(checkpoints[source.pinned]))
        for source in dict.fromkeys(inputs.models)
        if not loading.has_room_for_blocks(checkpoints[source.pinned])
    ]


def _too_small(what: str, n_bytes: int) -> str:
    return f"{what} takes {n_bytes:,} bytes in memory, {EVEN_SO}. {ALLOW}"


def loading_notes(
    recipe: Recipe, inputs: Inputs, checkpoints: Mapping[str, Checkpoint], loading: Loading
) -> list[str]:
    """Which models are measured block by block, and that scoring does not go so."""
    too_large = list(_too_large(inputs, checkpoints, loading))
    if not too_large:
        return []
    notes = [
        f"{label} takes {size:,} bytes in memory, more than `--max-memory`: it is measured block "
        "by block."
        for label, size in too_large
        if measures_on_texts(recipe)
    ]
    if recipe.evaluate:
        text = "Scoring loads whole models, whatever `--max-memory` says: leave it out by "
        notes.append(text + "`--no-eval`, and score the merge where it fits.")
    return notes


def _too_large(
    inputs: Inputs, checkpoints: Mapping[str, Checkpoint], loading: Loading
) -> Iterator[tuple[str, int]]:
    for source in dict.fromkeys(inputs.models):
        checkpoint = checkpoints[source.pinned]
        if loading.is_by_block(checkpoint):
            yield source.name, loading.model_bytes(checkpoint)
