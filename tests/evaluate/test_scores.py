from __future__ import annotations

import json
import math

import pytest

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.scores import (
    MetricResult,
    MetricScore,
    ModelResult,
    PairedTest,
    Scores,
    TaskResult,
    TaskScores,
    pooled,
)

SCORES = Scores(
    {
        "gsm8k": TaskScores(
            n=300,
            version="3.0",
            models={
                "base": {"exact_match,strict-match": MetricScore(0.25, 0.025)},
                "merged": {"exact_match,strict-match": MetricScore(0.5, None)},
            },
            paired=(PairedTest("exact_match,strict-match", "base", 0.25, (0.2, 0.3), 0.01, 0.02),),
        )
    }
)


def test_scores_are_written_in_the_documented_form():
    assert json.loads(SCORES.to_json()) == {
        "version": 1,
        "tasks": {
            "gsm8k": {
                "n": 300,
                "version": "3.0",
                "models": {
                    "base": {"exact_match,strict-match": {"value": 0.25, "stderr": 0.025}},
                    "merged": {"exact_match,strict-match": {"value": 0.5, "stderr": None}},
                },
                "paired": [
                    {
                        "metric": "exact_match,strict-match",
                        "against": "base",
                        "difference": 0.25,
                        "ci95": [0.2, 0.3],
                        "p": 0.01,
                        "p_holm": 0.02,
                    }
                ],
            }
        },
    }


def test_scores_come_back_as_they_were_written():
    assert Scores.from_json(SCORES.to_json()) == SCORES


def test_a_metric_that_is_better_when_lower_says_so():
    scores = Scores(
        {"t": TaskScores(1, "1", {"base": {"ppl,none": MetricScore(9.5, 0.5, False)}}, ())}
    )

    found = scores.to_document()["tasks"]["t"]["models"]["base"]["ppl,none"]

    assert found == {"value": 9.5, "stderr": 0.5, "higher_is_better": False}
    assert Scores.from_json(scores.to_json()) == scores


def test_an_overflown_metric_is_null_in_json_and_no_number_when_read_back():
    scores = Scores(
        {"t": TaskScores(1, "1", {"base": {"ppl,none": MetricScore(math.inf, None)}}, ())}
    )

    text = scores.to_json()

    assert json.loads(text)["tasks"]["t"]["models"]["base"]["ppl,none"]["value"] is None
    assert math.isnan(Scores.from_json(text).tasks["t"].models["base"]["ppl,none"].value)


def test_scores_of_another_version_are_refused():
    with pytest.raises(EvaluationError) as raised:
        Scores.from_json('{"version": 2, "tasks": {}}')

    assert str(raised.value) == (
        "scores.json: has version 2, expected 1.\nEvaluate again, or use the version that wrote it."
    )


def test_scores_that_are_no_json_are_refused():
    with pytest.raises(EvaluationError) as raised:
        Scores.from_json("oops")

    assert str(raised.value) == (
        "scores.json: is not JSON (Expecting value: line 1 column 1 (char 0)).\nEvaluate again."
    )


def test_a_models_result_comes_back_with_every_item():
    result = ModelResult(
        {
            "t": TaskResult(
                version="1.0",
                documents=("a1", "b2"),
                prompts=("p1", "p2"),
                metrics={
                    "acc,none": MetricResult(0.5, (1.0, 0.0), higher_is_better=True),
                    "rouge,none": MetricResult(0.25, (0.25, None), higher_is_better=None),
                    "f1,none": MetricResult(0.3, None, higher_is_better=True),
                },
            )
        }
    )

    assert ModelResult.from_json(result.to_json()) == result


def test_the_standard_error_is_that_of_a_mean():
    # mean 1/2, squares sum to 1, so sqrt(1 / 3 / 4)
    assert MetricResult(0.5, (1.0, 0.0, 0.0, 1.0)).stderr == pytest.approx(0.288675, abs=1e-6)


def test_there_is_no_standard_error_of_one_item_or_of_a_metric_that_is_no_mean():
    assert MetricResult(1.0, (1.0, None)).stderr is None
    assert MetricResult(0.7, None).stderr is None


def group_part(*values: float) -> TaskResult:
    metrics = {"acc,none": MetricResult(sum(values) / len(values), values, higher_is_better=True)}
    return TaskResult("1", tuple(map(str, values)), (), metrics)


def test_a_group_that_weighs_by_size_keeps_its_items():
    parts = [group_part(1.0, 0.0, 0.0, 0.0), group_part(1.0)]

    assert pooled(parts, "acc,none", 0.4) == MetricResult(0.4, (1.0, 0, 0, 0, 1.0), True)


def test_a_group_that_averages_its_tasks_has_no_items_to_pair():
    parts = [group_part(1.0, 0.0, 0.0, 0.0), group_part(1.0)]

    assert pooled(parts, "acc,none", 0.625) == MetricResult(0.625, None, True)


@pytest.mark.parametrize(
    "task",
    [
        "3",
        "{}",
        '{"version": "1", "documents": ["a"], "prompts": ["p", "q"], "metrics": {}}',
        '{"version": "1", "documents": ["a"], "prompts": ["p"], "metrics": {"m": {"value": 1,'
        ' "values": [1, 0], "higher_is_better": true}}}',
        '{"version": "1", "documents": ["a"], "prompts": ["p"], "metrics": {"m": {"value": 1,'
        ' "values": ["x"], "higher_is_better": true}}}',
    ],
)
def test_a_damaged_result_is_one_message(task):
    with pytest.raises(EvaluationError, match=r"evaluation result: is damaged \("):
        ModelResult.from_json(f'{{"version": 1, "tasks": {{"t": {task}}}}}')


def test_an_object_of_very_many_wrong_values_is_refused():
    """An error of pydantic for each took 5.1 GB for 14.5 MB."""
    tasks = ",".join(f'"{number}":{{}}' for number in range(100_000))

    with pytest.raises(EvaluationError) as raised:
        ModelResult.from_json(f'{{"version":1,"tasks":{{{tasks}}}}}')

    assert str(raised.value) == (
        "evaluation result: is damaged: it has more than 100,000 keys.\nEvaluate again."
    )
