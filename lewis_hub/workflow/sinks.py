"""Sinks: where a merge goes while it is made. A folder, or a Hub repo shard by shard."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.calibration.meta_model import FEWER, STATES
from lewis_hub.checkpoint.ranges import elsewhere, most_held
from lewis_hub.errors import OutputError, PublishError
from lewis_hub.files import require_room
from lewis_hub.hub.commit import recall, send
from lewis_hub.hub.failures import Asked
from lewis_hub.hub.publish import Published, open_repo
from lewis_hub.hub.source import Source
from lewis_hub.merge.byte_ranges import needs_of
from lewis_hub.merge.engine import Places, ShardResult, make_shards, noted, write_index
from lewis_hub.merge.plan import MergePlan
from lewis_hub.merge.runners import Means, Ray
from lewis_hub.merge.workspace import Workspace, open_workspace, unfinished
from lewis_hub.progress import Progress
from lewis_hub.workflow.fetch import SourceFiles, fetch_whole, open_ranges, require_disk
from lewis_hub.workflow.merge import report_nan, write_weights
from lewis_hub.workflow.publish import Destination, published_importance, push

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes that a merge takes on the disk.

    Attributes:
        download_bytes: of sources that are not in the cache.
        output_bytes: of the merged weights.
        made_bytes: of all that is written beside the download, but for hidden states.
        statistics_bytes: of second moments, or of matrices that are fitted by them.
        states_bytes: of the hidden states of calibration texts.
        shard_bytes: of the largest file of weights.
    """

    download_bytes: int
    output_bytes: int
    made_bytes: int
    statistics_bytes: int
    states_bytes: int
    shard_bytes: int


@dataclass(frozen=True)
class FolderSink:
    """A folder, which appears whole or not at all.

    Attributes:
        work: of the merge; an interrupted run's work in it is taken up.
        destination: of a push that may follow; None: the merge stays here.
    """

    work: Workspace
    destination: Destination | None
    api: HfApi
    progress: Progress

    keeps_models = True  # sources and twins lie on the disk

    @property
    def folder(self) -> Path:
        """The folder that is made."""
        return self.work.folder

    @property
    def scratch(self) -> Path:
        """Folder for what a rerun takes up and nobody keeps."""
        return self.work.scratch

    def require_room(self, needs: DiskNeeds) -> None:
        """Download, merge and twins lie on disks of this machine at once."""
        require_disk(self.folder, needs.download_bytes, needs.made_bytes + needs.states_bytes)

    def open_sources(self, sources: Sequence[Source]) -> SourceFiles:
        """Download them, weights included."""
        return fetch_whole(self.api, sources, self.progress)

    def profiles(self, beside: Path) -> list[Path]:
        """In the work, in the former output, beside the recipe, and in the target repo."""
        folders = (self.scratch, self.work.output / "lewis", beside)
        previous = self.destination.previous if self.destination else None
        published = published_importance(previous, self.api, self.scratch)
        return [*(folder / "importance.json" for folder in folders), *published]

    def write(self, planned: MergePlan, places: Places, means: Means) -> dict[str, ShardResult]:
        """Write them into the folder."""
        return write_weights(planned, places, self.folder, means, self.progress)

    def finish(self, files: Sequence[str]) -> Path:
        """Give the folder its name; returns it."""
        return self.work.finish(files)


