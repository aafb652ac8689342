"""Refuse to calibrate on what is scored: drawn items held against every item of every task."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.texts import CalibrationTokens, Rows, Template
from lewis_hub.errors import CalibrationError, EvaluationError
from lewis_hub.evaluate.benchmarks import LoadedTasks, load_tasks
from lewis_hub.evaluate.items import Item, TaskRows, holding, scored_items
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.progress import Progress
from lewis_hub.recipe.schema import Calibration
from lewis_hub.workflow.resolve import scored_commits

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Values = frozenset[str]  # texts without case and white space


@dataclass(frozen=True)
class DrawnText:
    """What a model is fitted to.

    Attributes:
        texts: as it is, and what of it comes from the data alone.
        fixing: what fixes an item; each of several will do.
    """

    texts: tuple[str, ...]
    fixing: tuple[Values, ...]


def drawn_texts(rows: Rows, template: Template, tokens: CalibrationTokens) -> list[DrawnText]:
    """A dataset's row is fixed by the columns that go into its text.

    A task's item by its document, and by its prompt with its answer.
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


def drawn_items(items: Iterable[Item]) -> list[DrawnText]:
    """Each item by itself, without few-shot examples."""
    return [DrawnText((f"{item.prompt} {item.answer}",), _fixing(item)) for item in items]


def _fixing(item: Item) -> tuple[Values, ...]:
    return values(item.document), values((item.prompt, item.answer))


def values(told: Any) -> Values:
    """All texts and numbers in a document."""
    return frozenset(text for text in _texts(told) if text)


def _texts(told: Any) -> Iterator[str]:
    if isinstance(told, Mapping):
        yield from _texts(list(told.values()))
    elif isinstance(told, list | tuple):
        for one in told:
            yield from _texts(one)
    elif told is not None:
        yield " ".join(str(told).split()).casefold()


def count_overlap(drawn: Sequence[DrawnText], scored: Sequence[Item]) -> Counter[str]:
    """Task -> number of drawn items that it scores."""
    found = {(item.task, index) for index, item in overlaps(drawn, scored)}
    return Counter(task for task, _ in found)


def overlaps(drawn: Sequence[DrawnText], scored: Sequence[Item]) -> Iterator[tuple[int, Item]]:
    """The place of each drawn text that holds a scored item, with that item.

    The item's question stands in it (`holding`), or all that fixes what was drawn stands in one
    scored document, its prompt or answer.
    """
    texts = [(index, text) for index, one in enumerate(drawn) for text in one.texts]
    for place, item in holding([text for _, text in texts], scored):
        yield texts[place][0], item
    by_longest: defaultdict[str, list[tuple[int, Values]]] = defaultdict(list)
    for index, alternatives in enumerate(drawn):
        for one in filter(None, alternatives.fixing):
            by_longest[max(one, key=lambda text: (len(text), text))].append((index, one))
    for item in scored:
        whole = item.prompt + item.answer, f"{item.prompt} {item.answer}"
        there = values((item.document, item.prompt, item.answer, whole))
        for text in by_longest.keys() & there:
            yield from ((index, item) for index, one in by_longest[text] if one <= there)


@dataclass(frozen=True)
class ScoredTasks:
    """Tasks that are scored, now or later; they are loaded when they are first needed.

    Attributes:
        selection: the tasks.
        are_scored_now: whether this run scores them; else another run is going to.
    """

    selection: TaskSelection
    are_scored_now: bool
    api: HfApi
    progress: Progress

    @cached_property
    def loaded(self) -> LoadedTasks:
        """The tasks.

        Raises:
            EvaluationError: a task cannot be built.
        """
        self.progress.say("Loading the benchmarks")
        return load_tasks(self.selection, scored_commits(self.api, self.selection))

    def items(self) -> list[Item]:
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
    """Compare every calibration with the items that are scored, now or later.

    Raises:
        CalibrationError: an item is in both, and the recipe does not allow it.
        EvaluationError: what is scored cannot be loaded.
    """
    held = {one: items for one, items in drawn.items() if not one.allow_overlap}
    if scored is None or not held:
        return
    progress.say("Comparing calibration texts with the items that are scored")
    known = scored.items()
    for calibration, items in held.items():
        found = count_overlap(items, known)
        if found:
            told = ", ".join(f"{n} of {task}" for task, n in sorted(found.items()))
            raise CalibrationError(
                f"calibration on {calibration.data}, split {calibration.split}",
                f"of {len(items)} texts, `evaluate` scores {told}",
                "A score on what a merge was fitted to says nothing: name another split, or "
                "another `seed`.\n`allow_overlap: true` in this calibration, or "
                "`--allow-overlap`, carries on all the same.",
            )
