"""Search better settings of a recipe on items that are neither calibrated on nor scored."""

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

from lewis_hub.checkpoint.ranges import Locations
from lewis_hub.display import TextTable, to_html
from lewis_hub.errors import (
    MERGE,
    CalibrationModelError,
    GuideError,
    LewisHubError,
    MergeError,
    NonFiniteError,
    RecipeError,
)
from lewis_hub.evaluate.harness import EvaluationSettings, exchange, load
from lewis_hub.evaluate.items import (
    ANSWER_LOSS,
    AnswerLoss,
    answer_losses,
    chat_of,
    loss_metric,
    scored_questions,
)
from lewis_hub.evaluate.paired import compare
from lewis_hub.evaluate.scores import ModelResult, Scores
from lewis_hub.evaluate.tasks import locate_tasks
from lewis_hub.files import require_writable
from lewis_hub.guides.schedule import DensitySchedule
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
from lewis_hub.workflow.calibrate import guide
from lewis_hub.workflow.evaluate import Candidate, EvaluationPlan, Run, score
from lewis_hub.workflow.examine import Examined, examine_sources, measurement_of
from lewis_hub.workflow.fetch import (
    FetchedSources,
    ModelLoader,
    code_files,
    fetch_whole,
    require_disk,
)
from lewis_hub.workflow.job import MergeJob, compile_job
from lewis_hub.workflow.merge import MergedModel, finish_model, merge_in_memory, write_weights
from lewis_hub.workflow.resolve import calibrations_of, hub_api, resolve_data
from lewis_hub.workflow.resources import Execution
from lewis_hub.workflow.statistics import Gathered, gather, require_by_block, wanted
from lewis_hub.workflow.texts import ScoredTasks, Sets, calibration_sets, draw_texts

if TYPE_CHECKING:
    from huggingface_hub import HfApi

IMPORTANCE = "importance.json"

STUDY = "study.journal"


@dataclass
class ResidentModel:
    """The model in memory whose weights each trial replaces.

    The first merge is written to a folder and loaded from there; later merges are made in memory.
    """

    lm: Any = None

    def load(self, tuner: Tuner, values: Values, clock: Clock) -> Any:
        """Load the merge of some values; it stays in memory until the next trial."""
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
        """Free the model, because only one may be in memory at a time."""
        self.lm = None
        gc.collect()


@dataclass(frozen=True)
class Tuner:
    """The sources, texts and items that all trials share.

    Attributes:
        sets: calibration texts.
        output: folder for `importance.json` and statistics.
    """

    examined: Examined
    execution: Execution
    api: HfApi
    progress: Progress
    space: Space
    objective: Objective
    files: FetchedSources
    sets: Sets
    output: Path
    scratch: Path
    model: ResidentModel = field(default_factory=ResidentModel)

    def compile(self, recipe: Recipe) -> MergeJob:
        """Compile a recipe of the same sources."""
        return compile_job(recipe, self.execution, self.examined, self.api)

    def loader(self, job: MergeJob, progress: Progress) -> ModelLoader:
        """Return the loader of the sources."""
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
        """Return the schedule of the job's guide, with known measurements; None without a guide."""
        if job.guide is None:
            return None
        stores = [folder / IMPORTANCE for folder in (self.output, job.guide.beside)]
        loader, needed = self.loader(job, progress), job.statistics
        left = wanted(needed, self.sets, loader, self.output) if needed else ()
        return guide(job.guide, self.sets, loader, stores, left).schedule

    def plan(self, values: Values) -> tuple[MergeJob, MergePlan, Locations]:
        """Return the job and plan of some values, and the places of its sources."""
        job, silent = self.compile(search_space.candidate(self.space, values)), Silent()
        schedule = self.guide(job, silent)
        known = self.gather(job, schedule, silent)
        planned = job.plan.plan(schedule, known.statistics)
        return job, planned, {**self.files.locations, **known.folders}

    def merge(self, values: Values, folder: str) -> MergedModel:
        """Write the merge of some values into a folder."""
        job, planned, places = self.plan(values)
        output, folders = self.scratch / folder, self.files.folders
        shards = write_weights(planned, places, output, job.means, Silent())
        return finish_model(planned, shards, job.sidecars, folders, output)


