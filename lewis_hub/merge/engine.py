"""A plan becomes shards on disk. The unit of work is one shard: a rerun keeps those that are whole.

Beside a finished shard lies a note with the digest of its plan and of its bytes, until the output
folder gets its name. A shard without a fitting note is made anew.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.ranges import (
    Locations,
    SourceFiles,
    absolute_locations,
    missing_folders,
)
from lewis_hub.checkpoint.reader import INDEX, Reader
from lewis_hub.checkpoint.writer import ShardWriter, index_document
from lewis_hub.errors import MergeError, OutputError
from lewis_hub.files import require_room, sha256_of, write_whole
from lewis_hub.merge.plan import MergePlan, ShardPlan
from lewis_hub.merge.runners import Backend, Inline, Ray, cpus_of_this_task, threads
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from lewis_hub.merge.chunks import Shard, TensorJob


NOTE = ".done.json"
RANGES = ".ranges"  # folder of the bytes that are fetched ahead of remote sources


@dataclass(frozen=True)
class ShardResult:
    """A file that is whole and on disk."""

    name: str
    sha256: str  # 64 hex digits
    n_bytes: int
    is_kept: bool = False  # an earlier run made it
    mended: Mapping[str, int] = field(default_factory=dict)  # source -> tensors with NaN, infinity


def run(
    plan: MergePlan, locations: Locations, output: Path, backend: Backend, advance: Advance
) -> dict[str, ShardResult]:
    """Write all shards and their index into a folder.

    Args:
        plan: what goes into which file.
        locations: of all sources, and of statistics.
        output: exists; finished shards of the same plan in it are kept.
        backend: the bytes are the same whatever they are.
        advance: called with bytes written or kept, in all `plan.n_bytes`, from this thread.

    Returns:
        File name -> digest and size; the index among them where there is one.

    Raises:
        NonFiniteError: a source or the result holds NaN or infinity.
        BrokenCheckpointError: a source's file is missing or ends too early.
        OutputError: there is not enough room, or the folder cannot be written.
        MergeError: a Ray cluster or one of its workers failed.
        DeviceError: a tensor does not fit on the device.
    """
    n_bytes = plan.n_bytes - sum(_size(output / one.name) for one in plan.layouts)
    remedy = "name a folder on another disk with -o"
    require_room(output, n_bytes, "the merged weights", remedy)
    made = {one.name: one for one in make_shards(plan, locations, output, backend, advance)}
    results = {layout.name: made[layout.name] for layout in plan.layouts}
    return results | write_index(plan, output)


def make_shards(
    plan: MergePlan, locations: Locations, output: Path, backend: Backend, advance: Advance
) -> Iterator[ShardResult]:
    """Each shard as it is finished, those that are kept first; the arguments are those of `run`.

    No further shard is begun before the next is asked for, but by Ray's workers.
    """
    found = [(shard, _kept(shard, output)) for shard in plan.shards]
    remaining = [shard for shard, kept in found if kept is None]
    for kept in (kept for _, kept in found if kept):
        advance(kept.n_bytes)
        yield kept
    if isinstance(backend.runner, Ray):
        yield from _elsewhere(remaining, locations, output, backend, advance)
        return
    with open_files(remaining, locations, output / RANGES) as files:
        for shard in remaining:
            yield merge_shard(shard, files, output, backend, advance)


def write_index(plan: MergePlan, output: Path) -> dict[str, ShardResult]:
    """Write what tells which shard holds which tensor; nothing for a single shard."""
    index = index_document(plan.layouts)
    if index is None:
        return {}
    path = output / INDEX
    path.write_text(index, encoding="utf-8")
    return {INDEX: ShardResult(INDEX, sha256_of(path), path.stat().st_size)}


def merge_shard(
    plan: ShardPlan, files: SourceFiles, output: Path, backend: Backend, advance: Advance
) -> ShardResult:
    """Make one shard on this machine from the beginning; the sources are read from `files`."""
    layout = plan.layout
    _note(output, layout.name).unlink(missing_ok=True)
    with ShardWriter(output, layout, stays_cached=backend.is_read_next) as writer:
        mended = fill(plan, files, writer, backend, advance)
        result = ShardResult(layout.name, writer.finish(), layout.n_bytes, mended=mended)
    _write_note(plan, result, output)
    return result


def fill(
    plan: ShardPlan, files: SourceFiles, shard: Shard, backend: Backend, advance: Advance
) -> Mapping[str, int]:
    """Make the tensors of a shard; which sources hold NaN or infinity, and in how many of them."""
    from lewis_hub.kernels.operands import BLOCK
    from lewis_hub.merge.assemble import assembling
    from lewis_hub.merge.chunks import (  # imports numpy and llvmlite
        LONGEST_ROW,
        Buffers,
        ShardContext,
        TensorJob,
        block_of,
    )

    layout = plan.layout
    with ExitStack() as opened:
        readers = [
            opened.enter_context(open_source(label, base, files.reader))
            for label, base in zip(plan.labels, plan.bases, strict=True)
        ]
        blocks = [block_of(plan.method, tensor) for tensor in plan.tensors]
        n_together = max((len(tensor.inputs) for tensor in plan.tensors), default=1)
        buffers = Buffers(n_together, max((b for b in blocks if b <= LONGEST_ROW), default=BLOCK))
        read = assembling(plan, readers)
        statistics = [opened.enter_context(files.reader(label)) for label in plan.statistics]
        context = ShardContext(plan, read, shard, buffers, statistics)
        jobs = [
            TensorJob(context, tensor, start)
            for tensor, start in zip(plan.tensors, layout.starts, strict=True)
        ]
        advance(layout.n_bytes - sum(tensor.output.n_bytes for tensor in plan.tensors))
        made = _make_all(jobs, backend)
        for n_bytes in made:
            files.step_done()
            advance(n_bytes)
        return Counter(label for label, _ in {one for job in jobs for one in job.mended})


def _elsewhere(
    shards: Sequence[ShardPlan],
    locations: Locations,
    output: Path,
    backend: Backend,
    advance: Advance,
) -> Iterator[ShardResult]:
    """Have each shard made by a worker that opens the sources itself."""
    assert isinstance(backend.runner, Ray)
    if not shards:
        return
    shared = absolute_locations(locations)
    on_worker = partial(_on_worker, shared, output.absolute(), replace(backend, runner=Inline()))
    for result in backend.runner.map(on_worker, shards):
        advance(result.n_bytes)
        yield result


def _on_worker(
    locations: Locations, output: Path, backend: Backend, plan: ShardPlan
) -> ShardResult:
    for folder in missing_folders({**locations, "output": output}):
        problem = f"the worker on {socket.gethostname()} does not see {folder}"
        remedy = "Keep sources and output where all machines mount them under the same path."
        raise MergeError("runner `ray`", problem, remedy)
    with open_files([plan], locations, output / f"{RANGES}-{plan.layout.name}") as files:
        here = replace(backend, runner=threads(cpus_of_this_task()), device=None)
        return merge_shard(plan, files, output, here, lambda _: None)


def open_files(shards: Sequence[ShardPlan], locations: Locations, scratch: Path) -> SourceFiles:
    """Open the sources of some shards; at most the bytes of one shard are fetched ahead."""
    steps = [tensors for shard in shards for tensors in shard.reads]
    max_bytes = max((shard.layout.n_bytes for shard in shards), default=0)
    return SourceFiles(locations, steps, scratch, max_bytes)


def open_source(label: str, base: str | None, reader: Callable[[str], Reader]) -> Reader:
    """Open a source, or an adapter on its `base`; `reader` opens the files of a label. Close it."""
    from lewis_hub.merge.sources import ScaledReader  # imports numpy and llvmlite

    own = reader(label)
    if base is None:
        return ScaledReader(own)
    from lewis_hub.merge.sources import AdapterReader

    return AdapterReader(ScaledReader(reader(base)), own)


def _make_all(jobs: Sequence[TensorJob], backend: Backend) -> Iterator[int]:
    """Go in the order of the file, so that hashing keeps up.

    A large tensor is made by all workers together, of small ones each by one worker.
    """
    from lewis_hub.merge.cuda import make_on_device
    from lewis_hub.merge.tensor import make_tensor  # imports numpy and llvmlite

    if backend.device:
        yield from make_on_device(jobs, backend.device)
        return
    runner = backend.runner
    assert not isinstance(runner, Ray)

    def is_large(job: TensorJob) -> bool:
        return job.tensor.output.n_elements > runner.large_elements

    for together, run_of_jobs in groupby(jobs, key=is_large):
        if together:
            yield from (make_tensor(job, runner) for job in run_of_jobs)
        else:
            yield from runner.map(lambda job: make_tensor(job, Inline()), list(run_of_jobs))


def noted(plan: ShardPlan, output: Path) -> ShardResult | None:
    """What the note beside a shard says of it, where it fits the plan; the shard may be gone."""
    try:
        note: Any = json.loads(_note(output, plan.layout.name).read_text(encoding="utf-8"))
        if note["plan"] == plan.digest:
            return ShardResult(plan.layout.name, note["sha256"], note["n_bytes"], is_kept=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def _write_note(plan: ShardPlan, made: ShardResult, output: Path) -> None:
    note = _note(output, made.name)
    told = {"plan": plan.digest, "sha256": made.sha256, "n_bytes": made.n_bytes}
    try:
        write_whole(note, json.dumps(told, indent=2) + "\n")
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})."
        raise OutputError(str(note), problem, "Free some space, then run again.") from None


def _kept(plan: ShardPlan, output: Path) -> ShardResult | None:
    """The shard if an earlier run finished it and its bytes are still what they were."""
    path, told = output / plan.layout.name, noted(plan, output)
    if told and _size(path) == told.n_bytes and sha256_of(path) == told.sha256:
        return told
    return None


def _note(output: Path, shard: str) -> Path:
    return output / (shard + NOTE)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
