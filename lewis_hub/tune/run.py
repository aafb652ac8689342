"""Tune: try settings of a recipe on items that are neither calibrated on nor scored."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.texts import load_tokenizer
from lewis_hub.errors import (
    MERGE,
    CalibrationModelError,
    GuideError,
    LewisHubError,
    MergeError,
    NonFiniteError,
    RecipeError,
)
from lewis_hub.evaluate.answer_loss import NAME, AnswerLoss, answer_losses, metric
from lewis_hub.evaluate.harness import EvaluationSettings, exchange, load
from lewis_hub.evaluate.items import chat_of, scored_questions
from lewis_hub.evaluate.paired import compare
from lewis_hub.evaluate.results import ModelResult
from lewis_hub.evaluate.scores import Scores
from lewis_hub.evaluate.tasks import check_tasks
from lewis_hub.files import require_writable
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.merge.engine import Places
from lewis_hub.merge.plan import MergePlan
from lewis_hub.merge.workspace import alone_in
from lewis_hub.progress import Advance, Progress, Silent
from lewis_hub.recipe.schema import Recipe
from lewis_hub.tune import space as search_space
from lewis_hub.tune import study
from lewis_hub.tune.objective import (
    ItemRequest,
    Objective,
    TuningItems,
    by_answer_loss,
    by_metric,
    draw_items,
    free_split_of,
)
from lewis_hub.tune.space import Space, Values, axes
from lewis_hub.tune.study import ERROR, SECONDS, Trial
from lewis_hub.workflow.calibrate import Sets, calibration_sets, draw_texts, guide
from lewis_hub.workflow.contamination import ScoredTasks
from lewis_hub.workflow.evaluate import Candidate, EvaluationPlan, Run, score
from lewis_hub.workflow.examine import Examined, calibrations_of, examine_sources, measurement_of
from lewis_hub.workflow.execution import Execution
from lewis_hub.workflow.fetch import SourceFiles, code_files, fetch_whole, require_disk
from lewis_hub.workflow.job import MergeJob, compile_job
from lewis_hub.workflow.load import ModelLoader
from lewis_hub.workflow.merge import MergedModel, finish_model, merge_in_memory, write_weights
from lewis_hub.workflow.resolve import hub_api, resolve_data
from lewis_hub.workflow.statistics import Gathered, gather, require_by_block, wanted

if TYPE_CHECKING:
    from huggingface_hub import HfApi

IMPORTANCE = "importance.json"


@dataclass
class ResidentModel:
    """The model in memory whose weights every trial replaces.

    The first merge is written to a folder and loaded from there; later merges are made in memory.
    """

    lm: Any = None

    def load(self, tuner: Tuner, values: Values, clock: Clock) -> Any:
        """Make the merge of some values; it stays until the next one is made."""
        if self.lm is None:
            merged = tuner.merge(values, "trial")
            clock.split("merge")
            self.lm = load(merged.folder, EvaluationSettings(device=tuner.execution.device))
        else:
            job, planned, places = tuner.plan(values)
            tensors = merge_in_memory(planned, places, tuner.scratch, job.means)
            clock.split("merge")
            exchange(self.lm.model, tensors)
        clock.split("load")
        return self.lm

    def release(self) -> None:
        """Free the model: only one is in memory at a time."""
        self.lm = None
        gc.collect()


@dataclass(frozen=True)
class Tuner:
    """What every trial needs; nothing of it is measured or loaded twice.

    Attributes:
        examined: the sources of all recipes that are tried.
        files: of the sources.
        sets: calibration texts.
        output: where what was measured stays, `importance.json` among it.
    """

    examined: Examined
    execution: Execution
    api: HfApi
    progress: Progress
    space: Space
    objective: Objective
    files: SourceFiles
    sets: Sets
    output: Path
    scratch: Path
    model: ResidentModel = field(default_factory=ResidentModel)

    def compile(self, recipe: Recipe) -> MergeJob:
        """Compile a recipe of the same sources."""
        return compile_job(recipe, self.execution, self.examined, self.api)

    def loader(self, job: MergeJob, progress: Progress) -> ModelLoader:
        """Return what loads the sources."""
        return job.loader(self.files, self.scratch, progress)

    def gather(
        self, job: MergeJob, schedule: DensitySchedule | None, progress: Progress
    ) -> Gathered:
        """Gather the second moments that a job needs."""
        if job.statistics is None:
            return Gathered()
        loader = self.loader(job, progress)
        return gather(job.statistics, self.sets, loader, schedule, self.output)

    def guide(self, job: MergeJob, progress: Progress) -> DensitySchedule | None:
        """Let the job's guide decide, from what was measured before; None: it has none."""
        if job.guide is None:
            return None
        stores = [folder / IMPORTANCE for folder in (self.output, job.guide.beside)]
        loader, needed = self.loader(job, progress), job.statistics
        left = wanted(needed, self.sets, loader, self.output) if needed else ()
        return guide(job.guide, self.sets, loader, stores, left).schedule

    def plan(self, values: Values) -> tuple[MergeJob, MergePlan, Places]:
        """Plan the merge of some values; returns its job, its plan and where its sources are."""
        job, silent = self.compile(search_space.candidate(self.space, values)), Silent()
        schedule = self.guide(job, silent)
        known = self.gather(job, schedule, silent)
        planned = job.plan.plan(schedule, known.statistics)
        return job, planned, {**self.files.places, **known.folders}

    def merge(self, values: Values, folder: str) -> MergedModel:
        """Make the merge of some values in a folder."""
        job, planned, places = self.plan(values)
        output, folders = self.scratch / folder, self.files.folders
        shards = write_weights(planned, places, output, job.means, Silent())
        return finish_model(planned, shards, job.sidecars, folders, output)


