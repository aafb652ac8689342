"""How models are loaded to be measured, whole or block by block, and what measures them."""

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
from lewis_hub.guides.registry import WITHOUT_TEXTS, Guide
from lewis_hub.recipe.schema import Calibration
from lewis_hub.workflow.open import MergeSources

WIDTH = 4  # bytes of a float32
EVEN_SO = (
    "more than `--max-memory`: embeddings and all else before the blocks, and a block twice while "
    "it is put together"
)
ALLOW = "Allow as many, or leave the option out where there is memory for the whole model."
ROWS = 8  # of the widest matrix's inputs or outputs, that a token takes at most on its way


@dataclass(frozen=True)
class MomentSettings:
    """Which second moments a merge needs.

    Attributes:
        widest: how many inputs one matrix of second moments covers.
        are_solved: whether matrices are fitted by them; else entries are trimmed by their diagonal.
        in_sequence: whether matrices are fitted one after the other, on what the merged model
            hands them.
    """

    widest: int
    are_solved: bool
    in_sequence: bool


@dataclass(frozen=True)
class Measurement:
    """What is measured before a merge.

    Attributes:
        guide: that decides by what is measured; None: there is none.
        moments: None: the method needs none.
        calibrations: of each expert, in order; none where nothing is measured on texts.
    """

    guide: Guide | None
    moments: MomentSettings | None
    calibrations: tuple[Calibration, ...]

    @property
    def in_sequence(self) -> bool:
        """Whether matrices are fitted one after the other."""
        return self.moments is not None and self.moments.in_sequence

    @property
    def measures(self) -> frozenset[str]:
        """What the guide needs of each source."""
        return frozenset(self.guide.needs if self.guide else ())

    @property
    def n_tokens(self) -> dict[Calibration, int]:
        """Tokens of each calibration's texts, at most."""
        return {one: one.samples * one.max_tokens for one in self.calibrations}

    def waiting_bytes(
        self,
        n_tokens: Mapping[Calibration, int],
        checkpoints: Iterable[Checkpoint],
        loading: Loading,
    ) -> int:
        """Bytes of hidden states that wait on the disk, of the largest step that measures.

        Args:
            n_tokens: of the texts of each calibration.
            checkpoints: of all sources.
            loading: whether they are measured whole.
        """
        if not n_tokens or not (self.moments or self.measures & {*SUMMARIES}):
            return 0
        n_measured = sum(n_tokens.values())
        n_fitted = 2 * sum(n_tokens[c] for c in self.calibrations) if self.in_sequence else 0
        found = [
            states_bytes(one, max(n_fitted, n_measured))
            for one in checkpoints
            if self.in_sequence
            or loading.is_by_block(one)
            or loading.is_less_by_block(one, n_measured)
        ]
        most = max(found, default=0)
        return most if most > HELD_BYTES else 0


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


def _width(checkpoint: Checkpoint) -> int:
    """Of hidden states, by the embedding of tokens; 0 where none is called so."""
    widths = (
        tensor.shape[-1]
        for name, tensor in checkpoint.tensors.items()
        if names.is_token_embedding(name)
    )
    return max(widths, default=0)


def loading_problems(
    measurement: Measurement, sources: MergeSources, loading: Loading
) -> list[str]:
    """Refuse measures of a whole model, or blocks, that do not fit into the allowed memory."""
    guide = measurement.guide
    whole = measurement.measures - {*SUMMARIES, *WITHOUT_TEXTS}
    if guide is None or not whole:
        return _block_problems(measurement, sources, loading)
    return [
        f"guide `{guide.name}` runs whole models, and {label} takes {size:,} bytes in memory, "
        f"more than `--max-memory`. Allow more, or take a guide that measures block by block, such "
        "as `lewis`."
        for label, size in _too_large(sources, loading)
    ]


def _block_problems(measurement: Measurement, sources: MergeSources, loading: Loading) -> list[str]:
    """Models of which a part takes more than is allowed for a model."""
    limit = loading.max_memory_bytes
    if limit is None or not measurement.calibrations:
        return []
    if measurement.in_sequence:
        fitted = (sources.donor, *sources.experts)
        n_bytes = sum(blocks_bytes(one.checkpoint) for one in fitted)
        whose = "`inputs: merged` fits the merge beside all experts, block by block, which"
        return [_too_small(whose, n_bytes)] if n_bytes > limit else []
    return [
        _too_small(f"block by block {source.name}", blocks_bytes(source.checkpoint))
        for source in sources.distinct
        if not loading.has_room_for_blocks(source.checkpoint)
    ]


def _too_small(what: str, n_bytes: int) -> str:
    return f"{what} takes {n_bytes:,} bytes in memory, {EVEN_SO}. {ALLOW}"


def loading_notes(
    measurement: Measurement, sources: MergeSources, loading: Loading, *, scores: bool
) -> list[str]:
    """Say which models are measured block by block, and that scoring loads whole models."""
    too_large = list(_too_large(sources, loading))
    if not too_large:
        return []
    notes = [
        f"{label} takes {size:,} bytes in memory, more than `--max-memory`: it is measured block "
        "by block."
        for label, size in too_large
        if measurement.calibrations
    ]
    if scores:
        text = "Scoring loads whole models, whatever `--max-memory` says: leave it out by "
        notes.append(text + "`--no-eval`, and score the merge where it fits.")
    return notes


def _too_large(sources: MergeSources, loading: Loading) -> Iterator[tuple[str, int]]:
    for source in sources.distinct:
        if loading.is_by_block(source.checkpoint):
            yield source.name, loading.model_bytes(source.checkpoint)
