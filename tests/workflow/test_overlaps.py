"""Which calibration texts are scored items, by the values that identify them."""

import pytest

from lewis_hub.evaluate.items import TaskItem
from lewis_hub.workflow.texts import (
    MAX_COMPARED,
    DrawnText,
    count_overlap,
    drawn_items,
    overlaps,
    values,
)


class Counted(str):
    """A value that counts how often it is found among others."""

    __slots__ = ()
    __hash__ = str.__hash__
    n_found = 0

    def __eq__(self, other):
        is_equal = str.__eq__(self, other)
        Counted.n_found += is_equal
        return is_equal


def listed(name, listed_values):
    return TaskItem("lists", f"prompt of {name}", "an answer", {"values": [*listed_values]})


def test_all_texts_and_numbers_of_a_document_are_its_values():
    document = {"a": [" One\nTWO ", 3, {"b": (2.5, True, None, b"c")}], "d": "", "e": [[], " "]}

    assert values(document) == {"one two", "3", "2.5", "true", "b'c'"}


def test_of_many_values_the_one_that_others_lack_tells_texts_apart():
    shared = [f"shared value number {n}" for n in range(MAX_COMPARED + 50)]
    drawn = drawn_items([listed(n, [*shared, f"own {n}"]) for n in range(5)])

    scored = [listed("other", [*shared, f"own {n}"]) for n in (7, 3, 8)]
    done = []

    assert [*overlaps(drawn, scored, done.append)] == [(3, scored[1])]
    assert sum(done) == 3
    assert count_overlap(drawn, [listed("other", shared)], done.append) == {}


@pytest.mark.parametrize(
    ("own", "lacking", "n_alike"),
    [(True, False, 0), (False, True, 10)],
    ids=["all but one are in every text and item", "each is in all but one text or item"],
)
def test_of_a_text_with_very_many_values_few_are_compared_with_each_item(own, lacking, n_alike):
    n, shared = 10, [Counted(f"value {number}") for number in range(8 * MAX_COMPARED)]
    kept = [shared[:i] + shared[i + lacking :] for i in range(2 * n)]
    drawn = [DrawnText((), (frozenset(kept[i] + [f"own {i}"] * own),)) for i in range(n)]
    scored = [listed(i, kept[n + i]) for i in range(n)]
    Counted.n_found = 0

    # what is not compared counts as found
    assert count_overlap(drawn, scored, [].append).total() == n_alike

    assert Counted.n_found <= n * n * (MAX_COMPARED + 1)  # and once to find the text
