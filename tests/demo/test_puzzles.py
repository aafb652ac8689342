from __future__ import annotations

import itertools
import random

from puzzles import SKILLS, draw_word, held_out, shifted, splits, stream


def test_the_skills_reverse_a_word_and_shift_it_by_one_letter():
    assert SKILLS["reverse"]("BAKOT").answer == "TOKAB"
    assert SKILLS["cipher"]("ZYFIQ").answer == "AZGJR"


def test_a_shift_undoes_its_opposite():
    assert shifted(shifted("LEWIS", 5), -5) == "LEWIS"


def test_words_have_four_or_five_letters_and_alternate_vowels_and_consonants():
    rng = random.Random(0)

    for word in (draw_word(rng) for _ in range(500)):
        vowels = [letter in "AEIOUY" for letter in word]
        assert len(word) in (4, 5)
        assert all(a != b for a, b in itertools.pairwise(vowels))


def test_no_training_question_of_any_model_is_about_a_word_of_a_test_set():
    excluded = held_out(7)

    assert len(excluded) > 1000
    for skill in (None, *SKILLS):
        for item in itertools.islice(stream(skill, 7, share=0.5), 3000):
            if not item.question.startswith(("swap", "join")):  # these name parts of words
                assert item.question.split()[-1] not in excluded


def test_the_base_is_never_trained_on_a_skill():
    primer = itertools.islice(stream(None, 7), 3000)
    lesson = list(itertools.islice(stream("base", 7, share=0.7), 3000))

    asked = [item for item in (*primer, *lesson) if item.question.startswith(("reverse", "encode"))]
    assert len(asked) > 900
    assert {item.answer for item in asked} == {"?"}
    assert any(item.question.startswith("letters from last of ") for item in lesson)


def test_a_stream_is_the_same_for_the_same_seed_and_differs_for_another():
    first = list(itertools.islice(stream("cipher", 7, share=0.5), 50))

    assert list(itertools.islice(stream("cipher", 7, share=0.5), 50)) == first
    assert list(itertools.islice(stream("cipher", 8, share=0.5), 50)) != first


def test_two_thirds_of_an_experts_lesson_are_its_skill():
    items = itertools.islice(stream("reverse", 7, share=0.75), 2000)

    share = sum(item.question.startswith("reverse") for item in items) / 2000
    assert 0.45 < share < 0.55


def test_the_splits_of_a_skill_share_no_word():
    train, test = splits("cipher", 7)

    assert not set(train) & set(test)
    assert (len(set(train)), len(set(test))) == (300, 300)
