"""Which texts hold an item: on the zoo, by a naive reference, and on GSM8K where it is here."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.evaluate import contained
from lewis_hub.evaluate.contained import (
    ANSWER_DISTANCE,
    contained_items,
    normalized,
    question_parts,
)
from lewis_hub.evaluate.items import TaskItem

LAB = Path(os.environ.get("LEWIS_HUB_LAB", "/nowhere")) / "data" / "gsm8k"
PROMPT = "Question: {question}\nAnswer:"
TEMPLATES = {
    "question and answer": "{question} {answer}",
    "another column before": "17 {question} {answer}",
    "a preamble": "Solve this. Question: {question}\nResponse: {answer}",
    "chat with a system message": "You help.\n{question}\n{answer}",
    "a chat template": "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}",
    "the question alone": "Solve this: {question}",
    "an open answer": "Solve this: {question}\n### Response:",
}


def item(row, prompt=PROMPT, task="sums"):
    return TaskItem(task, prompt.format(**row), row.get("answer", ""), row)


def found(texts, *items):
    return sorted({index for index, _ in contained_items(texts, items)})


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("skill", ["reverse", "cipher"])
def test_of_the_zoo_every_scored_text_holds_its_item_and_no_other_does(skill, template):
    train, test = (
        rows(zoo_folder() / f"data/{skill}/{split}.jsonl") for split in ("train", "test")
    )

    held = list(contained_items([template.format(**row) for row in test], map(item, test)))
    of_train = list(contained_items([template.format(**row) for row in train], map(item, test)))

    assert sorted((index, one.document["question"]) for index, one in held) == [
        (index, row["question"]) for index, row in enumerate(test)
    ]
    assert of_train == []


def test_a_short_question_that_stands_there_by_chance_is_no_item():
    cat = item({"question": "cat", "answer": "chat"})
    generic = item({"question": "Which of these is a mammal?", "answer": "whale"})
    texts = [
        "The cat sat on the mat.",
        "It saw the cat",
        "cat: chat",
        "Translate.\nCat\nAnswer:\nchat",
        "concatenate chats",
        "Well. Chat.",
        "Which of these is a mammal? dog",
        "Which of these is a mammal? A whale",
    ]

    assert found(texts, cat) == [2, 3]
    assert found(texts, item({"question": "cat", "mark": ".", "answer": "chat"})) == [2, 3]
    assert found(texts, item({"question": "...", "answer": "chat"})) == []
    assert found(texts, generic) == [7]


def test_a_long_question_is_found_whatever_its_answer():
    asked = {"question": "If Ann has 3 pens and buys 4 more, how many pens has she then?"}
    long = item(asked | {"answer": "3 + 4 = 7"})

    assert found(["so: IF  ann has 3 pens\nand buys 4 more, how many pens has she then? 8!"], long)
    assert not found(["If Ann has 3 pens and buys 5 more, how many pens has she then? 7"], long)


def test_all_that_is_asked_must_stand_there_and_labels_count_only_where_there_is_no_more():
    passage = "The quick brown fox jumps over the lazy dog on every single day of May."
    row = {"id": "a", "passage": passage, "question": "who is the lazy one", "answer": "the dog"}
    asked = item(row, "A. {passage}\n{question}?")
    pair = item({"word": "cat", "to": "French", "answer": "chat"}, "Write {word} in {to}:")

    assert question_parts(asked) == (normalized(passage), " who is the lazy one ")
    assert found([f"{passage} Who is the lazy one?", f"{passage} Who is quick?"], asked) == [0]
    assert found(["cat in French: chat", "dog in French: chat", "cat in French: chien"], pair) == [
        0
    ]


def test_where_no_column_is_shown_the_prompt_is_searched_and_without_a_prompt_the_answer():
    asked = "What comes after one, two, three, four, five, six, seven, eight, nine, ten?"
    made = TaskItem("made", asked, "eleven", {"n": 10})
    page = TaskItem("pages", "", "a page of many words " * 3, {})

    assert found([f"Q: {asked} It is 12.", "What comes after one, two?"], made) == [0]
    assert found(["so: " + "A page of  many words " * 3, "a page of many words"], page) == [0]
    assert found(["anything"], TaskItem("by Python", "", "", {"question": "anything"})) == []


def test_scripts_without_spaces_are_told_apart_letter_by_letter():
    asked = item({"question": "小明有三支笔又买了四支笔他一共有几支笔", "answer": "七"})

    assert found(["请回答小明有三支笔又买了四支笔他一共有几支笔？", "小明有三支笔"], asked) == [0]


letters = st.lists(st.sampled_from("ab"), min_size=1, max_size=20).map(" ".join)


@given(st.lists(letters, max_size=8), st.lists(letters, max_size=8))
def test_it_finds_what_a_search_of_every_question_in_every_text_finds(texts, questions):
    items = [item({"question": question, "answer": "c"}) for question in questions]

    naive = {
        (index, at)
        for index, text in enumerate(texts)
        for at, question in enumerate(questions)
        if f" {question} " in f" {text} "
        and (
            len(question.split()) >= 13
            or (len(question) > 1 and f" {text}".endswith(f" {question}"))
        )
    }

    places = {id(one): at for at, one in enumerate(items)}
    assert {(index, places[id(one)]) for index, one in contained_items(texts, items)} == naive


words = st.lists(st.sampled_from("ab!:"), max_size=12).map(" ".join)


@given(words, words, words.filter(str.strip), st.sampled_from([0, 4, contained.QUICK]))
def test_short_questions_are_followed_by_their_answer_or_the_end(text, answer, question, quick):
    def n_words(part):
        return sum(piece.isalnum() for piece in part.split())

    def fits(rest):
        before, found, _ = f" {rest}".partition(normalized(answer))
        answered = answer.strip() and found and n_words(before) <= ANSWER_DISTANCE
        ends = rest.rstrip().endswith(":") and n_words(rest) <= ANSWER_DISTANCE
        return answered or (n_words(question) > 1 and (n_words(rest) == 0 or ends))

    whole, asked = normalized(text), normalized(question)
    ends = [at + len(asked) for at in range(len(whole)) if whole.startswith(asked, at)]
    naive = n_words(question) > 0 and any(fits(whole[end:]) for end in ends)

    with mock.patch.object(contained, "QUICK", quick):
        assert bool(found([text], TaskItem("made", question, answer, {}))) == naive


def test_a_text_of_half_a_megabyte_that_repeats_a_question_takes_no_minutes():
    began = time.process_time()
    text = "What is it? " * 40_000
    assert found([text], TaskItem("made", "What is it?", "a dog", {})) == [0]
    assert found([f"{text} so it is"], TaskItem("made", "it?", "a dog", {})) == []
    marks = "! " * 100_000
    assert found([f"{marks * 5} why"], TaskItem("made", f"{marks} why", "a dog", {})) == []
    assert time.process_time() - began < 20


def test_a_long_text_with_many_short_questions_takes_no_minutes():
    questions = [f"What is {i} plus one?" for i in range(60)]
    text = f"{' or '.join(questions)} " + "padding " * 250_000

    began = time.process_time()
    assert found([text], *(TaskItem("made", one, "padding dog", {}) for one in questions)) == []
    assert found([text], TaskItem("made", questions[-1], "padding", {})) == [0]
    assert time.process_time() - began < 5  # 20 s if the text is cut into pieces for each


@pytest.mark.slow
@pytest.mark.skipif(not (LAB / "test.jsonl").exists(), reason="LEWIS_HUB_LAB has no GSM8K")
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_of_gsm8k_all_test_items_are_found_and_no_training_item(template):
    train, test = rows(LAB / "train.jsonl"), rows(LAB / "test.jsonl")
    items = [item(row) for row in test]

    assert found([template.format(**row) for row in train], *items) == []
    assert found([template.format(**row) for row in test], *items) == [*range(1319)]
