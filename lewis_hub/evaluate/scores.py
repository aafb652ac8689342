"""Scores of the models on each task, and the paired tests between them: `lewis/scores.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lewis_hub.errors import EvaluationError

VERSION = 1
TWINS = ("uniform", "task_arithmetic", "by_magnitude")  # labels of the merge without guidance


@dataclass(frozen=True)
class MetricScore:
    """A metric over a task's items; no standard error where none has a closed form."""

    value: float
    stderr: float | None
    higher_is_better: bool = True

    @property
    def merit(self) -> float:
        """The value, turned so that the better model has the higher one."""
        return self.value if self.higher_is_better else -self.value


@dataclass(frozen=True)
class PairedTest:
    """The merged model against another one on the same items.

    `difference` is merged minus the other, with its 95 % interval; `p` is two-sided, and `p_holm`
    is adjusted over every task and metric that is tested against the same model.
    """

    metric: str
    against: str
    difference: float
    ci95: tuple[float, float]
    p: float
    p_holm: float


@dataclass(frozen=True)
class TaskScores:
    """All models on one task: label -> metric (`exact_match,strict-match`) -> score."""

    n: int
    version: str
    models: Mapping[str, Mapping[str, MetricScore]]
    paired: tuple[PairedTest, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Task -> scores.

    Labels are `base`, `expert:<source>`, `merged`, and of its twins `uniform` (one density
    everywhere), `task_arithmetic` or `by_magnitude` (no statistics).
    """

    tasks: Mapping[str, TaskScores]

    def to_document(self) -> dict[str, Any]:
        """The content of `scores.json`."""
        tasks = {name: _task_document(task) for name, task in self.tasks.items()}
        return {"version": VERSION, "tasks": tasks}

    def to_json(self) -> str:
        """The text of `scores.json`."""
        document = self.to_document()
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """Read what `to_json` wrote.

        Raises:
            EvaluationError: the text is of another version, or no such document.
        """
        document = read_document(text, "scores.json", VERSION)
        return cls({name: _task_scores(task) for name, task in document["tasks"].items()})


def read_document(text: str, name: str, version: int) -> dict[str, Any]:
    """The JSON object in `text`, if it is of the one version that this code reads."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise EvaluationError(name, f"is not JSON ({error}).", "Evaluate again.") from error
    found = document.get("version") if isinstance(document, dict) else None
    if found != version or "tasks" not in document:
        problem = f"has version {found}, expected {version}."
        raise EvaluationError(name, problem, "Evaluate again, or use the version that wrote it.")
    return dict(document)


def finite(value: float) -> float | None:
    """The number as JSON holds it: null where there is none (an overflown perplexity)."""
    return value if math.isfinite(value) else None


def number(value: float | None) -> float:
    """The inverse of `finite`."""
    return math.nan if value is None else value


def _task_document(task: TaskScores) -> dict[str, Any]:
    return {
        "n": task.n,
        "version": task.version,
        "models": {
            label: {name: _score_document(score) for name, score in metrics.items()}
            for label, metrics in task.models.items()
        },
        "paired": [
            {
                "metric": test.metric,
                "against": test.against,
                "difference": test.difference,
                "ci95": list(test.ci95),
                "p": test.p,
                "p_holm": test.p_holm,
            }
            for test in task.paired
        ],
    }


def _score_document(score: MetricScore) -> dict[str, Any]:
    direction = {} if score.higher_is_better else {"higher_is_better": False}
    return {"value": finite(score.value), "stderr": score.stderr, **direction}


def _task_scores(document: Mapping[str, Any]) -> TaskScores:
    return TaskScores(
        n=document["n"],
        version=document["version"],
        models={
            label: {
                name: MetricScore(**{**score, "value": number(score["value"])})
                for name, score in metrics.items()
            }
            for label, metrics in document["models"].items()
        },
        paired=tuple(
            PairedTest(**{**test, "ci95": tuple(test["ci95"])}) for test in document["paired"]
        ),
    )
