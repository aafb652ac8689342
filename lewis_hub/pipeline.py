"""START HERE: a recipe becomes a published model, in the order in which it happens.

    prepare: recipe - MergeJob        run: fetch - calibrate - merge - evaluate - report

`workflow/` has a module for each of these steps. A sink is the folder or the Hub repo that a run
writes to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from lewis_hub.calibration.meta_model import FEWER, STATES
from lewis_hub.calibration.profile import ImportanceProfile
from lewis_hub.errors import CalibrationError, OutputError, RecipeError
from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.evaluate.scores import Scores
from lewis_hub.files import require_room, require_writable
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.hub.publish import Published
from lewis_hub.merge.runners import Ray
from lewis_hub.merge.workspace import open_workspace
from lewis_hub.progress import Progress, Silent
from lewis_hub.recipe.schema import Evaluation, ModelReference, Publishing, Recipe
from lewis_hub.report.cost import Costs
from lewis_hub.workflow import fetch, report, single_model
from lewis_hub.workflow import publish as publishing
from lewis_hub.workflow import verify as verification
from lewis_hub.workflow.calibrate import (
    Guidance,
    Sets,
    calibration_sets,
    draw_texts,
    guide,
    require_by_ranges,
)
from lewis_hub.workflow.check import CheckReport
from lewis_hub.workflow.contamination import ScoredTasks
from lewis_hub.workflow.evaluate import Scored, TwinMaker, score_merge
from lewis_hub.workflow.examine import examine, resolve_inputs
from lewis_hub.workflow.execution import Execution
from lewis_hub.workflow.job import MergeJob, compile_job, prepare
from lewis_hub.workflow.load import ModelLoader
from lewis_hub.workflow.merge import finish_model
from lewis_hub.workflow.publish import Destination
from lewis_hub.workflow.resolve import hub_api, resolve_one
from lewis_hub.workflow.sinks import FolderSink, HubSink, Sink, discard_work, work_folder
from lewis_hub.workflow.statistics import Gathered, gather, require_by_block, wanted
from lewis_hub.workflow.verify import Verdict

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Merged:
    """A finished merge.

    Attributes:
        output: its folder; not there where the target repo holds the merge already.
        gate: the quality gate's verdict on the scores.
        published: what the target repo holds, where that is this very merge.
    """

    status: Literal["merged", "unchanged"]
    output: Path
    scores: Scores | None
    gate: GateVerdict | None = None
    published: Published | None = None


@dataclass(frozen=True)
class Calibrated:
    """A finished calibration: a folder with the profile, the schedule and their plots.

    Attributes:
        sizes: tensor -> number of parameters, of the merge.
    """

    output: Path
    profile: ImportanceProfile | None
    schedule: DensitySchedule
    sizes: Mapping[str, int]


def check(
    recipe: Recipe, *, allow_pickle: bool = False, max_memory_bytes: int | None = None
) -> CheckReport:
    """Tell all that can be known before a download: headers and JSON files are read, no weights.

    Args:
        recipe: what to merge.
        allow_pickle: whether sources may have pickled weights alone.
        max_memory_bytes: of a model while it is measured; a larger one is never loaded whole.

    Raises:
        LewisHubError: a source cannot be found or read. Sources that are there and do not fit
            together are `problems` of the report.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> lewis_hub.check(recipe).problems
        ()
    """
    api = hub_api()
    execution = Execution(max_memory_bytes=max_memory_bytes, allow_code=True)
    inputs = resolve_inputs(recipe, api, allow_pickle=allow_pickle)
    examined = examine(recipe, execution, inputs, api)
    found, notes = examined.report, [*examined.report.notes]
    problems = found.problems
    if not problems:
        job = compile_job(recipe, execution, examined, api)
        try:
            if job.statistics:
                require_by_block(job.statistics, api)
        except CalibrationError as error:
            problems = (" ".join(str(error).split("\n")),)
    try:
        made_bytes = found.disk_bytes - found.states_bytes
        fetch.require_disk(Path(recipe.locate("merged.partial")), found.download_bytes, made_bytes)
    except OutputError as error:
        told = "A merge on this machine is refused before the download, but with `--stream`."
        notes.append(f"{error.path}: {error.problem} {told}")
    return replace(found, problems=problems, notes=tuple(notes))


def calibrate(
    recipe: Recipe,
    output: Path | str,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Measure, decide and draw, without merging.

    Args:
        recipe: has a `guide`.
        output: folder for `importance.json`, `density.json` and their plots; what it holds
            already is reused where source, data and settings are the same.
        execution: device, and what is allowed; None: on this machine's CPU.
        progress: told how far it is; None: nobody is.

    Raises:
        LewisHubError: a source cannot be used, or the calibration data does not fit.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> calibrated = lewis_hub.calibrate(recipe, tmp_path / "importance")
        >>> densities = calibrated.schedule.experts[0].tensors.values()
        >>> min(densities), max(densities)
        (0.3, 0.8)
    """
    output, progress, api = Path(output), progress or Silent(), hub_api()
    require_writable(output)
    measured = recipe.model_copy(update={"evaluate": None, "publish": None})
    job = prepare(measured, execution or Execution(), api, progress) if recipe.guide else None
    if job is None or job.guide is None:
        problem = "the recipe has no `guide`, so there is nothing to calibrate."
        raise RecipeError("recipe", "guide", problem, "Add a `guide:` with its calibration data.")
    sets = _draw(job, job.scored_tasks(api, progress), api, progress)
    output.mkdir(parents=True, exist_ok=True)
    if n_bytes := job.disk_needs(sets).states_bytes:
        require_room(output, n_bytes, STATES, FEWER)
    files = fetch.fetch_whole(api, [one.source for one in job.sources.models], progress)
    with TemporaryDirectory(prefix=".scratch-", dir=output) as scratch:
        loader = job.loader(files, Path(scratch), progress)
        guidance = guide(job.guide, sets, loader, [output / "importance.json"])
    report.write_guidance(output, guidance)
    return Calibrated(output, guidance.profile, guidance.schedule, job.plan.sizes())


