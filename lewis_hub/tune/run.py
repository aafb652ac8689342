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
from typing import Any

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
from lewis_hub.merge.plan import Known
from lewis_hub.merge.workspace import alone_in
from lewis_hub.progress import Advance, Progress, Silent
from lewis_hub.recipe.rules import fits_in_sequence
from lewis_hub.recipe.schema import Recipe
from lewis_hub.tune import space as search_space
from lewis_hub.tune import study
from lewis_hub.tune.objective import (
    Objective,
    TuningItems,
    by_answer_loss,
    by_metric,
    draw_items,
    free_split_of,
)
from lewis_hub.tune.space import Space, Values, axes
from lewis_hub.tune.study import ERROR, SECONDS, Trial
from lewis_hub.workflow import calibrate, check, convert_pickles, fetch
from lewis_hub.workflow import merge as merging
from lewis_hub.workflow.calibrate import Guidance, Sets
from lewis_hub.workflow.evaluate import Candidate, Run, score, selection, settings_of
from lewis_hub.workflow.gather import gather, require_possible, wanted
from lewis_hub.workflow.job import Execution, Folders, Step
from lewis_hub.workflow.merge import MergedModel
from lewis_hub.workflow.resolve import (
    hub_api,
    measures_on_texts,
    needs_grams,
    resolve_inputs,
    widest_input,
)

IMPORTANCE = "importance.json"


@dataclass
class Seat:
    """The place in memory that all merges of a search take in turn.

    The first is written to a folder and loaded from there; each of the others comes in its stead
    without a file.
    """

    lm: Any = None

    def take(self, tuner: Tuner, values: Values, clock: Clock) -> Any:
        """The merge of some values, to be scored before the next is asked for."""
        if self.lm is None:
            merged = merge(tuner, values, "trial")
            clock.split("merge")
            self.lm = load(merged.folder, EvaluationSettings(device=tuner.step.execution.device))
        else:
            tensors = merging.make_in_memory(*_given(tuner, values), tuner.scratch)
            clock.split("merge")
            exchange(self.lm.model, tensors)
        clock.split("load")
        return self.lm

    def leave(self) -> None:
        """Let the model go: only one is in memory at a time."""
        self.lm = None
        gc.collect()


@dataclass(frozen=True)
class Tuner:
    """What every trial needs; nothing of it is measured or loaded twice.

    Attributes:
        sets: calibration texts.
        output: where what was measured stays, `importance.json` among it.
    """

    step: Step
    space: Space
    objective: Objective
    folders: Folders
    sets: Sets
    output: Path
    scratch: Path
    seat: Seat = field(default_factory=Seat)


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
        lm = tuner.seat.take(tuner, values, clock)
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
    tuner.step.progress.say(f"Trial {trial.number} failed: {why}")


class Clock:
    """Seconds of each step of a trial."""

    def __init__(self) -> None:
        self.last, self.seconds = time.monotonic(), dict[str, float]()

    def split(self, name: str) -> None:
        """Say that a step has just ended."""
        now = time.monotonic()
        self.seconds[name], self.last = round(now - self.last, 3), now


def merge(tuner: Tuner, values: Values, folder: str) -> MergedModel:
    """The merge of some values, in a folder."""
    step, schedule, folders, statistics = _given(tuner, values)
    output = tuner.scratch / folder
    return merging.make(step, schedule, folders, output, "Merging", statistics)


def _given(tuner: Tuner, values: Values) -> tuple[Step, DensitySchedule | None, Folders, Known]:
    """What the merge of some values is made of."""
    recipe = search_space.candidate(tuner.space, values)
    step = replace(tuner.step, recipe=recipe, progress=Silent())
    schedule = guidance(tuner, recipe, Silent()).schedule if recipe.guide else None
    known = gather(step, tuner.sets, tuner.folders, tuner.scratch, schedule, tuner.output)
    return step, schedule, {**tuner.folders, **known.folders}, known.statistics


def guidance(tuner: Tuner, recipe: Recipe, progress: Progress) -> Guidance:
    """What a recipe's guide decides, from what was measured before."""
    assert recipe.guide
    step = replace(tuner.step, recipe=recipe, progress=progress)
    beside = Path(recipe.locate("importance")) / IMPORTANCE
    stores = [tuner.output / IMPORTANCE, beside]
    left = wanted(step, tuner.sets, tuner.folders, tuner.output)
    return calibrate.guide(step, tuner.sets, tuner.folders, tuner.scratch, stores, left)


