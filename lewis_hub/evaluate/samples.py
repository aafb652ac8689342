"""`lewis/samples.json`: each scored item with the question and the answers of all models.

It has the results of all items. Texts are shortened, and kept only up to MAX_BYTES: first of the
items that the merge lost or won against its best expert, then of those with another answer, then of
the others, from the first on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter

from lewis_hub.evaluate.answers import shortened
from lewis_hub.evaluate.scores import (
    BASE,
    EXPERT,
    MERGED,
    MetricResult,
    ModelResult,
    TaskResult,
    read_document,
)

if TYPE_CHECKING:
    from lewis_hub.evaluate.items import TaskItem

FILE = "lewis/samples.json"
VERSION = 1
MAX_QUESTION = 2000  # characters of a question or an expected answer that are kept
MAX_BYTES = 2_000_000  # of all texts together, in UTF-8
IN_TASKS = "Its items are those of its tasks."

Texts = Annotated[
    tuple[str | None, ...], Field(fail_fast=True)
]  # one per item; None where there is none, or where it was cut


@dataclass(frozen=True)
class SampledMetric:
    """The results of one metric, one per item in the order of the benchmark."""

    higher_is_better: bool
    against: str | None  # the model that the merge is compared with: its best expert
    values: Mapping[str, Annotated[tuple[float | None, ...], Field(fail_fast=True)]]  # by model
    judged: Mapping[str, Texts] = field(default_factory=dict)  # by model; None: the whole answer
    same: Mapping[str, str] = field(default_factory=dict)  # by model: "1" for the merge's answer


@dataclass(frozen=True)
class TaskSamples:
    """The items of a task. Without texts, `left_out` says why."""

    metrics: Mapping[str, SampledMetric]
    questions: Texts = ()
    targets: Texts = ()
    answers: Mapping[str, Texts] = field(default_factory=dict)  # by model
    left_out: str = ""

    @property
    def n_with_texts(self) -> int:
        """The number of items whose texts were kept."""
        return sum(question is not None for question in self.questions)


@dataclass(frozen=True)
class Samples:
    """The items of all tasks, by task."""

    tasks: Mapping[str, TaskSamples] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of `samples.json`."""
        plain = TypeAdapter(Samples).dump_python(self, mode="json", exclude_defaults=True)
        document = {"version": VERSION, "tasks": {}, **plain}
        compact = (",", ":")
        return json.dumps(document, separators=compact, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Samples:
        """Read what `to_json` wrote, or raise an EvaluationError."""
        return read_document(text, "samples.json", VERSION, cls)


def collect_samples(
    results: Mapping[str, ModelResult],
    items: Mapping[str, Sequence[TaskItem]],
    left_out: Mapping[str, str],
    max_bytes: int = MAX_BYTES,
) -> Samples:
    """Put the items of a merge and its rivals side by side.

    Args:
        results: by label.
        items: task -> its items, in the order of the results; groups have none of their own.
        left_out: task -> why its texts may not be shown.
        max_bytes: of all texts together.
    """
    if MERGED not in results:
        return Samples()
    tasks = {}
    for name in results[MERGED].tasks:
        scored = {label: one.tasks[name] for label, one in results.items() if name in one.tasks}
        whole = TaskSamples(dict(_metrics(scored)))
        if name not in items or name in left_out:
            tasks[name] = replace(whole, left_out=left_out.get(name, IN_TASKS))
        else:
            tasks[name] = _with_texts(whole, items[name], scored)
    return Samples(_within(tasks, max_bytes))


def _metrics(scored: Mapping[str, TaskResult]) -> Iterator[tuple[str, SampledMetric]]:
    """The metrics that are means over items."""
    for key, metric in scored[MERGED].metrics.items():
        found = {label: task.metrics[key] for label, task in scored.items() if key in task.metrics}
        values = {label: one.values for label, one in found.items() if one.values is not None}
        if MERGED in values:
            known = {label: found[label] for label in values}
            higher = metric.higher_is_better is not False
            same = dict(_same(scored, key))
            yield key, SampledMetric(higher, best_rival(known), values, same=same)


def _same(scored: Mapping[str, TaskResult], metric: str) -> Iterator[tuple[str, str]]:
    """For each other model, which of its answers are the merge's, as a metric judges them."""
    own = scored[MERGED].answers
    for label, task in scored.items():
        if own and task.answers and label != MERGED:
            pairs = zip(own.by(metric), task.answers.by(metric), strict=True)
            yield label, "".join("1" if mine == theirs else "0" for mine, theirs in pairs)


def best_rival(found: Mapping[str, MetricResult]) -> str | None:
    """The best expert on a metric; without experts the base, or else any other model."""
    experts = [label for label in found if label.startswith(EXPERT)]
    if experts:
        return max(experts, key=lambda label: _merit(found[label]))
    others = [label for label in found if label != MERGED]
    return BASE if BASE in others else next(iter(others), None)


def _merit(metric: MetricResult) -> float:
    return -metric.value if metric.higher_is_better is False else metric.value


def _with_texts(
    samples: TaskSamples, items: Sequence[TaskItem], scored: Mapping[str, TaskResult]
) -> TaskSamples:
    answers = {label: task.answers for label, task in scored.items() if task.answers}
    metrics = {
        key: replace(
            metric,
            judged={label: one.judged[key] for label, one in answers.items() if key in one.judged},
        )
        for key, metric in samples.metrics.items()
    }
    return replace(
        samples,
        metrics=metrics,
        questions=tuple(map(_question, items)),
        targets=tuple(shortened(item.answer.strip(), MAX_QUESTION) for item in items),
        answers={label: one.given for label, one in answers.items()},
    )


def _question(item: TaskItem) -> str:
    """The prompt with the choices that it does not list; or what else is known of the item."""
    text = item.prompt or item.answer or "\n".join(_columns(item.document))
    if item.choices and not all(choice in text for choice in item.choices):
        text = "\n".join([text, *(f"• {choice}" for choice in item.choices)])
    return shortened(text.strip(), MAX_QUESTION)


def _columns(document: Mapping[str, Any]) -> Iterator[str]:
    for name, value in document.items():
        if isinstance(value, str):
            yield f"{name}: {value}"


def _within(tasks: Mapping[str, TaskSamples], max_bytes: int) -> dict[str, TaskSamples]:
    """The same items, the texts of the last ones cut."""
    ranked = [
        (rank, place, index, name)
        for place, (name, task) in enumerate(tasks.items())
        for index, rank in enumerate(_ranks(task))
    ]
    kept: dict[str, set[int]] = {name: set() for name in tasks}
    left = max_bytes
    for _, _, index, name in sorted(ranked):
        left -= sum(len((texts[index] or "").encode()) for texts in _texts(tasks[name]))
        if left < 0:
            break
        kept[name].add(index)
    return {name: _only(task, kept[name]) for name, task in tasks.items()}


def _ranks(task: TaskSamples) -> list[int]:
    """For each item with texts: 0 lost or won, 1 answered otherwise, 2 neither."""
    ranks = [2] * len(task.questions)
    for metric in task.metrics.values():
        if metric.against is None:
            continue
        mine, theirs = metric.values[MERGED], metric.values[metric.against]
        same = metric.same.get(metric.against, "")
        for index in range(len(ranks)):
            if mine[index] != theirs[index]:
                ranks[index] = 0
            elif same and same[index] == "0":
                ranks[index] = min(ranks[index], 1)
    return ranks


def _texts(task: TaskSamples) -> Iterable[Texts]:
    judged = (texts for metric in task.metrics.values() for texts in metric.judged.values())
    return (task.questions, task.targets, *task.answers.values(), *judged)


def _only(task: TaskSamples, kept: set[int]) -> TaskSamples:
    """The same items with the texts of some."""
    if len(kept) == len(task.questions):
        return task

    def cut(texts: Texts) -> Texts:
        return tuple(text if index in kept else None for index, text in enumerate(texts))

    metrics = {
        key: replace(metric, judged={label: cut(texts) for label, texts in metric.judged.items()})
        for key, metric in task.metrics.items()
    }
    answers = {label: cut(texts) for label, texts in task.answers.items()}
    return replace(
        task,
        metrics=metrics,
        questions=cut(task.questions),
        targets=cut(task.targets),
        answers=answers,
    )
