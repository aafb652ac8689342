from __future__ import annotations

import pytest

from lewis_hub.evaluate.scores import MetricScore, Scores, TaskScores
from lewis_hub.report.verdict import SkillVerdict, kept_skills, verdict

MATH, TEXT = "expert:zoo/math@" + "a" * 40, "expert:zoo/text@" + "b" * 40


def scored(*, error: float = 0.01, higher: bool = True, **tasks: tuple[float, ...]) -> Scores:
    """Each task by the values of base, math, text and merged."""
    labels = ("base", MATH, TEXT, "merged")
    return Scores(
        {
            name: TaskScores(
                100,
                "1.0",
                {
                    label: {"acc,none": MetricScore(value, error, higher)}
                    for label, value in zip(labels, values, strict=True)
                },
                (),
            )
            for name, values in tasks.items()
        }
    )


def test_the_share_of_a_skill_is_the_gain_kept_over_the_base():
    scores = scored(sums=(0.1, 0.6, 0.1, 0.58), words=(0.2, 0.1, 0.7, 0.695))

    math, text = kept_skills(scores)

    assert (math.expert, math.share, math.tasks) == (MATH, pytest.approx(0.96), ("sums",))
    assert (text.expert, text.share, text.tasks) == (TEXT, pytest.approx(0.99), ("words",))
    found = verdict(scores)
    assert found.sentence == "It keeps 96 % of `zoo/math`'s and 99 % of `zoo/text`'s skill."
    assert found.computed == (
        "An expert's skill is its gain over the base on the tasks where it is the best expert "
        "(`zoo/math`: `sums`; `zoo/text`: `words`), if that gain is above two standard errors. "
        "The share that the merged model keeps is its own gain over the base, divided by the "
        "expert's, as a mean over these tasks."
    )


def test_the_shares_of_an_experts_tasks_are_averaged():
    [math] = kept_skills(scored(a=(0.0, 0.5, 0.1, 0.5), b=(0.2, 0.6, 0.2, 0.4)))

    assert (math.share, math.tasks) == (pytest.approx(0.75), ("a", "b"))


def test_a_gain_within_two_standard_errors_is_no_skill():
    scores = scored(sums=(0.50, 0.52, 0.4, 0.51))  # 0.02 against 2 * sqrt(2) * 0.01

    assert kept_skills(scores) == []
    assert verdict(scores) == SkillVerdict(
        "It scores 0.510 on `sums` (accuracy), its best expert `zoo/math` 0.520."
    )


def test_a_merge_worse_than_the_base_keeps_none_and_an_expert_without_a_skill_is_named():
    found = verdict(scored(sums=(0.1, 0.6, 0.2, 0.05)))

    assert found.sentence == "It keeps none of `zoo/math`'s skill."
    assert found.computed.endswith(" No task measured a skill of `zoo/text`.")


def test_of_perplexity_less_is_more():
    [math] = kept_skills(scored(higher=False, sums=(20.0, 10.0, 18.0, 12.0)))

    assert math.share == pytest.approx(0.8)


def test_scores_without_the_base_have_no_skills():
    task = scored(sums=(0.1, 0.6, 0.2, 0.5)).tasks["sums"]
    models = {label: values for label, values in task.models.items() if label != "base"}

    assert kept_skills(Scores({"sums": TaskScores(100, "1.0", models, ())})) == []