def attempt(tuner: Tuner, opened: Any, advance: Advance) -> None:
    """One trial; `advance` counts all of its items, those that are left out as well."""
    from optuna.trial import TrialState

    trial = opened.ask()
    values = study.propose(trial, tuner.space)
    clock, n_items, n_done = Clock(), tuner.objective.n_items, 0

    def done(n: int) -> None:
        nonlocal n_done
        n_done += n
        advance(n)

    try:
        lm = tuner.model.load(tuner, values, clock)
    except LewisHubError as error:
        if not is_of_settings(error):
            raise
        _failed(tuner, opened, trial, str(error))
        advance(n_items)
        return
    value, is_left = _score(tuner.objective, trial, lm, done)
    clock.split("score")
    trial.set_user_attr(SECONDS, clock.seconds)
    if not isfinite(value):
        _failed(tuner, opened, trial, f"its {tuner.objective.metric} is {value}")
    elif is_left:
        opened.tell(trial, state=TrialState.PRUNED)
    else:
        opened.tell(trial, value)
    advance(n_items - n_done)


def _score(objective: Objective, trial: Any, lm: Any, done: Advance) -> tuple[float, bool]:
    """The value of the parts that were scored, and whether the others are left out as hopeless."""
    value = float("nan")
    for number, value in enumerate(objective.values(lm, done), start=1):
        if not isfinite(value):
            break
        trial.report(value, number)
        if number < len(objective.parts) and trial.should_prune():
            return value, True
    return value, False


def is_of_settings(error: LewisHubError) -> bool:
    """Whether other settings might do: no source, disk or task is to blame."""
    if isinstance(error, NonFiniteError):
        return error.source == MERGE
    if isinstance(error, CalibrationModelError):
        return error.where == MERGE
    return isinstance(error, MergeError | GuideError)


def _failed(tuner: Tuner, opened: Any, trial: Any, why: str) -> None:
    from optuna.trial import TrialState

    trial.set_user_attr(ERROR, why)
    opened.tell(trial, state=TrialState.FAIL)
    tuner.progress.say(f"Trial {trial.number} failed: {why}")


class Clock:
    """Seconds of each step of a trial."""

    def __init__(self) -> None:
        self.last, self.seconds = time.monotonic(), dict[str, float]()

    def split(self, name: str) -> None:
        """Say that a step has just ended."""
        now = time.monotonic()
        self.seconds[name], self.last = round(now - self.last, 3), now


def score_both(
    evaluation: EvaluationPlan, tasks: ScoredTasks, models: Mapping[str, MergedModel], scratch: Path
) -> Scores:
    """Score models as the recipe's `evaluate` says, their answer loss among the metrics."""
    settings, loaded, limit = evaluation.settings, tasks.loaded, evaluation.limit
    run = Run(loaded, limit, settings, scratch / "scored")
    candidates = [Candidate(label, one.identity, one.folder) for label, one in models.items()]
    results = dict(score(candidates, run, tasks.progress))
    merged = models["merged"].folder  # all have its tokenizer
    chat = chat_of(load_tokenizer(str(merged), "merged")) if settings.chat_template else None
    questions = scored_questions(loaded, limit, chat)
    n_items = len(models) * sum(map(len, questions.values()))
    with tasks.progress.stage("Scoring right answers", n_items, "items") as advance:
        for label, one in models.items():
            lm = load(one.folder, settings)
            losses = {task: answer_losses(lm, some, advance) for task, some in questions.items()}
            results[label] = _with_losses(results[label], losses)
            del lm
            gc.collect()  # one model in memory at a time
    return compare(results)


