"""What a merge takes of disk and memory, from headers alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lewis_hub.calibration import meta_model
from lewis_hub.calibration.grams import HELD_BYTES, WIDEST, n_entries
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.checkpoint.writer import DTYPES
from lewis_hub.hub.fetch import weight_files
from lewis_hub.workflow.memory_budget import (
    Loading,
    Measurement,
    batch_bytes,
    blocks_bytes,
    states_bytes,
)
from lewis_hub.workflow.open import MergeSources

ENGINE_BYTES = 300_000_000  # interpreter and the engine's buffers, whatever the models' size
TORCH_BYTES = 900_000_000  # torch and transformers, loaded to calibrate and to evaluate
GRAM_COPIES = 3  # of a matrix, beside each expert's own and its shrunk one, while it is factored
DEFINED_COPIES = 4  # of a tensor in float64, beside its sources, while a definition is at work


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
                with_grams = model_bytes + min(HELD_BYTES, held_bytes)
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
        held_bytes = min(states_bytes(checkpoint, n_tokens), meta_model.HELD_BYTES)
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
