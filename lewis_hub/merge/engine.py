"""Make the tensors of a plan: in shards on disk, in memory, or one by one.

A finished shard has a note beside it, with the digests of its plan and its bytes, until the output
folder gets its name. A rerun keeps the shards whose note fits.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lewis_hub.checkpoint.header import torch_dtypes
from lewis_hub.checkpoint.ranges import Locations, SourceFiles, absolute_locations
from lewis_hub.checkpoint.reader import INDEX, read_tensor
from lewis_hub.checkpoint.writer import ShardLayout, ShardWriter, index_document
from lewis_hub.display import Advance
from lewis_hub.errors import MergeError
from lewis_hub.files import require_room, sha256_of, size_of, unwritable, write_whole
from lewis_hub.merge.plan import MergePlan, Moments, ShardPlan
from lewis_hub.merge.runners import Backend, Ray, Runner, cpus_of_this_task, threads

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.merge.chunks import Shard, ShardContext, TensorJob
    from lewis_hub.merge.readers import OpenFiles

# Modules that import the compiler of the kernels are imported in functions.

NOTE = ".done.json"
WORKERS_PER_SHARD = 4  # one thread hashes a file about as fast as four make its bytes
RANGES = ".ranges"  # folder of the bytes of remote sources that are fetched ahead

MakeTensor = Callable[[str, Moments | None], "Tensor"]


@dataclass(frozen=True)
class ShardResult:
    """A finished file."""

    name: str
    sha256: str
    n_bytes: int
    is_kept: bool = False  # made by an earlier run
    replaced_nan: Mapping[str, int] = field(default_factory=dict)  # source -> number of tensors


def run(
    plan: MergePlan, locations: Locations, output: Path, backend: Backend, advance: Advance
) -> dict[str, ShardResult]:
    """Write all shards and their index into a folder.

    Args:
        plan: the shards.
        locations: of all sources, and of statistics.
        output: exists; finished shards of the same plan in it are kept.
        backend: the bytes do not depend on it.
        advance: called with bytes written or kept, by one thread at a time.

    Raises:
        NonFiniteError: a source or the result holds NaN or infinity.
        BrokenCheckpointError: a source's file is missing or too short.
        OutputError: there is not enough room, or the folder cannot be written.
        MergeError: a Ray cluster or one of its workers failed.
        DeviceError: a tensor does not fit on the device.
    """
    n_bytes = plan.n_bytes - sum(size_of(output / one.name) for one in plan.layouts)
    remedy = "name a folder on another disk with -o"
    require_room(output, n_bytes, "the merged weights", remedy)
    together = _shards_together(locations, backend)
    shards = make_shards(plan, locations, output, backend, advance, together)
    made = {one.name: one for one in shards}
    results = {layout.name: made[layout.name] for layout in plan.layouts}
    return results | write_index(plan, output)


def make_shards(
    plan: MergePlan,
    locations: Locations,
    output: Path,
    backend: Backend,
    advance: Advance,
    together: int = 1,
) -> Iterator[ShardResult]:
    """Yield each shard when it is finished, kept ones first; the arguments are those of `run`.

    Threads make up to `together` shards at the same time; with 1, a shard is begun only when it is
    requested. More than 1 needs local sources: the bytes of others are fetched shard by shard.
    """
    counting = threading.Lock()

    def counted(n_bytes: int) -> None:
        with counting:
            advance(n_bytes)

    found = [(shard, _kept(shard, output)) for shard in plan.shards]
    remaining = [shard for shard, kept in found if kept is None]
    for kept in (kept for _, kept in found if kept):
        advance(kept.n_bytes)
        yield kept
    if not isinstance(backend.runner, Ray):
        together = max(1, min(together, len(remaining)))
        with open_files(remaining, locations, output / RANGES) as files:
            runner = replace(backend.runner, n_workers=backend.runner.n_workers // together)
            one = replace(backend, runner=runner)
            yield from Runner(together).map(
                lambda shard: _make_shard(shard, files, output, one, counted), remaining
            )
    elif remaining:
        on_worker = partial(
            _make_on_worker,
            absolute_locations(locations),
            output.absolute(),
            replace(backend, runner=Runner(), device=None),
        )
        for result in backend.runner.map(on_worker, remaining):
            advance(result.n_bytes)
            yield result


def _shards_together(locations: Locations, backend: Backend) -> int:
    """How many shards threads may make at the same time: one thread hashes each of them."""
    if isinstance(backend.runner, Ray) or backend.device:
        return 1
    if not all(isinstance(location, Path) for location in locations.values()):
        return 1
    return max(1, backend.runner.n_workers // WORKERS_PER_SHARD)


def write_index(plan: MergePlan, output: Path) -> dict[str, ShardResult]:
    """Write the index of the shards; nothing for a single shard."""
    index = index_document(plan.layouts)
    if index is None:
        return {}
    path = output / INDEX
    path.write_text(index, encoding="utf-8", newline="\n")
    return {INDEX: ShardResult(INDEX, sha256_of(path), path.stat().st_size)}


def tensors_in_memory(
    plan: MergePlan, locations: Locations, scratch: Path, backend: Backend
) -> dict[str, Tensor]:
    """Make all tensors of a plan, with the values that `run` would write.

    The bytes of remote sources are fetched into `scratch`.
    """
    made: dict[str, Tensor] = {}
    with open_files(plan.shards, locations, scratch / RANGES) as files:
        for shard in plan.shards:
            memory = InMemoryShard(shard.layout)
            _make_tensors(shard, files, memory, backend, lambda _: None)
            made |= memory.tensors()
    return made


@contextmanager
def per_tensor(
    plan: ShardPlan, open_files: OpenFiles, replaced_nan: set[tuple[str, str]]
) -> Iterator[MakeTensor]:
    """Make tensors of a shard one by one, in any order, while its sources are open.

    Yields a function that makes a tensor by its name, with the moments of its inputs on their
    device, or on the CPU without any. In the first case, if NaN or infinity was replaced in a
    source, (source, tensor) is added to `replaced_nan`.
    """
    from lewis_hub.merge.chunks import TensorJob
    from lewis_hub.merge.tensor import make_tensor, merge_by_definition

    tensors = {tensor.output.name: tensor for tensor in plan.tensors}
    nowhere = InMemoryShard(ShardLayout("", ()))  # each tensor is written to memory of its own
    with _open_shard(plan, open_files, nowhere) as context:

        def make(name: str, moments: Moments | None) -> Tensor:
            tensor = tensors[name]
            layout = ShardLayout(name, (tensor.output,))
            memory = InMemoryShard(layout)
            job = TensorJob(replace(context, writer=memory), tensor, *layout.starts)
            if moments is None or tensor.is_copied:
                make_tensor(job, Runner())
                return memory.tensors()[name]
            device = next(gram.device for gram in moments.grams if gram is not None)
            pairs = zip(job.readers, tensor.inputs, strict=True)
            sources = [read_tensor(reader, header).to(device) for reader, header in pairs]
            replaced_nan.update(job.replaced_nan)
            return merge_by_definition(plan, tensor, sources, moments)

        yield make


class InMemoryShard:
    """The bytes that a file would have, in memory. Threads may share it."""

    def __init__(self, layout: ShardLayout) -> None:
        import torch

        self._layout = layout
        self._content = torch.empty(layout.n_bytes, dtype=torch.uint8)

    def write(self, position: int, content: memoryview) -> None:
        """Put bytes at an offset from the beginning."""
        place = self._content.numpy()[position : position + content.nbytes]
        place[:] = np.frombuffer(content, np.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; they share its memory."""
        pairs = zip(self._layout.tensors, self._layout.starts, strict=True)
        return {
            tensor.name: self._content[start : start + tensor.n_bytes]
            .view(torch_dtypes()[tensor.dtype])
            .reshape(tensor.shape)
            for tensor, start in pairs
        }


