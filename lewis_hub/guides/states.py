"""Hidden states of many texts between two blocks: a few are held in memory, more on the disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import TYPE_CHECKING

import torch

from lewis_hub.errors import OutputError
from lewis_hub.files import require_room
from lewis_hub.guides.weights import FEWER, HELD_BYTES, STATES

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies; `room_bytes` may be more than it takes."""

    start: int
    room_bytes: int
    like: Tensor  # on meta
    device: torch.device


class States:
    """Tensors by numbers, one of them in memory at a time where all take more than HELD_BYTES.

    The file has no name, so it is gone once it is closed, in whatever way the process ends. A
    tensor is read and written rather than mapped: mapped pages would count as the process's memory.

    Args:
        folder: for the file; None: the system's for such.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path(gettempdir())
        self._file = SpooledTemporaryFile(HELD_BYTES, dir=str(self._folder))  # noqa: SIM115
        self._slots: list[Slot] = []
        self._end = 0

    def __enter__(self) -> States:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def require_room(self, n_bytes: int) -> None:
        """Refuse more than the disk holds.

        Raises:
            OutputError: so many bytes more do not fit.
        """
        if self._end + n_bytes > HELD_BYTES:
            require_room(self._folder, n_bytes, STATES, FEWER)

    def add(self, tensor: Tensor) -> int:
        """Keep a tensor; returns its number."""
        self._slots.append(self._placed(tensor))
        self._write(self._slots[-1], tensor)
        return len(self._slots) - 1

    def read(self, number: int) -> Tensor:
        """The tensor of a number, which is the caller's."""
        slot = self._slots[number]
        found = torch.empty_like(slot.like, device="cpu")
        self._file.seek(slot.start)
        self._file.readinto(_bytes(found))
        return found.to(slot.device)

    def write(self, number: int, tensor: Tensor) -> None:
        """Keep another tensor in the place of one."""
        slot = replace(self._slots[number], like=tensor.to("meta"), device=tensor.device)
        if tensor.nbytes > slot.room_bytes:  # the first block may return a wider dtype
            slot = self._placed(tensor)
        self._slots[number] = slot
        self._write(slot, tensor)

    def _placed(self, tensor: Tensor) -> Slot:
        start, self._end = self._end, self._end + tensor.nbytes
        return Slot(start, tensor.nbytes, tensor.to("meta"), tensor.device)

    def _write(self, slot: Slot, tensor: Tensor) -> None:
        try:
            self._file.seek(slot.start)
            self._file.write(_bytes(torch.empty_like(slot.like, device="cpu").copy_(tensor)))
        except OSError as error:
            problem = f"{STATES} cannot be written: {error.strerror}."
            remedy = f"Free some space, or {FEWER}."
            raise OutputError(str(self._folder), problem, remedy) from None


def _bytes(tensor: Tensor) -> memoryview:
    """Of a dense tensor on the CPU, in the order in which they lie."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