def _with_losses(result: ModelResult, losses: Mapping[str, Sequence[AnswerLoss]]) -> ModelResult:
    tasks = dict(result.tasks)
    for name, found in losses.items():
        metrics = {**tasks[name].metrics, NAME: metric(found)}
        tasks[name] = replace(tasks[name], metrics=metrics)
    return ModelResult(tasks)


STUDY = "study.journal"


@dataclass(frozen=True)
class Search:
    """What is asked of a search.

    Attributes:
        n_trials: in all, those of earlier runs included.
        budget_s: no trial is begun after so many seconds of this run; None: all are.
        tasks: to tune on; none: those that the recipe scores.
        split: of their data; None: one that they give examples from and do not score.
        samples: items of each task.
        metric: `metric,filter`; None: the loss on right answers.
        methods: to try besides the recipe's.
        guides: to try besides the recipe's, `none` for none; empty: `uniform` where it has one.
    """

    n_trials: int = 30
    budget_s: float | None = None
    tasks: tuple[str, ...] = ()
    split: str | None = None
    samples: int = 200
    metric: str | None = None
    methods: tuple[str, ...] = ()
    guides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        n_begun: trials of this run; the others are of earlier ones.
        start: the recipe's own settings; None where they were not scored to the end.
        refused: why they cannot be merged or scored; None: they can.
        final: best and start on the items that `evaluate` scores; None where they are the same. The
            best alone where the start is refused.
    """

    recipe: Recipe
    space: Space
    objective: Objective
    items: tuple[TuningItems, ...]
    trials: tuple[Trial, ...]
    n_begun: int
    best: Trial
    start: Trial | None
    refused: str | None
    final: Scores | None


def tune(
    recipe: Recipe,
    asked: Search,
    output: Path,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Search, going on where an earlier run of the same search ended.

    Args:
        recipe: has `evaluate`, whose items the search never sees.
        asked: how long, and on what.
        output: folder for the study, and for what is measured.
        execution: device and runner; None: this machine's CPU.
        progress: told how far it is; None: nobody is.

    Raises:
        LewisHubError: a source, task or setting cannot be used.
    """
    execution, progress = execution or Execution(), progress or Silent()
    study.require_optuna()
    execution.require_usable()
    space = search_space.space_of(recipe, asked.methods, asked.guides)
    if recipe.evaluate is None:
        raise _scores_nothing()
    require_writable(output)
    api, corners = hub_api(), search_space.corners(space)
    measured = next((one for one in corners if measurement_of(one).calibrations), corners[0])
    examined = examine_sources(measured, execution, api, progress)
    examined = _with_data_of(corners, examined, api)
    jobs = [compile_job(one, execution, examined, api) for one in corners]
    _require_mergeable(jobs, api)
    job = jobs[corners.index(measured)]
    tasks, evaluation = job.scored_tasks(api, progress), job.evaluation
    if tasks is None or evaluation is None:
        raise _scores_nothing()
    drawn, sets = _draw(job, asked, tasks, chat=evaluation.settings.chat_template)
    objective = by_answer_loss(drawn)
    if asked.metric:
        objective = by_metric(drawn, asked.metric, evaluation.settings)
    output.mkdir(parents=True, exist_ok=True)
    with alone_in(output, output), TemporaryDirectory(prefix=".scratch-", dir=output) as scratch:
        needs = job.disk_needs(sets)
        require_disk(output, needs.download_bytes, needs.made_bytes + needs.states_bytes)
        files = fetch_whole(api, [one.source for one in job.sources.models], progress)
        code_files(api, job.code)
        shared = (examined, execution, api, progress, space, objective, files, sets, output)
        tuner = Tuner(*shared, Path(scratch))
        _measure(tuner, corners)
        tried, n_begun = _search(tuner, output / STUDY, asked)
        tuner.model.release()
        best = study.best_of(tried, lower_is_better=objective.lower_is_better)
        first = search_space.warm_starts(space)[0]
        own = [trial for trial in tried if trial.values == first]
        start = next((trial for trial in own if trial.value is not None), None)
        refused = next((trial.error for trial in own if trial.error), None)
        final = None
        if best is not start:
            chosen = {"merged": best.values} | ({} if refused else {"start": first})
            models = {label: tuner.merge(values, label) for label, values in chosen.items()}
            final = score_both(evaluation, tasks, models, tuner.scratch)
    tuned = search_space.candidate(space, best.values)
    return Tuned(tuned, space, objective, drawn, tried, n_begun, best, start, refused, final)


def _scores_nothing() -> RecipeError:
    problem = "the recipe scores nothing, so nothing would tell whether tuning helped."
    return RecipeError("recipe", "evaluate", problem, "Add `evaluate:` with its tasks.")


