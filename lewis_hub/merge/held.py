"""A plan becomes tensors in memory, for a merge that is tried and let go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lewis_hub.checkpoint.dtypes import torch_dtypes
from lewis_hub.checkpoint.layout import ShardLayout
from lewis_hub.merge.engine import RANGES, Places, fill, window_of
from lewis_hub.merge.plan import MergePlan
from lewis_hub.merge.runners import Means

if TYPE_CHECKING:
    from torch import Tensor


class HeldShard:
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


def held_tensors(plan: MergePlan, places: Places, scratch: Path, means: Means) -> dict[str, Tensor]:
    """Make all tensors of a plan, with the values that its files would have.

    Args:
        plan: what goes into which file.
        places: of all sources, and of statistics.
        scratch: folder for what is fetched of sources that are elsewhere.
        means: by which it is made, on this machine.

    Raises:
        NonFiniteError: a source or the result holds NaN or infinity.
        BrokenCheckpointError: a source's file is missing or ends too early.
        DeviceError: a tensor does not fit on the device.
    """
    made: dict[str, Tensor] = {}
    with window_of(plan.shards, places, scratch / RANGES) as window:
        for shard in plan.shards:
            held = HeldShard(shard.layout)
            fill(shard, window, held, means, lambda _: None)
            made |= held.tensors()
    return made
