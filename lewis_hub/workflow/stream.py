"""Stream: from Hub to Hub. Neither a source nor the merge is ever whole on this disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.ranges import Location, Locations, scratch_bytes
from lewis_hub.errors import OutputError, PublishError, RecipeError
from lewis_hub.files import require_room
from lewis_hub.hub.commit import recall, send
from lewis_hub.hub.failures import Asked
from lewis_hub.hub.fetch import CODE_FILES, bytes_to_download, fetch
from lewis_hub.hub.publish import Published, open_repo
from lewis_hub.hub.ranges import Arrived, RemoteFiles
from lewis_hub.merge.engine import ShardResult, make_shards, noted, write_index
from lewis_hub.merge.plan import MergePlan, informed
from lewis_hub.merge.runners import Ray
from lewis_hub.merge.workspace import Workspace, open_workspace, unfinished
from lewis_hub.recipe.schema import Recipe
from lewis_hub.report.cost import Costs
from lewis_hub.workflow import calibrate, merge, publish, report
from lewis_hub.workflow.check import statistics_bytes
from lewis_hub.workflow.existing import published_importance
from lewis_hub.workflow.fetch import require_room_for_texts, small_files
from lewis_hub.workflow.gather import gather, wanted
from lewis_hub.workflow.grams import Gathered
from lewis_hub.workflow.publish import Destination
from lewis_hub.workflow.resolve import needs_grams

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

    from lewis_hub.workflow.calibrate import Sets
    from lewis_hub.workflow.job import Folders, Step
    from lewis_hub.workflow.merge import MergedModel


@dataclass(frozen=True)
class Sent:
    """Shards that are on the Hub and no longer here, by name."""

    results: dict[str, ShardResult]
    additions: dict[str, CommitOperationAdd]


def require_streamable(recipe: Recipe) -> None:
    """Refuse what needs whole models on the disk.

    Raises:
        RecipeError: the recipe asks for scores.
    """
    if recipe.evaluate is None:
        return
    problem = "scoring needs whole models on the disk, and --stream keeps none."
    where = "evaluate"
    remedy = "Add --no-eval, and score the result where it fits: `lewis-hub evaluate REPO`."
    if recipe.evaluate.gate:
        where = "evaluate.gate"
        remedy = (
            "A gate decides by them before anything is pushed. Merge without --stream where the "
            "models fit, such as by `--on jobs`; or remove the gate, then add --no-eval."
        )
    raise RecipeError("recipe", where, problem, remedy)


def work_folder(output: Path) -> Path:
    """What the work is done beside; nothing of this name remains."""
    return output.with_name(output.name + ".stream")


def forget(output: Path) -> None:
    """Delete what an interrupted run left; all of it is on the Hub."""
    folder = work_folder(output)
    if unfinished(folder).exists():
        with suppress(OutputError), open_workspace(folder, replace=False) as work:
            work.discard()


def run(step: Step, sets: Sets, destination: Destination, work: Workspace) -> Published:
    """Calibrate and merge from Hub to Hub.

    Args:
        step: what is merged, and how it runs.
        sets: from `calibration_sets`.
        destination: of the one commit, which comes last.
        work: keeps what was measured, and notes of the shards that were sent, so that a rerun need
            not make them again.

    Raises:
        CalibrationError: a source cannot be measured block by block.
        CheckpointError: a source is broken, or holds NaN or infinity.
        OutputError: there is not enough room for two shards, or for the texts' hidden states.
        PublishError: the repo is as it was before, or holds nothing yet where it is new; or lacks
            the tag alone.
        RecipeError: the guide has to load whole models.
        SourceError: bytes of a source cannot be had.
    """
    costs = Costs()
    with costs.measure("download"):
        folders = {s.pinned: small_files(step.api, s) for s in step.inputs.models}
        if step.inputs.donor.name in step.recipe.allow_code:
            fetch(step.api, step.inputs.donor, lambda _: None, only=CODE_FILES)
    step, fetched = _placed(step)
    former = published_importance(destination.former, step.api, work.scratch)
    stores = [work.scratch / "importance.json", *former]
    stores.append(Path(step.recipe.locate("importance")) / "importance.json")
    guidance, gathered = None, Gathered()
    if step.recipe.guide:
        _require_by_block(step, sets, folders, stores)
    require_room_for_texts(step, sets, work.scratch)
    _require_statistics_fit(step, work.scratch)
    if step.recipe.guide:
        with costs.measure("calibrate", fetched):
            left = wanted(step, sets, folders, work.scratch)
            guidance = calibrate.guide(step, sets, folders, work.scratch, stores, left)
    if needs_grams(step.recipe):
        with costs.measure("gather", fetched):
            schedule = guidance.schedule if guidance else None
            gathered = gather(step, sets, folders, work.scratch, schedule)
    model = work.scratch / "model"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    planned = merge.plan_of(step, guidance.schedule if guidance else None)
    planned = informed(planned, gathered.statistics)
    step = replace(step, places={**step.places, **gathered.folders})
    counted = None if isinstance(step.execution.workers, Ray) else fetched
    with costs.measure("merge", counted):
        merged, sent = _make(step, planned, folders, destination, model)
    report.write(step, merged, guidance, gathered, None, costs)
    return publish.push(model, destination, step.api, step.progress, sent, force=False)


def _placed(step: Step) -> tuple[Step, Callable[[], int]]:
    """Where each source's weights are read: here where they are here, else by byte ranges.

    Also what counts the bytes that came.
    """
    places: dict[str, Location] = {}
    counts: list[Arrived] = []
    for source in dict.fromkeys(step.inputs.models):
        if bytes_to_download(step.api, source) == 0:
            places[source.pinned] = fetch(step.api, source, lambda _: None)
        else:
            files = RemoteFiles(source, step.api.endpoint)
            places[source.pinned] = files.fetch
            counts.append(files.arrived)
    return replace(step, places=places), lambda: sum(one.n_bytes for one in counts)


def _require_by_block(step: Step, sets: Sets, folders: Folders, stores: Sequence[Path]) -> None:
    unknown = calibrate.loaded_whole(step, sets, folders, stores)
    if unknown:
        found = ", ".join(dict.fromkeys(unknown))
        problem = f"it has to load {found} whole, and --stream keeps no whole model."
        remedy = (
            "Run `lewis-hub importance` where they fit: the folder importance/ that it leaves "
            "beside the recipe is used here. Or name a guide that measures block by block, such as "
            "`lewis`."
        )
        raise RecipeError("recipe", "guide", problem, remedy)


def _require_statistics_fit(step: Step, scratch: Path) -> None:
    """Refuse before the first weight what a disk cannot hold beside two shards."""
    donor = step.examined.checkpoints[step.inputs.donor.pinned]
    needed = statistics_bytes(step.recipe, len(step.inputs.experts), donor)
    if needed:
        there = sum(path.stat().st_size for path in scratch.rglob("*.safetensors"))
        shard = min(step.execution.max_shard_bytes, step.examined.report.output_bytes)
        n_bytes = needed + 2 * shard - there
        remedy = "take a disk that is larger, or a method that merges without statistics"
        require_room(scratch, n_bytes, "the statistics of all experts and two shards", remedy)


def _make(
    step: Step, planned: MergePlan, folders: Folders, destination: Destination, model: Path
) -> tuple[MergedModel, Mapping[str, CommitOperationAdd]]:
    asked = Asked(step.api, destination.asked.repo, kind=PublishError)
    open_repo(asked, destination.asked.landing, private=destination.asked.private)
    shards = model.with_name("shards")
    shards.mkdir(exist_ok=True)
    made = planned.allowing_nan if step.execution.allow_nan else planned
    sent = _send_all(step, made, shards, asked, destination)
    merge.say_mended(step, (result.mended for result in sent.results.values()))
    results = {layout.name: sent.results[layout.name] for layout in planned.layouts}
    results |= write_index(planned, model)
    return merge.beside(step, planned, results, folders, model), sent.additions


def _send_all(
    step: Step, planned: MergePlan, folder: Path, asked: Asked, destination: Destination
) -> Sent:
    """Make every shard that the Hub does not have yet, and send each before the next is made.

    What the next one needs is fetched meanwhile, as much of it as a second shard would take.
    """
    execution, landing = step.execution, destination.asked.landing
    _clear(planned, folder)
    sent = _sent_before(planned, folder, asked, destination)
    left = MergePlan(tuple(s for s in planned.shards if s.layout.name not in sent.results))
    _require_room(left, step.places, folder, step)
    with step.progress.stage("Merging on the way", planned.n_bytes, "bytes") as advance:
        advance(sum(result.n_bytes for result in sent.results.values()))
        means = execution.means(is_read_next=True)
        for result in make_shards(left, step.places, folder, means, advance):
            file = folder / result.name
            sent.additions[result.name] = send(asked, landing, file, result.sha256)
            sent.results[result.name] = result
            file.unlink()
    return sent


def _clear(planned: MergePlan, folder: Path) -> None:
    """Delete what an interrupted run left in vain: shards cut short, or of another plan."""
    whole = {told.name for shard in planned.shards if (told := noted(shard, folder))}
    for path in folder.glob("*.safetensors"):
        if path.name not in whole:
            path.unlink()


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


def _require_room(left: MergePlan, places: Locations, folder: Path, step: Step) -> None:
    sizes = [layout.n_bytes for layout in left.layouts]
    largest = max(sizes, default=0)
    means = step.execution.means(is_read_next=True)
    on_disk = sum(sizes) if isinstance(means.runner, Ray) else largest  # they do not wait
    steps = [tensors for shard in left.shards for tensors in shard.reads]
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    n_bytes = on_disk + scratch_bytes(places, steps, largest, means.n_together) - there
    require_room(folder, n_bytes, "two shards and what is fetched ahead", "lower --max-shard-size")
