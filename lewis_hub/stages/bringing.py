"""Bring: how the weights of a source come into memory to be measured."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.dtypes import torch_dtypes
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint, Reader
from lewis_hub.checkpoint.window import Window, elsewhere
from lewis_hub.guides.weights import Weights, in_folder
from lewis_hub.hub.source import Source
from lewis_hub.merge.engine import open_source
from lewis_hub.merge.needs import stored
from lewis_hub.stages.loading import Loading
from lewis_hub.stages.writing_out import configured, loadable

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.guides.calibrate import Subject
    from lewis_hub.stages.execution import Folders, Step

REMEDY = (
    "So --stream cannot measure it: merge without --stream where it fits. For a guide `lewis-hub "
    "importance` is enough there: the folder importance/ that it leaves beside the recipe is used."
)


def brought(step: Step, subject: Subject, folders: Folders, scratch: Path) -> Subject:
    """The same subject, in a folder that can be loaded, or block by block.

    Block by block goes what is too large to be in memory, and in a stream everything; and where it
    can be, what takes less memory so.

    Args:
        step: of a merge that was examined.
        subject: one of its sources.
        folders: of all sources; in a stream they hold small files alone.
        scratch: for what measuring needs and nobody keeps.

    Raises:
        CheckpointError: a source is broken.
        OutputError: there is not enough room.
    """
    source = next(one for one in step.inputs.models if one.pinned == subject.source)
    if step.places:
        return replace(subject, weights=_on_the_way(step, source, folders, scratch))
    folder = loadable(step, source, folders, scratch)
    placed = replace(subject, folder=folder)
    checkpoint = step.examined.checkpoints[source.pinned]
    return in_memory(placed, checkpoint, step.execution.loading, scratch)


def in_memory(subject: Subject, checkpoint: Checkpoint, loading: Loading, scratch: Path) -> Subject:
    """The same subject, of a complete folder, block by block where that must be or is better."""
    must_be = loading.is_by_block(checkpoint)
    by_block = must_be or loading.is_less_by_block(checkpoint, subject.n_tokens)
    weights = in_folder(subject.source, subject.folder, scratch) if by_block else None
    return replace(subject, weights=weights, may_be_whole=not must_be)


def _on_the_way(step: Step, source: Source, folders: Folders, scratch: Path) -> Weights:
    """The weights of a source by ranges: those of a block while the one before it is measured."""
    checkpoint = step.examined.checkpoints[source.pinned]
    folder = folders[source.pinned]
    if checkpoint.is_computed:
        folder = configured(step, source, folders, scratch)
    places, base = step.places, checkpoint.base
    ranges = scratch / f"ranges-{step.inputs.models.index(source)}"  # several may be on their way

    def parts(
        lists: Sequence[Sequence[TensorHeader]],
    ) -> Generator[dict[str, Tensor], None, None]:
        remote = elsewhere(places)
        needs = [
            [need for tensor in tensors for need in stored(source.pinned, base, tensor)]
            for tensors in lists
        ]
        steps = [[need for need in one if need.source in remote] for one in needs]
        with (
            Window(places, steps, ranges, step.execution.max_shard_bytes) as window,
            open_source(source.pinned, base, window.reader) as reader,
        ):
            for tensors in lists:
                yield _part(tensors, reader, window)

    return Weights(folder, checkpoint, parts, REMEDY, scratch)


def _part(tensors: Sequence[TensorHeader], reader: Reader, window: Window) -> dict[str, Tensor]:
    found = {tensor.name: _as_written(reader, tensor) for tensor in tensors}
    window.step_done()
    return found


def _as_written(reader: Reader, tensor: TensorHeader) -> Tensor:
    """A tensor in float32; one that is computed is rounded as it is where it is written out."""
    found = reader.tensor(tensor)
    if not tensor.is_computed:
        return found
    return found.to(torch_dtypes()[tensor.kept_dtype]).float()