def open_files(shards: Sequence[ShardPlan], locations: Locations, scratch: Path) -> SourceFiles:
    """Open the sources of shards; at most the bytes of the largest shard are fetched ahead."""
    steps = [tensors for shard in shards for tensors in shard.reads]
    max_bytes = max((shard.layout.n_bytes for shard in shards), default=0)
    return SourceFiles(locations, steps, scratch, max_bytes)


@contextmanager
def _open_shard(plan: ShardPlan, open_files: OpenFiles, shard: Shard) -> Iterator[ShardContext]:
    """Open all sources of a shard; `open_files` opens the files of a label."""
    from lewis_hub.kernels.calls import BLOCK
    from lewis_hub.merge.chunks import LONGEST_ROW, Buffers, ShardContext, block_of
    from lewis_hub.merge.readers import open_source

    blocks = [block_of(plan.method, tensor) for tensor in plan.tensors]
    n_inputs = max((len(tensor.inputs) for tensor in plan.tensors), default=1)
    buffers = Buffers(n_inputs, max((b for b in blocks if b <= LONGEST_ROW), default=BLOCK))
    with ExitStack() as opened:
        readers = [
            opened.enter_context(open_source(label, base, open_files))
            for label, base in zip(plan.labels, plan.bases, strict=True)
        ]
        statistics = [opened.enter_context(open_files(label)) for label in plan.statistics]
        yield ShardContext(plan, readers, shard, buffers, statistics)


