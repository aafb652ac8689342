"""Refuse to calibrate on what is scored: drawn items held against every item of every task."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lewis_hub.errors import CalibrationError
from lewis_hub.evaluate.items import Item, TaskRows, scored_items
from lewis_hub.guides.template import Template
from lewis_hub.guides.tokens import CalibrationTokens, Rows
from lewis_hub.recipe_calibration import Calibration
from lewis_hub.stages.execution import Step

Values = frozenset[str]  # texts without case and white space


def drawn_values(
    rows: Rows, template: Template, tokens: CalibrationTokens
) -> list[tuple[Values, ...]]:
    """What fixes each drawn item: of a dataset's row the columns that go into its text.

    Of a task's item its document, and its prompt with its answer: either will do.
    """
    if isinstance(rows, TaskRows):
        return item_values(rows.items(tokens.rows))
    return [(values(template.parts(row)),) for row in rows.rows(tokens.rows)]


def item_values(items: Iterable[Item]) -> list[tuple[Values, ...]]:
    """Of each item its document, and its prompt with its answer."""
    return [(values(item.document), values((item.prompt, item.answer))) for item in items]


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


def count_overlap(drawn: Sequence[tuple[Values, ...]], scored: Iterable[Item]) -> Counter[str]:
    """Task -> number of drawn items that it scores."""
    found = {(item.task, index) for index, item in overlaps(drawn, scored)}
    return Counter(task for task, _ in found)


def overlaps(
    drawn: Sequence[tuple[Values, ...]], scored: Iterable[Item]
) -> Iterator[tuple[int, Item]]:
    """The place of each drawn item that is scored, with the item that it is.

    An item is scored where all that fixes it stands in one scored document, its prompt or answer.
    """
    by_longest: defaultdict[str, list[tuple[int, Values]]] = defaultdict(list)
    for index, alternatives in enumerate(drawn):
        for one in filter(None, alternatives):
            by_longest[max(one, key=lambda text: (len(text), text))].append((index, one))
    for item in scored:
        whole = item.prompt + item.answer, f"{item.prompt} {item.answer}"
        there = values((item.document, item.prompt, item.answer, whole))
        for text in by_longest.keys() & there:
            yield from ((index, item) for index, one in by_longest[text] if one <= there)


def refuse_overlap(step: Step, drawn: Mapping[Calibration, Sequence[tuple[Values, ...]]]) -> None:
    """Hold every calibration against what the recipe scores.

    Raises:
        CalibrationError: an item is in both, and the recipe does not allow it.
    """
    asked = step.recipe.evaluate
    held = {one: items for one, items in drawn.items() if not one.allow_overlap}
    if asked is None or not held:
        return
    step.progress.say("Comparing calibration texts with the items that are scored")
    scored = list(scored_items(step.scored))
    for calibration, items in held.items():
        found = count_overlap(items, scored)
        if found:
            told = ", ".join(f"{n} of {task}" for task, n in sorted(found.items()))
            raise CalibrationError(
                f"calibration on {calibration.data}, split {calibration.split}",
                f"of {len(items)} texts, `evaluate` scores {told}",
                "A score on what a merge was fitted to says nothing: name another split, or "
                "another `seed`.\n`allow_overlap: true` in this calibration carries on all the "
                "same.",
            )
