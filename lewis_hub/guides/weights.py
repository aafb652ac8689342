"""The weights of a model that is brought into memory part by part, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint, TensorReader, local_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = "Calibrate it whole, where there is memory for it: leave out `--max-memory`."

HELD_BYTES = 64 << 20  # of hidden states, of all texts together: what is more lies on the disk
STATES = "the hidden states of all calibration texts"
FEWER = "lower `samples` or `max_tokens` of the calibration"

Parts = Callable[[Sequence[Sequence[TensorHeader]]], "Generator[dict[str, Tensor], None, None]"]


@dataclass(frozen=True)
class Weights:
    """Where a model's weights come from.

    Attributes:
        folder: has its configuration.
        checkpoint: its headers, labelled as the user knows the source.
        parts: of lists of tensors, brings one list after the other: tensor -> values in float32.
            They are the caller's; the next list may be on its way meanwhile. Close it.
        remedy: what to do about a model that cannot be measured part by part.
        scratch: a folder for the hidden states of texts on their way, where they take more than
            `HELD_BYTES`; None: the system's for such.
    """

    folder: Path
    checkpoint: Checkpoint
    parts: Parts
    remedy: str = WHOLE
    scratch: Path | None = None


def in_folder(name: str, folder: Path, scratch: Path | None = None) -> Weights:
    """The weights of a complete local snapshot; `name` is the source as the user knows it.

    Raises:
        BrokenCheckpointError: a header is broken, or a file is missing.
    """

    def parts(
        lists: Sequence[Sequence[TensorHeader]],
    ) -> Generator[dict[str, Tensor], None, None]:
        with TensorReader(folder, name) as reader:
            for tensors in lists:
                yield {tensor.name: reader.tensor(tensor) for tensor in tensors}

    return Weights(folder, local_checkpoint(name, folder), parts, scratch=scratch)
