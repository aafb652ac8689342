from __future__ import annotations

from PIL import Image

from lewis_hub.evaluate.scores import MetricScore, Scores, TaskScores
from lewis_hub.report.chart import draw_scores, marks, score_rows
from lewis_hub.report.plots import THEMES


def test_each_task_has_a_row_with_all_models_and_their_intervals(make_scores):
    [row] = score_rows(make_scores())

    assert row.title == "sums, exact match, 300 items"
    assert [point.label.partition("@")[0] for point in row.points] == [
        *("merged", "expert:zoo/math", "expert:zoo/text", "base", "uniform"),
    ]
    assert [point.value for point in row.points] == [0.7, 0.9, 0.1, 0.05, 0.68]
    low, high = row.points[0].ends
    assert (round(low, 3), round(high, 3)) == (0.649, 0.751)


def test_the_chart_is_as_wide_as_a_card_in_both_versions_and_the_same_each_time(
    make_scores, tmp_path
):
    chart = draw_scores(make_scores(), tmp_path / "a")
    draw_scores(make_scores(), tmp_path / "b")

    assert chart.caption == (
        "Scores of 5 models with 95 % intervals: sums, exact match, 300 items."
    )
    for name, paper in zip(chart.files, ((255, 255, 255), (11, 15, 25)), strict=True):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        with Image.open(tmp_path / "a" / name) as picture:
            assert picture.size[0] == 720
            assert picture.convert("RGB").getpixel((1, 1)) == paper


def test_models_differ_in_form_as_well_as_in_colour(make_scores):
    found = marks(["merged", "expert:a", "expert:b", "base", "uniform", "by_magnitude"], THEMES[0])

    assert len({(mark.form, mark.is_filled) for mark in found.values()}) == len(found)


def test_perplexities_have_an_axis_of_their_own_and_many_metrics_are_one_per_task(tmp_path):
    metrics = {
        "acc,none": MetricScore(0.5, 0.01),
        "perplexity,none": MetricScore(12.0, 0.5, higher_is_better=False),
    }
    few = Scores({"a": TaskScores(10, "1", {"merged": metrics}, ())})
    many = Scores({f"t{i}": TaskScores(10, "1", {"merged": metrics}, ()) for i in range(9)})

    assert [row.title for row in score_rows(few)] == [
        "a, accuracy, 10 items",
        "a, perplexity, 10 items, lower is better",
    ]
    assert [row.title for row in score_rows(many)] == [
        f"t{i}, accuracy, 10 items" for i in range(9)
    ]
    with Image.open(tmp_path / draw_scores(few, tmp_path).light) as picture:
        assert picture.size[1] > 144


def test_long_names_are_cut_before_the_edge(make_scores, tmp_path):
    task = make_scores().tasks["sums"]
    long = Scores({"mmlu_pro_macroeconomics_" * 4: task})

    with Image.open(tmp_path / draw_scores(long, tmp_path).light) as picture:
        right = picture.convert("L").crop((712, 0, 720, picture.size[1]))

    assert right.getextrema() == (255, 255)


def test_scores_that_are_not_finite_are_not_drawn(make_scores, tmp_path):
    models = {"merged": {"perplexity,none": MetricScore(float("inf"), None)}}

    assert draw_scores(Scores({"a": TaskScores(1, "1", models, ())}), tmp_path) is None
