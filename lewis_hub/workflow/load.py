"""Load a source to measure or score it, as a whole or block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.calibration.subject import CalibrationSet, Subject, Weights, in_folder
from lewis_hub.checkpoint.header import TensorHeader, torch_dtypes
from lewis_hub.checkpoint.ranges import Locations, SourceFiles, SourceTensor
from lewis_hub.checkpoint.reader import Checkpoint, Reader, read_tensor
from lewis_hub.merge.engine import open_source
from lewis_hub.merge.planning import MergeSettings, MergeSource, make_plan
from lewis_hub.merge.runners import Backend
from lewis_hub.merge.sidecars import write_sidecars
from lewis_hub.progress import Progress
from lewis_hub.workflow.fetch import FetchedSources
from lewis_hub.workflow.merge import new_dtype, write_weights
from lewis_hub.workflow.open import OpenedSource
from lewis_hub.workflow.resources import Loading

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = (
    "So --stream cannot measure it: merge without --stream on a machine with enough room. For a "
    "guide, `lewis-hub importance` is enough there: this run uses the folder importance/ that it "
    "writes beside the recipe."
)


@dataclass(frozen=True)
class ModelLoader:
    """Loads the sources of a merge.

    Attributes:
        scratch: folder for temporary files.
        means: runner and device that write out weights.
        max_shard_bytes: limit for a file, and for bytes that are fetched ahead.
    """

    files: FetchedSources
    scratch: Path
    loading: Loading
    means: Backend
    max_shard_bytes: int
    progress: Progress

    @property
    def locations(self) -> Locations:
        """Pinned source -> where its weights are read."""
        return self.files.locations

    def subject(self, source: OpenedSource, *sets: CalibrationSet) -> Subject:
        """Return a source and its texts, which are in its own token ids."""
        folder = self.files.folders[source.pinned]
        return Subject(source.pinned, source.digest, source.role, folder, sets)

    def materialize_checkpoint(self, source: OpenedSource) -> Path:
        """Return a folder from which transformers can load a source.

        It is the source's own folder if its files hold the weights as they are merged. An adapter
        on its base is written to `scratch` in the dtypes of the base, and a quantised model in
        bfloat16: transformers runs 8-bit floats only on a GPU, and measures need plain weights.
        The folder of an earlier call is used again.

        Raises:
            CheckpointError: a source is broken, or holds NaN or infinity.
            OutputError: there is not enough room.
        """
        if not source.checkpoint.is_computed:
            return self.files.folders[source.pinned]
        expert = MergeSource(source.checkpoint, source.digest)
        alone = make_plan(MergeSettings("linear", None, (expert,)), self.max_shard_bytes)
        output = self._write_configuration(source)
        as_what = "on its base" if source.source.is_adapter else "in bfloat16"
        title = f"Writing out {source.name} {as_what}"
        means = replace(self.means, is_read_next=True)
        write_weights(alone, self.locations, output, means, self.progress, title)
        return output

    def load_for_calibration(self, subject: Subject, source: OpenedSource) -> Subject:
        """Return the same subject with weights that can be loaded.

        They are read block by block if the model is too large for the memory, if no whole model
        may be on this disk, or if this takes less memory.

        Raises:
            CheckpointError: a source is broken.
            OutputError: there is not enough room.
        """
        if not self.files.keeps_models:
            return replace(subject, weights=self._weights_by_ranges(source))
        placed = replace(subject, folder=self.materialize_checkpoint(source))
        return choose_loading(placed, source.checkpoint, self.loading, self.scratch)

    def _write_configuration(self, source: OpenedSource) -> Path:
        """Return a folder in `scratch` with the configuration of a source."""
        name = hashlib.sha256(f"{source.pinned} {source.digest}".encode()).hexdigest()[:16]
        output = self.scratch / "materialized" / name
        output.mkdir(parents=True, exist_ok=True)
        beside = self.files.folders[source.checkpoint.base or source.pinned]
        write_sidecars(beside, output, new_dtype(source.checkpoint), code=False)
        return output

    def _weights_by_ranges(self, source: OpenedSource) -> Weights:
        """Read the weights of a block while the block before it is measured."""
        checkpoint = source.checkpoint
        folder = self.files.folders[source.pinned]
        if checkpoint.is_computed:
            folder = self._write_configuration(source)
        name = hashlib.sha256(source.pinned.encode()).hexdigest()[:16]
        ranges = self.scratch / f"ranges-{name}"  # several sources may be read at once

        def parts(
            lists: Sequence[Sequence[TensorHeader]],
        ) -> Generator[dict[str, Tensor], None, None]:
            steps = [
                [SourceTensor(source.pinned, tensor, checkpoint.base) for tensor in tensors]
                for tensors in lists
            ]
            with (
                SourceFiles(self.locations, steps, ranges, self.max_shard_bytes) as files,
                open_source(source.pinned, checkpoint.base, files.reader) as reader,
            ):
                for tensors in lists:
                    found = {tensor.name: _as_written(reader, tensor) for tensor in tensors}
                    files.step_done()
                    yield found

        return Weights(folder, checkpoint, parts, REMEDY, self.scratch)


def _as_written(reader: Reader, tensor: TensorHeader) -> Tensor:
    """Read a tensor in float32; a computed tensor is rounded as if it came from a file."""
    found = read_tensor(reader, tensor)
    if not tensor.is_computed:
        return found
    return found.to(torch_dtypes()[tensor.kept_dtype]).float()


def choose_loading(
    subject: Subject, checkpoint: Checkpoint, loading: Loading, scratch: Path
) -> Subject:
    """Return a subject of a complete folder, block by block if this is needed or saves memory."""
    must_be = loading.is_by_block(checkpoint)
    by_block = must_be or loading.is_less_by_block(checkpoint, subject.n_tokens)
    weights = in_folder(subject.source, subject.folder, scratch) if by_block else None
    return replace(subject, weights=weights, may_be_whole=not must_be)
