"""The study: Optuna proposes values and stores trials; each trial merges and scores the values."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lewis_hub.checkpoint.ranges import Locations
from lewis_hub.display import SILENT, Advance, Progress
from lewis_hub.errors import (
    MERGE,
    CalibrationModelError,
    ExtraMissingError,
    GuideError,
    LewisHubError,
    MergeError,
    NonFiniteError,
    TuningError,
    UnscorableAnswerError,
)
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.harness import exchange, load
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.merge.plan import MergePlan
from lewis_hub.tune.objective import Objective
from lewis_hub.tune.space import Choice, Space, Value, Values, axes, candidate
from lewis_hub.workflow.calibrate import guide
from lewis_hub.workflow.examine import Examined
from lewis_hub.workflow.fetch import FetchedSources
from lewis_hub.workflow.job import MergeJob, compile_job
from lewis_hub.workflow.merge import MergedModel, finish_model, merge_in_memory, write_weights
from lewis_hub.workflow.resources import Execution
from lewis_hub.workflow.statistics import Gathered, gather, wanted
from lewis_hub.workflow.texts import Sets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

N_AT_RANDOM = 6  # random trials before the sampler uses results, including warm starts
N_BEFORE_PRUNING = 5  # trials that are scored to the end before any is pruned
SECONDS, ERROR = "seconds", "error"
# of Optuna for a file that is no journal, or lines of other types
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)

State = Literal["complete", "pruned", "failed"]
STATES: Mapping[str, State] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass(frozen=True)
class Trial:
    """The result of a set of values."""

    number: int
    state: State
    values: Values
    value: float | None  # the objective over all items; None if it was not scored to the end
    reached: float | None  # the objective over the scored items
    seconds: Mapping[str, float]  # of each step
    error: str | None = None  # the reason why these values cannot be merged or scored

    @property
    def tells(self) -> bool:
        """Whether its values were tried, and not interrupted by the end of a run."""
        return self.state != "failed" or self.error is not None


class _Alone:
    """Optuna's lock of a journal, without one: a run is alone at the folder of its study.

    Those of Optuna are files. A killed run leaves one, and a disk that fails makes a traceback.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        """There is nothing to release."""


def require_optuna() -> None:
    """Refuse to start without Optuna."""
    if find_spec("optuna") is None:
        raise ExtraMissingError("`tune`", "tune")


