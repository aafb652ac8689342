"""START HERE: the steps from a recipe to a published model, in order.

    prepare: recipe - MergeJob        run: fetch - calibrate - merge - evaluate - report

`workflow/` has a module for each step. A sink is the folder or the Hub repo that a run writes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi

from lewis_hub.calibration.subject import FEWER, STATES
from lewis_hub.display import Progress, Silent, to_html
from lewis_hub.distribution import requirement
from lewis_hub.errors import CalibrationError, ExportError, OutputError, RecipeError
from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.evaluate.scores import Scores
from lewis_hub.files import require_no_links_among, require_room, require_writable
from lewis_hub.hub.changes import local_states, telling_changes
from lewis_hub.hub.jobs import MOUNT, JobRequest
from lewis_hub.hub.publish import Published
from lewis_hub.merge.aligned import AlignedModel
from lewis_hub.merge.runners import Ray
from lewis_hub.merge.workspace import alone_with, open_workspace, scratch_folder
from lewis_hub.progress import BY_DEFAULT, Shown, shown
from lewis_hub.recipe.formats import exports_in
from lewis_hub.recipe.parts import parts_of, used
from lewis_hub.recipe.schema import Publishing, Recipe
from lewis_hub.report.cost import Costs
from lewis_hub.report.facts import Guided
from lewis_hub.report.findings import gate_sentences
from lewis_hub.workflow import evaluate, fetch, heads, merge, report, resolve
from lewis_hub.workflow import publish as publishing
from lewis_hub.workflow.align import align
from lewis_hub.workflow.calibrate import (
    MEASURED,
    Calibrated,
    guide,
    measurements,
    require_by_ranges,
)
from lewis_hub.workflow.check import CheckReport, together
from lewis_hub.workflow.examine import code_notes, examine
from lewis_hub.workflow.export import export_merge
from lewis_hub.workflow.finished import add_exports
from lewis_hub.workflow.generated import FILE as GENERATED
from lewis_hub.workflow.generated import requests_of, require_whole_models, write_texts
from lewis_hub.workflow.job import MergeJob, compile_job, prepare
from lewis_hub.workflow.mixture import measure_routers
from lewis_hub.workflow.parts import (
    examine_parameters,
    require_same_sources,
    require_sources,
    with_parts,
)
from lewis_hub.workflow.publish import Destination, Preflight
from lewis_hub.workflow.republish import has_recipe_of, republish
from lewis_hub.workflow.resolve import hub_api, resolve_inputs
from lewis_hub.workflow.resources import Execution
from lewis_hub.workflow.sinks import FolderSink, HubSink, Sink, discard_work, work_folder
from lewis_hub.workflow.statistics import Gathered, gather, require_by_block, wanted
from lewis_hub.workflow.steps import Finished, finished, record, steps_digest
from lewis_hub.workflow.texts import ScoredTasks, Sets, calibration_sets, draw_texts


@dataclass(frozen=True)
class Merged:
    """A finished merge."""

    status: Literal["merged", "unchanged"]
    output: Path  # its folder; not created if the target repo holds the merge already
    scores: Scores | None
    gate: GateVerdict | None = None  # the quality gate's verdict on the scores
    published: Published | None = None  # the merge in the target repo, if it is this merge

    @property
    def lines(self) -> tuple[str, ...]:
        """What the gate says of the merge, and where the merge is."""
        done = "Merged into" if self.status == "merged" else "Nothing changed: this merge is in"
        where = str(self.published) if self.published else f"{done} {self.output}"
        return (*(gate_sentences(self.gate) if self.gate else ()), where)

    def __repr__(self) -> str:
        return "\n".join([*self.lines, *([repr(self.scores)] if self.scores else [])])

    def _repr_html_(self) -> str:
        return to_html(*self.lines, *([self.scores.table] if self.scores else []))


def check(
    recipe: Recipe,
    *,
    allow_pickle: bool = False,
    max_memory_bytes: int | None = None,
    progress: Shown = BY_DEFAULT,
) -> CheckReport:
    """Check a merge before the download: only headers and JSON files are read, no weights.

    Args:
        recipe: the recipe.
        allow_pickle: whether sources may have only pickled weights.
        max_memory_bytes: a model that needs more is measured block by block; None: no limit.
        progress: True: shown on stderr; False: nothing; or what shows it.

    Raises:
        LewisHubError: a source cannot be found or read. Sources that do not fit together are
            `problems` of the report.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> lewis_hub.check(recipe).problems
        ()
    """
    if parts := parts_of(recipe):
        require_sources(recipe, hub_api())
        first = [one for one in parts if not used(one, [str(part.name) for part in parts])]
        checks = partial(
            check,
            allow_pickle=allow_pickle,
            max_memory_bytes=max_memory_bytes,
            progress=progress,
        )
        return together(
            {str(one.name): checks(one) for one in first}, examine_parameters((*parts, recipe))
        )
    api = hub_api()
    execution = Execution(max_memory_bytes=max_memory_bytes, allow_code=True)
    inputs = resolve_inputs(recipe, api, shown(progress), allow_pickle=allow_pickle)
    examined = examine(recipe, execution, inputs, api)
    result, notes = examined.report, [*examined.report.notes]
    problems = result.problems
    if not problems:
        try:
            job = compile_job(recipe, execution, examined, api)
            require_by_block(job.statistics, api)
            notes += code_notes(recipe)
        except (CalibrationError, ExportError) as error:
            problems = (" ".join(str(error).split("\n")),)
    try:
        place = Path(recipe.locate("merged.partial"))
        fetch.require_disk(place, result.download_bytes, result.disk_bytes - result.states_bytes)
    except OutputError as error:
        remedy = "A merge on this machine needs `--stream`; without it, the merge is refused."
        notes.append(f"{error.where}: {error.problem}. {remedy}")
    return replace(result, problems=problems, notes=tuple(notes))


def calibrate(
    recipe: Recipe,
    output: Path | str,
    execution: Execution | None = None,
    progress: Shown = BY_DEFAULT,
) -> Calibrated:
    """Measure the profile, compute the density schedule and draw both, without a merge.

    Args:
        recipe: has a `guide`.
        output: folder for `importance.json`, `density.json` and their plots; measurements of the
            same source, data and settings in it are used again.
        execution: device and permissions; None: this machine's CPU.
        progress: True: shown on stderr; False: nothing; or what shows it.

    Raises:
        LewisHubError: a source cannot be used, or the calibration data does not fit.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> calibrated = lewis_hub.calibrate(recipe, tmp_path / "importance")
        >>> densities = calibrated.schedule.experts[0].tensors.values()
        >>> min(densities), max(densities)
        (0.3, 0.8)
    """
    output, progress, api = Path(output), shown(progress), hub_api()
    require_no_links_among(output, (MEASURED,))
    require_writable(output)
    measured = recipe.model_copy(update={"evaluate": None, "publish": None})
    execution = execution or Execution()
    execution = replace(execution, held_out=recipe.evaluate or execution.held_out)
    job = prepare(measured, execution, api, progress) if recipe.guide else None
    if job is None or job.guide is None:
        problem = "the recipe has no `guide`, so there is nothing to calibrate."
        raise RecipeError("recipe", "guide", problem, "Add a `guide:` with its calibration data.")
    tasks = job.scored_tasks(api, progress)
    sets = _draw(job, tasks, api, progress)
    asked = requests_of(job.texts, sets, job.sources.experts)
    places = (output / MEASURED, output, *job.texts.beside)
    stores = [folder / GENERATED for folder in places]
    require_whole_models(asked, job.workload.loading, stores, keeps_models=True)
    output.mkdir(parents=True, exist_ok=True)
    if n_bytes := job.disk_needs(sets).states_bytes:
        require_room(output, n_bytes, STATES, FEWER)
    files = fetch.fetch_whole(api, [one.source for one in job.sources.models], progress)
    with (
        measurements(output, files.sources.values()) as folder,
        scratch_folder(output) as scratch,
    ):
        loader = job.loader(files, scratch, progress)
        sets = write_texts(job.texts, asked, sets, loader, stores, tasks).sets
        job, _ = _align(job, sets, loader, Costs())
        assert job.guide  # as above
        profiles = [one / "importance.json" for one in (folder, output)]
        guidance = guide(job.guide, sets, loader, profiles)
    report.write_guidance(output, guidance)
    return Calibrated(output, guidance.profile, guidance.schedule, job.plan.sizes())


def preflight(recipe: Recipe, asked: Publishing, output: Path | None, *, force: bool) -> Preflight:
    """Decide whether to merge, stream or skip a merge; only headers and small files are read.

    The profile of the published merge is saved in `importance/` beside the recipe, if there is no
    file yet, so that `merge` does not measure it again. A token with read access is enough; an
    invisible repo counts as empty. `output` is the folder that a merge on this disk would create;
    None: Hugging Face Jobs are to merge.
    """
    api = hub_api()
    job = prepare(recipe, Execution(replace=force), api, Silent())
    return publishing.preflight(job, asked, output, api, force=force)


def merge_models(
    recipe: Recipe,
    output: Path | str,
    execution: Execution | None = None,
    progress: Shown = BY_DEFAULT,
    target: Destination | None = None,
) -> Merged:
    """Fetch, calibrate, merge, score and report; the folder gets its name when it is complete.

    Args:
        recipe: the recipe; the merges that it uses are made first.
        output: folder to create; files of an interrupted run in ``OUTPUT.partial`` are used again.
        execution: execution settings; None: all cores of this machine.
        progress: True: shown on stderr; False: nothing; or what shows it.
        target: from `open_target`. If the repo holds this merge already, nothing is downloaded;
            known measurements in it are used again. A previous merge in `output` is replaced if
            the repo holds all of its files.

    Raises:
        LewisHubError: see the subclasses in `errors`; `output` does not exist.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> unscored = recipe.model_copy(update={"evaluate": None})
        >>> lewis_hub.merge_models(unscored, tmp_path / "merged").status
        'merged'
    """
    output, progress, execution = Path(output), shown(progress), execution or Execution()
    of_parts = replace(execution, held_out=recipe.evaluate or execution.held_out)

    merge_part = partial(merge_models, execution=of_parts, progress=progress)
    api, digest = hub_api(), None
    if sources := require_sources(recipe, api) if parts_of(recipe) else None:
        digest = steps_digest(recipe, sources.models, execution.max_shard_bytes)
        known = finished(recipe, digest, output) if digest and not execution.replace else None
        if known and (same := _made_before(known, output, target, api, progress)):
            return same
    with with_parts(recipe, output, merge_part, progress) as whole:
        job = prepare(whole, execution, api, progress)
        if sources:
            require_same_sources(recipe, sources, whole, output, api)
        merged = _merge_models(job, output, api, progress, target)
    if digest and not merged.published:  # else the folder may hold another merge
        record(output, digest)
    return merged


def _merge_models(
    job: MergeJob, output: Path, api: HfApi, progress: Progress, target: Destination | None
) -> Merged:
    gates = job.evaluation.gates if job.evaluation else ()
    asked = Finished(job.reporting, job.plan.sizes(), gates, job.repo, job.exports)
    if not job.replaces and (unchanged := _made_before(asked, output, target, api, progress)):
        return unchanged
    if target:
        publishing.require_free_tag(target, api)
    require_by_block(job.statistics, api)
    may_replace = job.replaces or (target and publishing.is_published(output, target, api))
    with open_workspace(output, replace=bool(may_replace)) as work:
        sink = FolderSink(work, target, api, progress)
        files, scored = run(job, sink, api, progress)
        scores, gate = (scored.scores, scored.gate) if scored else (None, None)
        return Merged("merged", work.finish(files), scores, gate)


def _made_before(
    asked: Finished, output: Path, target: Destination | None, api: HfApi, progress: Progress
) -> Merged | None:
    """Return the merge in the target repo or the output folder, if it is the planned merge."""
    planned = asked.reporting.planned
    published = publishing.published_already(target, planned, api) if target else None
    if target and published:
        scores, verdict = publishing.published_results(published, target, api)
        return Merged("unchanged", output, scores, verdict, published)
    found = publishing.complete_in(output)
    if found and publishing.same_model(found, planned):
        if left := [one for one in asked.exports if one not in exports_in(found.recipe)]:
            found = add_exports(output, found, left, progress)
        is_same = planned.recipe.get("publish") in (None, found.recipe.get("publish"))
        if not (is_same and has_recipe_of(found, output)):
            progress.say("Rewriting card, recipe and lock for the changed `publish` section")
            republish(asked.reporting, found, asked.parameters, output)
        gate = evaluate.judge_again(asked.gates, output, asked.repo, api)
        return Merged("unchanged", output, evaluate.read_scores(output), gate)
    return None


def stream(
    recipe: Recipe,
    target: Destination,
    output: Path | str,
    execution: Execution | None = None,
    progress: Shown = BY_DEFAULT,
) -> Published:
    """Merge from Hub to Hub: this disk never holds a whole model; one commit follows at the end.

    Args:
        recipe: the recipe; it has no `evaluate`, and its guide measures block by block. Tasks that
            are scored later belong into `execution.held_out`.
        target: from `open_target`.
        output: temporary files are beside this path until the commit.
        execution: execution settings; None: all cores of this machine.
        progress: True: shown on stderr; False: nothing; or what shows it.

    Raises:
        LewisHubError: see the subclasses in `errors`; the repo is unchanged, and a rerun continues
            after the uploaded shards.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> unscored = recipe.model_copy(update={"evaluate": None, "guide": None})
        >>> target = lewis_hub.open_target(lewis_hub.Publishing(repo=f"{user}/streamed"))
        >>> lewis_hub.stream(unscored, target, tmp_path / "work").changed
        True
    """
    output, progress, api = Path(output), shown(progress), hub_api()
    resolve.require_streamable(recipe)
    execution = replace(execution or Execution(), allow_code=False, allow_pickle=False)
    job = prepare(recipe, execution, api, progress)
    if not job.replaces and (published := publishing.published_already(target, job.planned, api)):
        discard_work(output)
        return published
    publishing.require_free_tag(target, api)
    require_by_block(job.statistics, api)
    with open_workspace(work_folder(output), replace=False) as work:
        sink = HubSink(work, target, api, progress)
        run(job, sink, api, progress)
        return sink.finish()


def run(
    job: MergeJob, sink: Sink, api: HfApi, progress: Progress
) -> tuple[tuple[str, ...], evaluate.Scored | None]:
    """Fetch, calibrate, merge, evaluate and report; return files and scores of the merge."""
    sink.require_room(job.disk_needs(keeps_models=sink.keeps_models))
    tasks = job.scored_tasks(api, progress)
    sets = _draw(job, tasks, api, progress)  # needs only small files, so errors show early
    sink.require_room(job.disk_needs(sets, keeps_models=sink.keeps_models))
    asked = requests_of(job.texts, sets, job.sources.experts)
    stores = sink.texts(job.texts.beside) if asked else []
    require_whole_models(asked, job.workload.loading, stores, keeps_models=sink.keeps_models)
    costs = Costs()
    with costs.measure("download"):
        if job.sidecars.code:
            fetch.code_files(api, job.sources.donor.source)
        files = sink.open_sources([one.source for one in job.sources.models])
    sink.work.resume(local_states(files.sources.values()))
    heads.require_copies(api, job.sources.distinct)
    loader = job.loader(files, sink.work.scratch, progress)
    with costs.measure("write texts") if asked else nullcontext():
        generated = write_texts(job.texts, asked, sets, loader, stores, tasks)
    sets = generated.sets
    job, aligned = _align(job, sets, loader, costs)
    guidance, gathered = _measure(job, sets, loader, sink, costs)
    gathered = replace(gathered, generated=generated.lines, aligned=aligned)
    counts = None if isinstance(job.means.runner, Ray) else files.count_bytes
    with costs.measure("merge", counts), telling_changes(files.sources.values()):
        planned = job.plan.plan(guidance.schedule if guidance else None, gathered.statistics)
        locations = {**files.locations, **gathered.folders}
        shards = sink.write(planned, locations, job.means)
        merged = merge.finish_model(planned, shards, job.sidecars, files.sources, sink.folder)
    if job.exports:
        with costs.measure("export"):
            merged = export_merge(merged, job.exports, progress)
    scored = None
    if job.evaluation and tasks:
        maker = evaluate.TwinMaker(job.plan, job.sidecars, loader, job.statistics, sets)
        with costs.measure("evaluate"):
            scored = evaluate.score_merge(job.evaluation, tasks, merged, guidance, maker)
        scored = evaluate.judge_scores(job.evaluation.gates, scored, job.repo, api)
    return report.write(job.reporting, merged, guidance, gathered, scored, costs), scored


def _draw(job: MergeJob, tasks: ScoredTasks | None, api: HfApi, progress: Progress) -> Sets:
    """Draw each expert's calibration texts, which must not contain scored items."""
    drawn = draw_texts(job.texts, tasks, api, progress)
    return calibration_sets(job.texts, drawn, job.sources.experts)


