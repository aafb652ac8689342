"""Results of models on tasks: item by item (`lewis/items.json`), and side by side.

`lewis/scores.json` holds the models side by side with the paired tests between them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, PlainSerializer, TypeAdapter, ValidationError

from lewis_hub.display import TextTable, to_html
from lewis_hub.documents import MAX_TABLE_BYTES, DocumentError, read_json, require_few_keys
from lewis_hub.errors import EvaluationError

VERSION = 1  # of `scores.json`
ITEMS_VERSION = 1
MAX_KEYS = 100_000  # of the objects of a document: a task and a metric of it have some ten each
BASE, MERGED, EXPERT = "base", "merged", "expert:"
TWINS = ("uniform", "task_arithmetic", "by_magnitude")  # labels of the merge without guidance

T = TypeVar("T")
# JSON has no infinity and no NaN, such as an overflown perplexity: they are written as null.
Value = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None),
]


@dataclass(frozen=True)
class MetricResult:
    """One metric of one model on one task.

    `values` has a number per item in the order of `TaskResult.documents`, None where the task gives
    none. It is None where the metric is not a mean over items.
    """

    value: Value  # as lm-eval aggregates it
    values: Annotated[tuple[float | None, ...], Field(fail_fast=True)] | None
    higher_is_better: bool | None = None  # None where the task does not say

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
class Answers:
    """What a model answered to each item, shortened; None for an item without an answer in words.

    `judged` has an entry for each metric that does not judge the whole answer: what its filter
    extracts, or the choice by another measure. None in it stands for the whole answer.
    """

    given: Annotated[tuple[str | None, ...], Field(fail_fast=True)]
    judged: Mapping[str, Annotated[tuple[str | None, ...], Field(fail_fast=True)]] = field(
        default_factory=dict
    )

    def by(self, metric: str) -> tuple[str | None, ...]:
        """The texts that a metric judges."""
        read = self.judged.get(metric, (None,) * len(self.given))
        pairs = zip(read, self.given, strict=True)
        return tuple(whole if text is None else text for text, whole in pairs)


@dataclass(frozen=True)
class TaskResult:
    """One model on one task: digests of the items and of their prompts, and its metrics."""

    version: str
    documents: Annotated[tuple[str, ...], Field(fail_fast=True)]
    prompts: Annotated[tuple[str, ...], Field(fail_fast=True)]
    metrics: Mapping[str, MetricResult]
    answers: Answers | None = None  # None: not recorded, or the task has none in words


@dataclass(frozen=True)
class ModelResult:
    """One model on all tasks; kept on disk while the others are evaluated."""

    tasks: Mapping[str, TaskResult]
    settings: Mapping[str, Any] = field(default_factory=dict)  # that change scores, but defaults

    def to_json(self) -> str:
        """The text of `items.json`, which `from_json` reads back without loss."""
        plain = TypeAdapter(ModelResult).dump_python(self, mode="json")
        settings = {"settings": plain["settings"]} if self.settings else {}
        for task in plain["tasks"].values():
            if task["answers"] is None:
                del task["answers"]
        document = {"version": ITEMS_VERSION, **settings, "tasks": plain["tasks"]}
        compact = (",", ":")  # with a line a number, white space would be most of the file
        return json.dumps(document, separators=compact, allow_nan=False) + "\n"

    @property
    def without_answers(self) -> ModelResult:
        """The same results without texts."""
        tasks = {name: replace(task, answers=None) for name, task in self.tasks.items()}
        return replace(self, tasks=tasks)

    @classmethod
    def from_json(cls, text: str) -> ModelResult:
        """Read what `to_json` wrote, or raise an EvaluationError."""
        name = "evaluation result"
        result = read_document(text, name, ITEMS_VERSION, cls)
        for task in result.tasks.values():
            answers = (task.answers.given, *task.answers.judged.values()) if task.answers else ()
            values = (metric.values for metric in task.metrics.values())
            lists = (task.prompts, *values, *answers)
            if any(len(each) != len(task.documents) for each in lists if each is not None):
                problem = f"is damaged ({len(task.documents)} items, but other numbers of values)."
                raise EvaluationError(name, problem, "Evaluate again.")
        return result


def settings_words(settings: Mapping[str, Any]) -> str:
    """The settings of an evaluation in words: `backend vllm, num_fewshot 5`."""
    found = []
    for name, value in settings.items():
        parts = value.items() if isinstance(value, Mapping) else [(name, value)]
        found += [f"{key} {_word(part)}" for key, part in parts]
    return ", ".join(found) or "the default settings"


def _word(value: Any) -> str:
    listed = value if isinstance(value, list | tuple) else [value]
    return " ".join(
        str(one).lower() if isinstance(one, bool) else repr(one).strip("'") for one in listed
    )


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


@dataclass(frozen=True)
class MetricScore:
    """A metric over a task's items; no standard error where none has a closed form."""

    value: Value
    stderr: float | None
    higher_is_better: bool = True

    @property
    def merit(self) -> float:
        """The value with the sign that gives the better model the higher number; NaN is worst."""
        if math.isnan(self.value):  # also an overflown perplexity, which was written as null
            return -math.inf
        return self.value if self.higher_is_better else -self.value

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" ± {self.stderr:.3f}" if self.stderr is not None else "")


