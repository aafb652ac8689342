"""What one model did on each task, item by item: what scores and paired tests are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.scores import finite, number, read_document

VERSION = 1


@dataclass(frozen=True)
class MetricResult:
    """One metric of one model on one task.

    Attributes:
        value: what lm-eval aggregated.
        values: one number per item in the order of `TaskResult.documents`, None where the task
            gave none; no numbers at all where the metric is not a mean over items.
        higher_is_better: None where the task does not say.
    """

    value: float
    values: tuple[float | None, ...] | None
    higher_is_better: bool | None = None

    @property
    def stderr(self) -> float | None:
        """The standard error of a mean, from the sample's standard deviation."""
        known = [value for value in self.values or () if value is not None]
        if len(known) < 2:
            return None
        mean = math.fsum(known) / len(known)
        squares = math.fsum((value - mean) ** 2 for value in known)
        return math.sqrt(squares / (len(known) - 1) / len(known))


@dataclass(frozen=True)
class TaskResult:
    """One model on one task: digests of the items and of their prompts, and its metrics."""

    version: str
    documents: tuple[str, ...]
    prompts: tuple[str, ...]
    metrics: Mapping[str, MetricResult]


@dataclass(frozen=True)
class ModelResult:
    """One model on all tasks; kept on disk while the others are still being evaluated."""

    tasks: Mapping[str, TaskResult]

    def to_json(self) -> str:
        """A document that `from_json` reads back without loss."""
        tasks = {
            name: {
                "version": task.version,
                "documents": task.documents,
                "prompts": task.prompts,
                "metrics": {key: _metric_document(m) for key, m in task.metrics.items()},
            }
            for name, task in self.tasks.items()
        }
        document = {"version": VERSION, "tasks": tasks}
        compact = (",", ":")  # a number a line would be most of the file
        return json.dumps(document, separators=compact, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelResult:
        """Read what `to_json` wrote.

        Raises:
            EvaluationError: the text is of another version, or no such document.
        """
        name = "evaluation result"
        document = read_document(text, name, VERSION)
        try:
            return cls({name: _task(task) for name, task in document["tasks"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"is damaged ({type(error).__name__}: {error})."
            raise EvaluationError(name, problem, "Evaluate again.") from None


def pooled(parts: Sequence[TaskResult], metric: str, value: float) -> MetricResult:
    """A group's metric over the items of its tasks, where it is the mean over all of them."""
    results = [part.metrics.get(metric) for part in parts]
    values: list[float | None] = []
    for result in results:
        if result is None or result.values is None:
            return MetricResult(value, None)
        values.extend(result.values)
    directions = {result.higher_is_better for result in results if result is not None}
    direction = directions.pop() if len(directions) == 1 else None
    known = [item for item in values if item is not None]
    is_mean = bool(known) and math.isclose(
        math.fsum(known) / len(known), value, rel_tol=1e-9, abs_tol=1e-12
    )
    return MetricResult(value, tuple(values) if is_mean else None, direction)


def _metric_document(metric: MetricResult) -> dict[str, Any]:
    return {
        "value": finite(metric.value),
        "values": metric.values,
        "higher_is_better": metric.higher_is_better,
    }


def _task(document: Mapping[str, Any]) -> TaskResult:
    documents, prompts = tuple(document["documents"]), tuple(document["prompts"])
    metrics = {key: _metric(metric) for key, metric in document["metrics"].items()}
    lengths = {len(metric.values) for metric in metrics.values() if metric.values is not None}
    if {len(prompts), *lengths} != {len(documents)}:
        raise ValueError(f"{len(documents)} items, but other numbers of prompts or values")
    return TaskResult(document["version"], documents, prompts, metrics)


def _metric(document: Mapping[str, Any]) -> MetricResult:
    values = document["values"]
    items = None if values is None else tuple(None if v is None else float(v) for v in values)
    return MetricResult(number(document["value"]), items, document["higher_is_better"])
