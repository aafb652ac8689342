"""START HERE: a recipe becomes a published model, in the order in which it happens.

    recipe - resolve - check - calibrate - guide - plan - merge - evaluate - report - publish

Each step lives in its own file of `workflow/`, which puts the recipe's words in those of the rooms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from lewis_hub.calibration.profile import ImportanceProfile
from lewis_hub.errors import RecipeError
from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.evaluate.scores import Scores
from lewis_hub.files import require_writable
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.hub.publish import Published
from lewis_hub.merge.workspace import Workspace, open_workspace
from lewis_hub.progress import Progress, Silent
from lewis_hub.recipe.schema import Evaluation, ModelReference, Publishing, Recipe
from lewis_hub.report.cost import Costs
from lewis_hub.workflow import calibrate as calibration
from lewis_hub.workflow import check as checking
from lewis_hub.workflow import (
    convert_pickles,
    evaluate,
    existing,
    fetch,
    gather,
    merge,
    report,
    single_model,
)
from lewis_hub.workflow import gate as gating
from lewis_hub.workflow import publish as publishing
from lewis_hub.workflow import stream as streaming
from lewis_hub.workflow import verify as verification
from lewis_hub.workflow.calibrate import Sets
from lewis_hub.workflow.check import CheckReport
from lewis_hub.workflow.evaluate import Scored
from lewis_hub.workflow.existing import Former
from lewis_hub.workflow.grams import Gathered
from lewis_hub.workflow.job import Execution, Step
from lewis_hub.workflow.memory import Loading
from lewis_hub.workflow.publish import Destination
from lewis_hub.workflow.resolve import hub_api, needs_grams, resolve_inputs, resolve_one
from lewis_hub.workflow.verify import Verdict


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
    inputs = resolve_inputs(recipe, api, allow_pickle=allow_pickle)
    loading = Loading(max_memory_bytes=max_memory_bytes)
    examined = checking.examine(recipe, inputs, api, allow_code=True, loading=loading)
    step = Step(recipe, inputs, examined, Execution(), api, Silent())
    problems = examined.report.problems or gather.problems(step)
    notes = (
        *examined.report.notes,
        *fetch.shortages(step, Path(recipe.locate("merged.partial"))),
    )
    return replace(examined.report, problems=problems, notes=notes)


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
    output = Path(output)
    execution, progress = execution or Execution(), progress or Silent()
    execution.require_usable()
    require_writable(output)
    if recipe.guide is None:
        problem = "the recipe has no `guide`, so there is nothing to calibrate."
        raise RecipeError("recipe", "guide", problem, "Add a `guide:` with its calibration data.")
    api = hub_api()
    measured = recipe.model_copy(update={"evaluate": None, "publish": None})
    inputs = resolve_inputs(recipe, api, allow_pickle=execution.allow_pickle)
    inputs = convert_pickles.without_pickles(measured, inputs, api, progress)
    examined = checking.examine(
        measured, inputs, api, allow_code=execution.allow_code, loading=execution.loading
    )
    checking.require_fine(examined.report)
    step = Step(recipe, inputs, examined, execution, api, progress)
    sets = calibration.calibration_sets(step)
    output.mkdir(parents=True, exist_ok=True)
    fetch.require_room_for_texts(step, sets, output)
    folders = fetch.everything(step)
    with TemporaryDirectory(prefix=".scratch-", dir=output) as scratch:
        stores = [output / "importance.json"]
        guidance = calibration.guide(step, sets, folders, Path(scratch), stores)
    report.write_guidance(output, guidance)
    return Calibrated(output, guidance.profile, guidance.schedule, merge.sizes(step))


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
    output = Path(output)
    execution, progress = execution or Execution(), progress or Silent()
    execution.require_usable()
    api = hub_api()
    inputs = resolve_inputs(recipe, api, allow_pickle=execution.allow_pickle)
    inputs = convert_pickles.without_pickles(recipe, inputs, api, progress)
    planned = report.lock(recipe, inputs, execution.max_shard_bytes, {})
    if not execution.replace:
        if target and (held := publishing.published_already(target, planned, api)):
            told = None if held.pull_request_url else target.former
            scores, gate = existing.published_scores(told, api), gating.published_verdict(told, api)
            return Merged("unchanged", output, scores, gate, held)
        if existing.is_this_merge(output, planned):
            gate = gating.judged_again(recipe, output, api)
            return Merged("unchanged", output, existing.read_scores(output), gate)
    examined = checking.examine(
        recipe, inputs, api, allow_code=execution.allow_code, loading=execution.loading
    )
    checking.require_fine(examined.report)
    step = Step(recipe, inputs, examined, execution, api, progress)
    gather.require_possible(step)
    gives_way = target is not None and publishing.is_published(output, target, api)
    with open_workspace(output, replace=execution.replace or gives_way) as work:
        fetch.require_disk(step, work.folder)
        sets = calibration.calibration_sets(step)  # small files; the weights come after
        fetch.require_disk(step, work.folder, sets)  # again, now that they are known
        scored, files = _merge(step, sets, work, target.former if target else None)
        scores, gate = (scored.scores, scored.gate) if scored else (None, None)
        return Merged("merged", work.finish(files), scores, gate)


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
    execution, progress = execution or Execution(), progress or Silent()
    execution.require_usable()
    streaming.require_streamable(recipe)
    api = hub_api()
    inputs = resolve_inputs(recipe, api)
    planned = report.lock(recipe, inputs, execution.max_shard_bytes, {})
    if not execution.replace and (held := publishing.published_already(target, planned, api)):
        streaming.forget(Path(output))
        return held
    examined = checking.examine(recipe, inputs, api, allow_code=False)
    checking.require_fine(examined.report)
    step = Step(recipe, inputs, examined, execution, api, progress)
    gather.require_possible(step)
    with open_workspace(streaming.work_folder(Path(output)), replace=False) as work:
        published = streaming.run(step, calibration.calibration_sets(step), target, work)
        work.discard()
    return published


def _merge(
    step: Step, sets: Sets, work: Workspace, former: Former | None
) -> tuple[Scored | None, tuple[str, ...]]:
    """From the sources' files to all files of the result."""
    costs = Costs()
    with costs.measure("download"):
        folders = fetch.everything(step)
    guidance, gathered = None, Gathered()
    if step.recipe.guide:
        with costs.measure("calibrate"):
            beside = Path(step.recipe.locate("importance"))  # where `calibrate` leaves it
            known_in = (work.scratch, work.output / "lewis", beside)
            stores = [folder / "importance.json" for folder in known_in]
            stores += existing.published_importance(former, step.api, work.scratch)
            left = gather.wanted(step, sets, folders, work.scratch)
            guidance = calibration.guide(step, sets, folders, work.scratch, stores, left)
    schedule = guidance.schedule if guidance else None
    known = partial(gather.gather, step, sets, folders, work.scratch)
    if needs_grams(step.recipe):
        with costs.measure("gather"):
            gathered = known(schedule)
    there = {**folders, **gathered.folders}
    with costs.measure("merge"):
        merged = merge.make(step, schedule, there, work.folder, "Merging", gathered.statistics)
    with costs.measure("evaluate"):
        scored = evaluate.score_merge(step, merged, guidance, folders, work.scratch, known)
    scored = gating.judged(step.recipe, scored, step.api)
    return scored, report.write(step, merged, guidance, gathered, scored, costs)


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


def published_at(recipe: Recipe, repo: str) -> Recipe:
    """The same recipe, to be published in another repo."""
    asked = recipe.publish or Publishing(repo=repo)
    return recipe.model_copy(update={"publish": asked.model_copy(update={"repo": repo})})


def destination(recipe: Recipe) -> Publishing:
    """Where a recipe wants to be published.

    Raises:
        RecipeError: it does not say.
    """
    if recipe.publish is None:
        raise RecipeError(
            "recipe",
            "publish.repo",
            "the recipe does not say where to publish.",
            "Add `publish: {repo: owner/name}`, or give --repo owner/name.",
        )
    return recipe.publish


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
