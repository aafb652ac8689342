"""Search better settings of a recipe on items that are neither calibrated on nor scored."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.display import Progress, TextTable, to_html
from lewis_hub.errors import RecipeError
from lewis_hub.evaluate.harness import load
from lewis_hub.evaluate.items import (
    ANSWER_LOSS,
    answer_losses,
    chat_of,
    loss_metric,
    scored_questions,
)
from lewis_hub.evaluate.paired import compare
from lewis_hub.evaluate.scores import Scores
from lewis_hub.files import require_no_links_among, require_writable
from lewis_hub.hub.changes import unchanged
from lewis_hub.merge.workspace import LOCK, alone_at, keep_unless_written, scratch_folder
from lewis_hub.progress import BY_DEFAULT, Shown, shown
from lewis_hub.recipe.schema import Calibration, Recipe
from lewis_hub.tune import space as search_space
from lewis_hub.tune import study
from lewis_hub.tune.drift import FOLDER as PREDICTIONS
from lewis_hub.tune.drift import DriftTexts, predict
from lewis_hub.tune.material import (
    DriftSearch,
    Material,
    held_out_texts,
    items_of_tasks,
    scores_nothing,
)
from lewis_hub.tune.objective import Objective, Search, TuningItems
from lewis_hub.tune.space import Space, axes
from lewis_hub.tune.study import Trial, Tuner
from lewis_hub.workflow.evaluate import Candidate, EvaluationPlan, score
from lewis_hub.workflow.examine import Examined, examine_sources, measurement_of
from lewis_hub.workflow.fetch import code_files, fetch_whole, require_disk
from lewis_hub.workflow.generated import FILE as GENERATED
from lewis_hub.workflow.generated import requests_of, require_whole_models, write_texts
from lewis_hub.workflow.heads import require_copies
from lewis_hub.workflow.job import MergeJob, compile_job
from lewis_hub.workflow.merge import MergedModel
from lewis_hub.workflow.resolve import calibrations_of, hub_api, resolve_data
from lewis_hub.workflow.resources import Execution
from lewis_hub.workflow.statistics import require_by_block
from lewis_hub.workflow.texts import ScoredTasks

if TYPE_CHECKING:
    from huggingface_hub import HfApi

STUDY = "study.journal"
FOLDERS = (PREDICTIONS, "statistics")  # in the output
SOURCES = ".sources.json"  # states of local models, until a search is complete


@dataclass(frozen=True)
class Tuned:
    """The result of a search."""

    recipe: Recipe
    space: Space
    objective: Objective
    items: tuple[TuningItems, ...]
    trials: tuple[Trial, ...]
    n_begun: int  # trials of this run
    best: Trial
    start: Trial | None  # with the recipe's own settings; None if it was not scored to the end
    refused: str | None  # the reason why these settings cannot be merged or scored
    final: Scores | None  # best and start on the scored items; None if equal or nothing is scored
    texts: tuple[DriftTexts, ...] = ()  # of each expert, if the objective is drift

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
    progress: Shown = BY_DEFAULT,
) -> Tuned:
    """Search for better settings of a recipe; an earlier run of the same search is continued.

    Args:
        recipe: has `evaluate`, whose items the search never sees, unless the objective is drift.
        asked: number of trials, time, the objective, and the items or texts to tune on.
        output: folder for the study and for measurements.
        execution: device and runner; None: this machine's CPU.
        progress: True: shown on stderr; False: nothing; or what shows it.

    Raises:
        LewisHubError: a source, task, text or setting cannot be used.
        ExtraMissingError: Optuna is not installed.

    Example:
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> uniform = recipe.model_copy(update={"guide": None, "parameters": {"density": 0.5}})
        >>> search = lewis_hub.Search(n_trials=1, samples=4)
        >>> tuned = lewis_hub.tune_recipe(uniform, search, tmp_path / "tuning")
        >>> tuned.recipe.merge_method
        'ties'
    """
    execution, progress = execution or Execution(), shown(progress)
    output = Path(output)
    space = _space(recipe, asked, execution)
    require_no_links_among(output, FOLDERS)
    require_writable(output)
    prepared = _prepare(space, asked, execution, output, progress)
    output.mkdir(parents=True, exist_ok=True)
    sources = [one.source for one in prepared.job.sources.models]
    with alone_at(output / LOCK, output), scratch_folder(output) as scratch:
        with unchanged(sources) as states:
            keep_unless_written(output / SOURCES, states, partial(_discard, output))
            tuner = _fetch(prepared, space, execution, output, scratch)
            _measure(tuner, prepared.corners)
            name = _name(tuner, prepared.digests)
            tried, n_begun = _search(tuner, output / STUDY, name, asked)
            tuner.model.release()
            judged = _judge(tuner, tried, prepared)
        (output / SOURCES).unlink(missing_ok=True)
    material = prepared.material
    tuned = search_space.candidate(space, judged.best.values)
    found = (tried, n_begun, judged.best, judged.start, judged.refused, judged.final)
    return Tuned(tuned, space, material.objective, material.items, *found, material.texts)


def _discard(output: Path) -> None:
    """Delete measurements and trials of an interrupted run that may have read other bytes."""
    for name in FOLDERS:
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (STUDY, "importance.json", GENERATED):
        (output / name).unlink(missing_ok=True)


def _space(recipe: Recipe, asked: Search, execution: Execution) -> Space:
    """Refuse what cannot be searched before anything is read; return the space."""
    study.require_optuna()
    execution.require_usable()
    if any(one.align for one in recipe.models):
        problem = "`tune` merges models as they are, and this recipe aligns them first."
        raise RecipeError("recipe", "models", problem, "Tune without `align`.")
    space = search_space.space_of(recipe, asked.methods, asked.guides)
    if recipe.evaluate is None and asked.objective == "answers":
        raise scores_nothing()
    return space


@dataclass(frozen=True)
class Prepared:
    """A search whose sources and data are pinned, before weights are downloaded."""

    api: HfApi
    progress: Progress
    corners: Sequence[Recipe]  # one recipe for each combination of method and guide
    digests: tuple[str, ...]  # of what they make, with versions, data and task files
    examined: Examined
    job: MergeJob  # of the first corner that reads calibration texts, or of the first
    tasks: ScoredTasks | None
    material: Material


def _prepare(
    space: Space, asked: Search, execution: Execution, output: Path, progress: Progress
) -> Prepared:
    """Pin sources and data, and draw the items or texts."""
    api, corners = hub_api(), search_space.corners(space)
    measured = next((one for one in corners if measurement_of(one).calibrations), corners[0])
    examined = examine_sources(measured, execution, api, progress)
    recipe, by_drift = space.recipe, asked.objective == "drift"
    declared = search_space.declared_calibrations(recipe) if by_drift else ()
    examined = _with_data_of([*corners, recipe], (one for _, one in declared if one), examined, api)
    jobs = [compile_job(one, execution, examined, api) for one in corners]
    _require_mergeable(jobs, api)
    job = jobs[corners.index(measured)]
    tasks = job.scored_tasks(api, progress)
    if by_drift:
        search = DriftSearch(recipe, asked, job, examined, output)
        material = held_out_texts(search, tasks, api, progress)
    else:
        material = items_of_tasks(job, asked, tasks)
    digests = tuple(one.reporting.planned.digest for one in jobs)
    return Prepared(api, progress, corners, digests, examined, job, tasks, material)


def _fetch(
    prepared: Prepared, space: Space, execution: Execution, output: Path, scratch: Path
) -> Tuner:
    """Download the models, write the texts that models write, and predict the held-out ones."""
    api, job, material = prepared.api, prepared.job, prepared.material
    needs = job.disk_needs(material.sets)
    made_bytes = needs.made_bytes + needs.states_bytes
    made_bytes += sum(one.n_bytes for one in material.texts)
    require_disk(output, needs.download_bytes, made_bytes)
    requests = requests_of(job.texts, material.sets, job.sources.experts)
    stores = [folder / GENERATED for folder in (output, *job.texts.beside)]
    require_whole_models(requests, job.workload.loading, stores, keeps_models=True)
    files = fetch_whole(api, [one.source for one in job.sources.models], prepared.progress)
    require_copies(api, job.sources.distinct)
    if job.sidecars.code:
        code_files(api, job.sources.donor.source)
    loader = job.loader(files, scratch, prepared.progress)
    sets = write_texts(job.texts, requests, material.sets, loader, stores, prepared.tasks).sets
    predict(material.texts, loader)
    shared = (prepared.examined, execution, api, prepared.progress, space, material.objective)
    return Tuner(*shared, files, sets, output, scratch)


@dataclass(frozen=True)
class Judged:
    """The best trial, and how it compares with the recipe's own settings; see `Tuned`."""

    best: Trial
    start: Trial | None
    refused: str | None
    final: Scores | None


