"""The quality gate: whether a merge is good enough to be published, held against other models."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.paired import paired
from lewis_hub.evaluate.results import ModelResult, TaskResult
from lewis_hub.evaluate.scores import TWINS, Scores

VERSION = 1
FILE = "lewis/gate.json"
MERGED, EXPERT = "merged", "expert:"

Rival = Literal["base", "experts", "uniform", "previous"]
OnRefusal = Literal["stop", "pull-request"]


@dataclass(frozen=True)
class Demand:
    """What a merge has to reach; `tolerance` is in the metric's own unit, 0 or more."""

    task: str
    metric: str
    not_worse_than: tuple[Rival, ...]
    tolerance: float
    on_refusal: OnRefusal


@dataclass(frozen=True)
class Previous:
    """What was published before: `name` is its repo@commit, `items` what that merge did.

    Where there is nothing to compare with, `items` is None and `why` says it.
    """

    name: str
    items: ModelResult | None = None
    why: str = ""


@dataclass(frozen=True)
class Check:
    """The merged model held against one other.

    Attributes:
        against: a label of the scores, or the repo@commit that was published before.
        value: the merged model's metric, `other` the rival's.
        difference: merged minus the other, with its 95 % interval; None where nothing could be
            compared, which only what was published before may be: `why` says the reason.
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
        """Whether the whole interval lies beyond the tolerance on the worse side."""
        if self.ci95 is None:
            return False
        low, high = self.ci95
        return (high if self.higher_is_better else -low) < -self.tolerance


@dataclass(frozen=True)
class GateVerdict:
    """All that was demanded, held against every model that it names."""

    checks: tuple[Check, ...]

    @property
    def missed(self) -> tuple[Check, ...]:
        """What keeps the merge from being published; nothing where it passed."""
        return tuple(check for check in self.checks if check.missed)

    @property
    def proposes(self) -> bool:
        """Whether what was refused is to be proposed by a pull request."""
        missed = self.missed
        return bool(missed) and all(check.on_refusal == "pull-request" for check in missed)

    @property
    def stops(self) -> bool:
        """Whether nothing at all is to be pushed."""
        return bool(self.missed) and not self.proposes

    def to_json(self) -> str:
        """The text of `gate.json`."""
        checks = [{**asdict(check), "missed": check.missed} for check in self.checks]
        document = {"version": VERSION, "passed": not self.missed, "checks": checks}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> GateVerdict:
        """Read what `to_json` wrote; whether a check is missed follows from its numbers.

        Raises:
            EvaluationError: the text is of another version, or no such document.
        """
        try:
            document = json.loads(text)
            if document["version"] != VERSION:
                raise ValueError(f"version {document['version']}, expected {VERSION}")
            return cls(tuple(_check(one) for one in document["checks"]))
        except (ValueError, TypeError, KeyError) as error:
            problem = f"is no verdict of a gate ({type(error).__name__}: {error})."
            raise EvaluationError(FILE, problem, "Take the file that the merge wrote.") from None


def judge(
    demands: Sequence[Demand], scores: Scores, items: ModelResult, previous: Previous
) -> GateVerdict:
    """Hold a scored merge against what is demanded of it.

    Args:
        demands: what has to be reached.
        scores: of the merged model and its rivals, with their paired tests.
        items: what the merged model did, item by item.
        previous: what was published before.

    Raises:
        EvaluationError: a metric that the task does not have, or that is no mean over items.
    """
    return GateVerdict(
        tuple(
            check
            for demand in demands
            for rival in demand.not_worse_than
            for check in (
                [_against_previous(demand, items, previous)]
                if rival == "previous"
                else _against(demand, scores, rival)
            )
        )
    )


def _against(demand: Demand, scores: Scores, rival: Rival) -> Iterator[Check]:
    task = scores.tasks[demand.task]
    merged = task.models[MERGED]
    if demand.metric not in merged:
        raise unknown_metric(demand.task, demand.metric, list(merged))
    for label, found in task.models.items():
        if not _is(label, rival):
            continue
        tests = [test for test in task.paired if test.against == label]
        test = next((test for test in tests if test.metric == demand.metric), None)
        if test is None:
            raise _no_mean(demand, sorted({test.metric for test in tests}))
        yield Check(
            task=demand.task,
            metric=demand.metric,
            against=label,
            tolerance=demand.tolerance,
            on_refusal=demand.on_refusal,
            higher_is_better=merged[demand.metric].higher_is_better,
            value=merged[demand.metric].value,
            other=found[demand.metric].value,
            difference=test.difference,
            ci95=test.ci95,
        )


def _against_previous(demand: Demand, items: ModelResult, previous: Previous) -> Check:
    mine = items.tasks[demand.task]
    if demand.metric not in mine.metrics:
        raise unknown_metric(demand.task, demand.metric, list(mine.metrics))
    metric = mine.metrics[demand.metric]
    if metric.values is None:
        means = [key for key, one in mine.metrics.items() if one.values is not None]
        raise _no_mean(demand, means)
    theirs = previous.items.tasks.get(demand.task) if previous.items else None
    why = _why_not(mine, theirs, demand.metric) if previous.items else previous.why
    other = theirs.metrics[demand.metric] if theirs and not why else None
    found = paired(metric, other) if other else None
    return Check(
        task=demand.task,
        metric=demand.metric,
        against=previous.name,
        tolerance=demand.tolerance,
        on_refusal=demand.on_refusal,
        higher_is_better=metric.higher_is_better is not False,
        value=metric.value,
        other=other.value if other else None,
        difference=found.difference if found else None,
        ci95=found.ci95 if found else None,
        why=why or ("" if found else "no item has a number from both"),
    )


def _why_not(mine: TaskResult, theirs: TaskResult | None, metric: str) -> str:
    """Why two results cannot be paired; nothing where they can."""
    if theirs is None or metric not in theirs.metrics or theirs.metrics[metric].values is None:
        return "it was not scored by this task and metric"
    if mine.version != theirs.version:
        return f"it was scored by version {theirs.version} of the task, this by {mine.version}"
    if (mine.documents, mine.prompts) != (theirs.documents, theirs.prompts):
        return "it was scored on other items or prompts"
    return ""


def _is(label: str, rival: Rival) -> bool:
    if rival == "experts":
        return label.startswith(EXPERT)
    return label in TWINS if rival == "uniform" else label == rival


def unknown_metric(task: str, metric: str, known: Sequence[str]) -> EvaluationError:
    """A gate, a leaderboard or a search names a metric that the task does not have."""
    near = difflib.get_close_matches(metric, known, n=1, cutoff=0.5)
    remedy = f"Did you mean `{near[0]}`? " if near else ""
    listed = ", ".join(f"`{key}`" for key in known)
    return EvaluationError(task, f"it has no metric `{metric}`.", f"{remedy}It has {listed}.")


def _no_mean(demand: Demand, means: Sequence[str]) -> EvaluationError:
    problem = f"`{demand.metric}` is no mean over items, so the gate cannot test its differences."
    listed = ", ".join(f"`{key}`" for key in means)
    remedy = f"Gate on {listed} instead." if means else "Gate on another task."
    return EvaluationError(demand.task, problem, remedy)


def _check(document: dict[str, Any]) -> Check:
    told = {key: value for key, value in document.items() if key != "missed"}
    ci95 = told["ci95"]
    return Check(**{**told, "ci95": None if ci95 is None else tuple(ci95)})