def _with_data_of(recipes: Sequence[Recipe], examined: Examined, api: HfApi) -> Examined:
    """Pin the calibration data of all recipes: they differ in which of it they use."""
    known = examined.inputs.data
    asked = {one: recipe for recipe in recipes for one in calibrations_of(recipe)}
    left = [one for one in asked if one not in known]
    found = resolve_data(left, api, asked[left[0]].locate) if left else {}
    return replace(examined, inputs=replace(examined.inputs, data={**known, **found}))


def _require_mergeable(jobs: Sequence[MergeJob], api: HfApi) -> None:
    """Refuse a method that cannot merge these sources, from their headers."""
    for job in {one.planned.method: one for one in jobs}.values():
        job.plan.plan(None)
    fitted = [one for one in jobs if one.statistics and one.statistics.moments.in_sequence]
    for statistics in [one.statistics for one in fitted[:1] if one.statistics]:
        require_by_block(statistics, api)  # all are of the same models


def _measure(tuner: Tuner, corners: Sequence[Recipe]) -> None:
    """Measure once what many trials need, here, where progress is shown."""
    for one in _by_guide(corners).values():
        tuner.guide(tuner.compile(_at_any_mean(one)), tuner.progress)
    for one in _by_width(corners).values():
        tuner.gather(tuner.compile(one), None, tuner.progress)


def _by_width(recipes: Sequence[Recipe]) -> dict[int, Recipe]:
    """One recipe of each kind of second moments that merges need and that are gathered once."""
    needed = ((measurement_of(one).moments, one) for one in recipes)
    return {m.widest: one for m, one in needed if m and not m.in_sequence}


def _by_guide(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    return {one.guide.name: one for one in recipes if one.guide}


def _at_any_mean(recipe: Recipe) -> Recipe:
    """For a guide to be measured: whether its mean density is in reach, each trial finds out."""
    guide = recipe.guide and recipe.guide.model_copy(update={"mean_density": None})
    return recipe.model_copy(update={"guide": guide})


def _draw(
    job: MergeJob, asked: Search, tasks: ScoredTasks, *, chat: bool
) -> tuple[tuple[TuningItems, ...], Sets]:
    """Draw the items to tune on, and the texts to measure on."""
    selected = replace(tasks.selection, names=asked.tasks or tasks.selection.names)
    check_tasks(selected)
    split = asked.split or free_split_of(selected)
    drawn = draw_texts(job.texts, tasks, tasks.api, tasks.progress)
    calibrated = [values for one in drawn.values() for values in one.values]
    donor = job.sources.donor.source if chat else None
    request = ItemRequest(selected, split, asked.samples, job.texts.seed, donor)
    items = draw_items(request, tasks, calibrated)
    for one in items:
        passed = f"; {one.n_calibrated} that calibration draws are passed over"
        told = f"{one.task}: {len(one.indices):,} items of split `{one.split}` to tune on"
        tasks.progress.say(f"{told}{passed if one.n_calibrated else ''}.")
    return items, calibration_sets(job.texts, drawn, job.sources.experts)


def _name(tuner: Tuner) -> str:
    """Of the study: another recipe, other items or other sources begin another one."""
    told = [
        search_space.written(tuner.space.recipe),
        tuner.space.methods,
        tuner.space.guides,
        tuner.objective.digest,
        [source.digest for source in tuner.examined.sources.models],
        [source.commit_sha for source in tuner.examined.inputs.datasets],
        [
            sorted(axis.__dict__.items())
            for values in search_space.combinations(tuner.space)
            for axis in axes(tuner.space, values)
        ],
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _search(tuner: Tuner, file: Path, asked: Search) -> tuple[tuple[Trial, ...], int]:
    """Try until there are enough trials or the time is over; all of them, and how many are new."""
    lower, seed = tuner.objective.lower_is_better, tuner.space.recipe.seed
    opened = study.open_study(file, _name(tuner), lower_is_better=lower, seed=seed)
    study.enqueue(opened, search_space.warm_starts(tuner.space))
    began, n_begun = time.monotonic(), 0
    n_left = max(0, asked.n_trials - len(_tried(tuner.space, opened)))
    with tuner.progress.stage("Tuning", n_left * tuner.objective.n_items, "items") as advance:
        while n_begun < n_left:
            if asked.budget_s is not None and time.monotonic() - began >= asked.budget_s:
                tuner.progress.say("The budget is spent; the same command goes on.")
                break
            n_begun += 1
            attempt(tuner, opened, advance)
    return _tried(tuner.space, opened), n_begun


def _tried(space: Space, opened: Any) -> tuple[Trial, ...]:
    """What tells something, with the values that were merged."""
    found = (trial for trial in study.trials(opened) if trial.tells)
    return tuple(
        replace(trial, values=search_space.settled(space, trial.values)) for trial in found
    )
