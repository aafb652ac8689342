"""Refuse calibration texts that contain scored items; every item of every task is compared."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.texts import CalibrationTokens, Template, TextRows
from lewis_hub.errors import CalibrationError, EvaluationError
from lewis_hub.evaluate.benchmarks import LoadedTasks, load_tasks
from lewis_hub.evaluate.items import TaskItem, TaskRows, contained_items, scored_items
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.progress import Progress
from lewis_hub.recipe.schema import Calibration
from lewis_hub.workflow.resolve import scored_commits

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Values = frozenset[str]  # texts without case and white space


@dataclass(frozen=True)
class DrawnText:
    """A calibration text or an item to tune on.

    Attributes:
        texts: the rendered text, and the part of it that comes from the data.
        fixing: sets of values of which each identifies the item.
    """

    texts: tuple[str, ...]
    fixing: tuple[Values, ...]


def drawn_texts(rows: TextRows, template: Template, tokens: CalibrationTokens) -> list[DrawnText]:
    """Return drawn rows for the comparison.

    The columns of its text identify a row of a dataset. Its document, or its prompt with its
    answer, identifies an item of a task.
    """
    table = rows.rows(tokens.rows)
    if isinstance(rows, TaskRows):
        items = zip(table, rows.items(tokens.rows), strict=True)
        return [DrawnText(template.parts(row), _fixing(item)) for row, item in items]
    drawn = []
    for index, row in zip(tokens.rows, table, strict=True):
        parts = template.parts(row)
        joined = "\n".join(str(part) for part in parts if part is not None)
        drawn.append(DrawnText((template.render(index, row), joined), (values(parts),)))
    return drawn


def drawn_items(items: Iterable[TaskItem]) -> list[DrawnText]:
    """Return items without few-shot examples for the comparison."""
    return [DrawnText((f"{item.prompt} {item.answer}",), _fixing(item)) for item in items]


def _fixing(item: TaskItem) -> tuple[Values, ...]:
    return values(item.document), values((item.prompt, item.answer))


def values(document: Any) -> Values:
    """Return all texts and numbers in a document, without case and white space."""
    return frozenset(text for text in _texts(document) if text)


def _texts(document: Any) -> Iterator[str]:
    if isinstance(document, Mapping):
        yield from _texts(list(document.values()))
    elif isinstance(document, list | tuple):
        for part in document:
            yield from _texts(part)
    elif document is not None:
        yield " ".join(str(document).split()).casefold()


def count_overlap(drawn: Sequence[DrawnText], scored: Sequence[TaskItem]) -> Counter[str]:
    """Return the number of drawn items that each task scores."""
    found = {(item.task, index) for index, item in overlaps(drawn, scored)}
    return Counter(task for task, _ in found)


def overlaps(
    drawn: Sequence[DrawnText], scored: Sequence[TaskItem]
) -> Iterator[tuple[int, TaskItem]]:
    """Yield the index of each drawn text that matches a scored item, with that item.

    The text contains the item's question (`contained_items`), or the item's document, prompt and
    answer contain all values that identify the text.
    """
    texts = [(index, text) for index, one in enumerate(drawn) for text in one.texts]
    for place, item in contained_items([text for _, text in texts], scored):
        yield texts[place][0], item
    by_longest: defaultdict[str, list[tuple[int, Values]]] = defaultdict(list)
    for index, alternatives in enumerate(drawn):
        for one in filter(None, alternatives.fixing):
            by_longest[max(one, key=lambda text: (len(text), text))].append((index, one))
    for item in scored:
        whole = item.prompt + item.answer, f"{item.prompt} {item.answer}"
        known = values((item.document, item.prompt, item.answer, whole))
        for text in by_longest.keys() & known:
            yield from ((index, item) for index, one in by_longest[text] if one <= known)


@dataclass(frozen=True)
class ScoredTasks:
    """Tasks that are scored now or later; they are loaded on first use.

    Attributes:
        are_scored_now: whether this run scores them; otherwise a later run does.
    """

    selection: TaskSelection
    are_scored_now: bool
    api: HfApi
    progress: Progress

    @cached_property
    def loaded(self) -> LoadedTasks:
        """The loaded tasks.

        Raises:
            EvaluationError: a task cannot be built.
        """
        self.progress.say("Loading the benchmarks")
        return load_tasks(self.selection, scored_commits(self.api, self.selection))

    def items(self) -> list[TaskItem]:
        """Return every item of every task.

        Raises:
            EvaluationError: a task cannot be built.
        """
        try:
            return list(scored_items(self.loaded))
        except EvaluationError as error:
            if self.are_scored_now:
                raise
            remedy = f"{error.remedy}\nOr merge without comparing: `--allow-overlap`."
            raise EvaluationError(error.subject, error.problem, remedy) from error


def refuse_overlap(
    scored: ScoredTasks | None, drawn: Mapping[Calibration, Sequence[DrawnText]], progress: Progress
) -> None:
    """Refuse calibrations whose texts contain items that are scored now or later.

    Raises:
        CalibrationError: an item is in both, and the recipe does not allow it.
        EvaluationError: the tasks cannot be loaded.
    """
    compared = {one: items for one, items in drawn.items() if not one.allow_overlap}
    if scored is None or not compared:
        return
    progress.say("Comparing calibration texts with the items that are scored")
    known = scored.items()
    for calibration, items in compared.items():
        found = count_overlap(items, known)
        if found:
            counts = ", ".join(f"{n} of {task}" for task, n in sorted(found.items()))
            raise CalibrationError(
                f"calibration on {calibration.data}, split {calibration.split}",
                f"of {len(items)} texts, `evaluate` scores {counts}",
                "A score on calibration texts is meaningless: name another split, or another "
                "`seed`.\n`allow_overlap: true` in this calibration, or `--allow-overlap`, "
                "continues anyway.",
            )