def open_study(file: Path, name: str, *, lower_is_better: bool, seed: int) -> Any:
    """Open or create the study of this name in a file that no other run opens.

    Running trials of a killed run count as failed; if their values were queued, they are queued
    again.

    Raises:
        TuningError: the file is not a journal of Optuna.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        _cut_unfinished_line(file)
        journal = JournalFileBackend(str(file), _Alone())
        study = optuna.create_study(
            storage=JournalStorage(journal),
            study_name=name,
            direction="minimize" if lower_is_better else "maximize",
            pruner=optuna.pruners.MedianPruner(N_BEFORE_PRUNING, n_warmup_steps=0),
            load_if_exists=True,
        )
    except UNREADABLE as error:
        problem = f"the study cannot be read: {type(error).__name__}: {error}"
        raise TuningError(str(file), problem, "Delete the file to start again.") from error
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if start := trial.system_attrs.get("fixed_params"):
            study.enqueue_trial(start)
    # a continued run must not draw the values of the previous run again
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=N_AT_RANDOM, seed=(seed + len(study.trials)) % 2**32
    )
    return study


def _cut_unfinished_line(file: Path) -> None:
    """Delete a last line that a full disk cut off: Optuna would append to it, and read neither."""
    content = file.read_bytes() if file.exists() else b""
    n_whole = content.rfind(b"\n") + 1
    if n_whole < len(content):
        os.truncate(file, n_whole)


def enqueue(study: Any, starts: Sequence[Values]) -> None:
    """Queue these values before all others, unless they were tried or are queued."""
    for values in starts:
        study.enqueue_trial(dict(values), skip_if_exists=True)


def propose(trial: Any, space: Space) -> Values:
    """Propose a value on each axis; the axes depend on the values before."""
    chosen: dict[str, Value] = {}
    while left := [axis for axis in axes(space, chosen) if axis.name not in chosen]:
        axis = left[0]
        if isinstance(axis, Choice):
            chosen[axis.name] = trial.suggest_categorical(axis.name, axis.options)
        else:
            chosen[axis.name] = trial.suggest_float(axis.name, axis.low, axis.high)
    return chosen


def trials(study: Any) -> tuple[Trial, ...]:
    """Return the finished trials in order, including those of killed runs."""
    return tuple(
        Trial(
            number=trial.number,
            state=STATES[trial.state.name],
            values=dict(trial.params),
            value=trial.value if trial.state.name == "COMPLETE" else None,
            reached=trial.intermediate_values.get(trial.last_step),
            seconds=trial.user_attrs.get(SECONDS, {}),
            error=trial.user_attrs.get(ERROR),
        )
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name in STATES
    )


def best_of(tried: Sequence[Trial], *, lower_is_better: bool) -> Trial:
    """Return the complete trial of the best value, the earliest if several are equal.

    Raises:
        TuningError: no trial is complete.
    """
    complete = [(trial.value, trial) for trial in tried if trial.value is not None]
    if not complete:
        problem = "no trial was scored to the end"
        errors = [trial.error for trial in tried if trial.error]
        last = f"The last error: {errors[-1]}\n" if errors else ""
        remedy = "Use more --trials, or a longer --budget."
        raise TuningError("tune", problem, last + remedy)
    pick = min if lower_is_better else max
    return pick(complete, key=lambda one: one[0])[1]


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
    """The sources, texts and items that all trials share."""

    examined: Examined
    execution: Execution
    api: HfApi
    progress: Progress
    space: Space
    objective: Objective
    files: FetchedSources
    sets: Sets  # calibration texts
    output: Path  # folder for `importance.json` and statistics
    scratch: Path
    model: ResidentModel = field(default_factory=ResidentModel)

    def gather(
        self, job: MergeJob, schedule: DensitySchedule | None, progress: Progress
    ) -> Gathered:
        """Gather the second moments that a job needs."""
        if job.statistics is None:
            return Gathered()
        loader = job.loader(self.files, self.scratch, progress)
        return gather(job.statistics, self.sets, loader, schedule, self.output)

    def guide(self, job: MergeJob, progress: Progress) -> DensitySchedule | None:
        """Return the schedule of the job's guide, with known measurements; None without a guide."""
        if job.guide is None:
            return None
        stores = [folder / "importance.json" for folder in (self.output, *job.guide.beside)]
        loader, needed = job.loader(self.files, self.scratch, progress), job.statistics
        left = wanted(needed, self.sets, loader, self.output) if needed else ()
        return guide(job.guide, self.sets, loader, stores, left).schedule

    def plan(self, values: Values) -> tuple[MergeJob, MergePlan, Locations]:
        """Return the job and plan of some values, and the places of its sources."""
        recipe = candidate(self.space, values)
        job = compile_job(recipe, self.execution, self.examined, self.api)
        schedule = self.guide(job, SILENT)
        known = self.gather(job, schedule, SILENT)
        planned = job.plan.plan(schedule, known.statistics)
        return job, planned, {**self.files.locations, **known.folders}

    def merge(self, values: Values, folder: str) -> MergedModel:
        """Write the merge of some values into a folder."""
        job, planned, places = self.plan(values)
        output, sources = self.scratch / folder, self.files.sources
        shards = write_weights(planned, places, output, job.means, SILENT)
        return finish_model(planned, shards, job.sidecars, sources, output)


def run_trial(tuner: Tuner, study: Any, advance: Advance) -> None:
    """Run a trial; `advance` counts all of its items, including those that pruning skips."""
    from optuna.trial import TrialState

    trial = study.ask()
    values = propose(trial, tuner.space)
    clock, n_left = Clock(), tuner.objective.n_items

    def done(n: int) -> None:
        nonlocal n_left
        n_left -= n
        advance(n)

    value, error, is_pruned = float("nan"), None, False
    try:
        lm = tuner.model.load(tuner, values, clock)
        value, is_pruned = _score(tuner.objective, trial, lm, done)
    except LewisHubError as failure:
        if not is_of_settings(failure):
            raise
        error = str(failure)
    else:
        clock.split("score")
        trial.set_user_attr(SECONDS, clock.seconds)
        if not isfinite(value):
            error = f"its {tuner.objective.metric} is {value}"
    if error:
        trial.set_user_attr(ERROR, error)
        study.tell(trial, state=TrialState.FAIL)
        tuner.progress.say(f"Trial {trial.number} failed: {error}")
    elif is_pruned:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, value)
    advance(n_left)


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
    return isinstance(error, MergeError | GuideError | UnscorableAnswerError)


class Clock:
    """A clock with the seconds of each step of a trial."""

    def __init__(self) -> None:
        self.last, self.seconds = time.monotonic(), dict[str, float]()

    def split(self, name: str) -> None:
        """Record the time of the step that ended now."""
        now = time.monotonic()
        self.seconds[name], self.last = round(now - self.last, 3), now
