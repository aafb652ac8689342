from __future__ import annotations

import math

import pytest

from lewis_hub.evaluate.scores import MetricScore, PairedTest, Scores, TaskScores
from lewis_hub.report.findings import (
    findings,
    interval,
    model_name,
    number,
    paired_table,
    scores_table,
    signed,
    twins,
)


def one_task(
    metric: str, paired: tuple[PairedTest, ...] = (), *, higher: bool = True, **values: float
) -> Scores:
    labels = {"base": "base", "math": "expert:zoo/math", "twin": "uniform", "merged": "merged"}
    models = {labels[name]: {metric: MetricScore(v, None, higher)} for name, v in values.items()}
    return Scores({"sums": TaskScores(300, "1.0", models, paired)})


def against(label: str, difference: float, p: float) -> PairedTest:
    return PairedTest("acc", label, difference, (difference - 0.1, difference + 0.1), p / 2, p)


def test_a_merge_worse_than_its_best_expert_is_said_to_be(make_scores):
    _, limits = findings(make_scores())

    assert limits[0] == (
        "On `sums` (exact match) the merged model is worse than its best expert, `zoo/math`: "
        "0.700 against 0.900 (difference −0.200, 95 % interval −0.250 to −0.150, "
        "adjusted p < 0.001)."
    )


def test_guidance_that_is_not_beyond_the_noise_is_said_not_to_be(make_scores):
    gains, limits = findings(make_scores(merged=0.7, twin=0.68, p=0.6))

    assert gains == []
    assert limits[1] == (
        "On `sums` (exact match) the merged model is not significantly better than its uniform "
        "twin: 0.700 against 0.680 (difference +0.020, 95 % interval −0.030 to +0.070, adjusted p "
        "= 0.600)."
    )


def test_guidance_that_helps_is_a_gain(make_scores):
    gains, _ = findings(make_scores(merged=0.8, twin=0.6, p=0.01))

    assert gains == [
        "On `sums` (exact match) the merged model is better than its uniform twin: 0.800 against "
        "0.600 (difference +0.200, 95 % interval +0.150 to +0.250, adjusted p = 0.010).",
    ]


def test_guidance_that_hurts_is_a_limit(make_scores):
    _, limits = findings(make_scores(merged=0.4, twin=0.6, p=0.01))

    assert "is worse than its uniform twin: 0.400 against 0.600" in limits[1]


def test_no_number_is_worse_than_any():
    """As an overflown perplexity, which is written as null."""
    gains, limits = findings(one_task("ppl", higher=False, base=30.0, twin=math.nan, merged=21.0))
    assert gains == [
        "On `sums` (ppl) the merged model is better than its uniform twin: 21.000 against nan."
    ]
    assert limits == []
    overflown = one_task("ppl", higher=False, base=30.0, math=20.0, merged=math.nan)
    assert findings(overflown) == (
        [],
        [
            "On `sums` (ppl) the merged model is worse than its best expert, `zoo/math`: nan "
            "against 20.000.",
            "On `sums` (ppl) the merged model is worse than the base: nan against 30.000.",
        ],
    )


def test_a_gain_over_the_twin_without_statistics_is_told():
    models = {
        label: {"acc": MetricScore(value, None)}
        for label, value in {"task_arithmetic": 0.5, "merged": 0.7}.items()
    }
    paired = (against("task_arithmetic", 0.2, 0.01),)
    scores = Scores({"sums": TaskScores(300, "1.0", models, paired)})

    assert findings(scores)[0] == [
        "On `sums` (accuracy) the merged model is better than its task arithmetic twin: 0.700 "
        "against 0.500 (difference +0.200, 95 % interval +0.100 to +0.300, adjusted p = 0.010).",
    ]
    assert twins(scores) == (
        "The task arithmetic twin is the same merge without statistics: the mean of the task "
        "vectors, with the same weights.",
    )


def test_a_merge_worse_than_the_base_is_said_to_be_and_noise_is_named():
    scores = one_task("acc", (against("base", -0.02, 0.4),), base=0.5, merged=0.48)

    assert findings(scores)[1] == [
        "On `sums` (accuracy) the merged model is worse than the base: 0.480 against 0.500 "
        "(difference −0.020, 95 % interval −0.120 to +0.080, adjusted p = 0.400); the difference "
        "is not significant.",
    ]


def test_a_merge_better_than_its_best_expert_is_a_gain():
    scores = one_task("acc", (against("expert:zoo/math", 0.2, 0.001),), math=0.5, merged=0.7)

    [gain], _ = findings(scores)

    assert gain.startswith("On `sums` (accuracy) the merged model is better than its best expert")


