"""Texts that contain a task's items: such texts would tell a merge what it is asked later."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice

from lewis_hub.evaluate.items import TaskItem

LONG_QUESTION = 13  # words that two texts do not share by chance, as in GPT-3's overlap analysis
LONGEST_LABEL = 3  # words of a column that may be a label, a letter or a subject
QUICK = 1000  # letters of what is compared again at each place
NO_SPACE = re.compile("[^ ]+")
ANSWER_DISTANCE = 8  # words between a short question and its answer: "Answer:", a chat template's
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
PIECE = re.compile(rf"[^\W{UNSPACED}]+|\w|[^\w\s]")  # a word, a letter as in Chinese, or a mark


def normalized(text: str) -> str:
    """Words and marks in lower case, with one space before, between and after them."""
    return f" {' '.join(PIECE.findall(text.casefold()))} "


def question_parts(item: TaskItem) -> tuple[str, ...]:
    """The columns of the document that the prompt shows, or else the prompt, all `normalized`.

    Short columns, which may be labels, count only where the prompt shows no longer column.
    """
    prompt = normalized(item.prompt or item.answer)
    columns = {normalized(value) for value in item.document.values() if isinstance(value, str)}
    shown = sorted(column for column in columns if _n_words(column) and column in prompt)
    longer = [column for column in shown if _n_words(column) > LONGEST_LABEL]
    return tuple(longer or shown or ([prompt] if _n_words(prompt) else []))


def contained_items(
    texts: Sequence[str], items: Iterable[TaskItem]
) -> Iterator[tuple[int, TaskItem]]:
    """Find the items that texts contain; yields the index of each such text with the item.

    A text contains an item if it contains the whole question. A question of fewer than
    `LONG_QUESTION` words may occur by chance: its answer must follow, or the text must end before
    the answer.
    """
    written = [normalized(text) for text in texts]
    places: dict[str, set[int]] = defaultdict(set)
    for index, text in enumerate(written):
        for word in set(text.split()):
            places[word].add(index)
    for item in items:
        question = question_parts(item)
        words = {word for part in question for word in part.split()}
        if words and words <= places.keys():
            for index in set.intersection(*sorted((places[w] for w in words), key=len)):
                if _contains(written[index], question, normalized(item.answer)):
                    yield index, item


def _contains(text: str, question: Sequence[str], answer: str) -> bool:
    if not all(part in text for part in question):
        return False
    n_words = sum(map(_n_words, question))
    if n_words >= LONG_QUESTION:
        return True
    last, answered = max(question, key=len), -1
    found = list(_places(text, answer)) if len(answer) > QUICK else []
    for place in _places(text, last):
        end = place + len(last) - 1
        if answered < end and answer.strip():
            answered = _nearest(text, answer, end, found)
        if end <= answered < len(text) and _words_up_to(text, end, answered) <= ANSWER_DISTANCE:
            return True
        n_left = _words_up_to(text, end, len(text)) if n_words > 1 else ANSWER_DISTANCE + 1
        if n_left == 0 or (n_left <= ANSWER_DISTANCE and text.endswith(" : ")):
            return True  # the text ends before the answer
    return False


def _nearest(text: str, answer: str, start: int, found: Sequence[int]) -> int:
    """The first place of an answer from `start` on; the length of the text if there is none."""
    if len(answer) > QUICK:
        number = bisect_left(found, start)
        return found[number] if number < len(found) else len(text)
    place = text.find(answer, start)
    return len(text) if place < 0 else place


def _words_up_to(text: str, start: int, stop: int) -> int:
    """The number of words in a part of a text, at most ANSWER_DISTANCE + 1."""
    pieces = (text[found.start()] for found in NO_SPACE.finditer(text, start, stop))
    return sum(1 for _ in islice(filter(_is_word, pieces), ANSWER_DISTANCE + 1))


def _places(text: str, part: str) -> Iterator[int]:
    """The places of a part in a text, both `normalized`; none of an empty part.

    A long part is found by the search of Knuth, Morris and Pratt, piece by piece, as a text may
    repeat it a million times.
    """
    if not part.strip():
        return
    if len(part) <= QUICK:
        place = text.find(part)
        while place >= 0:
            yield place
            place = text.find(part, place + 1)
        return
    wanted, pieces = part.split(), text.split()
    starts = [*accumulate((len(piece) + 1 for piece in pieces), initial=0)]
    borders: list[int] = []  # of the first pieces of the part: how many of them end it as well
    n_alike = 0  # pieces before this one that are the first of the part
    for number, piece in enumerate((*wanted, None, *pieces)):
        while n_alike and (n_alike == len(wanted) or piece != wanted[n_alike]):
            n_alike = borders[n_alike - 1]
        n_alike += number > 0 and piece == wanted[n_alike]
        if number < len(wanted):
            borders.append(n_alike)
        elif n_alike == len(wanted):
            yield starts[number - 2 * len(wanted)]


def _is_word(piece: str) -> bool:
    return piece[0].isalnum() or piece[0] == "_"


def _n_words(text: str) -> int:
    return sum(map(_is_word, text.split()))
