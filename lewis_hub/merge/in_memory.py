"""A plan becomes tensors in memory, for a merge that is tried and let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lewis_hub.checkpoint.header import torch_dtypes
from lewis_hub.checkpoint.ranges import Locations
from lewis_hub.checkpoint.reader import Reader, read_tensor
from lewis_hub.checkpoint.writer import ShardLayout
from lewis_hub.merge.assemble import assembling
from lewis_hub.merge.engine import RANGES, fill, open_files, open_source
from lewis_hub.merge.nan import NanReplacingReader, replace_nan
from lewis_hub.merge.plan import MergePlan, ShardPlan, TensorPlan
from lewis_hub.merge.reference import Moments, merge_by_definition
from lewis_hub.merge.runners import Backend, Inline

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.merge.chunks import Buffers


class InMemoryShard:
    """The bytes that a file would have, in memory. Threads may share it, as they may a file."""

    def __init__(self, layout: ShardLayout) -> None:
        import torch

        self._layout = layout
        self._held = torch.empty(layout.n_bytes, dtype=torch.uint8)
        self._bytes = self._held.numpy()

    def write(self, position: int, content: memoryview) -> None:
        """Put bytes at an offset from the beginning."""
        self._bytes[position : position + content.nbytes] = np.frombuffer(content, np.uint8)

    def complete(self, start: int, stop: int) -> None:
        """Nothing waits for it."""

    def tensors(self) -> dict[str, Tensor]:
        """By name; they share its memory."""
        pairs = zip(self._layout.tensors, self._layout.starts, strict=True)
        return {
            tensor.name: self._held[start : start + tensor.n_bytes]
            .view(torch_dtypes()[tensor.dtype])
            .reshape(tensor.shape)
            for tensor, start in pairs
        }


def tensors_in_memory(
    plan: MergePlan, locations: Locations, scratch: Path, backend: Backend
) -> dict[str, Tensor]:
    """Make all tensors of a plan, with the values that its files would have.

    Args:
        plan: what goes into which file.
        locations: of all sources, and of statistics.
        scratch: folder for the bytes that are fetched of remote sources.
        backend: by which it is made, on this machine.

    Raises:
        NonFiniteError: a source or the result holds NaN or infinity.
        BrokenCheckpointError: a source's file is missing or ends too early.
        DeviceError: a tensor does not fit on the device.
    """
    made: dict[str, Tensor] = {}
    with open_files(plan.shards, locations, scratch / RANGES) as files:
        for shard in plan.shards:
            held = InMemoryShard(shard.layout)
            fill(shard, files, held, backend, lambda _: None)
            made |= held.tensors()
    return made


Single = Callable[[str, Moments | None], "Tensor"]


@contextmanager
def per_tensor(
    plan: ShardPlan, reader: Callable[[str], Reader], mended: set[tuple[str, str]]
) -> Iterator[Single]:
    """Make tensors of a shard one by one, in any order; the sources are open meanwhile.

    Args:
        plan: of the shard.
        reader: opens the files of a label.
        mended: takes the label of each source that holds NaN or infinity, and the tensor; of those
            that are made with moments.

    Yields:
        What makes a tensor by its name, in the output's dtype: with the moments of its inputs where
        they are, or without, on the CPU.
    """
    from lewis_hub.merge.chunks import Buffers  # imports numpy and llvmlite

    tensors = {tensor.output.name: tensor for tensor in plan.tensors}
    with ExitStack() as opened:
        pairs = zip(plan.labels, plan.bases, strict=True)
        own = [opened.enter_context(open_source(label, base, reader)) for label, base in pairs]
        readers = assembling(plan, own)
        buffers = Buffers(max(len(tensor.inputs) for tensor in plan.tensors))

        def make(name: str, moments: Moments | None) -> Tensor:
            tensor = tensors[name]
            if moments is None or tensor.is_copied:
                return _alone(plan, readers, buffers, tensor)
            found = tuple(readers[number] for number in tensor.sources)
            if plan.allow_nan:
                found = replace_nan(tensor, found)
            sources = [read_tensor(r, h) for r, h in zip(found, tensor.inputs, strict=True)]
            mended.update(
                (plan.labels[number], name)
                for number, one in zip(tensor.sources, found, strict=True)
                if isinstance(one, NanReplacingReader) and one.has_replaced
            )
            known = next(gram for gram in moments.grams if gram is not None)
            there = [source.to(known.device) for source in sources]
            return merge_by_definition(plan, tensor, there, moments)

        yield make


def _alone(
    plan: ShardPlan, readers: Sequence[Reader], buffers: Buffers, tensor: TensorPlan
) -> Tensor:
    """Make a tensor as a shard of its own, as the engine does."""
    from lewis_hub.merge.chunks import ShardContext, TensorJob
    from lewis_hub.merge.tensor import make_tensor

    layout = ShardLayout(tensor.output.name, (tensor.output,))
    held = InMemoryShard(layout)
    make_tensor(
        TensorJob(ShardContext(plan, readers, held, buffers), tensor, *layout.starts), Inline()
    )
    return held.tensors()[tensor.output.name]