def _align(
    job: MergeJob, sets: Sets, loader: fetch.ModelLoader, costs: Costs
) -> tuple[MergeJob, tuple[AlignedModel, ...]]:
    """Match the units of models without a common base; the job then reads them as permuted."""
    if job.alignment is None:
        return job, ()
    with costs.measure("align"):
        found = align(job.alignment, sets, loader)
    return job.aligned(found), found


def _measure(
    job: MergeJob, sets: Sets, loader: fetch.ModelLoader, sink: Sink, costs: Costs
) -> tuple[Guided | None, Gathered]:
    """Measure the sources on the texts, for the guide, second moments or router weights."""
    guidance, gathered, counts = None, Gathered(), loader.files.count_bytes
    statistics, scratch = job.statistics, sink.work.scratch
    if job.routers:
        with costs.measure("route", counts):
            return None, measure_routers(job.routers, loader)
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
    drawn = zip(job.texts.calibrations, sets, strict=True)
    rows = tuple(one.tokens.rows for asked, one in drawn if not asked.source)
    return guidance, replace(gathered, rows=rows)


def open_target(asked: Publishing) -> Destination:
    """Open the target repo and check the token, before any work.

    Raises:
        PublishError: the token is missing or may not write there, or the namespace is unknown.

    Example:
        >>> asked = lewis_hub.Publishing(repo=f"{user}/new-merge", private=True)
        >>> lewis_hub.open_target(asked).previous is None
        True
    """
    return publishing.open_destination(asked, hub_api())