def score_both(step: Step, models: Mapping[str, MergedModel], scratch: Path) -> Scores:
    """Score models as the recipe's `evaluate` says, their answer loss among the metrics.

    Args:
        step: of a recipe with `evaluate`.
        models: label -> model; `merged` is tested against each of the others.
        scratch: for results.
    """
    asked = step.recipe.evaluate
    assert asked
    settings = settings_of(asked, step.execution.device)
    run = Run(step.scored, asked.limit, settings, scratch / "scored")
    candidates = [Candidate(label, one.identity, one.folder) for label, one in models.items()]
    results = dict(score(candidates, run, step.progress))
    merged = models["merged"].folder  # all have its tokenizer
    chat = chat_of(load_tokenizer(str(merged), "merged")) if asked.chat_template else None
    questions = scored_questions(step.scored, asked.limit, chat)
    n_items = len(models) * sum(map(len, questions.values()))
    with step.progress.stage("Scoring right answers", n_items, "items") as advance:
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
        problem = "the recipe scores nothing, so nothing would tell whether tuning helped."
        raise RecipeError("recipe", "evaluate", problem, "Add `evaluate:` with its tasks.")
    require_writable(output)
    corners = search_space.corners(space)
    measured = next((one for one in corners if measures_on_texts(one)), corners[0])
    step = _examined(measured, execution, progress)
    _require_plans(step, corners)
    if fitted := [one for one in corners if fits_in_sequence(one)]:
        require_possible(replace(step, recipe=fitted[0]))  # all are of the same models
    drawn, sets = _draw(step, asked)
    settings = settings_of(recipe.evaluate, execution.device)
    objective = by_metric(drawn, asked.metric, settings) if asked.metric else by_answer_loss(drawn)
    output.mkdir(parents=True, exist_ok=True)
    with alone_in(output, output), TemporaryDirectory(prefix=".scratch-", dir=output) as scratch:
        fetch.require_disk(step, output, sets)
        folders = fetch.everything(step)
        tuner = Tuner(step, space, objective, folders, sets, output, Path(scratch))
        for one in _by_guide(corners).values():  # here, where it is told how far it is
            guidance(tuner, _at_any_mean(one), progress)
        for one in _by_width(corners).values():
            gather(replace(step, recipe=one), sets, folders, Path(scratch), store=output)
        tried, n_begun = _search(tuner, output / STUDY, asked)
        tuner.seat.leave()
        best = study.best_of(tried, lower_is_better=objective.lower_is_better)
        first = search_space.warm_starts(space)[0]
        own = [trial for trial in tried if trial.values == first]
        start = next((trial for trial in own if trial.value is not None), None)
        refused = next((trial.error for trial in own if trial.error), None)
        compared = {"merged": best.values} | ({} if refused else {"start": first})
        final = None if best is start else _final(tuner, compared)
    tuned = search_space.candidate(space, best.values)
    return Tuned(tuned, space, objective, drawn, tried, n_begun, best, start, refused, final)


def _examined(recipe: Recipe, execution: Execution, progress: Progress) -> Step:
    api = hub_api()
    inputs = resolve_inputs(recipe, api, allow_pickle=execution.allow_pickle)
    inputs = convert_pickles.without_pickles(recipe, inputs, api, progress)
    examined = check.examine(recipe, inputs, api, allow_code=execution.allow_code)
    check.require_fine(examined.report)
    return Step(recipe, inputs, examined, execution, api, progress)


def _by_width(recipes: Sequence[Recipe]) -> dict[int, Recipe]:
    """One recipe of each kind of second moments that merges need and that are gathered once."""
    once = (one for one in recipes if needs_grams(one) and not fits_in_sequence(one))
    return {widest_input(one): one for one in once}


def _by_guide(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    return {one.guide.name: one for one in recipes if one.guide}


def _at_any_mean(recipe: Recipe) -> Recipe:
    """For a guide to be measured: whether its mean density is in reach, each trial finds out."""
    assert recipe.guide
    guide = recipe.guide.model_copy(update={"mean_density": None})
    return recipe.model_copy(update={"guide": guide})


def _require_plans(step: Step, recipes: Sequence[Recipe]) -> None:
    """Refuse a method that cannot merge these sources, from their headers."""
    for recipe in {one.merge_method: one for one in recipes}.values():
        merging.plan(
            recipe,
            step.inputs,
            step.examined.checkpoints,
            step.examined.tokens.alignment,
            None,
            step.execution.max_shard_bytes,
        )


def _draw(step: Step, asked: Search) -> tuple[tuple[TuningItems, ...], Sets]:
    """The items to tune on, and the texts to measure on."""
    scoring = step.recipe.evaluate
    assert scoring
    on = scoring.model_copy(update={"tasks": asked.tasks or scoring.tasks})
    selected = selection(step.recipe, on, allow_code=step.execution.allow_code)
    check_tasks(selected)
    split = asked.split or free_split_of(selected)
    drawn = calibrate.drawn_sets(step)
    calibrated = [values for one in drawn.values() for values in one.values]
    items = draw_items(step, selected, split, asked.samples, calibrated)
    for one in items:
        passed = f"; {one.n_calibrated} that calibration draws are passed over"
        told = f"{one.task}: {len(one.indices):,} items of split `{one.split}` to tune on"
        step.progress.say(f"{told}{passed if one.n_calibrated else ''}.")
    return items, calibrate.in_order(step.recipe, drawn)


def _name(tuner: Tuner) -> str:
    """Of the study: another recipe, other items or other sources begin another one."""
    told = [
        search_space.written(tuner.space.recipe),
        tuner.space.methods,
        tuner.space.guides,
        tuner.objective.digest,
        [tuner.step.inputs.content(source) for source in tuner.step.inputs.models],
        [source.commit_sha for source in tuner.step.inputs.calibration_data],
        [
            sorted(axis.__dict__.items())
            for values in search_space.combinations(tuner.space)
            for axis in axes(tuner.space, values)
        ],
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _search(tuner: Tuner, file: Path, asked: Search) -> tuple[tuple[Trial, ...], int]:
    """Try until there are enough trials or the time is over; all of them, and how many are new."""
    lower, seed = tuner.objective.lower_is_better, tuner.step.recipe.seed
    opened = study.open_study(file, _name(tuner), lower_is_better=lower, seed=seed)
    study.enqueue(opened, search_space.warm_starts(tuner.space))
    began, n_begun = time.monotonic(), 0
    n_left = max(0, asked.n_trials - len(_tried(tuner.space, opened)))
    with tuner.step.progress.stage("Tuning", n_left * tuner.objective.n_items, "items") as advance:
        while n_begun < n_left:
            if asked.budget_s is not None and time.monotonic() - began >= asked.budget_s:
                tuner.step.progress.say("The budget is spent; the same command goes on.")
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


def _final(tuner: Tuner, chosen: Mapping[str, Values]) -> Scores:
    models = {label: merge(tuner, values, label) for label, values in chosen.items()}
    return score_both(tuner.step, models, tuner.scratch)
