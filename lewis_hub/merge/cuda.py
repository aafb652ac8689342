"""Tensors by the methods' definitions on a device: while one is computed, the next is on its way.

Sources are read into page-locked memory and cross to the device on a stream of their own, as the
files have them; they become float32 there. The device holds the sources of two tensors, and what
the method makes of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from lewis_hub.checkpoint.header import torch_dtypes
from lewis_hub.errors import DeviceError
from lewis_hub.merge.chunks import TensorJob
from lewis_hub.merge.plan import Moments
from lewis_hub.merge.tensor import bytes_of, merge_by_definition

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lewis_hub.checkpoint.header import TensorHeader
    from lewis_hub.checkpoint.reader import Reader


class Transfer(NamedTuple):
    """Tensors that cross between host and device; they are there when `done` is over."""

    tensors: tuple[Tensor, ...]
    done: torch.cuda.Event | None  # None: they are there
    moments: Moments = Moments(())


def make_on_device(jobs: Sequence[TensorJob], device: str) -> Iterator[int]:
    """Make the tensors of a shard in order; the numbers of bytes written.

    Raises:
        DeviceError: a tensor does not fit on the device.
    """
    import torch

    pipeline = CudaPipeline(torch.device(device))
    with ThreadPoolExecutor(2) as pool:  # one reads ahead, the other writes behind
        coming = [pool.submit(pipeline.fetch, job) for job in jobs[:1]]
        going: list[Future[int]] = []
        for job, following in zip_longest(jobs, jobs[1:]):
            try:
                fetched = coming.pop().result()
                if following:
                    coming.append(pool.submit(pipeline.fetch, following))
                merged = pipeline.compute(job, fetched)
            except torch.OutOfMemoryError:
                output = job.tensor.output
                problem = f"it has too little memory to merge {output.name} {list(output.shape)}"
                remedy = "Use `--device cpu`: finished shards stay."
                raise DeviceError(f"device `{device}`", problem, remedy) from None
            del fetched
            yield from (stored.result() for stored in going)
            going = [pool.submit(_store, job, merged)]
            del merged
        yield from (stored.result() for stored in going)


class CudaPipeline:
    """The way from files to a device of torch and back; on a GPU, copies overlap."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._inward: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._inward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fetch(self, job: TensorJob) -> Transfer:
        """The tensor's sources, as their files have them; none of one that is only copied."""
        import torch

        if job.tensor.is_copied:
            return Transfer((), None)
        with torch.cuda.stream(self._inward) if self._inward else nullcontext():
            pairs = zip(job.readers, job.tensor.inputs, strict=True)
            sources = tuple(self._read(reader, header) for reader, header in pairs)
            found = job.moments()
            moments = replace(found, grams=[self._there(gram) for gram in found.grams])
            return Transfer(sources, self._inward.record_event() if self._inward else None, moments)

    def compute(self, job: TensorJob, fetched: Transfer) -> Transfer:
        """The merged tensor on its way back to the host; none of one that is only copied."""
        import torch

        if job.tensor.is_copied:
            return Transfer((), None)
        if fetched.done:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(fetched.done)
            for held in (*fetched.tensors, *fetched.moments.grams):
                if held is not None:
                    held.record_stream(stream)  # its memory is not given away before it was read
        sources = [source.float() for source in fetched.tensors]
        merged = merge_by_definition(job.context.plan, job.tensor, sources, fetched.moments)
        if not fetched.done:
            return Transfer((merged,), None)
        back = torch.empty(merged.shape, dtype=merged.dtype, pin_memory=True)
        back.copy_(merged, non_blocking=True)
        return Transfer((back,), torch.cuda.current_stream(self._device).record_event())

    def _read(self, reader: Reader, header: TensorHeader) -> Tensor:
        import torch

        dtype = torch_dtypes()[header.dtype]
        held = torch.empty(header.n_bytes, dtype=torch.uint8, pin_memory=self._inward is not None)
        reader.read(header, 0, held.numpy().data)
        return held.to(self._device, non_blocking=True).view(dtype).reshape(header.shape)

    def _there(self, gram: Tensor | None) -> Tensor | None:
        if gram is None:
            return None
        held = gram.pin_memory() if self._inward else gram
        return held.to(self._device, non_blocking=True)


def _store(job: TensorJob, merged: Transfer) -> int:
    if merged.done:
        merged.done.synchronize()
    if job.tensor.is_copied:
        job.copy()
    else:
        job.context.writer.write(job.start, bytes_of(*merged.tensors))
    return job.tensor.output.n_bytes