def _judge(tuner: Tuner, tried: Sequence[Trial], prepared: Prepared) -> Judged:
    """Choose the best trial; score it and the recipe's own settings on the scored items."""
    best = study.best_of(tried, lower_is_better=tuner.objective.lower_is_better)
    first = search_space.warm_starts(tuner.space)[0]
    own = [trial for trial in tried if trial.values == first]
    start = next((trial for trial in own if trial.value is not None), None)
    refused = next((trial.error for trial in own if trial.error), None)
    final, evaluation = None, prepared.job.evaluation
    if best is not start and prepared.tasks and evaluation:
        chosen = {"merged": best.values} | ({} if refused else {"start": first})
        models = {label: tuner.merge(values, label) for label, values in chosen.items()}
        final = score_both(evaluation, prepared.tasks, models, tuner.scratch)
    return Judged(best, start, refused, final)


def _with_data_of(
    recipes: Sequence[Recipe], others: Iterable[Calibration], examined: Examined, api: HfApi
) -> Examined:
    """Pin the data of other calibrations and of those of all recipes, which use parts of it."""
    known = examined.inputs.data
    asked = dict.fromkeys([*(c for one in recipes for c in calibrations_of(one)), *others])
    left = [one for one in asked if one not in known]
    found = resolve_data(left, api, recipes[0].locate) if left else {}
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

    def compiled(recipe: Recipe) -> MergeJob:
        return compile_job(recipe, tuner.execution, tuner.examined, tuner.api)

    guided = {one.guide.name: (one, one.guide) for one in corners if one.guide}
    for recipe, guide in guided.values():
        # these settings may not reach the mean density of the recipe
        any_mean = {"guide": guide.model_copy(update={"mean_density": None})}
        tuner.guide(compiled(recipe.model_copy(update=any_mean)), tuner.progress)
    moments = ((measurement_of(one).moments, one) for one in corners)
    by_width = {m.widest: one for m, one in moments if m and not m.in_sequence}
    for one in by_width.values():
        tuner.gather(compiled(one), None, tuner.progress)