def merge_models(
    recipe: Recipe,
    output: Path | str,
    execution: Execution | None = None,
    progress: Progress | None = None,
    target: Destination | None = None,
) -> Merged:
    """Pull, check, calibrate, merge, score and report; the folder appears whole or not at all.

    Args:
        recipe: what to merge.
        output: folder to make; an interrupted run's work in ``OUTPUT.partial`` is taken up.
        execution: how to run; None: on all cores of this machine.
        progress: told how far it is; None: nobody is.
        target: from `open_target`: a repo that holds this very merge already ends the work before
            any weight is downloaded, and what its merge measured is not measured again. A former
            merge in `output` that it holds, file by file, is replaced.

    Raises:
        LewisHubError: see the subclasses in `errors`; nothing half-done carries the name `output`.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> unscored = recipe.model_copy(update={"evaluate": None})
        >>> lewis_hub.merge_models(unscored, tmp_path / "merged").status
        'merged'
    """
    output, progress, api = Path(output), progress or Silent(), hub_api()
    job = prepare(recipe, execution or Execution(), api, progress)
    if not job.replaces and (unchanged := _made_before(job, output, target, api)):
        return unchanged
    if job.statistics:
        require_by_block(job.statistics, api)
    gives_way = target is not None and publishing.is_published(output, target, api)
    with open_workspace(output, replace=job.replaces or gives_way) as work:
        sink = FolderSink(work, target, api, progress)
        outcome = run(job, sink, api, progress)
        scored = outcome.scored
        scores, gate = (scored.scores, scored.gate) if scored else (None, None)
        return Merged("merged", sink.finish(outcome.files), scores, gate)


def _made_before(
    job: MergeJob, output: Path, target: Destination | None, api: HfApi
) -> Merged | None:
    """What the target repo or the output folder holds already, if it is this very merge."""
    held = publishing.published_already(target, job.planned, api) if target else None
    if target and held:
        previous = None if held.pull_request_url else target.previous
        scores = publishing.published_scores(previous, api)
        return Merged(
            "unchanged", output, scores, publishing.published_verdict(previous, api), held
        )
    if publishing.is_this_merge(output, job.planned):
        demands = job.evaluation.demands if job.evaluation else ()
        gate = publishing.judge_again(demands, output, job.repo, api)
        return Merged("unchanged", output, publishing.read_scores(output), gate)
    return None


