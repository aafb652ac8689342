"""START HERE: a recipe becomes a published model, in the order in which it happens.

    recipe - resolve - check - calibrate - guide - plan - merge - evaluate - report - publish

Each step lives in its own file of `stages/`, which puts the recipe's words in those of the rooms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from lewis_hub.errors import RecipeError
from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.evaluate.scores import Scores
from lewis_hub.files import require_writable
from lewis_hub.guides.density import DensitySchedule
from lewis_hub.guides.importance import ImportanceProfile
from lewis_hub.hub.publish import Published
from lewis_hub.merge.workspace import Workspace, open_workspace
from lewis_hub.progress import Progress, Silent
from lewis_hub.recipe import Recipe
from lewis_hub.report.cost import Costs
from lewis_hub.stages import (
    calibration,
    checking,
    converting,
    downloading,
    evaluation,
    gathering,
    gating,
    merging,
    publishing,
    reporting,
    standing,
    streaming,
)
from lewis_hub.stages.calibration import Sets
from lewis_hub.stages.checking import CheckReport
from lewis_hub.stages.evaluation import Scored
from lewis_hub.stages.execution import Execution, Step
from lewis_hub.stages.loading import Loading
from lewis_hub.stages.publishing import Destination
from lewis_hub.stages.sources import hub_api, needs_grams, resolve_inputs
from lewis_hub.stages.standing import Former
from lewis_hub.stages.statistics import Gathered


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
    problems = examined.report.problems or gathering.problems(step)
    notes = (
        *examined.report.notes,
        *downloading.shortages(step, Path(recipe.locate("merged.partial"))),
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
    inputs = converting.without_pickles(measured, inputs, api, progress)
    examined = checking.examine(
        measured, inputs, api, allow_code=execution.allow_code, loading=execution.loading
    )
    checking.require_fine(examined.report)
    step = Step(recipe, inputs, examined, execution, api, progress)
    sets = calibration.calibration_sets(step)
    output.mkdir(parents=True, exist_ok=True)
    downloading.require_room_for_texts(step, sets, output)
    folders = downloading.everything(step)
    with TemporaryDirectory(prefix=".scratch-", dir=output) as scratch:
        stores = [output / "importance.json"]
        guidance = calibration.guide(step, sets, folders, Path(scratch), stores)
    reporting.write_guidance(output, guidance)
    return Calibrated(output, guidance.profile, guidance.schedule, merging.sizes(step))


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
    inputs = converting.without_pickles(recipe, inputs, api, progress)
    planned = reporting.lock(recipe, inputs, execution.max_shard_bytes, {})
    if not execution.replace:
        if target and (held := publishing.published_already(target, planned, api)):
            told = None if held.pull_request_url else target.former
            scores, gate = standing.published_scores(told, api), gating.published_verdict(told, api)
            return Merged("unchanged", output, scores, gate, held)
        if standing.is_this_merge(output, planned):
            gate = gating.judged_again(recipe, output, api)
            return Merged("unchanged", output, standing.read_scores(output), gate)
    examined = checking.examine(
        recipe, inputs, api, allow_code=execution.allow_code, loading=execution.loading
    )
    checking.require_fine(examined.report)
    step = Step(recipe, inputs, examined, execution, api, progress)
    gathering.require_possible(step)
    gives_way = target is not None and publishing.is_published(output, target, api)
    with open_workspace(output, replace=execution.replace or gives_way) as work:
        downloading.require_disk(step, work.folder)
        sets = calibration.calibration_sets(step)  # small files; the weights come after
        downloading.require_disk(step, work.folder, sets)  # again, now that they are known
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
    planned = reporting.lock(recipe, inputs, execution.max_shard_bytes, {})
    if not execution.replace and (held := publishing.published_already(target, planned, api)):
        streaming.forget(Path(output))
        return held
    examined = checking.examine(recipe, inputs, api, allow_code=False)
    checking.require_fine(examined.report)
    step = Step(recipe, inputs, examined, execution, api, progress)
    gathering.require_possible(step)
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
        folders = downloading.everything(step)
    guidance, gathered = None, Gathered()
    if step.recipe.guide:
        with costs.measure("calibrate"):
            beside = Path(step.recipe.locate("importance"))  # where `calibrate` leaves it
            known_in = (work.scratch, work.output / "lewis", beside)
            stores = [folder / "importance.json" for folder in known_in]
            stores += standing.published_importance(former, step.api, work.scratch)
            left = gathering.wanted(step, sets, folders, work.scratch)
            guidance = calibration.guide(step, sets, folders, work.scratch, stores, left)
    schedule = guidance.schedule if guidance else None
    known = partial(gathering.gather, step, sets, folders, work.scratch)
    if needs_grams(step.recipe):
        with costs.measure("gather"):
            gathered = known(schedule)
    there = {**folders, **gathered.folders}
    with costs.measure("merge"):
        merged = merging.make(step, schedule, there, work.folder, "Merging", gathered.statistics)
    with costs.measure("evaluate"):
        scored = evaluation.score_merge(step, merged, guidance, folders, work.scratch, known)
    scored = gating.judged(step.recipe, scored, step.api)
    return scored, reporting.write(step, merged, guidance, gathered, scored, costs)
