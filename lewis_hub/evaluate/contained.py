"""Which texts hold a task's items: its question found inside them, whatever stands around it.

Texts are compared word by word: case and white space do not count, all else does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lewis_hub.evaluate.items import Item

ENOUGH = 13  # words that no two texts share by chance: the n-grams of GPT-3's search for overlaps
LABEL = 3  # words of a column that may be a label, a letter or a subject
NEAR = 8  # words between a short question and its answer: "Answer:", a chat template's
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_PIECE = re.compile(rf"[^\W{_UNSPACED}]+|\w|[^\w\s]")  # a word, a letter as in Chinese, or a mark


@dataclass(frozen=True)
class Sought:
    """What of an item is looked for; all in words between single spaces, as `spelt` writes them."""

    question: tuple[str, ...]  # columns, each of which must stand in the text
    answer: str

    @property
    def n_words(self) -> int:
        """Words of the question."""
        return sum(map(_n_words, self.question))


def spelt(text: str) -> str:
    """Words and marks in lower case, one space before, between and after them."""
    return f" {' '.join(_PIECE.findall(text.casefold()))} "


def sought(item: Item) -> Sought:
    """The columns of its document that its prompt shows, or else the prompt; and its answer.

    Short columns, which may be labels, count only where the prompt shows no other.
    """
    prompt, answer = spelt(item.prompt or item.answer), spelt(item.answer)
    columns = {spelt(value) for value in item.document.values() if isinstance(value, str)}
    shown = sorted(column for column in columns if _n_words(column) and column in prompt)
    longer = [column for column in shown if _n_words(column) > LABEL]
    return Sought(tuple(longer or shown or ([prompt] if _n_words(prompt) else [])), answer)


def holding(texts: Sequence[str], items: Iterable[Item]) -> Iterator[tuple[int, Item]]:
    """The place of each text that holds an item, with that item.

    A text holds an item where the whole question stands in it. One of fewer than `ENOUGH` words
    may be there by chance, so its answer has to follow, or the text to end where it would.

    Args:
        texts: as they are.
        items: one after the other; only texts with all words of an item are looked through.
    """
    written = [spelt(text) for text in texts]
    places: dict[str, set[int]] = defaultdict(set)
    for index, text in enumerate(written):
        for word in set(text.split()):
            places[word].add(index)
    for item in items:
        asked = sought(item)
        words = {word for column in asked.question for word in column.split()}
        if words and words <= places.keys():
            for index in set.intersection(*sorted((places[w] for w in words), key=len)):
                if _holds(written[index], asked):
                    yield index, item


def _holds(text: str, asked: Sought) -> bool:
    if not all(column in text for column in asked.question):
        return False
    if asked.n_words >= ENOUGH:
        return True
    last = max(asked.question, key=len)
    ends = (place.start() + len(last) for place in re.finditer(f"(?={re.escape(last)})", text))
    return any(_is_over(text[end:], asked) for end in ends)


def _is_over(rest: str, asked: Sought) -> bool:
    if asked.answer.strip() and _follows(rest, asked.answer):
        return True
    return asked.n_words > 1 and _is_left_open(rest)


def _follows(rest: str, answer: str) -> bool:
    before, found, _ = f" {rest}".partition(answer)
    return bool(found) and _n_words(before) <= NEAR


def _is_left_open(rest: str) -> bool:
    """Whether a text has no answer: nothing is left, or only what asks for one."""
    n_words = _n_words(rest)
    return n_words == 0 or (n_words <= NEAR and rest.rstrip().endswith(":"))


def _n_words(text: str) -> int:
    return sum(piece[0].isalnum() or piece[0] == "_" for piece in text.split())
