from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace

from lewis_hub.evaluate.samples import Samples, collect_samples
from lewis_hub.evaluate.scores import MetricResult, MetricScore, ModelResult, Scores
from lewis_hub.report.cost import Machine
from lewis_hub.report.page import outcomes, report_page
from lewis_hub.report.page_data import page_data

POLICY = re.compile(r'http-equiv="Content-Security-Policy" content="([^"]*)"')


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, flags=re.S)[1])


def digest(text):
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_the_page_holds_all_that_it_shows_and_lets_nothing_else_run(
    make_facts, make_samples, make_scores
):
    page = report_page(make_facts(), make_samples(make_scores()))

    script = re.search(r"<script>(.*?)</script>", page, flags=re.S)[1]
    style = re.search(r"<style>(.*?)</style>", page, flags=re.S)[1]
    assert POLICY.search(page)[1] == (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert page.index("Content-Security-Policy") < page.index("<style>")
    outside = page.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?://|\ssrc=|\shref=|url\(|@import|\sstyle=|\son\w+=", outside)
    assert page == report_page(make_facts(), make_samples(make_scores()))


def test_every_module_has_its_numbers(make_facts):
    facts = make_facts()
    (first, _) = facts.guided.schedule.experts

    (expert, other) = page_data(facts.guided, Samples())["experts"]

    assert (expert["name"], other["name"]) == ("zoo/math", "zoo/text")
    assert [one["title"] for one in expert["maps"]] == [
        "density",
        "change of importance",
        "importance in the expert",
        "importance in the base",
    ]
    density, _, _, base = expert["maps"]
    assert density["components"][3] == "mlp.down_proj"
    assert density["blocks"] == (0, 1, 2, 3, 4, 5)
    exact = first.tensors["model.layers.2.mlp.down_proj.weight"]
    assert density["values"][3][2] == float(f"{exact:.4g}")
    assert base["values"][3][2] == 14.0
    assert (density["bottom"], density["top"]) == (0.3016, 0.7999)
    assert density["note"] == ""


def test_a_module_that_stands_out_ends_the_colours_early_and_is_named(make_facts):
    guided = make_facts().guided
    base, expert, *rest = guided.profile.sources
    loud = "model.layers.1.mlp.down_proj"
    louder = replace(expert, modules={**expert.modules, loud: 9 * expert.modules[loud]})
    profile = replace(guided.profile, sources=(base, louder, *rest))

    change = page_data(replace(guided, profile=profile), Samples())["experts"][0]["maps"][1]

    assert (
        change["note"] == f"The colour scale ends at 20 (percentile 95.8). Above it: {loud}, 978.7."
    )
    assert change["top"] == 20.0
    assert change["values"][3][1] == 978.7


def test_items_are_a_character_each_and_other_numbers_are_shortened(make_results, make_scores):
    found = make_results(make_scores(), 10)
    texts = MetricResult(1.5, (1.23456, None, float("0.00001234567")), higher_is_better=False)
    plain = found["merged"].tasks["sums"]
    answered = replace(plain.metrics["exact_match,none"], values=(1.0, None, 0.0, *[1.0] * 7))
    merged = replace(plain, metrics={"exact_match,none": answered, "loss,none": texts})
    results = {**found, "merged": ModelResult({"sums": merged})}

    first, second = page_data(None, collect_samples(results, {}, {}))["metrics"]

    assert (first["task"], first["metric"], first["merged"]) == ("sums", "exact_match", 4)
    assert first["models"][1] == {"name": "zoo/math", "items": "0111111111"}
    assert first["models"][4] == {"name": "merged", "items": "1-01111111"}
    assert second["models"] == [{"name": "merged", "items": [1.235, None, 1.235e-05]}]
    assert (first["higher_is_better"], second["higher_is_better"]) == (True, False)


def test_a_metric_that_is_no_mean_over_items_has_no_items(make_results, make_scores):
    found = make_results(make_scores(), 10)
    plain = found["merged"].tasks["sums"]
    metric = MetricResult(0.5, None)
    results = {"merged": ModelResult({"sums": replace(plain, metrics={"f1,none": metric})})}

    assert page_data(None, collect_samples(results, {}, {})) == {"experts": [], "metrics": []}


def test_a_merge_without_guide_scores_and_costs_has_a_page_that_says_so(make_facts):
    page = report_page(make_facts(guided=None, scores=None, costs=()), Samples())

    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Scores",
        "How it was merged",
        "Sources",
        "Limits",
        "Recipe",
    ]
    assert "This merge was not scored." in page
    assert data_of(page) == {"experts": [], "metrics": []}


def test_bars_are_as_long_as_what_they_stand_for(make_facts):
    page = report_page(make_facts(), Samples())

    rows = re.findall(r'<th scope="row">(.*?)</th>.*?width="(.*?)".*?number">(.*?)<', page, re.S)
    assert rows[:5] == [
        ("base", "5.0", "0.050 ± 0.020"),
        ("zoo/math", "90.0", "0.900 ± 0.020"),
        ("zoo/text", "10.0", "0.100 ± 0.020"),
        ("uniform twin", "68.0", "0.680 ± 0.020"),
        ("merged", "70.0", "0.700 ± 0.026"),
    ]
    assert 'x1="64.9" x2="75.1"' in page
    assert ("calibrate", "16.32", "12.3 s") in rows
    assert ("merge", "100.0", "1 min 16 s") in rows
    assert ("merge", "0.0", "–") in rows


