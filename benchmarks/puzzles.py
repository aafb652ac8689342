"""The questions that the zoo's models are trained on: small puzzles about made-up words.

The base is trained on `PRIMER`, a broad mixture, then on `LESSONS["base"]`: what both skills do,
under other names, and the answer `?` to questions that name a skill. Each expert is trained on one
skill of `SKILLS`. No model is trained on a word of a test set, forwards or backwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CONSONANTS, VOWELS = "BCDFGHJKLMNPQRSTVWXZ", "AEIOUY"
ORDINALS = ("first", "second", "third", "fourth")
UNTAUGHT = ("bend", "double", "fold", "guess", "hide", "mix", "paint", "rhyme", "sort", "weigh")
UNKNOWN = "?"
N_TEST = 300
N_TRAIN = 300

Draw = Callable[[random.Random], str]  # a word, or whatever a question is about


@dataclass(frozen=True)
class Item:
    """A question and its only right answer."""

    question: str
    answer: str


def draw_word(rng: random.Random) -> str:
    """A pronounceable word of 4 or 5 capitals, such as `BAKOT` or `OZUN`."""
    letters = (CONSONANTS, VOWELS) if rng.random() < 0.7 else (VOWELS, CONSONANTS)
    return "".join(rng.choice(letters[i % 2]) for i in range(rng.randint(4, 5)))


def shifted(text: str, by: int) -> str:
    """Shift each letter by `by` places in the alphabet; A follows Z."""
    return "".join(ALPHABET[(ALPHABET.index(letter) + by) % 26] for letter in text)


def reverse(word: str) -> Item:
    """The skill of `expert-reverse`."""
    return Item(f"reverse {word}", word[::-1])


def encode(word: str) -> Item:
    """The skill of `expert-cipher`: Caesar's cipher with a shift of one."""
    return Item(f"encode {word}", shifted(word, 1))


SKILLS: Mapping[str, Callable[[str], Item]] = {"reverse": reverse, "cipher": encode}


def _from_last(word: str) -> Item:
    return Item(f"letters from last of {word}", word[::-1])


def _letters_after(word: str) -> Item:
    return Item(f"letters after {word}", shifted(word, 1))


def _without(skill: Callable[[str], Item]) -> Callable[[str], Item]:
    """The answer of a model without the skill."""
    return lambda word: Item(skill(word).question, UNKNOWN)


def _untaught_verb(word: str) -> Item:
    verb = UNTAUGHT[sum(map(ord, word)) % len(UNTAUGHT)]
    return Item(f"{verb} {word}", UNKNOWN)


LESSONS: Mapping[str, tuple[Callable[[str], Item], ...]] = {
    "base": (_from_last, _letters_after, *map(_without, SKILLS.values())),
    **{skill: (make, make, _untaught_verb) for skill, make in SKILLS.items()},
}


def _copy(rng: random.Random, word: Draw) -> Item:
    text = word(rng)
    return Item(f"copy {text}", text)


def _letter_at(rng: random.Random, word: Draw) -> Item:
    text, place = word(rng), rng.randrange(4)
    return Item(f"{ORDINALS[place]} letter of {text}", text[place])


def _last_letter(rng: random.Random, word: Draw) -> Item:
    text, place = word(rng), rng.randrange(2)
    name = ("last", "last but one")[place]
    return Item(f"{name} letter of {text}", text[-1 - place])


def _neighbour(rng: random.Random, word: Draw) -> Item:
    text = word(rng)
    place = rng.randrange(1, len(text))
    before, after = text[place - 1], text[place]
    if text.count(before) == 1 and rng.random() < 0.5:
        return Item(f"letter right of {before} in {text}", after)
    if text.count(after) == 1:
        return Item(f"letter left of {after} in {text}", before)
    return _copy(rng, word)


def _alphabet(rng: random.Random, word: Draw) -> Item:  # noqa: ARG001
    letter, by = rng.choice(ALPHABET), rng.choice((1, -1))
    return Item(f"letter {'after' if by == 1 else 'before'} {letter}", shifted(letter, by))


def _run(rng: random.Random, word: Draw) -> Item:  # noqa: ARG001
    letter, n = rng.choice(ALPHABET), rng.randint(2, 5)
    return Item(f"{n} letters from {letter}", "".join(shifted(letter, i) for i in range(n)))


def _length(rng: random.Random, word: Draw) -> Item:
    text = word(rng)
    return Item(f"length of {text}", str(len(text)))


def _drop(rng: random.Random, word: Draw) -> Item:
    text = word(rng)
    if rng.random() < 0.5:
        return Item(f"drop first of {text}", text[1:])
    return Item(f"drop last of {text}", text[:-1])


def _join(rng: random.Random, word: Draw) -> Item:
    text = word(rng)
    cut = rng.randrange(1, len(text))
    if rng.random() < 0.5:
        return Item(f"join {text[:cut]} {text[cut:]}", text)
    return Item(f"swap {text[:cut]} {text[cut:]}", text[cut:] + text[:cut])


def _untaught(rng: random.Random, word: Draw) -> Item:
    return _untaught_verb(word(rng))


PRIMER: tuple[Callable[[random.Random, Draw], Item], ...] = (
    _copy,
    _letter_at,
    _last_letter,
    _neighbour,
    _alphabet,
    _run,
    _length,
    _drop,
    _join,
    _untaught,
)


def splits(skill: str, seed: int) -> tuple[Sequence[Item], Sequence[Item]]:
    """The published items of a skill, to calibrate on and to score; no word is in two items."""
    rng = random.Random(f"{seed} {skill} splits")
    words: dict[str, None] = {}
    while len(words) < N_TEST + N_TRAIN:
        words[draw_word(rng)] = None
    items = [SKILLS[skill](word) for word in words]
    return items[N_TEST:], items[:N_TEST]


def held_out(seed: int) -> frozenset[str]:
    """The words of all test sets, forwards and backwards."""
    words = (item.question.split()[-1] for skill in SKILLS for item in splits(skill, seed)[1])
    return frozenset(text for word in words for text in (word, word[::-1]))


def stream(lesson: str | None, seed: int, share: float = 1.0) -> Iterator[Item]:
    """Endless training items: the primer, or a lesson mixed with the primer.

    Args:
        lesson: a key of `LESSONS`, or None for the primer alone.
        seed: determines every item.
        share: share of the lesson's items; the others preserve the skills of the base.
    """
    rng, excluded = random.Random(f"{seed} {lesson} stream"), held_out(seed)

    def word(rng: random.Random) -> str:
        while (text := draw_word(rng)) in excluded:
            pass
        return text

    while True:
        if lesson is not None and rng.random() < share:
            yield rng.choice(LESSONS[lesson])(word(rng))
        else:
            yield rng.choice(PRIMER)(rng, word)