def publish(
    folder: Path | str,
    target: Destination,
    progress: Shown = BY_DEFAULT,
    *,
    force: bool = False,
) -> Published:
    """Push a merged model in one commit; an unchanged model makes no commit.

    A model that missed its quality gate becomes a pull request if the gate says so.

    Args:
        folder: output of `merge`.
        target: from `open_target`, before the work began. Later commits of others to the repo are
            never overwritten.
        progress: True: shown on stderr; False: nothing; or what shows it.
        force: push even if the quality gate was missed.

    Raises:
        PublishError: the repo is unchanged, or only the tag is missing.
        GateRefusedError: the model missed its quality gate; the repo is unchanged.

    Example:
        >>> target = lewis_hub.open_target(lewis_hub.Publishing(repo=f"{user}/my-merge"))
        >>> folder = lewis_hub.zoo_folder() / "base"
        >>> published = lewis_hub.publish(folder, target)
        >>> published.changed, lewis_hub.publish(folder, target).changed
        (True, False)
    """
    with alone_with(folder := Path(folder)):
        return publishing.push(folder, target, hub_api(), shown(progress), force=force)


@dataclass(frozen=True)
class Hardware:
    """The hardware of a Job; None leaves the choice to the Hub."""

    flavor: str | None
    timeout: str | None
    namespace: str | None


def job_request(
    recipe_file: Path, recipe: Recipe, options: Sequence[str], hardware: Hardware
) -> JobRequest:
    """Return the Job that merges a recipe and pushes the result, with the local files it needs."""
    return JobRequest(
        words=["merge", MOUNT, "-o", "merged", *options],  # a Job's folder is deleted with the Job
        files={**resolve.local_files(recipe_file, recipe), "recipe.yaml": recipe_file},
        package=requirement("gguf" if recipe.export else None),
        flavor=hardware.flavor,
        timeout=hardware.timeout,
        namespace=hardware.namespace,
    )
