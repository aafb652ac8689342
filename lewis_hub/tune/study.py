"""The study: Optuna proposes values, and stores all trials in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lewis_hub.errors import ExtraMissingError, TuningError
from lewis_hub.tune.space import Axis, Choice, Space, Value, Values, axes

N_AT_RANDOM = 6  # random trials before the sampler uses results, including warm starts
N_BEFORE_PRUNING = 5  # trials that are scored to the end before any is pruned
SECONDS, ERROR = "seconds", "error"

State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """The result of a set of values.

    Attributes:
        value: the objective over all items; None if it was not scored to the end.
        reached: the objective over the scored items.
        seconds: step -> duration.
        error: the reason why these values cannot be merged or scored.
    """

    number: int
    state: State
    values: Values
    value: float | None
    reached: float | None
    seconds: Mapping[str, float]
    error: str | None = None

    @property
    def tells(self) -> bool:
        """Whether its values were tried, and not interrupted by the end of a run."""
        return self.state != "failed" or self.error is not None


def require_optuna() -> None:
    """Refuse to start without Optuna.

    Raises:
        ExtraMissingError: it is not installed.
    """
    if find_spec("optuna") is None:
        raise ExtraMissingError("`tune`", "tune")


def open_study(file: Path, name: str, *, lower_is_better: bool, seed: int) -> Any:
    """Open or create the study of this name in a file.

    Running trials of a killed run count as failed.

    Raises:
        TuningError: the file is not a journal of Optuna.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            study_name=name,
            direction="minimize" if lower_is_better else "maximize",
            pruner=optuna.pruners.MedianPruner(N_BEFORE_PRUNING, n_warmup_steps=0),
            load_if_exists=True,
        )
    except (OSError, ValueError, KeyError) as error:
        problem = f"the study cannot be read: {type(error).__name__}: {error}"
        raise TuningError(str(file), problem, "Delete the file to start again.") from error
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    # a continued run must not draw the values of the previous run again
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=N_AT_RANDOM, seed=(seed + len(study.trials)) % 2**32
    )
    return study


def enqueue(study: Any, starts: Sequence[Values]) -> None:
    """Queue these values before all others, unless they were tried or are queued.

    A failed trial with an error was tried; a trial that a killed run left was not.
    """
    import optuna

    failed = optuna.trial.TrialState.FAIL
    known = [
        _asked(trial)
        for trial in study.get_trials(deepcopy=False)
        if trial.state != failed or ERROR in trial.user_attrs
    ]
    for values in starts:
        if dict(values) not in known:
            study.enqueue_trial(dict(values))


def _asked(trial: Any) -> dict[str, Any]:
    """Return the values of a trial, or of a queued trial."""
    return trial.params or dict(trial.system_attrs.get("fixed_params", {}))


def propose(trial: Any, space: Space) -> Values:
    """Propose a value on each axis; the axes depend on the values before."""
    chosen: dict[str, Value] = {}
    while left := [axis for axis in axes(space, chosen) if axis.name not in chosen]:
        chosen[left[0].name] = _suggested(trial, left[0])
    return chosen


def _suggested(trial: Any, axis: Axis) -> Value:
    found: Value
    if isinstance(axis, Choice):
        found = trial.suggest_categorical(axis.name, axis.options)
    else:
        found = trial.suggest_float(axis.name, axis.low, axis.high)
    return found


def trials(study: Any) -> tuple[Trial, ...]:
    """Return the finished trials in order, including those of killed runs."""
    import optuna

    states: dict[Any, State] = {
        optuna.trial.TrialState.COMPLETE: "complete",
        optuna.trial.TrialState.PRUNED: "pruned",
        optuna.trial.TrialState.FAIL: "failed",
    }
    return tuple(
        Trial(
            number=trial.number,
            state=states[trial.state],
            values=dict(trial.params),
            value=trial.value if states[trial.state] == "complete" else None,
            reached=trial.intermediate_values.get(trial.last_step),
            seconds=trial.user_attrs.get(SECONDS, {}),
            error=trial.user_attrs.get(ERROR),
        )
        for trial in study.get_trials(deepcopy=False, states=list(states))
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
