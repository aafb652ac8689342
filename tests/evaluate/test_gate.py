"""The gate's decision, on results that are written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.gate import GateVerdict, Previous, Rival, judge
from lewis_hub.evaluate.paired import compare, newcombe_interval
from lewis_hub.evaluate.scores import MetricResult, ModelResult, TaskResult
from lewis_hub.recipe.evaluation import Gate

BETTER, WORSE = [1.0] * 30, [0.0] * 30
MIXED = [1.0, 0.0] * 15


def result(values: Sequence[float], *, higher: bool = True, version: str = "1", items: str = ""):
    n = len(values)
    documents = tuple(f"{items}{i}" for i in range(n))
    metrics = {"m,none": MetricResult(sum(values) / n, tuple(values), higher)}
    metrics["f1,none"] = MetricResult(0.5, None, higher_is_better=True)
    return ModelResult({"t": TaskResult(version, documents, documents, metrics)})


def gate(*rivals: Rival, tolerance: float = 0.0, metric: str = "m,none"):
    return Gate(task="t", metric=metric, not_worse_than=rivals, tolerance=tolerance)


def verdict(asked, previous=None, **models):
    results = {label.replace("expert_", "expert:"): one for label, one in models.items()}
    before = previous or Previous("me/x", why="the repo does not exist yet")
    return judge([asked], compare(results), results["merged"], before)


@pytest.mark.parametrize(
    ("merged", "passes"),
    [
        (BETTER, True),  # all better
        (MIXED, True),  # equal
        ([*MIXED[:28], 0.0, 0.0], True),  # worse on one item: the interval straddles zero
        (WORSE, False),  # worse on fifteen, better on none
    ],
)
def test_a_merge_is_refused_only_where_the_whole_interval_lies_below(merged, passes):
    found = verdict(gate("base"), base=result(MIXED), merged=result(merged))

    assert [check.missed for check in found.checks] == [not passes]
    assert found.stops is not passes


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), min_size=1, max_size=40),
    st.booleans(),
)
def test_what_is_nowhere_worse_is_never_refused(pairs, higher):
    lower, upper = zip(*pairs, strict=True)
    merged, base = (upper, lower) if higher else (lower, upper)
    models = {
        "base": result(list(base), higher=higher),
        "merged": result(list(merged), higher=higher),
    }

    assert not verdict(gate("base"), **models).missed


def test_a_check_keeps_the_numbers_that_decide():
    (check,) = verdict(gate("base"), base=result(MIXED), merged=result(WORSE)).checks

    assert (check.value, check.other, check.difference) == (0.0, 0.5, -0.5)
    assert check.ci95 == newcombe_interval(0, 0, 15, 15)
    assert check.against == "base"


def test_tolerance_is_taken_from_the_interval_s_better_end():
    (check,) = verdict(gate("base"), base=result(MIXED), merged=result(WORSE)).checks
    assert check.ci95
    high = check.ci95[1]  # about -0.31

    assert replace(check, tolerance=-high - 1e-9).missed
    assert not replace(check, tolerance=-high).missed


def test_where_lower_is_better_the_higher_model_is_refused():
    low, high = result([1.0, 2.0] * 15, higher=False), result([3.0, 4.0] * 15, higher=False)

    assert verdict(gate("base"), base=low, merged=high).missed
    assert not verdict(gate("base"), base=high, merged=low).missed
    assert not verdict(gate("base", tolerance=2.5), base=low, merged=high).missed


def test_every_expert_is_a_rival_of_its_own():
    found = verdict(
        gate("experts", "uniform"),
        expert_a=result(WORSE),
        expert_b=result(BETTER),
        uniform=result(MIXED),
        merged=result(MIXED),
    )

    assert [(c.against, c.missed) for c in found.checks] == [
        ("expert:a", False),
        ("expert:b", True),
        ("uniform", False),
    ]


def test_what_was_published_before_is_compared_item_by_item():
    better = Previous("me/x@abc", result(BETTER))
    found = verdict(gate("previous"), better, merged=result(MIXED))

    (check,) = found.missed
    assert (check.against, check.difference, check.other) == ("me/x@abc", -0.5, 1.0)
    assert check.ci95 == newcombe_interval(15, 0, 15, 0)


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (Previous("me/x", why="the repo does not exist yet"), "the repo does not exist yet"),
        (
            Previous("me/x@abc", result(BETTER, version="2")),
            "it was scored with version 2 of the task, this with 1",
        ),
        (
            Previous("me/x@abc", result(BETTER, items="other ")),
            "it was scored on other items or prompts",
        ),
        (Previous("me/x@abc", result(BETTER[:20])), "it was scored on other items or prompts"),
        (Previous("me/x@abc", ModelResult({})), "it was not scored on this task and metric"),
    ],
)
def test_what_was_published_before_counts_only_on_the_same_items(before, why):
    (check,) = verdict(gate("previous"), before, merged=result(WORSE)).checks

    assert (check.missed, check.ci95, check.why) == (False, None, why)


@pytest.mark.parametrize(
    ("version", "told"),
    [("2\n::error::boom\x1b[2J", "2 ::error::boom\\x1b[2J"), ("2" * 5000, "2" * 970 + "...")],
)
def test_what_an_earlier_merge_states_is_one_short_line(version, told):
    """Anyone may write it, and it is shown in logs of GitHub Actions."""
    before = Previous("me/x@abc", result(BETTER, version=version))

    (check,) = verdict(gate("previous"), before, merged=result(WORSE)).checks

    end = "" if told.endswith("...") else " of the task, this with 1"
    assert check.why == f"it was scored with version {told}{end}"


@pytest.mark.parametrize("mean", [1e308, float("nan")])
def test_numbers_that_are_too_large_are_not_compared(mean):
    """They were a traceback after the merge and its scores, as JSON has no infinity."""
    task = result(BETTER).tasks["t"]
    huge = MetricResult(mean, (1e308, -1e308) * 15, higher_is_better=True)
    before = Previous("me/x@abc", ModelResult({"t": replace(task, metrics={"m,none": huge})}))

    found = verdict(gate("previous"), before, merged=result(WORSE))

    why = "no item has numbers of both models that can be compared"
    assert [(check.missed, check.difference, check.why) for check in found.checks] == [
        (False, None, why)
    ]
    assert GateVerdict.from_json(found.to_json()).checks[0].why == why


def test_a_value_that_json_has_not_is_null():
    overflown = MetricResult(float("nan"), tuple(MIXED), higher_is_better=True)
    task = replace(result(MIXED).tasks["t"], metrics={"m,none": overflown})
    before = Previous("me/x@abc", ModelResult({"t": task}))

    found = verdict(gate("previous"), before, merged=result(WORSE))

    assert '"other": null' in found.to_json()
    assert found.stops


def test_other_prompts_for_the_same_items_are_another_test():
    task = result(BETTER).tasks["t"]
    asked_otherwise = replace(task, prompts=tuple(f"now {p}" for p in task.prompts))
    before = Previous("me/x@abc", ModelResult({"t": asked_otherwise}))

    (check,) = verdict(gate("previous"), before, merged=result(WORSE)).checks

    assert check.why == "it was scored on other items or prompts"


@pytest.mark.parametrize("rival", ["base", "previous"])
@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            "n,none",
            "t: it has no metric `n,none`.\nDid you mean `m,none`? It has `m,none`, `f1,none`.",
        ),
        (
            "f1,none",
            "t: `f1,none` is not a mean over items, so the gate cannot test differences.\n"
            "Use `m,none` in the gate.",
        ),
    ],
)
def test_a_metric_that_cannot_be_tested_is_told(rival, metric, message):
    with pytest.raises(EvaluationError) as caught:
        verdict(gate(rival, metric=metric), base=result(MIXED), merged=result(MIXED))

    assert str(caught.value) == message


def test_uniform_is_every_twin_that_was_scored():
    twins = {"uniform": result(MIXED), "task_arithmetic": result(BETTER)}

    found = verdict(gate("uniform"), **twins, base=result(BETTER), merged=result(MIXED))

    assert [(check.against, check.missed) for check in found.checks] == [
        ("uniform", False),
        ("task_arithmetic", True),
    ]


def test_a_verdict_is_read_back_without_loss():
    before = Previous("me/x", why="the repo does not exist yet")
    found = verdict(gate("base", "previous"), before, base=result(MIXED), merged=result(WORSE))

    assert GateVerdict.from_json(found.to_json()) == found


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1, "checks": [{}]}'])
def test_a_damaged_verdict_is_one_message(text):
    with pytest.raises(
        EvaluationError, match=r"lewis/gate\.json: (is not JSON|has version|is damaged) ?"
    ):
        GateVerdict.from_json(text)


def test_a_pull_request_is_opened_only_where_all_that_missed_ask_for_it():
    found = verdict(gate("base"), base=result(BETTER), merged=result(WORSE))
    (stops,) = found.checks
    proposes = replace(stops, on_refusal="pull-request")
    passed = replace(stops, ci95=(0.0, 0.1))

    told = [
        (v.stops, v.proposes)
        for v in map(GateVerdict, [(stops,), (proposes,), (proposes, stops), (proposes, passed)])
    ]

    assert told == [(True, False), (False, True), (True, False), (False, True)]
    assert not GateVerdict((passed,)).stops
    assert not GateVerdict((passed,)).proposes