def attempt(tuner: Tuner, opened: Any, advance: Advance) -> None:
    """Run a trial; `advance` counts all of its items, including those that pruning skips."""
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
    """Return the objective over the scored parts, and whether the trial is pruned."""
    value = float("nan")
    for number, value in enumerate(objective.values(lm, done), start=1):
        if not isfinite(value):
            break
        trial.report(value, number)
        if number < len(objective.parts) and trial.should_prune():
            return value, True
    return value, False


def is_of_settings(error: LewisHubError) -> bool:
    """Return whether the tried settings caused the error, rather than a source, disk or task."""
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
    """A clock with the seconds of each step of a trial."""

    def __init__(self) -> None:
        self.last, self.seconds = time.monotonic(), dict[str, float]()

    def split(self, name: str) -> None:
        """Record the time of the step that ended now."""
        now = time.monotonic()
        self.seconds[name], self.last = round(now - self.last, 3), now


def score_both(
    evaluation: EvaluationPlan, tasks: ScoredTasks, models: Mapping[str, MergedModel], scratch: Path
) -> Scores:
    """Score models by the recipe's `evaluate` and by their answer loss.

    `merged` is compared with each of the other labels.
    """
    settings, loaded, limit = evaluation.settings, tasks.loaded, evaluation.limit
    run = Run(loaded, limit, settings, scratch / "scored")
    candidates = [Candidate(label, one.identity, one.folder) for label, one in models.items()]
    results = dict(score(candidates, run, tasks.progress))
    merged = models["merged"].folder  # all have its tokenizer
    from lewis_hub.calibration.model import load_tokenizer

    chat = chat_of(load_tokenizer(str(merged), "merged")) if settings.chat_template else None
    questions = scored_questions(loaded, limit, chat)
    n_items = len(models) * sum(map(len, questions.values()))
    with tasks.progress.stage("Scoring right answers", n_items, "items") as advance:
        for label, one in models.items():
            lm = load(one.folder, settings)
            losses = {task: answer_losses(lm, some, advance) for task, some in questions.items()}
            results[label] = _with_losses(results[label], losses)
            del lm
            gc.collect()  # only one model fits into memory
    return compare(results)


def _with_losses(result: ModelResult, losses: Mapping[str, Sequence[AnswerLoss]]) -> ModelResult:
    tasks = dict(result.tasks)
    for name, found in losses.items():
        metrics = {**tasks[name].metrics, ANSWER_LOSS: loss_metric(found)}
        tasks[name] = replace(tasks[name], metrics=metrics)
    return ModelResult(tasks)


@dataclass(frozen=True)
class Search:
    """The settings of a search.

    Attributes:
        n_trials: total number, including those of earlier runs.
        budget_s: no trial begins after this many seconds of this run; None: no limit.
        tasks: tasks to tune on; empty: the tasks that the recipe scores.
        split: split of their data; None: a split for few-shot examples that is not scored.
        samples: number of items per task.
        metric: `metric,filter`; None: the answer loss.
        methods: tried besides the recipe's method.
        guides: tried besides the recipe's guide, or `none`; empty: `uniform` if it has a guide.
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
    """The result of a search.

    Attributes:
        n_begun: number of trials of this run.
        start: the trial of the recipe's own settings; None if it was not scored to the end.
        refused: the reason why these settings cannot be merged or scored, if there is one.
        final: best and start on the items that `evaluate` scores; without start if it was refused.
            None if best and start are the same.
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

    def __repr__(self) -> str:
        told = f"{len(self.trials)} trials on {self.objective.metric}; the best is number "
        told += f"{self.best.number}: {self.best.value:.4f}"
        return told + (f", the recipe's own settings: {self.start.value:.4f}" if self.start else "")

    def _repr_html_(self) -> str:
        own = self.start.values if self.start else {}
        rows = (
            (search_space.short_name(name), *map(search_space.shown_value, (value, own.get(name))))
            for name, value in self.best.values.items()
        )
        settings = TextTable(("setting", "best", "recipe"), tuple(rows))
        return to_html(repr(self), settings, *([self.final.table] if self.final else []))