@dataclass
class HubSink:
    """A Hub repo: each shard is uploaded as it is finished, and one commit comes last.

    Neither a source nor the merge is ever whole on this disk.

    Attributes:
        work: keeps what was measured, and notes of the shards that were uploaded, so that a rerun
            does not make them again.
        destination: of the commit.
        sent: files that are uploaded and in no commit yet.
    """

    work: Workspace
    destination: Destination
    api: HfApi
    progress: Progress
    sent: dict[str, CommitOperationAdd] = field(default_factory=dict)

    keeps_models = False  # neither a source nor the merge is whole here

    @property
    def folder(self) -> Path:
        """Folder with small files of the model."""
        return self.work.scratch / "model"

    @property
    def scratch(self) -> Path:
        """Folder for what a rerun takes up and nobody keeps."""
        return self.work.scratch

    def require_room(self, needs: DiskNeeds) -> None:
        """Hidden states, and statistics beside two shards, lie on this disk."""
        if needs.states_bytes:
            require_room(self.scratch, needs.states_bytes, STATES, FEWER)
        if needs.statistics_bytes:
            there = sum(path.stat().st_size for path in self.scratch.rglob("*.safetensors"))
            shard = min(needs.shard_bytes, needs.output_bytes)
            n_bytes = needs.statistics_bytes + 2 * shard - there
            remedy = "take a disk that is larger, or a method that merges without statistics"
            what = "the statistics of all experts and two shards"
            require_room(self.scratch, n_bytes, what, remedy)

    def open_sources(self, sources: Sequence[Source]) -> SourceFiles:
        """Fetch small files; weights are read by ranges."""
        return open_ranges(self.api, sources)

    def profiles(self, beside: Path) -> list[Path]:
        """In the work, in the target repo, and beside the recipe."""
        published = published_importance(self.destination.previous, self.api, self.scratch)
        return [self.scratch / "importance.json", *published, beside / "importance.json"]

    def write(self, planned: MergePlan, places: Places, means: Means) -> dict[str, ShardResult]:
        """Make every shard that the Hub does not have yet, and upload each before the next.

        What the next one needs is fetched meanwhile, as much of it as a second shard would take.

        Raises:
            PublishError: the repo cannot be made, or a shard cannot be uploaded.
            OutputError: there is not enough room for two shards.
        """
        means = replace(means, is_read_next=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        asked = Asked(self.api, self.destination.asked.repo, kind=PublishError)
        landing = self.destination.asked.landing
        open_repo(asked, landing, private=self.destination.asked.private)
        shards = self.scratch / "shards"
        shards.mkdir(exist_ok=True)
        _clear(planned, shards)
        results = self._sent_before(planned, shards, asked)
        left = MergePlan(tuple(s for s in planned.shards if s.layout.name not in results))
        _require_room_for_shards(left, places, shards, means)
        with self.progress.stage("Merging on the way", planned.n_bytes, "bytes") as advance:
            advance(sum(result.n_bytes for result in results.values()))
            for result in make_shards(left, places, shards, means, advance):
                file = shards / result.name
                self.sent[result.name] = send(asked, landing, file, result.sha256)
                results[result.name] = result
                file.unlink()
        report_nan((result.mended for result in results.values()), self.progress)
        ordered = {layout.name: results[layout.name] for layout in planned.layouts}
        return ordered | write_index(planned, self.folder)

    def finish(self) -> Published:
        """Push all in one commit, and delete the work.

        Raises:
            PublishError: the repo is as it was before, or lacks the tag alone.
        """
        pushed = push(
            self.folder, self.destination, self.api, self.progress, self.sent, force=False
        )
        self.work.discard()
        return pushed

    def _sent_before(
        self, planned: MergePlan, folder: Path, asked: Asked
    ) -> dict[str, ShardResult]:
        """What an interrupted run uploaded, as far as the Hub still has it."""
        results = {}
        landing = self.destination.asked.landing
        for shard in planned.shards:
            told = noted(shard, folder)
            if told is None or (folder / told.name).exists():
                continue
            addition = recall(asked, landing, told.name, told.n_bytes, told.sha256)
            if addition:
                results[told.name], self.sent[told.name] = told, addition
        return results


Sink = FolderSink | HubSink


def work_folder(output: Path) -> Path:
    """Return the folder that a stream works in; nothing of this name remains."""
    return output.with_name(output.name + ".stream")


def discard_work(output: Path) -> None:
    """Delete what an interrupted stream left; all of it is on the Hub."""
    folder = work_folder(output)
    if unfinished(folder).exists():
        with suppress(OutputError), open_workspace(folder, replace=False) as work:
            work.discard()


def _clear(planned: MergePlan, folder: Path) -> None:
    """Delete useless shards of an interrupted run: those cut short, or of another plan."""
    whole = {told.name for shard in planned.shards if (told := noted(shard, folder))}
    for path in folder.glob("*.safetensors"):
        if path.name not in whole:
            path.unlink()


def _require_room_for_shards(left: MergePlan, places: Places, folder: Path, means: Means) -> None:
    sizes = [layout.n_bytes for layout in left.layouts]
    largest = max(sizes, default=0)
    on_disk = sum(sizes) if isinstance(means.runner, Ray) else largest  # they do not wait
    needs = [needs for shard in left.shards for needs in needs_of(shard, elsewhere(places))]
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    n_bytes = on_disk + most_held(needs, largest, means.n_together) - there
    require_room(folder, n_bytes, "two shards and what is fetched ahead", "lower --max-shard-size")
