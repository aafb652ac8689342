"""One trial of a search: settings are merged, loaded and scored, part by part."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

from lewis_hub.errors import (
    MERGE,
    CalibrationModelError,
    GuideError,
    LewisHubError,
    MergeError,
    NonFiniteError,
)
from lewis_hub.evaluate.exchange import exchange
from lewis_hub.evaluate.harness import EvaluationSettings, load
from lewis_hub.guides.density import DensitySchedule
from lewis_hub.merge.statistics import Known
from lewis_hub.progress import Advance, Progress, Silent
from lewis_hub.recipe import Recipe
from lewis_hub.stages import calibration, merging, search_space, study
from lewis_hub.stages.calibration import Guidance, Sets
from lewis_hub.stages.execution import Folders, Step
from lewis_hub.stages.gathering import gather, wanted
from lewis_hub.stages.merging import MergedModel
from lewis_hub.stages.objective import Objective
from lewis_hub.stages.search_axes import Space, Values
from lewis_hub.stages.study import ERROR, SECONDS

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
    return calibration.guide(step, tuner.sets, tuner.folders, tuner.scratch, stores, left)
