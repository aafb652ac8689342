from __future__ import annotations

import pytest

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.paired import compare, mcnemar, newcombe_interval
from lewis_hub.evaluate.scores import MetricResult, MetricScore, ModelResult, TaskResult


def task(*values: float | None, version: str = "1", first: int = 0) -> TaskResult:
    known = [value for value in values if value is not None]
    items = tuple(f"item {first + i}" for i in range(len(values)))
    return TaskResult(
        version=version,
        documents=items,
        prompts=items,
        metrics={"acc,none": MetricResult(sum(known) / len(known), values, higher_is_better=True)},
    )


def test_the_merged_model_is_tested_against_each_of_the_others():
    results = {
        "base": ModelResult({"t": task(0, 0, 0, 0)}),
        "expert:a/b": ModelResult({"t": task(1, 1, 1, 0)}),
        "uniform": ModelResult({"t": task(1, 1, 0, 0)}),
        "merged": ModelResult({"t": task(1, 1, 0, 1)}),
    }

    scores = compare(results).tasks["t"]

    assert [(test.against, test.difference) for test in scores.paired] == [
        ("base", 0.75),
        ("expert:a/b", 0.0),
        ("uniform", 0.25),
    ]
    assert [test.p for test in scores.paired] == [mcnemar(3, 0), mcnemar(1, 1), mcnemar(1, 0)]
    assert scores.paired[0].ci95 == newcombe_interval(0, 3, 0, 1)
    assert scores.models["merged"] == {"acc,none": MetricScore(0.75, 0.25)}
    assert (scores.n, scores.version) == (4, "1")


@pytest.mark.parametrize(("told", "taken"), [(True, True), (False, False), (None, True)])
def test_which_way_is_better_comes_from_the_task(told, taken):
    metrics = {"ppl,none": MetricResult(9.5, None, told)}
    result = ModelResult({"t": TaskResult("1", ("item",), ("item",), metrics)})

    score = compare({"merged": result}).tasks["t"].models["merged"]["ppl,none"]

    assert score == MetricScore(9.5, None, taken)
    assert score.merit == (9.5 if taken else -9.5)


def test_holm_runs_over_the_tasks_tested_against_the_same_model():
    results = {
        "base": ModelResult({"t": task(*[0] * 8), "u": task(*[0] * 6)}),
        "uniform": ModelResult({"t": task(*[1] * 8), "u": task(*[1] * 6)}),
        "merged": ModelResult({"t": task(*[1] * 8), "u": task(*[1] * 6)}),
    }

    scores = compare(results)

    assert [test.p for test in scores.tasks["t"].paired] == [2 / 2**8, 1.0]
    assert [test.p_holm for test in scores.tasks["t"].paired] == [4 / 2**8, 1.0]
    assert [test.p_holm for test in scores.tasks["u"].paired] == [2 / 2**6, 1.0]


def test_without_a_merged_model_there_is_nothing_to_test():
    scores = compare({"model": ModelResult({"t": task(1, 0)})})

    assert scores.tasks["t"].paired == ()


def test_items_that_one_of_the_two_was_not_scored_on_are_left_out_of_their_test():
    results = {
        "base": ModelResult({"t": task(0, 0, None)}),
        "merged": ModelResult({"t": task(1, 1, 0)}),
    }

    (test,) = compare(results).tasks["t"].paired

    assert (test.difference, test.p) == (1.0, mcnemar(2, 0))


def test_a_metric_that_is_no_mean_is_shown_but_not_tested():
    f1 = TaskResult("1", ("item 0",), ("item 0",), {"f1,none": MetricResult(0.5, None)})

    scores = compare({"base": ModelResult({"t": f1}), "merged": ModelResult({"t": f1})})

    assert scores.tasks["t"].models["merged"] == {"f1,none": MetricScore(0.5, None)}
    assert scores.tasks["t"].paired == ()


def test_models_that_answered_other_items_are_not_compared():
    results = {
        "base": ModelResult({"t": task(0, 1, 1)}),
        "merged": ModelResult({"t": task(0, 1, 1, first=2, version="2")}),
    }

    with pytest.raises(EvaluationError) as raised:
        compare(results)

    assert str(raised.value) == (
        "t: base and merged did not answer the same items: 3 of version 1 against "
        "3 of version 2, 1 in common.\n"
        "Evaluate both again with one version and one limit."
    )


def test_models_that_were_scored_on_other_tasks_are_not_compared():
    results = {
        "base": ModelResult({"t": task(0, 1)}),
        "merged": ModelResult({"t": task(0, 1), "u": task(1, 1)}),
    }

    with pytest.raises(EvaluationError) as raised:
        compare(results)

    assert str(raised.value) == (
        "compare: base was scored on t; merged on t, u.\nEvaluate both on the same tasks."
    )
