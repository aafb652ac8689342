from __future__ import annotations

import html
import json
import re
from dataclasses import replace

import yaml
from markdown_it import MarkdownIt

from lewis_hub.evaluate.benchmarks import ScoredData
from lewis_hub.evaluate.gate import Check, GateVerdict
from lewis_hub.evaluate.items import TaskItem
from lewis_hub.evaluate.samples import collect_samples
from lewis_hub.evaluate.scores import Answers, ModelResult, Scores
from lewis_hub.hub.facts import Licence, ModelFacts
from lewis_hub.localhub.pages import render_markdown
from lewis_hub.recipe.evaluation import Benchmark
from lewis_hub.report.card import eval_results, model_card
from lewis_hub.report.chart import draw_scores
from lewis_hub.report.cost import Machine
from lewis_hub.report.facts import StackedBlocks
from lewis_hub.report.maps import draw_maps
from lewis_hub.report.page import report_page
from lewis_hub.report.usage import ModelUsage

ONERROR = "<img src=x onerror=alert(1)>"
HTML = MarkdownIt("commonmark", {"html": True}).enable("table")


NAME = f"{ONERROR}</script><script>alert(2)</script>|`\n\n# x\u202e: [y\n---\n"
CLOSED = html.escape(" ".join(NAME.replace("\u202e", "").split()))  # as it may stand in a page


def hostile_facts(make_facts):
    """Every string that comes from somebody else tries to get out."""
    facts, name = make_facts(), NAME
    base = replace(facts.base, name=name)
    licence = Licence("x: [y\n---\n<b>", ONERROR, "javascript:1")
    told = ModelFacts(name, licence, ("<b>",), "javascript:1", name, name)
    maps = replace(facts.guided.maps, caption=f'" {ONERROR}', note=name)
    schedule = facts.guided.schedule
    schedule = replace(schedule, experts=(replace(schedule.experts[0], source=name),))
    profile = facts.guided.profile
    evil = replace(
        profile.experts[0], source=name, calibration={"dataset": name, "split": name, "text": name}
    )
    guided = replace(
        facts.guided,
        notes=(name,),
        maps=maps,
        schedule=schedule,
        profile=replace(profile, sources=(evil,)),
    )
    scored = facts.scores.tasks["sums"]
    models = {f"expert:{name}": scored.models["base"], **scored.models}
    metric = {f"{ONERROR},|": scored.models["merged"]["exact_match,none"]}
    return replace(
        facts,
        title=name,
        base=base,
        models={**facts.models, base.pinned: told},
        guided=guided,
        licence=Licence(name, name, "javascript:1"),
        scores=Scores({name: replace(scored, models={**models, "merged": metric})}),
        scored_data={name: ScoredData(name, name, name, None)},
        chart=replace(facts.chart, caption=f'" {ONERROR}'),
        usage=ModelUsage(task=name, automatic="AutoModelForCausalLM", stated=name),
        costs=(replace(facts.costs[0], stage=name),),
        recipe=f"a: 1\n```\n{ONERROR}\n",
        software={ONERROR: name},
        digest=name,
        dtype=ONERROR,
        machine=Machine(name, 2, None, name),
        config={"architectures": [name], "vocab_size": name, "num_hidden_layers": name},
        gate=GateVerdict((Check(name, name, name, 0.1, 0.2, -0.1, (-0.2, -0.05), 0.01),)),
        stack=(StackedBlocks(range(2), ((base, range(2)),), base),),
    )


def hostile_samples(make_results, make_scores):
    """The same of what the models did and said."""
    found = {}
    for label, result in make_results(make_scores(), 5).items():
        task = result.tasks["sums"]
        metrics = {f"{NAME},{NAME}": task.metrics["exact_match,none"]}
        found[f"expert:{NAME}" if label == "uniform" else label] = ModelResult(
            {NAME: replace(task, metrics=metrics, answers=Answers((NAME,) * 5))}
        )
    items = [TaskItem(NAME, NAME, NAME, {})] * 5
    return collect_samples(found, {NAME: items}, {})


