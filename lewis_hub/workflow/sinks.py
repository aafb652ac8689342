"""The sinks that a merge is written to: a folder, or a Hub repo shard by shard."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from lewis_hub.calibration.subject import FEWER, STATES
from lewis_hub.checkpoint.ranges import Locations, scratch_bytes
from lewis_hub.display import Progress
from lewis_hub.errors import OutputError
from lewis_hub.files import require_room
from lewis_hub.hub.failures import HubRepo
from lewis_hub.hub.publish import Published, find_uploaded, preupload
from lewis_hub.hub.source import Source
from lewis_hub.hub.target import open_repo
from lewis_hub.merge.engine import ShardResult, make_shards, noted, write_index
from lewis_hub.merge.plan import MergePlan
from lewis_hub.merge.runners import Backend, Ray
from lewis_hub.merge.workspace import Workspace, beside, open_workspace, unfinished
from lewis_hub.workflow.fetch import FetchedSources, fetch_whole, open_ranges, require_disk
from lewis_hub.workflow.generated import FILE as GENERATED
from lewis_hub.workflow.merge import report_nan, write_weights
from lewis_hub.workflow.publish import IMPORTANCE, Destination, published_file, push
from lewis_hub.workflow.resources import DiskNeeds


@dataclass(frozen=True)
class FolderSink:
    """A folder that gets its name when the merge is complete."""

    work: Workspace  # files of an interrupted run in it are used again
    destination: Destination | None  # for a later push; its profile is read
    api: HfApi
    progress: Progress

    keeps_models = True  # whole models may be on the disk

    @property
    def folder(self) -> Path:
        """The folder that is written."""
        return self.work.folder

    def require_room(self, needs: DiskNeeds) -> None:
        """Refuse disks that cannot hold download, merge and twins at once."""
        require_disk(self.folder, needs.download_bytes, needs.made_bytes + needs.states_bytes)

    def open_sources(self, sources: Sequence[Source]) -> FetchedSources:
        """Download whole sources."""
        return fetch_whole(self.api, sources, self.progress)

    def profiles(self, beside: Sequence[Path]) -> list[Path]:
        """Return profiles: in the workspace, the former output, beside the recipe, on the Hub."""
        folders = (self.work.scratch, self.work.output / "lewis", *beside)
        published = published_file(IMPORTANCE, self.destination, self.api, self.work.scratch)
        return [*(folder / "importance.json" for folder in folders), *published]

    def texts(self, beside: Sequence[Path]) -> list[Path]:
        """Return files with texts that experts wrote: as `profiles`, but of several folders."""
        folders = (self.work.scratch, self.work.output / "lewis", *beside)
        return written_in(folders, self.destination, self.api)

    def write(
        self, planned: MergePlan, locations: Locations, means: Backend
    ) -> dict[str, ShardResult]:
        """Write the shards into the folder."""
        return write_weights(planned, locations, self.folder, means, self.progress)


@dataclass
class HubSink:
    """A Hub repo: each shard is uploaded when it is finished, and one commit follows at the end."""

    work: Workspace  # keeps measurements and a note on each uploaded shard for a rerun
    destination: Destination
    api: HfApi
    progress: Progress
    # uploaded but not committed
    sent: dict[str, CommitOperationAdd] = field(default_factory=dict)

    keeps_models = False  # the disk never holds a whole source or merge

    @property
    def folder(self) -> Path:
        """Folder with the small files of the model."""
        return self.work.scratch / "model"

    def require_room(self, needs: DiskNeeds) -> None:
        """Refuse a disk that cannot hold the hidden states, or statistics beside two shards."""
        if needs.states_bytes:
            require_room(self.work.scratch, needs.states_bytes, STATES, FEWER)
        if needs.statistics_bytes:
            present = sum(path.stat().st_size for path in self.work.scratch.rglob("*.safetensors"))
            n_bytes = needs.statistics_bytes + 2 * needs.shard_bytes - present
            remedy = "use a larger disk, or a method that merges without statistics"
            content = "the statistics of all experts and two shards"
            require_room(self.work.scratch, n_bytes, content, remedy)

    def open_sources(self, sources: Sequence[Source]) -> FetchedSources:
        """Fetch small files; weights are read by byte ranges."""
        return open_ranges(self.api, sources)

    def profiles(self, beside: Sequence[Path]) -> list[Path]:
        """Return profiles in the workspace, beside the recipe and on the Hub."""
        published = published_file(IMPORTANCE, self.destination, self.api, self.work.scratch)
        folders = (self.work.scratch, *beside)
        return [*(folder / "importance.json" for folder in folders), *published]

    def texts(self, beside: Sequence[Path]) -> list[Path]:
        """Return files with texts that experts wrote: as `profiles`, but of several folders."""
        return written_in((self.work.scratch, *beside), self.destination, self.api)

    def write(
        self, planned: MergePlan, locations: Locations, means: Backend
    ) -> dict[str, ShardResult]:
        """Make and upload the shards that the Hub does not have yet, one after the other."""
        means = replace(means, is_read_next=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        asked = HubRepo.to_publish(self.api, self.destination.asked.repo)
        landing = self.destination.asked.landing
        open_repo(asked, landing, private=self.destination.asked.private)
        shards = self.work.scratch / "shards"
        shards.mkdir(exist_ok=True)
        whole = {note.name for shard in planned.shards if (note := noted(shard, shards))}
        for path in shards.glob("*.safetensors"):  # of an interrupted run
            if path.name not in whole:  # incomplete, or of another plan
                path.unlink()
        results = self._sent_before(planned, shards, asked)
        left = MergePlan(tuple(s for s in planned.shards if s.layout.name not in results))
        _require_room_for_shards(left, locations, shards, means)
        with self.progress.stage("Merging and uploading", planned.n_bytes, "bytes") as advance:
            advance(sum(result.n_bytes for result in results.values()))
            for result in make_shards(left, locations, shards, means, advance):
                file = shards / result.name
                self.sent[result.name] = preupload(asked, landing, file, result.sha256)
                results[result.name] = result
                file.unlink()
        report_nan((result.replaced_nan for result in results.values()), self.progress)
        ordered = {layout.name: results[layout.name] for layout in planned.layouts}
        return ordered | write_index(planned, self.folder)

    def finish(self) -> Published:
        """Push all files in one commit, and delete the workspace."""
        pushed = push(
            self.folder, self.destination, self.api, self.progress, self.sent, force=False
        )
        self.work.discard()
        return pushed

    def _sent_before(
        self, planned: MergePlan, folder: Path, asked: HubRepo
    ) -> dict[str, ShardResult]:
        """Return the shards that an interrupted run uploaded and the Hub still has."""
        results = {}
        landing = self.destination.asked.landing
        for shard in planned.shards:
            note = noted(shard, folder)
            if note is None or (folder / note.name).exists():
                continue
            addition = find_uploaded(asked, landing, note.name, note.n_bytes, note.sha256)
            if addition:
                results[note.name], self.sent[note.name] = note, addition
        return results


Sink = FolderSink | HubSink


def work_folder(output: Path) -> Path:
    """Return the workspace of a stream, which is deleted at the end."""
    return beside(output, ".stream")


def written_in(folders: Sequence[Path], destination: Destination | None, api: HfApi) -> list[Path]:
    """Return files with texts that experts wrote, the first to write to, the last from the Hub."""
    published = published_file(f"lewis/{GENERATED}", destination, api, folders[0])
    return [*(folder / GENERATED for folder in folders), *published]


def discard_work(output: Path) -> None:
    """Delete the workspace of an interrupted stream whose merge is on the Hub."""
    folder = work_folder(output)
    if unfinished(folder).exists():
        with suppress(OutputError), open_workspace(folder, replace=False) as work:
            work.discard()


def _require_room_for_shards(
    left: MergePlan, locations: Locations, folder: Path, means: Backend
) -> None:
    sizes = [layout.n_bytes for layout in left.layouts]
    largest = max(sizes, default=0)
    on_disk = sum(sizes) if isinstance(means.runner, Ray) else largest  # Ray makes all at once
    steps = [tensors for shard in left.shards for tensors in shard.reads]
    present = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    n_bytes = on_disk + scratch_bytes(locations, steps, largest, means.n_together) - present
    content = "two shards and the byte ranges that are fetched ahead"
    require_room(folder, n_bytes, content, "lower --max-shard-size")
