"""The quality gate: whether a merge is good enough to be published, compared with other models."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.paired import paired
from lewis_hub.evaluate.scores import EXPERT, MERGED, TWINS, ModelResult, Scores, TaskResult

VERSION = 1
FILE = "lewis/gate.json"

Rival = Literal["base", "experts", "uniform", "previous"]
OnRefusal = Literal["stop", "pull-request"]


@dataclass(frozen=True)
class Demand:
    """A requirement on a merge; `tolerance` is in the metric's own unit, 0 or more."""

    task: str
    metric: str
    not_worse_than: tuple[Rival, ...]
    tolerance: float
    on_refusal: OnRefusal


@dataclass(frozen=True)
class Previous:
    """The previously published merge: `name` is its repo@commit, `items` its results.

    If there is nothing to compare with, `items` is None and `why` is the reason.
    """

    name: str
    items: ModelResult | None = None
    why: str = ""


@dataclass(frozen=True)
class Check:
    """The merged model compared with one other model.

    Attributes:
        against: a label of the scores, or the repo@commit that was published before.
        value: the merged model's metric; `other` is that of the other model.
        difference: merged minus the other, with its 95 % interval. None if the previous merge
            could not be compared; `why` is the reason then.
    """

    task: str
    metric: str
    against: str
    tolerance: float
    on_refusal: OnRefusal
    higher_is_better: bool
    value: float
    other: float | None = None
    difference: float | None = None
    ci95: tuple[float, float] | None = None
    why: str = ""

    @property
    def missed(self) -> bool:
        """Whether the whole interval is worse than the tolerance allows."""
        if self.ci95 is None:
            return False
        low, high = self.ci95
        return (high if self.higher_is_better else -low) < -self.tolerance


@dataclass(frozen=True)
class GateVerdict:
    """A check for each demand and each model that it names."""

    checks: tuple[Check, ...]

    @property
    def missed(self) -> tuple[Check, ...]:
        """The checks that prevent publication; empty if the merge passed."""
        return tuple(check for check in self.checks if check.missed)

    @property
    def proposes(self) -> bool:
        """Whether the merge is refused, and is to be proposed as a pull request instead."""
        missed = self.missed
        return bool(missed) and all(check.on_refusal == "pull-request" for check in missed)

    @property
    def stops(self) -> bool:
        """Whether nothing is to be pushed."""
        return bool(self.missed) and not self.proposes

    def to_json(self) -> str:
        """The text of `gate.json`."""
        checks = [{**asdict(check), "missed": check.missed} for check in self.checks]
        document = {"version": VERSION, "passed": not self.missed, "checks": checks}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> GateVerdict:
        """Read what `to_json` wrote; `missed` is computed again from the numbers.

        Raises:
            EvaluationError: the text has another version, or is no such document.
        """
        try:
            document = json.loads(text)
            if document["version"] != VERSION:
                raise ValueError(f"version {document['version']}, expected {VERSION}")
            return cls(tuple(map(_check, document["checks"])))
        except (ValueError, TypeError, KeyError) as error:
            problem = f"is not a gate verdict ({type(error).__name__}: {error})."
            raise EvaluationError(FILE, problem, "Use the file that the merge wrote.") from None


def judge(
    demands: Sequence[Demand], scores: Scores, items: ModelResult, previous: Previous
) -> GateVerdict:
    """Compare a scored merge with the models that the demands name.

    Args:
        demands: the requirements.
        scores: of the merged model and the others, with their paired tests.
        items: the merged model's results, item by item.
        previous: the previously published merge.

    Raises:
        EvaluationError: the task does not have a metric, or the metric is not a mean over items.
    """
    checks: list[Check] = []
    for demand in demands:
        for rival in demand.not_worse_than:
            if rival == "previous":
                checks.append(_against_previous(demand, items, previous))
            else:
                checks += _against(demand, scores, rival)
    return GateVerdict(tuple(checks))