def test_hostile_names_do_no_harm(make_facts):
    card = model_card(hostile_facts(make_facts))

    metadata = yaml.safe_load(card.content.split("\n---\n")[0])
    assert metadata["license"] == "other"
    assert metadata["base_model"] == ["zoo/math", "zoo/text"]
    assert metadata["language"] == ["en"]
    rendered = HTML.render(card.text)
    tags = set(re.findall(r"<(\w+)", rendered))
    assert tags <= {
        *("h1", "h2", "h3", "p", "a", "code", "pre", "ul", "li", "strong"),
        *("table", "thead", "tbody", "tr", "th", "td", "picture", "source", "img"),
    }
    pictures = re.findall(r"<img [^>]*>", rendered)
    assert len(pictures) == 2
    assert all(re.fullmatch(r'<img src="lewis/[\w.-]+" alt="[^"<>]*">', p) for p in pictures)
    assert not re.search(r"<[^>]*\sonerror=[^>]*>", re.sub(r'"[^"]*"', '""', rendered))
    assert "javascript:" not in rendered
    assert rendered.count("<h1>") == 1
    assert rendered.count("<pre>") == 5
    for row in re.findall(r"<table>.*?</table>", rendered, flags=re.S):
        n_columns = row.count("<th>") + row.count("<th ")
        cells = [line.count("<td") for line in row.split("<tr>")[2:]]
        assert set(cells) == {n_columns}
    shown = html.unescape(re.search(r"<h1>(.*?)</h1>", rendered)[1])
    assert shown == " ".join(NAME.replace("\u202e", "").split())


def test_the_embedded_hubs_own_page_shows_the_card(make_facts):
    for facts in (make_facts(), hostile_facts(make_facts)):
        page = render_markdown(model_card(facts).text, lambda path: f"/f/{path}")

        assert page.count("<picture>") == 2
        assert '<img src="/f/lewis/maps-light.png"' in page
        assert '<a href="/f/lewis/lock.json">' in page
        assert not re.search(r"<[^>]*\sonerror=[^>]*>", re.sub(r'"[^"]*"', '""', page))


def test_hostile_names_stay_text_in_the_report_page(make_facts, make_results, make_scores):
    page = report_page(hostile_facts(make_facts), hostile_samples(make_results, make_scores))

    tags = re.findall(r"<\s*(/?[a-z!]\w*)", page, flags=re.I)
    assert [tag for tag in tags if "script" in tag.lower()] == [
        *("noscript", "/noscript"),
        *("script", "/script", "script", "/script"),
    ]
    assert "img" not in tags
    assert "\u202e" not in page
    data = re.search(r'id="data">(.*?)</script>', page, flags=re.S)[1]
    assert not set("<>&") & set(data)
    shown = html.unescape(CLOSED)
    read = json.loads(data)
    assert read["metrics"][0]["task"] == shown
    assert shown in [model["name"] for model in read["metrics"][0]["models"]]
    assert read["experts"][0]["name"] == shown
    assert f"<h1>{CLOSED.replace('&#x27;', '&#39;')}</h1>" in page


def test_hostile_names_stay_text_in_the_entries_for_leaderboards(make_facts):
    facts = hostile_facts(make_facts)
    (metric,) = facts.scores.tasks[NAME].models["merged"]
    benchmark = Benchmark(dataset="a/b", task_id=NAME, metric=metric)

    files = eval_results(facts.scores, {NAME: benchmark}, replace(facts, repo=NAME))

    ((path, text),) = files.items()
    assert path == ".eval_results/b.yaml"
    (entry,) = yaml.safe_load(text)
    assert set(entry) == {"dataset", "value", "source", "notes"}
    assert entry["dataset"] == {"id": "a/b", "task_id": NAME}
    assert entry["source"]["url"].startswith("https://huggingface.co/%3Cimg%20src")


def test_hostile_names_are_drawn_as_text_and_name_no_file(make_fake, make_facts, tmp_path):
    fake = make_fake(2, components=(f"$x^{{{ONERROR}}}$../../x",), experts=(f"../{ONERROR}",))

    maps = draw_maps(fake.profile, fake.schedule, tmp_path)
    chart = draw_scores(hostile_facts(make_facts).scores, tmp_path)

    assert maps.files == ("maps-light.png", "maps-dark.png")
    assert chart.files == ("scores-light.png", "scores-dark.png")
    assert {path.name for path in tmp_path.iterdir()} == {*maps.files, *chart.files}
