"""Hidden states of all calibration texts, in memory while they are few, else on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir

import torch
from torch import Tensor

from lewis_hub.calibration.subject import FEWER, HELD_BYTES, STATES
from lewis_hub.errors import OutputError
from lewis_hub.files import require_room


@dataclass(frozen=True)
class _Slot:
    """Where a tensor is in the file; `reserved_bytes` may be more than it takes."""

    start: int
    reserved_bytes: int
    like: Tensor  # on meta
    device: torch.device


class ActivationCache:
    """Tensors by number, on disk if all together take more than HELD_BYTES.

    The file has no name, so that it is deleted however the process ends. Tensors are read and
    written, not mapped, as mapped pages would count as the process's memory.

    Args:
        folder: for the file; None: the system's default.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path(gettempdir())
        self._file = SpooledTemporaryFile(HELD_BYTES, dir=str(self._folder))  # noqa: SIM115
        self._slots: list[_Slot] = []
        self._end = 0

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def require_room(self, n_bytes: int) -> None:
        """Refuse more bytes than the disk holds.

        Raises:
            OutputError: `n_bytes` more do not fit.
        """
        if self._end + n_bytes > HELD_BYTES:
            require_room(self._folder, n_bytes, STATES, FEWER)

    def add(self, tensor: Tensor) -> int:
        """Store a tensor; returns its number."""
        self._slots.append(self._reserve(tensor))
        self._write(self._slots[-1], tensor)
        return len(self._slots) - 1

    def read(self, number: int) -> Tensor:
        """A copy of the tensor with a number."""
        slot = self._slots[number]
        tensor = torch.empty_like(slot.like, device="cpu")
        self._file.seek(slot.start)
        self._file.readinto(_bytes(tensor))
        return tensor.to(slot.device)

    def write(self, number: int, tensor: Tensor) -> None:
        """Replace the tensor with a number."""
        slot = replace(self._slots[number], like=tensor.to("meta"), device=tensor.device)
        if tensor.nbytes > slot.reserved_bytes:  # the first block may return a wider dtype
            slot = self._reserve(tensor)
        self._slots[number] = slot
        self._write(slot, tensor)

    def _reserve(self, tensor: Tensor) -> _Slot:
        start, self._end = self._end, self._end + tensor.nbytes
        return _Slot(start, tensor.nbytes, tensor.to("meta"), tensor.device)

    def _write(self, slot: _Slot, tensor: Tensor) -> None:
        try:
            self._file.seek(slot.start)
            self._file.write(_bytes(torch.empty_like(slot.like, device="cpu").copy_(tensor)))
        except OSError as error:
            problem = f"{STATES} cannot be written: {error.strerror}."
            remedy = f"Free some space, or {FEWER}."
            raise OutputError(str(self._folder), problem, remedy) from None


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a dense tensor on the CPU, in their order in memory."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