def _against(demand: Demand, scores: Scores, rival: Rival) -> Iterator[Check]:
    task = scores.tasks[demand.task]
    merged = task.models[MERGED]
    if demand.metric not in merged:
        raise unknown_metric(demand.task, demand.metric, list(merged))
    metric = merged[demand.metric]
    for label, others in task.models.items():
        if not _names(rival, label):
            continue
        tests = [test for test in task.paired if test.against == label]
        test = next((test for test in tests if test.metric == demand.metric), None)
        if test is None:
            raise _not_a_mean(demand, sorted({test.metric for test in tests}))
        check = _uncompared(demand, label, metric.value, higher=metric.higher_is_better)
        yield replace(
            check, other=others[demand.metric].value, difference=test.difference, ci95=test.ci95
        )


def _against_previous(demand: Demand, items: ModelResult, previous: Previous) -> Check:
    mine = items.tasks[demand.task]
    if demand.metric not in mine.metrics:
        raise unknown_metric(demand.task, demand.metric, list(mine.metrics))
    metric = mine.metrics[demand.metric]
    if metric.values is None:
        means = [key for key, other in mine.metrics.items() if other.values is not None]
        raise _not_a_mean(demand, means)
    higher = metric.higher_is_better is not False
    check = _uncompared(demand, previous.name, metric.value, higher=higher)
    theirs = previous.items.tasks.get(demand.task) if previous.items else None
    why = _why_not(mine, theirs, demand.metric) if previous.items else previous.why
    if theirs is None or why:
        return replace(check, why=why)
    other = theirs.metrics[demand.metric]
    test = paired(metric, other)
    if test is None:
        return replace(check, other=other.value, why="no item has a number from both models")
    return replace(check, other=other.value, difference=test.difference, ci95=test.ci95)


def _uncompared(demand: Demand, against: str, value: float, *, higher: bool) -> Check:
    return Check(
        task=demand.task,
        metric=demand.metric,
        against=against,
        tolerance=demand.tolerance,
        on_refusal=demand.on_refusal,
        higher_is_better=higher,
        value=value,
    )


def _why_not(mine: TaskResult, theirs: TaskResult | None, metric: str) -> str:
    """The reason why two results cannot be paired; empty if they can."""
    if theirs is None or metric not in theirs.metrics or theirs.metrics[metric].values is None:
        return "it was not scored on this task and metric"
    if mine.version != theirs.version:
        return f"it was scored with version {theirs.version} of the task, this with {mine.version}"
    if (mine.documents, mine.prompts) != (theirs.documents, theirs.prompts):
        return "it was scored on other items or prompts"
    return ""


def _names(rival: Rival, label: str) -> bool:
    if rival == "experts":
        return label.startswith(EXPERT)
    return label in TWINS if rival == "uniform" else label == rival


def unknown_metric(task: str, metric: str, known: Sequence[str]) -> EvaluationError:
    """The error for a gate, leaderboard or search that names a metric that the task lacks."""
    near = difflib.get_close_matches(metric, known, n=1, cutoff=0.5)
    remedy = f"Did you mean `{near[0]}`? " if near else ""
    listed = ", ".join(f"`{key}`" for key in known)
    return EvaluationError(task, f"it has no metric `{metric}`.", f"{remedy}It has {listed}.")


def _not_a_mean(demand: Demand, means: Sequence[str]) -> EvaluationError:
    problem = f"`{demand.metric}` is not a mean over items, so the gate cannot test differences."
    listed = ", ".join(f"`{key}`" for key in means)
    remedy = f"Use {listed} in the gate." if means else "Use another task in the gate."
    return EvaluationError(demand.task, problem, remedy)


def _check(document: dict[str, Any]) -> Check:
    fields = {key: value for key, value in document.items() if key != "missed"}
    ci95 = fields["ci95"]
    return Check(**{**fields, "ci95": None if ci95 is None else tuple(ci95)})