def stream(
    recipe: Recipe,
    target: Destination,
    output: Path | str,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> Published:
    """Merge from Hub to Hub: no model is ever whole on this disk, and one commit comes last.

    Args:
        recipe: what to merge; it asks for no scores, and its guide measures block by block. What
            is scored later goes into `execution`, as `held_out`.
        target: from `open_target`.
        output: work lies beside it until all is on the Hub; then nothing is left here.
        execution: how to run; None: on all cores of this machine.
        progress: told how far it is; None: nobody is.

    Raises:
        LewisHubError: see the subclasses in `errors`; the repo is as it was, and a rerun goes on
            from the shards that were sent.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> unscored = recipe.model_copy(update={"evaluate": None, "guide": None})
        >>> target = lewis_hub.open_target(lewis_hub.Publishing(repo=f"{user}/streamed"))
        >>> lewis_hub.stream(unscored, target, tmp_path / "work").changed
        True
    """
    output, progress, api = Path(output), progress or Silent(), hub_api()
    _require_streamable(recipe)
    execution = replace(execution or Execution(), allow_code=False, allow_pickle=False)
    job = prepare(recipe, execution, api, progress)
    if not job.replaces and (held := publishing.published_already(target, job.planned, api)):
        discard_work(output)
        return held
    if job.statistics:
        require_by_block(job.statistics, api)
    with open_workspace(work_folder(output), replace=False) as work:
        sink = HubSink(work, target, api, progress)
        run(job, sink, api, progress)
        return sink.finish()


def _require_streamable(recipe: Recipe) -> None:
    """Refuse what needs whole models on the disk."""
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


@dataclass(frozen=True)
class Outcome:
    """What a run wrote.

    Attributes:
        files: paths of all files of the model.
        scored: None where nothing was scored.
    """

    files: tuple[str, ...]
    scored: Scored | None


def run(job: MergeJob, sink: Sink, api: HfApi, progress: Progress) -> Outcome:
    """Fetch, calibrate, merge, evaluate and report: the one sequence of every merge.

    Raises:
        LewisHubError: see the subclasses in `errors`.
    """
    sink.require_room(job.disk_needs(keeps_models=sink.keeps_models))
    tasks = job.scored_tasks(api, progress)
    sets = _draw(job, tasks, api, progress)  # small files; the weights come after
    sink.require_room(job.disk_needs(sets, keeps_models=sink.keeps_models))
    costs = Costs()
    with costs.measure("download"):
        fetch.code_files(api, job.code)
        files = sink.open_sources([one.source for one in job.sources.models])
    loader = job.loader(files, sink.scratch, progress)
    guidance, gathered = _measure(job, sets, loader, sink, costs)
    counts = None if isinstance(job.means.runner, Ray) else files.count_bytes
    with costs.measure("merge", counts):
        planned = job.plan.plan(guidance.schedule if guidance else None, gathered.statistics)
        places = {**files.places, **gathered.folders}
        shards = sink.write(planned, places, job.means)
        merged = finish_model(planned, shards, job.sidecars, files.folders, sink.folder)
    scored = None
    if job.evaluation and tasks:
        maker = TwinMaker(job.plan, job.sidecars, loader, job.statistics, sets)
        with costs.measure("evaluate"):
            scored = score_merge(job.evaluation, tasks, merged, guidance, maker)
        scored = publishing.judge_scores(job.evaluation.demands, scored, job.repo, api)
    written = report.write(job.reporting, merged, guidance, gathered, scored, costs)
    return Outcome(written, scored)


def _draw(job: MergeJob, tasks: ScoredTasks | None, api: HfApi, progress: Progress) -> Sets:
    """Draw each expert's calibration texts; none of them holds an item that is scored."""
    drawn = draw_texts(job.texts, tasks, api, progress)
    return calibration_sets(job.texts, drawn, job.sources.experts)


def _measure(
    job: MergeJob, sets: Sets, loader: ModelLoader, sink: Sink, costs: Costs
) -> tuple[Guidance | None, Gathered]:
    """Run the texts through the sources, for the guide and for second moments."""
    guidance, gathered, counts = None, Gathered(), loader.files.count_bytes
    statistics, scratch = job.statistics, sink.scratch
    if job.guide:
        stores = sink.profiles(job.guide.beside)
        if not sink.keeps_models:
            require_by_ranges(job.guide, sets, loader, stores)
        with costs.measure("calibrate", counts):
            left = wanted(statistics, sets, loader, scratch) if statistics else ()
            guidance = guide(job.guide, sets, loader, stores, left)
    if statistics:
        with costs.measure("gather", counts):
            schedule = guidance.schedule if guidance else None
            gathered = gather(statistics, sets, loader, schedule, scratch)
    return guidance, gathered


def evaluate_model(
    model: ModelReference,
    asked: Evaluation,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score one model on lm-eval tasks.

    Args:
        model: a repo, repo@revision or folder.
        asked: tasks, own task files and limit.
        execution: device, and whether benchmarks may run code.
        progress: told how far it is; None: nobody is.

    Raises:
        LewisHubError: the model or a task cannot be used.

    Example:
        >>> tasks = str(lewis_hub.zoo_folder() / "tasks")
        >>> asked = lewis_hub.Evaluation(tasks=("zoo_reverse",), include=tasks, limit=5)
        >>> model = lewis_hub.ModelReference(name="zoo/expert-reverse")
        >>> scores = lewis_hub.evaluate_model(model, asked)
        >>> scores.tasks["zoo_reverse"].n
        5
    """
    execution, progress = execution or Execution(), progress or Silent()
    execution.require_usable()
    api = hub_api()
    source = resolve_one(model, api, allow_pickle=execution.allow_pickle)
    return single_model.score_one(source, asked, execution, api, progress)


def verify(
    model: ModelReference,
    execution: Execution | None = None,
    progress: Progress | None = None,
    *,
    rebuild: bool = False,
    public_key: Path | None = None,
) -> Verdict:
    """Hold a merged model against its lock; nothing of it is run or loaded.

    Args:
        model: a repo, repo@revision or folder that a merge made.
        execution: how to make it again.
        progress: told how far it is; None: nobody is.
        rebuild: also make the merge again from the lock alone, and compare the bytes of all that
            is loaded.
        public_key: PEM file of the key that it must be signed with; None: no signature is looked
            into.

    Raises:
        LewisHubError: there is no lock, it was changed, or a source is no longer there.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> plain = recipe.model_copy(update={"evaluate": None, "guide": None})
        >>> merged = lewis_hub.merge_models(plain, tmp_path / "merged")
        >>> lewis_hub.verify(lewis_hub.ModelReference(name=str(merged.output))).problems
        ()
    """
    progress, api = progress or Silent(), hub_api()
    execution = execution or Execution()
    source = resolve_one(model, api)
    lock = verification.read_lock(source, api)
    verdict = verification.verify_files(source, lock, api, progress, public_key)
    if not rebuild:
        return verdict
    with TemporaryDirectory() as folder:
        recipe = verification.recipe_of(lock, source, allow_code=execution.allow_code)
        same = replace(execution, max_shard_bytes=lock.max_shard_bytes)
        made = merge_models(recipe, Path(folder) / "merged", same, progress)
        again = verification.read_lock(resolve_one(ModelReference(name=str(made.output)), api), api)
    differing = verification.compare_models(lock, again)
    return replace(verdict, problems=(*verdict.problems, *differing))


def open_target(asked: Publishing) -> Destination:
    """Look at the repo that will be pushed to, before any work.

    Raises:
        PublishError: no token, one that may not write there, or no such namespace.
    """
    return publishing.open_destination(asked, hub_api())


def publish(
    folder: Path, target: Destination, progress: Progress | None = None, *, force: bool = False
) -> Published:
    """Push a merged model in one commit, or in none where nothing changed.

    What the quality gate refused becomes a pull request where the gate says so.

    Args:
        folder: what `merge` made.
        target: from `open_target`, before the work began: what somebody pushed to the repo since
            then is never overwritten.
        progress: told how far it is; None: nobody is.
        force: push what the quality gate refused, as if it had passed.

    Raises:
        PublishError: the repo is as it was before, or lacks the tag alone.
        GateRefusedError: so it is here.

    Example:
        >>> target = lewis_hub.open_target(lewis_hub.Publishing(repo=f"{user}/my-merge"))
        >>> folder = lewis_hub.zoo_folder() / "base"
        >>> published = lewis_hub.publish(folder, target)
        >>> published.changed, lewis_hub.publish(folder, target).changed
        (True, False)
    """
    return publishing.push(folder, target, hub_api(), progress or Silent(), force=force)
