"""Fetch sources, and load them to measure or score: whole models, or byte ranges."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from lewis_hub.calibration.subject import CalibrationSet, Subject, Weights, in_folder
from lewis_hub.checkpoint.header import TensorHeader, torch_dtypes
from lewis_hub.checkpoint.pickles import convert
from lewis_hub.checkpoint.ranges import Location, Locations, SourceFiles, SourceTensor
from lewis_hub.checkpoint.reader import Checkpoint, Reader, read_tensor
from lewis_hub.display import Progress
from lewis_hub.documents import read_json
from lewis_hub.files import existing, require_room, size_of
from lewis_hub.hub import converted
from lewis_hub.hub.fetch import (
    CODE_FILES,
    SIDECAR_FILES,
    bytes_to_download,
    fetch,
    read_small,
    weight_files,
)
from lewis_hub.hub.ranges import ByteCounter, RemoteFiles
from lewis_hub.hub.source import Source, SourceFile, cache_root
from lewis_hub.merge.plan import MergeSettings, MergeSource, make_plan
from lewis_hub.merge.runners import Backend
from lewis_hub.merge.sidecars import SidecarSettings
from lewis_hub.workflow.merge import Folders, new_dtype, write_weights
from lewis_hub.workflow.open import OpenedSource, ties
from lewis_hub.workflow.resources import Loading

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FetchedSources:
    """The files of sources."""

    # pinned source -> source, of which at least configuration and tokenizer are on this disk
    sources: Mapping[str, Source]
    locations: Locations  # pinned source -> folder of its weights, or reader of byte ranges
    keeps_models: bool  # whether whole models may be on this disk; otherwise byte ranges are read
    count_bytes: Callable[[], int] | None = None  # counts the bytes that were read by ranges

    @property
    def folders(self) -> Folders:
        """Return pinned source -> folder with at least its configuration and tokenizer."""
        return {pinned: source.place for pinned, source in self.sources.items()}


def small_files(api: HfApi, source: Source) -> Path:
    """Fetch configuration and tokenizer; return their folder."""
    return fetch(api, source, lambda _: None, only=SIDECAR_FILES)


def code_files(api: HfApi, source: Source) -> None:
    """Fetch the Python files of a source."""
    fetch(api, source, lambda _: None, only=CODE_FILES)


def download(api: HfApi, sources: Sequence[Source], progress: Progress) -> dict[str, Path]:
    """Download whole sources that are not in the cache; return pinned source -> folder."""
    total = sum(bytes_to_download(source) for source in sources)
    with progress.stage("Downloading", total, "bytes") as advance:
        return {source.pinned: fetch(api, source, advance) for source in sources}


def fetch_whole(api: HfApi, sources: Sequence[Source], progress: Progress) -> FetchedSources:
    """Download whole sources."""
    folders = download(api, sources, progress)
    return FetchedSources({one.pinned: one for one in sources}, folders, keeps_models=True)


def open_ranges(api: HfApi, sources: Sequence[Source]) -> FetchedSources:
    """Fetch small files; weights that are not in the cache are read by byte ranges."""
    locations: dict[str, Location] = {}
    counts: list[ByteCounter] = []
    for source in dict.fromkeys(sources):
        small_files(api, source)
        if bytes_to_download(source) == 0:
            locations[source.pinned] = fetch(api, source, lambda _: None)
        else:
            files = RemoteFiles(source, api.endpoint)
            locations[source.pinned] = files.fetch
            counts.append(files.received)
    return FetchedSources(
        {source.pinned: source for source in sources},
        locations,
        keeps_models=False,
        count_bytes=lambda: sum(one.n_bytes for one in counts),
    )


def require_disk(work: Path, download_bytes: int, made_bytes: int) -> None:
    """Refuse disks without room for download and new files; old files in `work` count as free."""
    left = sum(size_of(path) for path in work.rglob("*") if path.is_file())
    needs = ((cache_root(), download_bytes), (work, max(0, made_bytes - left)))
    of_disk: defaultdict[int, list[tuple[Path, int]]] = defaultdict(list)
    for folder, n_bytes in needs:
        of_disk[existing(folder).stat().st_dev].append((folder, n_bytes))
    for shares in of_disk.values():
        needed = sum(n_bytes for _, n_bytes in shares)
        where = " and ".join(str(folder) for folder, _ in shares)
        remedy = "use another disk: HF_HUB_CACHE names the folder for the download, -o that for "
        require_room(shares[0][0], needed, "download and merge", f"{remedy}the merge", where)


def convert_pickles(
    sources: Sequence[Source], code: Collection[str], api: HfApi, progress: Progress
) -> dict[Source, Source]:
    """Download pickled weights and convert them to safetensors; return source -> converted source.

    `code` names the sources whose Python files are copied.
    """
    found, folders = {}, download(api, sources, progress)
    for source in sources:
        has_code, folder = source.name in code, folders[source.pinned]
        if has_code:
            code_files(api, source)
        convert_into = partial(_convert_into, source, folder, api, progress)
        found[source] = converted.store_converted(source, convert_into, code=has_code)
    return found


def _convert_into(
    source: Source, folder: Path, api: HfApi, progress: Progress, work: Path
) -> list[SourceFile]:
    config = read_json(read_small(api, source, "config.json") or b"{}")
    files = {path: folder / path for path in converted.pickles_of(source)}
    total = source.size_bytes(weight_files(source))
    with progress.stage(f"Converting {source.name}", total, "bytes") as advance:
        written = convert(source.pinned, files, work, advance, ties=ties(config))
    return [SourceFile(f.name, f.n_bytes, f"sha256:{f.sha256}") for f in written]


REMEDY = (
    "So --stream cannot measure it: merge without --stream on a machine with enough room. For a "
    "guide, `lewis-hub importance` is enough there: this run uses the folder importance/ that it "
    "writes beside the recipe."
)


@dataclass(frozen=True)
class ModelLoader:
    """Loads the sources of a merge."""

    files: FetchedSources
    scratch: Path  # folder for temporary files
    loading: Loading
    means: Backend  # runner and device that write out weights
    max_shard_bytes: int  # limit for a file, and for bytes that are fetched ahead
    progress: Progress

    def subject(self, source: OpenedSource, *sets: CalibrationSet) -> Subject:
        """Return a source and its texts, which are in its own token ids."""
        folder = self.files.folders[source.pinned]
        return Subject(source.pinned, source.digest, source.role, folder, sets)

    def materialize_checkpoint(self, source: OpenedSource) -> Path:
        """Return a folder from which transformers can load a source.

        It is the source's own folder if its files hold the weights as they are merged. An adapter
        on its base is written to `scratch` in the dtypes of the base, and a quantised model in
        bfloat16: transformers runs 8-bit floats only on a GPU, and measures need plain weights.
        The folder of an earlier call is used again.
        """
        if not source.checkpoint.is_computed:
            return self.files.folders[source.pinned]
        expert = MergeSource(source.checkpoint, source.digest)
        alone = make_plan(MergeSettings("linear", None, (expert,)), self.max_shard_bytes)
        as_what = "on its base" if source.source.is_adapter else "in bfloat16"
        of_depth = source.checkpoint.base is not None and not source.source.is_adapter
        if of_depth or any(tensor.permuted for tensor in source.checkpoint.tensors.values()):
            as_what = "aligned"
        title = f"Writing out {source.name} {as_what}"
        means = replace(self.means, is_read_next=True)
        output = self._materialized(source)
        write_weights(alone, self.files.locations, output, means, self.progress, title)
        return self._write_configuration(source)

    def load_for_calibration(self, subject: Subject, source: OpenedSource) -> Subject:
        """Return the subject with weights to load, by block if it must be or takes less memory."""
        if not self.files.keeps_models:
            return replace(subject, weights=self._weights_by_ranges(source))
        placed = replace(subject, folder=self.materialize_checkpoint(source))
        return choose_loading(placed, source.checkpoint, self.loading, self.scratch)

    def _materialized(self, source: OpenedSource) -> Path:
        name = hashlib.sha256(f"{source.pinned} {source.digest}".encode()).hexdigest()[:16]
        return self.scratch / "materialized" / name

    def _write_configuration(self, source: OpenedSource) -> Path:
        """Return a folder in `scratch` with the configuration of a source."""
        output = self._materialized(source)
        output.mkdir(parents=True, exist_ok=True)
        donor = source.checkpoint.base or source.pinned
        SidecarSettings(donor, new_dtype(source.checkpoint)).write(self.files.sources, output)
        return output

    def _weights_by_ranges(self, source: OpenedSource) -> Weights:
        """Read the weights of a block while the block before it is measured."""
        checkpoint = source.checkpoint
        folder = self.files.folders[source.pinned]
        if checkpoint.is_computed:
            folder = self._write_configuration(source)
        name = hashlib.sha256(source.pinned.encode()).hexdigest()[:16]
        ranges = self.scratch / f"ranges-{name}"  # several sources may be read at once

        from lewis_hub.merge.readers import open_source  # imports the compiler

        def parts(
            lists: Sequence[Sequence[TensorHeader]],
        ) -> Generator[dict[str, Tensor], None, None]:
            steps = [
                [SourceTensor(source.pinned, tensor, checkpoint.base) for tensor in tensors]
                for tensors in lists
            ]
            with (
                SourceFiles(self.files.locations, steps, ranges, self.max_shard_bytes) as files,
                open_source(source.pinned, checkpoint.base, files.reader) as reader,
            ):
                for tensors in lists:
                    found = {tensor.name: _as_written(reader, tensor) for tensor in tensors}
                    files.step_done()
                    yield found

        return Weights(folder, checkpoint, parts, REMEDY, self.scratch)


def _as_written(reader: Reader, tensor: TensorHeader) -> Tensor:
    """Read a tensor in float32; a computed tensor is rounded as if it came from a file."""
    found = read_tensor(reader, tensor)
    if not tensor.is_computed:
        return found
    return found.to(torch_dtypes()[tensor.kept_dtype]).float()


def choose_loading(
    subject: Subject, checkpoint: Checkpoint, loading: Loading, scratch: Path
) -> Subject:
    """Return a subject of a complete folder, block by block if this is needed or saves memory."""
    by_block = loading.goes_by_block(checkpoint, subject.n_tokens)
    weights = in_folder(subject.source, subject.folder, scratch) if by_block else None
    return replace(subject, weights=weights, may_be_whole=not loading.is_too_large(checkpoint))
