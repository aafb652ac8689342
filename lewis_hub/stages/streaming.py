"""Stream: from Hub to Hub. Neither a source nor the merge is ever whole on this disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.window import Place, most_held
from lewis_hub.errors import PublishError, RecipeError
from lewis_hub.files import require_room
from lewis_hub.hub.ahead import recall, send
from lewis_hub.hub.failures import Asked
from lewis_hub.hub.fetch import CODE_FILES, bytes_to_download, fetch
from lewis_hub.hub.publish import Published, open_repo
from lewis_hub.hub.ranges import RemoteFiles
from lewis_hub.hub.source import Source
from lewis_hub.merge.cluster import Ray
from lewis_hub.merge.engine import ShardResult, make_shards, noted, write_index
from lewis_hub.merge.needs import needs_of
from lewis_hub.merge.plan import MergePlan
from lewis_hub.merge.workspace import Workspace
from lewis_hub.recipe import Recipe
from lewis_hub.report.cost import Costs
from lewis_hub.stages import calibration, merging, publishing, reporting
from lewis_hub.stages.downloading import small_files
from lewis_hub.stages.publishing import Destination
from lewis_hub.stages.sources import needs_grams
from lewis_hub.stages.standing import published_importance
from lewis_hub.stages.statistics import Gathered

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

    from lewis_hub.guides.density import DensitySchedule
    from lewis_hub.stages.calibration import Guidance, Sets
    from lewis_hub.stages.execution import Folders, Step
    from lewis_hub.stages.merging import MergedModel

N_ON_DISK = 2  # shards: one is made while the one before is sent


@dataclass(frozen=True)
class Sent:
    """Shards that are on the Hub and no longer here, by name."""

    results: dict[str, ShardResult]
    additions: dict[str, CommitOperationAdd]


def require_streamable(recipe: Recipe) -> None:
    """Refuse what needs whole models on the disk.

    Raises:
        RecipeError: the recipe asks for scores, or for statistics.
    """
    if needs_grams(recipe):
        problem = "statistics are gathered by whole models, and --stream keeps none."
        remedy = "Merge without --stream, or by a method and a trim that need no statistics."
        raise RecipeError("recipe", "merge_method", problem, remedy)
    if recipe.evaluate:
        problem = "scoring needs whole models on the disk, and --stream keeps none."
        remedy = "Add --no-eval, and score the result where it fits: `lewis-hub evaluate REPO`."
        raise RecipeError("recipe", "evaluate", problem, remedy)


def work_folder(output: Path) -> Path:
    """What the work is done beside; nothing of this name remains."""
    return output.with_name(output.name + ".stream")


def run(step: Step, sets: Sets, destination: Destination, work: Workspace) -> Published:
    """Merge from Hub to Hub.

    Args:
        step: what is merged, and how it runs.
        sets: from `calibration_sets`.
        destination: of the one commit, which comes last.
        work: keeps notes of the shards that were sent, so that a rerun need not make them again.

    Raises:
        CheckpointError: a source is broken, or holds NaN or infinity.
        OutputError: there is not enough room for two shards.
        PublishError: the repo is as it was before, or holds nothing yet where it is new.
        RecipeError: the guide has to load whole models.
        SourceError: bytes of a source cannot be had.
    """
    costs = Costs()
    with costs.measure("download"):
        folders = {s.pinned: small_files(step.api, s) for s in step.inputs.models}
        if step.inputs.donor.name in step.recipe.allow_code:
            fetch(step.api, step.inputs.donor, lambda _: None, only=CODE_FILES)
    former = published_importance(destination.former, step.api, work.scratch)
    guidance = _guidance(step, sets, folders, work, former) if step.recipe.guide else None
    model = work.scratch / "model"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    with costs.measure("merge"):
        schedule = guidance.schedule if guidance else None
        merged, sent = _make(step, schedule, folders, destination, model)
    reporting.write(step, merged, guidance, Gathered(), None, costs)
    return publishing.push(model, destination, step.api, step.progress, sent, force=False)


def _guidance(
    step: Step, sets: Sets, folders: Folders, work: Workspace, former: list[Path]
) -> Guidance:
    stores = [work.scratch / "importance.json", *former]
    stores.append(Path(step.recipe.locate("importance")) / "importance.json")
    unknown = calibration.unmeasured(step, sets, folders, stores)
    if unknown:
        found = ", ".join(dict.fromkeys(unknown))
        problem = f"calibration has to load {found}, and --stream keeps no whole model."
        remedy = (
            "Run `lewis-hub importance` where they fit: the folder importance/ that it leaves "
            "beside the recipe is used here. Or name a guide that measures nothing."
        )
        raise RecipeError("recipe", "guide", problem, remedy)
    return calibration.guide(step, sets, folders, work.scratch, stores)


def _make(
    step: Step,
    schedule: DensitySchedule | None,
    folders: Folders,
    destination: Destination,
    model: Path,
) -> tuple[MergedModel, Mapping[str, CommitOperationAdd]]:
    asked = Asked(step.api, destination.asked.repo, kind=PublishError)
    open_repo(asked, destination.asked.landing, private=destination.asked.private)
    planned = merging.plan_of(step, schedule)
    shards = model.with_name("shards")
    shards.mkdir(exist_ok=True)
    made = planned.allowing_nan if step.execution.allow_nan else planned
    sent = _send_all(step, made, shards, asked, destination)
    merging.say_mended(step, sent.results)
    results = {layout.name: sent.results[layout.name] for layout in planned.layouts}
    results |= write_index(planned, model)
    return merging.beside(step, planned, results, folders, model), sent.additions


def _send_all(
    step: Step, planned: MergePlan, folder: Path, asked: Asked, destination: Destination
) -> Sent:
    """Make every shard that the Hub does not have yet, and send each while the next is made."""
    execution, landing = step.execution, destination.asked.landing
    places = {source.pinned: _place(step, source) for source in step.inputs.models}
    sent = _sent_before(planned, folder, asked, destination)
    left = MergePlan(tuple(s for s in planned.shards if s.layout.name not in sent.results))
    _require_room(left, places, folder, step)

    def deliver(result: ShardResult) -> None:
        file = folder / result.name
        sent.additions[result.name] = send(asked, landing, file, result.sha256)
        file.unlink()

    under_way: Future[None] | None = None
    with (
        step.progress.stage("Merging on the way", planned.n_bytes, "bytes") as advance,
        ThreadPoolExecutor(1) as pool,  # after an error too, what is being sent is sent
    ):
        advance(sum(result.n_bytes for result in sent.results.values()))
        means = execution.means(is_read_next=True)
        for result in make_shards(left, places, folder, means, advance):
            sent.results[result.name] = result
            if under_way:
                under_way.result()
            under_way = pool.submit(deliver, result)
        if under_way:
            under_way.result()
    return sent


def _sent_before(planned: MergePlan, folder: Path, asked: Asked, destination: Destination) -> Sent:
    """What an interrupted run sent, as far as the Hub still has it."""
    sent = Sent({}, {})
    for shard in planned.shards:
        told = noted(shard, folder)
        if told is None or (folder / told.name).exists():
            continue
        landing = destination.asked.landing
        addition = recall(asked, landing, told.name, told.n_bytes, told.sha256)
        if addition:
            sent.results[told.name], sent.additions[told.name] = told, addition
    return sent


def _place(step: Step, source: Source) -> Place:
    """Where a source's weights are read: here where they are here, else by byte ranges."""
    if bytes_to_download(step.api, source) == 0:
        return fetch(step.api, source, lambda _: None)
    return RemoteFiles(source, step.api.endpoint).fetch


def _require_room(left: MergePlan, places: Mapping[str, Place], folder: Path, step: Step) -> None:
    sizes = sorted((layout.n_bytes for layout in left.layouts), reverse=True)
    if not isinstance(step.execution.workers, Ray):  # its workers do not wait for what is sent
        sizes = sizes[:N_ON_DISK]
    elsewhere = [label for label, place in places.items() if not isinstance(place, Path)]
    ranges = most_held([needs for s in left.shards for needs in needs_of(s, elsewhere)])
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    n_bytes = sum(sizes) + ranges - there
    require_room(folder, n_bytes, "two shards and what is fetched ahead", "lower --max-shard-size")
