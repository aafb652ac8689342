"""A plan becomes shards on disk. The unit of work is one shard: a rerun keeps those that are whole.

Beside a finished shard lies a note with the digest of its plan and of its bytes, until the output
folder gets its name. A shard without a fitting note is made anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.layout import index_document
from lewis_hub.checkpoint.reader import INDEX, Reader, TensorReader
from lewis_hub.checkpoint.writer import ShardWriter, require_room
from lewis_hub.errors import OutputError
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.merge.plan import MergePlan, ShardPlan
from lewis_hub.merge.runners import Inline, Runner
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from lewis_hub.merge.pieces import Job

NOTE = ".done.json"


@dataclass(frozen=True)
class ShardResult:
    """A file that is whole and on disk."""

    name: str
    sha256: str  # 64 hex digits
    n_bytes: int
    is_kept: bool = False  # an earlier run made it


def run(
    plan: MergePlan,
    folders: Mapping[str, Path],
    output: Path,
    runner: Runner,
    advance: Advance,
) -> dict[str, ShardResult]:
    """Write all shards and their index into a folder.

    Args:
        plan: what goes into which file.
        folders: label of a source, or of the base of one, -> folder with its shards.
        output: exists; finished shards of the same plan in it are kept.
        runner: the bytes are the same whichever it is.
        advance: called with bytes written or kept, in all `plan.n_bytes`, from this thread.

    Returns:
        File name -> digest and size; the index among them where there is one.

    Raises:
        NonFiniteError: a source or the result holds NaN or infinity.
        BrokenCheckpointError: a source's file is missing or ends too early.
        OutputError: there is not enough room, or the folder cannot be written.
    """
    kept = {shard.layout.name: _kept(shard, output) for shard in plan.shards}
    remaining = [shard.layout for shard in plan.shards if not kept[shard.layout.name]]
    there = sum(_size(output / layout.name) for layout in remaining)
    require_room(output, sum(layout.n_bytes for layout in remaining) - there)
    results: dict[str, ShardResult] = {}
    for shard in plan.shards:
        found = kept[shard.layout.name]
        if found:
            advance(found.n_bytes)
        results[shard.layout.name] = found or merge_shard(shard, folders, output, runner, advance)
    index = index_document(plan.layouts)
    if index:
        path = output / INDEX
        path.write_text(index, encoding="utf-8")
        results[INDEX] = ShardResult(INDEX, sha256_of(path), path.stat().st_size)
    return results


def merge_shard(
    plan: ShardPlan,
    folders: Mapping[str, Path],
    output: Path,
    runner: Runner,
    advance: Advance,
) -> ShardResult:
    """Make one shard from the beginning; the arguments are those of `run`."""
    from lewis_hub.merge.fused import LONGEST_ROW, block_of  # imports numba
    from lewis_hub.merge.pieces import Desks, Job, Site

    layout = plan.layout
    note = _note(output, layout.name)
    note.unlink(missing_ok=True)
    with ExitStack() as opened:
        readers = [
            opened.enter_context(_open(label, base, folders))
            for label, base in zip(plan.labels, plan.bases, strict=True)
        ]
        writer = opened.enter_context(ShardWriter(output, layout))
        blocks = [block_of(plan.method, tensor) for tensor in plan.tensors]
        desks = Desks(len(readers), max(b for b in blocks if b <= LONGEST_ROW))
        site = Site(plan, readers, writer, desks)
        jobs = [
            Job(site, tensor, start)
            for tensor, start in zip(plan.tensors, layout.starts, strict=True)
        ]
        advance(layout.n_bytes - sum(tensor.output.n_bytes for tensor in plan.tensors))
        for n_bytes in _make_all(jobs, runner):
            advance(n_bytes)
        result = ShardResult(layout.name, writer.finish(), layout.n_bytes)
    told = {"plan": plan.digest, "sha256": result.sha256, "n_bytes": result.n_bytes}
    try:
        write_whole(note, json.dumps(told, indent=2) + "\n")
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})."
        raise OutputError(str(note), problem, "Free some space, then run again.") from None
    return result


def _open(label: str, base: str | None, folders: Mapping[str, Path]) -> Reader:
    from lewis_hub.merge.scaled import ScaledReader  # imports numba

    own = TensorReader(folders[label], label)
    if base is None:
        return ScaledReader(own)
    from lewis_hub.merge.adapted import AdapterReader

    return AdapterReader(ScaledReader(TensorReader(folders[base], base)), own)


def _make_all(jobs: Sequence[Job], runner: Runner) -> Iterator[int]:
    """Go in the order of the file, so that hashing keeps up.

    A large tensor is made by all workers together, of small ones each by one worker.
    """
    from lewis_hub.merge.tensors import make_tensor  # imports numba

    def is_large(job: Job) -> bool:
        return job.tensor.output.n_elements > runner.large_elements

    for together, run_of_jobs in groupby(jobs, key=is_large):
        if together:
            yield from (make_tensor(job, runner) for job in run_of_jobs)
        else:
            yield from runner.map(lambda job: make_tensor(job, Inline()), list(run_of_jobs))


def _kept(plan: ShardPlan, output: Path) -> ShardResult | None:
    """The shard if an earlier run finished it and its bytes are still what they were."""
    path = output / plan.layout.name
    try:
        note: Any = json.loads(_note(output, plan.layout.name).read_text(encoding="utf-8"))
        fits = note["plan"] == plan.digest and path.stat().st_size == note["n_bytes"]
        if fits and sha256_of(path) == note["sha256"]:
            return ShardResult(plan.layout.name, note["sha256"], note["n_bytes"], is_kept=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def _note(output: Path, shard: str) -> Path:
    return output / (shard + NOTE)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
