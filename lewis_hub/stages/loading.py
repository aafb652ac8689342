"""How models are brought into memory to be measured: whole, or block by block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import WIDTHS
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.guides import registry
from lewis_hub.guides.calibrate import SUMMARIES
from lewis_hub.guides.registry import WITHOUT_TEXTS
from lewis_hub.recipe import Recipe
from lewis_hub.recipe_calibration import Calibration
from lewis_hub.stages.sources import Inputs, measures_on_texts

WIDTH = 4  # bytes of a float32


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

    def is_less_by_block(self, checkpoint: Checkpoint, n_tokens: int) -> bool:
        """Whether a model that may be loaded whole takes less memory block by block.

        Not asked but on a CPU: to bring a block into another memory goes through this one, in
        float32, which takes longer than to load the model there.

        Args:
            checkpoint: of the model.
            n_tokens: that run through it, of all texts.
        """
        blocks = blocks_bytes(checkpoint) + WIDTH * _width(checkpoint) * n_tokens
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


def texts_bytes(drawn: Iterable[Calibration], checkpoint: Checkpoint) -> int:
    """Bytes at most of the hidden states of all texts at once that are drawn, of the base's."""
    n_tokens = sum(one.samples * one.max_tokens for one in drawn)
    return WIDTH * _width(checkpoint) * n_tokens


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
    """Measures that look at a whole model, asked of one that does not fit."""
    guide = registry.find(recipe.guide.name) if recipe.guide else None
    whole = [m for m in guide.needs if m not in {*SUMMARIES, *WITHOUT_TEXTS}] if guide else []
    if guide is None or not whole:
        return []
    return [
        f"guide `{guide.name}` runs whole models, and {label} takes {size:,} bytes in memory, "
        f"more than `--max-memory`. Allow more, or take a guide that measures block by block, such "
        "as `lewis`."
        for label, size in _too_large(inputs, checkpoints, loading)
    ]


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
