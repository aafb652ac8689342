"""Plan exports of a merge before it is made, and write them beside its safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi

from lewis_hub.checkpoint.quantisation import KEYS
from lewis_hub.checkpoint.reader import TensorReader, local_checkpoint
from lewis_hub.display import Progress
from lewis_hub.documents import read_json
from lewis_hub.export.gguf import GgufPlan, gguf_bytes, plan_gguf, write_gguf
from lewis_hub.export.vocabulary import FILES
from lewis_hub.files import require_room
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.source import Source
from lewis_hub.merge.engine import ShardResult
from lewis_hub.merge.sidecars import SidecarSettings
from lewis_hub.merge.workspace import alone_at, lock_beside
from lewis_hub.recipe.formats import ExportFormat, file_name
from lewis_hub.workflow.merge import MergedModel, PlanSettings, output_headers
from lewis_hub.workflow.open import MergeSources

ELSEWHERE = "name a folder on another disk with -o"


def require_exportable(
    plan: PlanSettings, sidecars: SidecarSettings, sources: MergeSources, api: HfApi
) -> None:
    """Refuse a merge that cannot be written as GGUF, before any weights are read.

    Raises:
        LewisHubError: as `plan_gguf` says.
    """
    carried = sidecars.tokenizer
    labelled = {one.pinned: one.source for one in sources.models}
    files = small_files(labelled[carried.source if carried else sidecars.donor], api)
    config = dict(sources.donor.config if sidecars.config is None else sidecars.config)
    if carried:
        files = {name: files[name] for name in files if name not in carried.dropped}
        files |= {name: text.encode() for name, text in carried.written.items() if name in FILES}
        config |= carried.config
    config = {key: value for key, value in config.items() if key not in KEYS}
    plan_gguf(output_headers(plan.plan(None)), config, files)


def small_files(source: Source, api: HfApi) -> dict[str, bytes]:
    """Return the content of the files of a tokenizer, by name."""
    found = ((name, read_small(api, source, name)) for name in FILES)
    return {name: content for name, content in found if content is not None}


def export_merge(
    merged: MergedModel, exports: Sequence[ExportFormat], progress: Progress
) -> MergedModel:
    """Write a merge in other formats into its folder; the result lists them among its files."""
    written = write_exports(plan_of(merged.folder), merged.folder, merged.folder, exports, progress)
    return replace(merged, shards={**merged.shards, **written})


def plan_of(folder: Path) -> GgufPlan:
    """Plan the file of a model in a folder."""
    files = {name: folder / name for name in FILES if (folder / name).exists()}
    return plan_gguf(
        local_checkpoint(str(folder), folder),
        read_json((folder / "config.json").read_bytes()),
        {name: path.read_bytes() for name, path in files.items()},
    )


def write_exports(
    plan: GgufPlan,
    folder: Path,
    target: Path,
    exports: Sequence[ExportFormat],
    progress: Progress,
) -> Mapping[str, ShardResult]:
    """Write files of a model in `folder` to `target`; each gets its name when it is complete."""
    written = [_write_export(plan, folder, target, export, progress) for export in exports]
    return {one.name: one for one in written}


def _write_export(
    plan: GgufPlan, folder: Path, target: Path, export: ExportFormat, progress: Progress
) -> ShardResult:
    name, n_bytes = file_name(export), gguf_bytes(plan, export)
    with alone_at(lock_beside(target / name), target / name):
        require_room(target, n_bytes, f"the bytes of `{name}`", ELSEWHERE)
        partial = target / f".{name}.partial"
        partial.unlink(missing_ok=True)  # it may be a link
        title = f"Exporting {name}"
        try:
            with (
                progress.stage(title, n_bytes, "bytes") as advance,
                TensorReader(folder, plan.label) as reader,
            ):
                sha256 = write_gguf(plan, export, reader, partial, advance)
            size = partial.stat().st_size
            partial.replace(target / name)
        finally:
            partial.unlink(missing_ok=True)
    return ShardResult(name, sha256, size)