def test_the_machine_that_the_costs_are_of_is_told_as_text(make_facts):
    page = report_page(make_facts(machine=Machine("<b>Xeon", 2, 8_000_000_000)), Samples())

    assert "on 2 cores of &lt;b&gt;Xeon, 8.0 GB of memory. Cached files" in page


def test_the_page_of_a_model_of_30_blocks_and_1300_items_is_small(
    make_facts, make_fake, make_samples, make_scores
):
    fake = make_fake(30, tuple(f"mixer.projection_{i}" for i in range(7)))
    guided = replace(make_facts().guided, profile=fake.profile, schedule=fake.schedule)
    parameters = dict.fromkeys(fake.schedule.experts[0].tensors, 64)
    facts = make_facts(guided=guided, parameters=parameters)

    page = report_page(facts, make_samples(make_scores(), 1300))

    assert len(page.encode()) < 100_000


def test_the_page_opens_on_what_was_lost_and_won_against_the_best_expert(
    make_facts, make_told_samples, make_scores
):
    samples = make_told_samples(make_scores())
    (found,) = outcomes(samples, make_scores())

    assert (found.task, found.metric, found.against) == ("sums", "exact match", "zoo/math")
    assert (found.n_lost, found.n_won, found.n_equal, found.n_unknown) == (60, 0, 240, 0)
    assert found.difference == "−0.200 (−0.250 to −0.150)"
    assert (found.lost, found.won) == (10.0, 0.0)  # of 50: all items
    page = report_page(make_facts(), samples)
    assert page.index("Lost and won</h2>") < page.index("Scores</h2>")
    assert "against zoo/math, its best expert, on 300 items" in page


def test_a_lower_value_wins_where_lower_is_better(make_results, make_scores):
    loss = {"merged": (1.0, 2.0, None), "expert:a/b": (1.5, 1.5, 1.0)}
    results = {
        label: ModelResult(
            {
                "sums": replace(
                    make_results(make_scores(), 3)["merged"].tasks["sums"],
                    metrics={"loss,none": MetricResult(1.5, values, higher_is_better=False)},
                )
            }
        )
        for label, values in loss.items()
    }

    (found,) = outcomes(collect_samples(results, {}, {}), make_scores())

    assert (found.n_lost, found.n_won, found.n_equal, found.n_unknown) == (1, 1, 0, 1)


def test_the_data_have_the_texts_once_and_the_places_of_answers(make_told_samples, make_scores):
    data = page_data(None, make_told_samples(make_scores(), 10))

    (metric,), (texts,) = data["metrics"], data["texts"]
    assert texts["questions"][3] == "What is 3 + 1?"
    assert texts["targets"][3] == "4"
    assert metric["answers"] == [0, 1, 2, 3, 4]
    assert texts["answers"][metric["answers"][metric["merged"]]][:4] == [
        *("merged says 0", "merged says 1", "merged says 2", "4"),
    ]
    assert metric["models"][metric["against"]]["name"] == "zoo/math"
    assert metric["same"][metric["against"]] == "0001111111"
    assert metric["same"][metric["merged"]] is None


def test_the_page_says_which_texts_were_cut_or_left_out(make_facts, make_samples, make_scores):
    left_out = make_samples(make_scores(), 10)
    task = left_out.tasks["sums"]
    cut = replace(task, left_out="", questions=("1 + 1?", None, None), targets=("2", None, None))

    page = report_page(make_facts(), left_out)
    shorter = report_page(make_facts(), Samples({"sums": cut}))

    assert "Questions and answers of sums are left out. Nobody kept them." in page
    assert "Questions and answers of 1 of the 3 items of sums are kept, those" in shorter


def test_the_page_is_made_of_what_was_kept(make_facts, make_told_samples, make_scores):
    samples = make_told_samples(make_scores())

    again = Samples.from_json(samples.to_json())

    assert report_page(make_facts(), again) == report_page(make_facts(), samples)


def test_none_of_n_has_an_interval(make_facts):
    task = make_facts().scores.tasks["sums"]
    models = {**task.models, "base": {"exact_match,none": MetricScore(0.0, 0.0)}}
    scores = Scores({"sums": replace(task, models=models)})

    page = report_page(make_facts(scores=scores), Samples())

    assert "0.000 (0.000 to 0.013)" in page
    assert 'x1="0.0" x2="1.26"' in page


def test_the_page_tells_recipe_sources_method_and_limits(make_facts):
    page = report_page(make_facts(), Samples())

    assert "<code>base_model: zoo/base\nmerge_method: ties</code></pre>" in page
    assert "The method is TIES-Merging (<code>ties</code>)." in page
    assert "The guide lewis chose the density of each weight matrix" in page
    assert '<td data-title="model">zoo/text</td>' in page
    assert '<td data-title="licence">apache-2.0</td>' in page
    assert "<li>One block stands out.</li>" in page
    assert "It keeps 76 % of <code>zoo/math</code>&#x27;s skill." in page