def tune_recipe(
    recipe: Recipe,
    asked: Search,
    output: Path | str,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Search for better settings of a recipe; an earlier run of the same search is continued.

    Args:
        recipe: has `evaluate`, whose items the search never sees.
        asked: number of trials, time, and the items to tune on.
        output: folder for the study and for measurements.
        execution: device and runner; None: this machine's CPU.
        progress: shows progress; None: shows nothing.

    Raises:
        LewisHubError: a source, task or setting cannot be used.
        ExtraMissingError: Optuna is not installed.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> uniform = recipe.model_copy(update={"guide": None, "parameters": {"density": 0.5}})
        >>> search = lewis_hub.Search(n_trials=1, samples=4)
        >>> tuned = lewis_hub.tune_recipe(uniform, search, tmp_path / "tuning")
        >>> tuned.recipe.merge_method
        'ties'
    """
    execution, progress = execution or Execution(), progress or Silent()
    output = Path(output)
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
    problem = "the recipe scores nothing, so tuning could not be judged."
    return RecipeError("recipe", "evaluate", problem, "Add `evaluate:` with its tasks.")


def _with_data_of(recipes: Sequence[Recipe], examined: Examined, api: HfApi) -> Examined:
    """Pin the calibration data of all recipes, which use different parts of it."""
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
        require_by_block(statistics, api)  # all have the same models


def _measure(tuner: Tuner, corners: Sequence[Recipe]) -> None:
    """Measure once, with progress, the profiles and second moments that many trials need."""
    for one in _by_guide(corners).values():
        tuner.guide(tuner.compile(_at_any_mean(one)), tuner.progress)
    for one in _by_width(corners).values():
        tuner.gather(tuner.compile(one), None, tuner.progress)


def _by_width(recipes: Sequence[Recipe]) -> dict[int, Recipe]:
    """Return a recipe for each width of second moments that are gathered once."""
    needed = ((measurement_of(one).moments, one) for one in recipes)
    return {m.widest: one for m, one in needed if m and not m.in_sequence}


def _by_guide(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    return {one.guide.name: one for one in recipes if one.guide}


def _at_any_mean(recipe: Recipe) -> Recipe:
    """Return the recipe without a mean density, which a guide may not reach with these settings."""
    guide = recipe.guide and recipe.guide.model_copy(update={"mean_density": None})
    return recipe.model_copy(update={"guide": guide})


def _draw(
    job: MergeJob, asked: Search, tasks: ScoredTasks, *, chat: bool
) -> tuple[tuple[TuningItems, ...], Sets]:
    """Draw the items to tune on and the calibration texts."""
    selected = replace(tasks.selection, names=asked.tasks or tasks.selection.names)
    locate_tasks(selected)
    split = asked.split or free_split_of(selected)
    drawn = draw_texts(job.texts, tasks, tasks.api, tasks.progress)
    calibrated = [text for one in drawn.values() for text in one.texts]
    donor = job.sources.donor.source if chat else None
    request = ItemRequest(selected, split, asked.samples, job.texts.seed, donor)
    items = draw_items(request, tasks, calibrated)
    for one in items:
        skipped = f"; {one.n_calibrated} calibration items are skipped" if one.n_calibrated else ""
        drawn_items = f"{one.task}: {len(one.indices):,} items of split `{one.split}` to tune on"
        tasks.progress.say(f"{drawn_items}{skipped}.")
    return items, calibration_sets(job.texts, drawn, job.sources.experts)


def _name(tuner: Tuner) -> str:
    """Return the name of the study, which depends on recipe, items and sources."""
    facts = [
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
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _search(tuner: Tuner, file: Path, asked: Search) -> tuple[tuple[Trial, ...], int]:
    """Run trials until their number or the budget is reached; return all, and how many are new."""
    lower, seed = tuner.objective.lower_is_better, tuner.space.recipe.seed
    opened = study.open_study(file, _name(tuner), lower_is_better=lower, seed=seed)
    study.enqueue(opened, search_space.warm_starts(tuner.space))
    began, n_begun = time.monotonic(), 0
    n_left = max(0, asked.n_trials - len(_tried(tuner.space, opened)))
    with tuner.progress.stage("Tuning", n_left * tuner.objective.n_items, "items") as advance:
        while n_begun < n_left:
            if asked.budget_s is not None and time.monotonic() - began >= asked.budget_s:
                tuner.progress.say("The budget is spent; the same command continues the search.")
                break
            n_begun += 1
            attempt(tuner, opened, advance)
    return _tried(tuner.space, opened), n_begun


def _tried(space: Space, opened: Any) -> tuple[Trial, ...]:
    """Return the informative trials with the values that were merged."""
    found = (trial for trial in study.trials(opened) if trial.tells)
    return tuple(
        replace(trial, values=search_space.settled(space, trial.values)) for trial in found
    )
