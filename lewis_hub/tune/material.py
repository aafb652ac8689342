"""What the trials of a search are fitted and measured on: items of tasks, or held-out texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.display import Progress
from lewis_hub.errors import RecipeError, SearchRefusedError
from lewis_hub.hub.source import Source
from lewis_hub.recipe.schema import Recipe
from lewis_hub.tune.drift import DriftTexts, by_drift, drift_texts
from lewis_hub.tune.held_out import (
    N_TEXTS,
    hold_out,
    length_problems,
    missing_problems,
    model_problems,
    n_vocabulary,
    option_problems,
)
from lewis_hub.tune.objective import (
    N_ITEMS,
    Objective,
    Search,
    TuningItems,
    by_answer_loss,
    by_metric,
    choose_split,
    draw_items,
)
from lewis_hub.tune.space import declared_calibrations
from lewis_hub.workflow.examine import Examined
from lewis_hub.workflow.job import MergeJob
from lewis_hub.workflow.texts import ScoredTasks, Sets, calibration_sets, draw_texts

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Material:
    """What the trials of a search are made from and measured on."""

    objective: Objective
    sets: Sets  # calibration texts that the merges are fitted on
    items: tuple[TuningItems, ...] = ()
    texts: tuple[DriftTexts, ...] = ()


def items_of_tasks(job: MergeJob, asked: Search, tasks: ScoredTasks | None) -> Material:
    """Draw the items to tune on and the calibration texts."""
    if tasks is None or job.evaluation is None:
        raise scores_nothing()
    settings = job.evaluation.settings
    chat_model = job.sources.donor.source if settings.chat_template else None
    drawn, sets = _draw(job, asked, tasks, chat_model)
    objective = by_answer_loss(drawn)
    if asked.metric:
        objective = by_metric(drawn, asked.metric, settings.on_transformers)
    return Material(objective, sets, drawn)


@dataclass(frozen=True)
class DriftSearch:
    """A search by drift: its recipe, which may lack data, and its job."""

    recipe: Recipe
    asked: Search
    job: MergeJob
    examined: Examined
    output: Path


def held_out_texts(
    search: DriftSearch, tasks: ScoredTasks | None, api: HfApi, progress: Progress
) -> Material:
    """Draw the texts to fit on and those to measure drift on.

    Raises:
        SearchRefusedError: everything that prevents the search.
    """
    job, experts = search.job, search.job.sources.experts
    declared = declared_calibrations(search.recipe)
    calibrations = tuple(one for _, one in declared if one)
    settings = replace(job.texts, calibrations=calibrations)
    problems = [*option_problems(search.asked), *missing_problems(declared)]
    problems += model_problems(search.examined)
    n_texts = search.asked.samples or N_TEXTS
    known = hold_out(settings, n_texts, tasks, api, progress)
    problems += known.problems
    problems += length_problems(job.sources.donor, known)
    if problems:
        raise SearchRefusedError(tuple(problems))
    texts = drift_texts(
        experts,
        [(one, known.held_out[one]) for one in calibrations],
        n_vocabulary(job.sources.donor.config) or 0,
        job.workload.loading.device,
        search.output,
    )
    return Material(by_drift(texts), calibration_sets(job.texts, known.fitted, experts), (), texts)


def _draw(
    job: MergeJob, asked: Search, tasks: ScoredTasks, chat_model: Source | None
) -> tuple[tuple[TuningItems, ...], Sets]:
    """Draw the items to tune on and the calibration texts."""
    chosen = choose_split(asked, tasks.selection)  # before any data is read
    drawn = draw_texts(job.texts, tasks, tasks.api, tasks.progress)
    calibrated = [text for one in drawn.values() for text in one.texts]
    n_items = asked.samples or N_ITEMS
    items = draw_items(chosen, n_items, tasks, calibrated, job.texts.seed, chat_model)
    for one in items:
        skipped = f"; {one.n_calibrated} calibration items are skipped" if one.n_calibrated else ""
        drawn_items = f"{one.task}: {len(one.indices):,} items of split `{one.split}` to tune on"
        tasks.progress.say(f"{drawn_items}{skipped}.")
    return items, calibration_sets(job.texts, drawn, job.sources.experts)


def scores_nothing() -> RecipeError:
    """Return the error of a recipe without `evaluate`."""
    problem = "the recipe scores nothing, so tuning could not be judged."
    remedy = "Add `evaluate:` with its tasks, or search without by `--objective drift`."
    return RecipeError("recipe", "evaluate", problem, remedy)