def _name(tuner: Tuner, digests: Sequence[str]) -> str:
    """Return the name of the study: of recipe, items, sources, and all that decides a merge."""
    facts = [
        search_space.written(tuner.space.recipe),
        tuner.space.methods,
        tuner.space.guides,
        tuner.objective.digest,
        [source.digest for source in tuner.examined.sources.models],
        digests,
        [
            sorted(axis.__dict__.items())
            for values in search_space.combinations(tuner.space)
            for axis in axes(tuner.space, values)
        ],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _search(tuner: Tuner, file: Path, name: str, asked: Search) -> tuple[tuple[Trial, ...], int]:
    """Run trials until their number or the budget is reached; return all, and how many are new."""
    lower, seed = tuner.objective.lower_is_better, tuner.space.recipe.seed
    opened = study.open_study(file, name, lower_is_better=lower, seed=seed)
    study.enqueue(opened, search_space.warm_starts(tuner.space))
    began, n_begun = time.monotonic(), 0
    n_left = max(0, asked.n_trials - len(_tried(tuner.space, opened)))
    with tuner.progress.stage("Tuning", n_left * tuner.objective.n_items, "items") as advance:
        while n_begun < n_left:
            if asked.budget_s is not None and time.monotonic() - began >= asked.budget_s:
                tuner.progress.say("The budget is spent; the same command continues the search.")
                break
            n_begun += 1
            study.run_trial(tuner, opened, advance)
    return _tried(tuner.space, opened), n_begun


def _tried(space: Space, opened: Any) -> tuple[Trial, ...]:
    """Return the informative trials with the values that were merged."""
    found = (trial for trial in study.trials(opened) if trial.tells)
    return tuple(
        replace(trial, values=search_space.settled(space, trial.values)) for trial in found
    )


def score_both(
    evaluation: EvaluationPlan, tasks: ScoredTasks, models: Mapping[str, MergedModel], scratch: Path
) -> Scores:
    """Score models by the recipe's `evaluate` and by their answer loss.

    `merged` is compared with each of the other labels.
    """
    from lewis_hub.calibration.model import load_tokenizer

    settings, loaded, limit = evaluation.settings, tasks.loaded, evaluation.limit
    candidates = [Candidate(label, one.identity, one.folder) for label, one in models.items()]
    kept, progress = scratch / "scored", tasks.progress
    results = dict(score(candidates, loaded, limit, settings, kept, progress))
    merged = models["merged"].folder  # all have its tokenizer
    chat = chat_of(load_tokenizer(str(merged), "merged")) if settings.chat_template else None
    questions = scored_questions(loaded, limit, chat)
    n_items = len(models) * sum(map(len, questions.values()))
    with progress.stage("Scoring right answers", n_items, "items") as advance:
        for label, one in models.items():
            lm = load(one.folder, settings.on_transformers)
            scored = dict(results[label].tasks)
            for task, some in questions.items():
                losses = {ANSWER_LOSS: loss_metric(answer_losses(lm, some, advance))}
                scored[task] = replace(scored[task], metrics={**scored[task].metrics, **losses})
            results[label] = replace(results[label], tasks=scored)
            del lm
            gc.collect()  # only one model fits into memory
    return compare(results)
