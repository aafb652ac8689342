"""The quality gate: whether a merge is good enough to be published, compared with other models."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from lewis_hub.display import line_of
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.paired import MeanDifference, paired
from lewis_hub.evaluate.scores import (
    EXPERT,
    MERGED,
    TWINS,
    MetricResult,
    MetricScore,
    ModelResult,
    PairedTest,
    Scores,
    TaskResult,
    TaskScores,
    Value,
    read_document,
    settings_words,
)
from lewis_hub.recipe.evaluation import Gate

VERSION = 1
FILE = "lewis/gate.json"
LONGEST_REASON = 1000  # characters

Rival = Literal["base", "experts", "uniform", "previous"]
OnRefusal = Literal["stop", "pull-request"]


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
    """The merged model compared with one other model."""

    task: str
    metric: str
    against: str  # a label of the scores, or the repo@commit that was published before
    tolerance: float
    on_refusal: OnRefusal
    higher_is_better: bool
    value: Value  # the merged model's metric
    other: Value | None = None  # the other model's
    difference: float | None = None  # merged minus the other; None if they could not be compared
    ci95: tuple[float, float] | None = None
    why: str = ""  # the reason why they could not be compared

    @property
    def missed(self) -> bool:
        """Whether the whole interval is worse than the tolerance allows."""
        if self.ci95 is None:
            return False
        low, high = self.ci95
        return (high if self.higher_is_better else -low) < -self.tolerance


@dataclass(frozen=True)
class GateVerdict:
    """A check for each gate and each model that it names."""

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
        plain = TypeAdapter(Check).dump_python
        checks = [{**plain(check), "missed": check.missed} for check in self.checks]
        document = {"version": VERSION, "passed": not self.missed, "checks": checks}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> GateVerdict:
        """Read what `to_json` wrote; `missed` is computed again from the numbers."""
        return read_document(text, FILE, VERSION, cls, "Use the file that the merge wrote.")


def judge(
    gates: Sequence[Gate], scores: Scores, items: ModelResult, previous: Previous
) -> GateVerdict:
    """Compare a scored merge, whose results are `items`, with the models that the gates name.

    Raises:
        EvaluationError: the task does not have a metric, or the metric is not a mean over items.
    """
    checks: list[Check] = []
    for gate in gates:
        mine = items.tasks[gate.task]
        if gate.metric not in mine.metrics:
            raise unknown_metric(gate.task, gate.metric, list(mine.metrics))
        if mine.metrics[gate.metric].values is None:
            means = [key for key, metric in mine.metrics.items() if metric.values is not None]
            raise _not_a_mean(gate, means)
        for rival in gate.not_worse_than:
            if rival == "previous":
                checks.append(_against_previous(gate, mine, previous, items.settings))
            else:
                checks += _against(gate, scores.tasks[gate.task], rival)
    return GateVerdict(tuple(checks))


def _against(gate: Gate, task: TaskScores, rival: Rival) -> Iterator[Check]:
    for label, others in task.models.items():
        if _names(rival, label):
            tests = {test.metric: test for test in task.paired if test.against == label}
            if gate.metric not in tests:
                raise _not_a_mean(gate, sorted(tests))
            other, mine = others[gate.metric].value, task.models[MERGED][gate.metric]
            yield _check(gate, label, mine, other, tests[gate.metric])


def _against_previous(
    gate: Gate, mine: TaskResult, previous: Previous, settings: Mapping[str, Any]
) -> Check:
    metric = mine.metrics[gate.metric]
    theirs = previous.items.tasks.get(gate.task) if previous.items else None
    why = _why_not(mine, theirs, gate.metric) if previous.items else previous.why
    if previous.items and previous.items.settings != settings:
        why = f"it was scored with {settings_words(previous.items.settings)}, this with "
        why += settings_words(settings)
    if theirs is None or why:
        return _check(gate, previous.name, metric, why=why)
    other = theirs.metrics[gate.metric]
    test = paired(metric, other)
    why = "" if test else "no item has numbers of both models that can be compared"
    return _check(gate, previous.name, metric, other.value, test, why)


def _check(
    gate: Gate,
    against: str,
    mine: MetricScore | MetricResult,
    other: float | None = None,
    test: PairedTest | MeanDifference | None = None,
    why: str = "",
) -> Check:
    """A check; `why` may quote what an earlier merge was published with, which anyone may write."""
    return Check(
        task=gate.task,
        metric=gate.metric,
        against=against,
        tolerance=gate.tolerance,
        on_refusal=gate.on_refusal,
        higher_is_better=mine.higher_is_better is not False,
        value=mine.value,
        other=other,
        difference=test.difference if test else None,
        ci95=test.ci95 if test else None,
        why=line_of(why, LONGEST_REASON),
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


def _not_a_mean(gate: Gate, means: Sequence[str]) -> EvaluationError:
    problem = f"`{gate.metric}` is not a mean over items, so the gate cannot test differences."
    listed = ", ".join(f"`{key}`" for key in means)
    remedy = f"Use {listed} in the gate." if means else "Use another task in the gate."
    return EvaluationError(gate.task, problem, remedy)