def test_without_a_test_nothing_is_said_of_noise():
    gains, limits = findings(one_task("acc", math=0.5, twin=0.2, merged=0.4))

    assert limits == [
        "On `sums` (accuracy) the merged model is worse than its best expert, `zoo/math`: 0.400 "
        "against 0.500.",
    ]
    assert gains == [
        "On `sums` (accuracy) the merged model is better than its uniform twin: 0.400 against "
        "0.200.",
    ]


def test_lower_is_better_where_the_task_says_so():
    values = {"math": 12.0, "base": 20.0, "twin": 15.0, "merged": 14.0}
    scores = one_task("word_perplexity,none", higher=False, **values)

    gains, limits = findings(scores)

    assert "worse than its best expert, `zoo/math`: 14.000 against 12.000" in limits[0]
    assert "better than its uniform twin" in gains[0]
    assert "| zoo/math | **12.000** |" in scores_table(scores)


def test_the_table_has_a_row_per_model_the_merge_first_and_the_best_in_bold(make_scores):
    assert scores_table(make_scores()).splitlines() == [
        "| model | `sums`, exact match |",
        "| --- | ---: |",
        "| **this merge** | 0.700 ± 0.026 |",
        "| zoo/math | **0.900** ± 0.020 |",
        "| zoo/text | 0.100 ± 0.020 |",
        "| base | 0.050 ± 0.020 |",
        "| uniform twin | 0.680 ± 0.020 |",
        "| items | 300 |",
    ]


def test_a_model_that_was_not_scored_on_a_task_leaves_its_cell_open():
    first = one_task("exact_match,strict-match", base=0.5, merged=0.5).tasks["sums"]
    second = one_task("acc", merged=1234.5).tasks["sums"]

    rows = scores_table(Scores({"a": first, "b": second})).splitlines()

    assert rows[0] == "| model | `a`, exact match, strict-match | `b`, accuracy |"
    assert rows[2:] == [
        "| **this merge** | **0.500** | 1,234.5 |",
        "| base | **0.500** | – |",
        "| items | 300 | 300 |",
    ]


def test_the_interval_of_a_share_is_wilsons_and_not_empty_at_zero():
    none, all_, half = (
        interval(MetricScore(p, math.sqrt(p * (1 - p) / 99)), 100) for p in (0.0, 1.0, 0.5)
    )

    assert none == pytest.approx((0.0, 0.03699), abs=1e-5)  # of a textbook: 0 of 100
    assert all_ == pytest.approx((0.96301, 1.0), abs=1e-5)
    assert half == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert interval(MetricScore(12.0, 0.5), 100) == pytest.approx((11.02, 12.98))
    assert interval(MetricScore(0.5, None), 100) is None


def test_the_paired_table_gives_interval_and_both_p_values():
    scores = one_task("acc", (against("uniform", 0.05, 0.03),), twin=0.4, merged=0.45)

    table = paired_table(scores)

    assert table
    assert table.splitlines()[2] == (
        "| `sums` | accuracy | uniform twin | +0.050 | −0.050 to +0.150 | 0.015 | 0.030 |"
    )
    assert paired_table(one_task("acc", merged=0.4)) is None


def test_scores_without_the_merged_model_are_no_scores_of_it(make_facts):
    assert not make_facts(scores=None).was_scored
    assert not make_facts(scores=one_task("acc", base=0.4)).was_scored
    assert make_facts(scores=one_task("acc", merged=0.4)).was_scored


def test_names_and_numbers_are_for_readers():
    assert model_name("expert:zoo/math@" + "a" * 40) == "zoo/math"
    assert [number(0.12345), number(99.9994), number(1234.56)] == ["0.123", "99.999", "1,234.6"]
    assert [signed(-0.5), signed(0.0), signed(-0.0001), signed(2)] == [
        "−0.500",
        "0.000",
        "0.000",
        "+2.000",
    ]


def test_the_table_gives_none_of_n_an_interval():
    table = scores_table(
        Scores(
            {
                "sums": TaskScores(
                    300,
                    "1.0",
                    {
                        "merged": {"acc,none": MetricScore(0.5, 0.02)},
                        "base": {"acc,none": MetricScore(0.0, 0.0)},
                        "uniform": {"acc,none": MetricScore(1.0, 0.0)},
                    },
                    (),
                )
            }
        )
    )

    assert "| base | 0.000 (0.000 to 0.013) |" in table
    assert "| uniform twin | **1.000** (0.987 to 1.000) |" in table