def _make_tensors(
    plan: ShardPlan, files: SourceFiles, shard: Shard, backend: Backend, advance: Advance
) -> Mapping[str, int]:
    """Make the tensors of a shard; returns source -> number of its tensors that held NaN."""
    from lewis_hub.merge.chunks import TensorJob

    layout = plan.layout
    with _open_shard(plan, files.reader, shard) as context:
        pairs = zip(plan.tensors, layout.starts, strict=True)
        jobs = [TensorJob(context, tensor, start) for tensor, start in pairs]
        advance(layout.n_bytes - sum(tensor.output.n_bytes for tensor in plan.tensors))
        for n_bytes in _make_in_order(jobs, backend):
            files.step_done()
            advance(n_bytes)
        return Counter(label for label, _ in {one for job in jobs for one in job.replaced_nan})


def _make_in_order(jobs: Sequence[TensorJob], backend: Backend) -> Iterator[int]:
    """Make tensors in the order of the file, so that it is hashed meanwhile; yield their bytes.

    All workers share a large tensor; of small tensors each worker makes one.
    """
    from lewis_hub.merge.cuda import make_on_device
    from lewis_hub.merge.tensor import make_tensor

    if backend.device:
        yield from make_on_device(jobs, backend.device)
        return
    runner = backend.runner
    assert not isinstance(runner, Ray)  # its workers have a runner of their own

    most = runner.large_elements
    for are_large, group in groupby(jobs, lambda job: job.tensor.output.n_elements > most):
        if are_large:
            yield from (make_tensor(job, runner) for job in group)
        else:
            yield from runner.map(lambda job: make_tensor(job, Runner()), list(group))


def _make_shard(
    plan: ShardPlan, files: SourceFiles, output: Path, backend: Backend, advance: Advance
) -> ShardResult:
    layout, note = plan.layout, output / (plan.layout.name + NOTE)
    note.unlink(missing_ok=True)
    with ShardWriter(output, layout, stays_cached=backend.is_read_next) as writer:
        replaced = _make_tensors(plan, files, writer, backend, advance)
        sha256 = writer.finish()
    result = ShardResult(layout.name, sha256, layout.n_bytes, replaced_nan=replaced)
    facts = {"plan": plan.digest, "sha256": result.sha256, "n_bytes": result.n_bytes}
    try:
        write_whole(note, json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise unwritable(note, error, "Free some space, then run again.") from None
    return result


def _make_on_worker(
    locations: Locations, output: Path, backend: Backend, plan: ShardPlan
) -> ShardResult:
    for folder in (*locations.values(), output):
        if isinstance(folder, Path) and not folder.is_dir():
            problem = f"the worker on {socket.gethostname()} does not see {folder}"
            remedy = "Keep sources and output where all machines mount them under the same path."
            raise MergeError("runner `ray`", problem, remedy)
    backend = replace(backend, runner=threads(cpus_of_this_task()))
    with open_files([plan], locations, output / f"{RANGES}-{plan.layout.name}") as files:
        return _make_shard(plan, files, output, backend, lambda _: None)


def noted(plan: ShardPlan, output: Path) -> ShardResult | None:
    """The result in the note beside a shard, if it fits the plan; the shard itself may be gone."""
    try:
        path = output / (plan.layout.name + NOTE)
        note: Any = json.loads(path.read_text(encoding="utf-8"))
        if note["plan"] == plan.digest:
            return ShardResult(plan.layout.name, note["sha256"], note["n_bytes"], is_kept=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def _kept(plan: ShardPlan, output: Path) -> ShardResult | None:
    """The shard of an earlier run, if its bytes are unchanged."""
    path, result = output / plan.layout.name, noted(plan, output)
    if result and size_of(path) == result.n_bytes and sha256_of(path) == result.sha256:
        return result
    return None
