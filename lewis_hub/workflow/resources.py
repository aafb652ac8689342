"""What a merge takes of memory and disk, and how models are loaded to be measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from lewis_hub.calibration.grams import HELD_BYTES as GRAM_BYTES
from lewis_hub.calibration.grams import WIDEST, n_entries
from lewis_hub.calibration.measure import SUMMARIES
from lewis_hub.calibration.meta_model import HELD_BYTES
from lewis_hub.calibration.texts import TOGETHER
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.checkpoint.writer import DTYPES
from lewis_hub.guides.registry import WITHOUT_TEXTS, Guide
from lewis_hub.hub.fetch import weight_files
from lewis_hub.recipe.schema import Calibration
from lewis_hub.workflow.open import MergeSources

ENGINE_BYTES = 300_000_000  # interpreter and the engine's buffers, whatever the models' size
TORCH_BYTES = 900_000_000  # torch and transformers, loaded to calibrate and to evaluate
GRAM_COPIES = 3  # of a matrix, beside each expert's own and its shrunk one, while it is factored
DEFINED_COPIES = 4  # of a tensor in float64, beside its sources, while a definition is at work
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


@dataclass(frozen=True)
class Needs:
    """Bytes.

    Attributes:
        disk_bytes: beside the download and the hidden states.
        states_bytes: of hidden states on the disk, at most, while models are measured.
        memory_bytes: at most, of the largest step.
    """

    output_bytes: int
    disk_bytes: int
    states_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Workload:
    """What decides the resources that a merge takes.

    Attributes:
        sources: opened.
        output: what is made, in the dtypes of its sources.
        dtype: of the output; None keeps the dtype of each tensor.
        has_kernel: whether a compiled kernel computes every tensor without second moments.
        measurement: what is measured before the merge.
        loading: whether models are measured whole.
        scores: whether models are scored.
        n_twins: how many times more the merge is made, to be scored beside it.
        uniform_twin: whether one of them is the same merge with uniform densities.
        loaded: sources that are loaded as whole models, to be measured or scored.
    """

    sources: MergeSources
    output: Checkpoint
    dtype: str | None
    has_kernel: bool
    measurement: Measurement
    loading: Loading
    scores: bool
    n_twins: int
    uniform_twin: bool
    loaded: Collection[str]

    @property
    def _checkpoints(self) -> tuple[Checkpoint, ...]:
        return tuple(one.checkpoint for one in self.sources.distinct)

    @property
    def _pickles(self) -> dict[str, int]:
        pickled = [s.source for s in self.sources.distinct if s.source.is_pickled]
        return {source.pinned: source.size_bytes(weight_files(source)) for source in pickled}

    def needs(self) -> Needs:
        """Estimate what the merge takes."""
        pickles = self._pickles
        largest_pickle_bytes = max(pickles.values(), default=0)
        output_bytes = _output_bytes(self.output, self.dtype)
        output_bytes = pickles.get(self.sources.donor.pinned, output_bytes)
        written = [one.checkpoint for one in self.sources.distinct if one.pinned in self.loaded]
        written_bytes = sum(_output_bytes(one, None) for one in written if one.is_computed)
        disk_bytes = output_bytes * (1 + self.n_twins) + written_bytes + self.statistics_bytes()
        measured = self.measurement
        return Needs(
            output_bytes,
            disk_bytes + sum(pickles.values()),
            measured.waiting_bytes(measured.n_tokens, self._checkpoints, self.loading),
            max(
                self._merging_bytes(),
                self._scoring_bytes(largest_pickle_bytes),
                self._measuring_bytes(largest_pickle_bytes),
            ),
        )

    def statistics_bytes(self) -> int:
        """Second moments of all experts on disk; or the matrices that are fitted by them."""
        if not self.measurement.in_sequence:
            return len(self.sources.experts) * self._grams_bytes(self.output)
        asked = DTYPES[self.dtype] if self.dtype else None
        fitted_bytes = sum(
            one.n_elements * WIDTHS[asked or one.kept_dtype] for one in _matrices(self.output)
        )
        return fitted_bytes * (1 + self.uniform_twin)

    def _grams_bytes(self, checkpoint: Checkpoint) -> int:
        """Second moments of one expert, at most: modules that share inputs share them."""
        moments = self.measurement.moments
        if moments is None:
            return 0
        shapes = [tensor.shape for tensor in _matrices(checkpoint)]
        return sum(4 * n_entries(shape[1], moments.widest) for shape in shapes)

    def _merging_bytes(self) -> int:
        """Kernels hold pieces; a definition holds the largest tensor that it computes, in torch.

        Of an adapter the two narrow matrices of each module are held.
        """
        tensors = [t for one in self._checkpoints for t in one.tensors.values()]
        updates = [t.adapted.update for t in tensors if t.adapted and t.adapted.update]
        narrow_bytes = 4 * sum(update.a.n_elements + update.b.n_elements for update in updates)
        moments = self.measurement.moments
        if self.has_kernel and moments is None:
            return ENGINE_BYTES + narrow_bytes
        defined = _matrices(self.output) if self.has_kernel else [*self.output.tensors.values()]
        largest = max((tensor.n_elements for tensor in defined), default=0)
        n_sources = len(self._checkpoints)
        held_bytes = (4 * n_sources + 8 * DEFINED_COPIES) * largest
        if moments and moments.are_solved:
            held_bytes += _solving_bytes(self.output, n_sources)
        return TORCH_BYTES + held_bytes + narrow_bytes

    def _scoring_bytes(self, largest_pickle_bytes: int) -> int:
        """Evaluation holds one model, in float32 on a CPU.

        A pickle is taken to hold numbers of two bytes, the smallest that are merged.
        """
        if not self.scores:
            return 0
        sizes = [
            sum(t.n_elements for t in one.tensors.values())
            for one in (self.output, *self._checkpoints)
        ]
        return TORCH_BYTES + 4 * max(*sizes, largest_pickle_bytes // 2)

    def _measuring_bytes(self, largest_pickle_bytes: int) -> int:
        """Calibration holds one model, or a part; two where they are compared.

        Statistics are held beside the model that they are gathered of.
        """
        if not self.measurement.calibrations:
            return 0
        if self.measurement.in_sequence:
            return self._fitting_bytes()
        n_tokens = sum(self.measurement.n_tokens.values())
        n_models = 2 if "output_shift" in self.measurement.measures else 1
        found = [4 * (largest_pickle_bytes // 2)]
        for one in (self.output, *self._checkpoints):
            held_bytes = 2 * self._grams_bytes(one)
            if self.loading.is_by_block(one):
                n_blocks = len({names.block(name) for name in one.tensors} - {None})
                held_bytes //= max(n_blocks, 1)
                found.append(blocks_bytes(one) + held_bytes + self._texts_bytes(one, n_tokens))
            else:
                model_bytes = 4 * sum(t.n_elements for t in one.tensors.values())
                with_grams = model_bytes + min(GRAM_BYTES, held_bytes)
                found.append(max(n_models * model_bytes, with_grams))
        return TORCH_BYTES + max(found)

    def _fitting_bytes(self) -> int:
        """Blocks of all models at once, one batch of texts, moments of two kinds, and residuals."""
        checkpoints = (self.output, *self._checkpoints)
        drawn = self.measurement.n_tokens
        n_tokens = 2 * sum(drawn[one] for one in self.measurement.calibrations)
        texts = max(self._texts_bytes(one, n_tokens) for one in checkpoints)
        largest = max((tensor.n_elements for tensor in _matrices(self.output)), default=0)
        moments = 2 * _solving_bytes(self.output, len(checkpoints))
        blocks = sum(map(blocks_bytes, checkpoints))
        return TORCH_BYTES + blocks + texts + moments + 4 * len(checkpoints) * largest

    def _texts_bytes(self, checkpoint: Checkpoint, n_tokens: int) -> int:
        """One batch, and the hidden states of all texts as far as they are not on the disk."""
        held_bytes = min(states_bytes(checkpoint, n_tokens), HELD_BYTES)
        return batch_bytes(self.measurement.calibrations, checkpoint) + held_bytes


def _output_bytes(checkpoint: Checkpoint, dtype: str | None) -> int:
    asked = DTYPES[dtype] if dtype else None
    tensors = checkpoint.tensors.values()
    return sum(t.n_elements * WIDTHS[asked or t.kept_dtype] for t in tensors)


def _matrices(output: Checkpoint) -> list[TensorHeader]:
    """Return the matrices of the blocks."""
    return [
        tensor
        for name, tensor in output.tensors.items()
        if len(tensor.shape) == 2 and names.block(name) is not None
    ]


def _solving_bytes(output: Checkpoint, n_sources: int) -> int:
    """Moments of the widest matrix, as gathered and shrunk, while one is factored."""
    widths = [tensor.shape[-1] for tensor in output.tensors.values() if tensor.shape]
    widest = min(max(widths, default=0), WIDEST)
    return 4 * (2 * n_sources + GRAM_COPIES) * widest**2