@dataclass(frozen=True)
class PairedTest:
    """The merged model against another model on the same items.

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
    paired: Annotated[tuple[PairedTest, ...], Field(fail_fast=True)]


@dataclass(frozen=True)
class Scores:
    """Task -> scores.

    Labels are `base`, `expert:<source>`, `merged`, and those of its twins: `uniform` (one density
    everywhere), `task_arithmetic` or `by_magnitude` (no statistics).
    """

    tasks: Mapping[str, TaskScores]
    settings: Mapping[str, Any] = field(default_factory=dict)  # as those of a `ModelResult`

    @property
    def labels(self) -> tuple[str, ...]:
        """Of all models, in the order in which tasks name them."""
        return tuple(dict.fromkeys(label for task in self.tasks.values() for label in task.models))

    def by_metric(self) -> Iterator[tuple[str, str, str, list[MetricScore | None]]]:
        """Task, metric, number of items and a score for each label, for every task and metric."""
        for name, task in self.tasks.items():
            for metric in dict.fromkeys(key for scored in task.models.values() for key in scored):
                scores = [task.models.get(label, {}).get(metric) for label in self.labels]
                yield name, metric, f"{task.n:,}", scores

    @property
    def table(self) -> TextTable:
        """A row per task and metric, a column per model."""
        rows = ((*row, *(str(s or "-") for s in scores)) for *row, scores in self.by_metric())
        names = (re.sub("^expert:|@[0-9a-f]{40}$", "", label) for label in self.labels)
        return TextTable(("task", "metric", "n", *names), tuple(rows))

    def __repr__(self) -> str:
        header, lines = self.table.header, []
        for task, metric, n, *cells in self.table.rows:
            scored = ", ".join(f"{m} {cell}" for m, cell in zip(header[3:], cells, strict=True))
            lines.append(f"{task}, {metric} (n = {n}): {scored}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return to_html(self.table)

    def to_document(self) -> dict[str, Any]:
        """The content of `scores.json`."""
        plain = TypeAdapter(Scores).dump_python(self, mode="json", exclude_defaults=True)
        settings = {"settings": plain["settings"]} if self.settings else {}
        return {"version": VERSION, **settings, "tasks": plain["tasks"]}

    def to_json(self) -> str:
        """The text of `scores.json`."""
        document = self.to_document()
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """Read what `to_json` wrote, or raise an EvaluationError."""
        return read_document(text, "scores.json", VERSION, cls)


def read_document(
    text: str, name: str, version: int, kind: type[T], remedy: str = "Evaluate again."
) -> T:
    """Read a JSON object of this version as a dataclass, whose other fields it may have.

    Raises:
        EvaluationError: the text is not JSON, or has another version or other fields.
    """
    try:
        document = read_json(text, MAX_TABLE_BYTES)
    except ValueError as error:
        raise EvaluationError(name, f"is not JSON ({error}).", remedy) from error
    found = document.get("version") if isinstance(document, dict) else None
    if found != version:
        problem = f"has version {found}, expected {version}."
        raise EvaluationError(name, problem, "Evaluate again, or use the version that wrote it.")
    try:
        require_few_keys(document, MAX_KEYS)
        return TypeAdapter(kind).validate_python(document)
    except DocumentError as error:
        raise EvaluationError(name, f"is damaged: {error}.", remedy) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise EvaluationError(name, f"is damaged (`{place}`: {first['msg']}).", remedy) from None
