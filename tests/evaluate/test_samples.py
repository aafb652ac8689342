from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.answers import shortened
from lewis_hub.evaluate.items import TaskItem
from lewis_hub.evaluate.samples import IN_TASKS, Samples, collect_samples
from lewis_hub.evaluate.scores import Answers, MetricResult, ModelResult, TaskResult

MATH, TEXT = "expert:zoo/math", "expert:zoo/text"


def result(values, given=None, judged=None, higher=True):
    ids = tuple(f"{i:016x}" for i in range(len(values)))
    metric = MetricResult(sum(values) / len(values), tuple(map(float, values)), higher)
    answers = Answers(tuple(given), judged or {}) if given else None
    return ModelResult({"sums": TaskResult("1.0", ids, ids, {"em,none": metric}, answers)})


def asked(n):
    return {"sums": [TaskItem("sums", f"{i} + 1?", str(i + 1), {}) for i in range(n)]}


def four_models():
    return {
        "base": result([0, 0, 0, 0], ["a", "b", "c", "d"]),
        MATH: result([1, 1, 1, 0], ["1", "2", "3", "x"]),
        TEXT: result([0, 0, 0, 1], ["a", "b", "c", "4"]),
        "merged": result([0, 1, 1, 1], ["0", "2", "3", "4"]),
    }


def test_every_item_has_its_question_and_the_answers_of_all_models():
    task = collect_samples(four_models(), asked(4), {}).tasks["sums"]

    assert task.questions == ("0 + 1?", "1 + 1?", "2 + 1?", "3 + 1?")
    assert task.targets == ("1", "2", "3", "4")
    assert task.answers["merged"] == ("0", "2", "3", "4")
    assert task.answers[TEXT] == ("a", "b", "c", "4")
    metric = task.metrics["em,none"]
    assert metric.values[MATH] == (1.0, 1.0, 1.0, 0.0)
    assert metric.same == {"base": "0000", MATH: "0110", TEXT: "0001"}


@pytest.mark.parametrize(("higher", "best"), [(True, MATH), (False, TEXT)])
def test_the_merge_is_compared_with_its_best_expert(higher, best):
    results = {
        label: ModelResult(
            {
                "sums": replace(
                    one.tasks["sums"],
                    metrics={
                        key: replace(metric, higher_is_better=higher)
                        for key, metric in one.tasks["sums"].metrics.items()
                    },
                )
            }
        )
        for label, one in four_models().items()
    }

    assert collect_samples(results, {}, {}).tasks["sums"].metrics["em,none"].against == best


def test_without_experts_the_merge_is_compared_with_its_base_or_its_twin_or_nothing():
    def against(*labels):
        found = {label: result([1, 0]) for label in (*labels, "merged")}
        return collect_samples(found, {}, {}).tasks["sums"].metrics["em,none"].against

    assert against("uniform", "base") == "base"
    assert against("uniform") == "uniform"
    assert against() is None


def test_answers_are_compared_as_the_metric_judges_them():
    results = {
        MATH: result([1, 1], ["so it is 1", "2"], {"em,none": ("1", None)}),
        "merged": result([1, 0], ["hence 1", "it is 3"], {"em,none": ("1", "3")}),
    }

    metric = collect_samples(results, asked(2), {}).tasks["sums"].metrics["em,none"]

    assert metric.same == {MATH: "10"}
    assert metric.judged == {MATH: ("1", None), "merged": ("1", "3")}


def test_texts_that_may_not_be_shown_are_left_out_and_results_stay():
    samples = collect_samples(four_models(), asked(4), {"sums": "The dataset a/b is gated."})

    task = samples.tasks["sums"]
    assert (task.questions, task.targets, task.answers) == ((), (), {})
    assert task.left_out == "The dataset a/b is gated."
    assert task.metrics["em,none"].values["merged"] == (0.0, 1.0, 1.0, 1.0)
    assert task.metrics["em,none"].same[MATH] == "0110"
    assert "+ 1?" not in samples.to_json()


def test_a_group_refers_to_its_tasks():
    assert collect_samples(four_models(), {}, {}).tasks["sums"].left_out == IN_TASKS


def test_texts_are_cut_last_where_the_merge_lost_or_won():
    # each item has 6 + 1 + 4 bytes; 0 is lost, 3 is won, 1 and 2 are equal
    (task,) = collect_samples(four_models(), asked(4), {}, max_bytes=33).tasks.values()

    assert task.questions == ("0 + 1?", "1 + 1?", None, "3 + 1?")
    assert task.answers["merged"] == ("0", "2", None, "4")
    assert task.n_with_texts == 3
    assert task.metrics["em,none"].values["merged"] == (0.0, 1.0, 1.0, 1.0)
    (none,) = collect_samples(four_models(), asked(4), {}, max_bytes=10).tasks.values()
    assert none.questions == (None,) * 4


def test_an_item_that_was_answered_otherwise_is_kept_before_an_equal_one():
    results = {
        MATH: result([1, 1, 1], ["1", "2", "3"]),
        "merged": result([1, 1, 1], ["1", "two", "3"]),
    }

    (task,) = collect_samples(results, asked(3), {}, max_bytes=12).tasks.values()

    assert task.questions == (None, "1 + 1?", None)


def test_choices_are_shown_unless_the_prompt_lists_them():
    items = [
        TaskItem("sums", "1 + 1?", "two", {}, ("one", "two")),
        TaskItem("sums", "1 + 1? A. one B. two", "B", {}, ("A", "B")),
        TaskItem("sums", "", "", {"question": "1 + 1?", "n": 2}),
        TaskItem("sums", "", "a whole page", {}),
    ]

    (task,) = collect_samples(four_models(), {"sums": items}, {}).tasks.values()

    assert task.questions == (
        "1 + 1?\n• one\n• two",
        "1 + 1? A. one B. two",
        "question: 1 + 1?",
        "a whole page",
    )


def test_a_long_text_keeps_its_beginning_and_its_end():
    assert shortened("a" * 12, 12) == "a" * 12
    assert shortened("a" * 50 + "b" * 1950, 90) == (
        f"{'a' * 50}{'b' * 10} [… 1,910 characters …] {'b' * 30}"
    )
    assert shortened("\ud800", 12) == "?"


def test_samples_are_read_back_as_they_were_written():
    samples = collect_samples(four_models(), asked(4), {}, max_bytes=33)

    text = samples.to_json()

    assert Samples.from_json(text) == samples
    assert Samples.from_json(text).to_json() == text
    assert json.loads(text)["version"] == 1
    with pytest.raises(EvaluationError, match=r"samples.json: has version 9, expected 1"):
        Samples.from_json('{"version": 9}')


def test_answers_are_no_part_of_the_results_by_item():
    whole = four_models()["merged"]

    assert ModelResult.from_json(whole.to_json()) == whole
    assert '"answers"' not in whole.without_answers.to_json()
    assert ModelResult.from_json(whole.without_answers.to_json()) == whole.without_answers
    damaged = whole.to_json().replace('"given":["0",', '"given":[')
    with pytest.raises(EvaluationError, match="4 items, but other numbers of values"):
        ModelResult.from_json(damaged)
