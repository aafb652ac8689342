from __future__ import annotations

import html
import re
from dataclasses import replace

import yaml
from markdown_it import MarkdownIt

from lewis_hub.hub.facts import Licence, ModelFacts
from lewis_hub.hub.markdown import render
from lewis_hub.report.card import model_card
from lewis_hub.report.findings import Scores

ONERROR = "<img src=x onerror=alert(1)>"
HTML = MarkdownIt("commonmark", {"html": True}).enable("table")


def hostile_facts(make_facts):
    """Every string that comes from somebody else tries to get out."""
    facts = make_facts()
    name = f"{ONERROR}|`\n\n# x"
    base = replace(facts.base, name=name)
    told = ModelFacts(
        name, "x: [y\n---\n<b>", ONERROR, "javascript:1", ("<b>",), (), False, "javascript:1"
    )
    plots = tuple(replace(plot, caption=f'" {ONERROR}', expert=name) for plot in facts.guided.plots)
    schedule = facts.guided.schedule
    schedule = replace(schedule, experts=(replace(schedule.experts[0], source=name),))
    profile = facts.guided.profile
    evil = replace(
        profile.experts[0], source=name, calibration={"dataset": name, "split": name, "text": name}
    )
    guided = replace(
        facts.guided,
        notes=(name,),
        plots=plots,
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
        costs=(replace(facts.costs[0], stage=name),),
        recipe=f"a: 1\n```\n{ONERROR}\n",
        software={ONERROR: name},
        digest=name,
        dtype=ONERROR,
    )


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
    assert len(pictures) == 4
    assert all(re.fullmatch(r'<img src="lewis/[\w.-]+" alt="[^"<>]*">', p) for p in pictures)
    assert not re.search(r"<[^>]*\sonerror=[^>]*>", re.sub(r'"[^"]*"', '""', rendered))
    assert "javascript:" not in rendered
    assert rendered.count("<h1>") == 1
    assert rendered.count("<pre>") == 4
    for row in re.findall(r"<table>.*?</table>", rendered, flags=re.S):
        n_columns = row.count("<th>") + row.count("<th ")
        cells = [line.count("<td") for line in row.split("<tr>")[2:]]
        assert set(cells) == {n_columns}
    shown = html.unescape(re.search(r"<h1>(.*?)</h1>", rendered)[1])
    assert shown == f"{ONERROR}|` # x"


def test_the_embedded_hubs_own_page_shows_the_card(make_facts):
    for facts in (make_facts(), hostile_facts(make_facts)):
        page = render(model_card(facts).text, lambda path: f"/i/{path}", lambda path: f"/f/{path}")

        assert page.count("<picture>") == 4
        assert '<img src="/i/lewis/importance-math-light.png"' in page
        assert '<a href="/f/lewis/lock.json">' in page
        assert not re.search(r"<[^>]*\sonerror=[^>]*>", re.sub(r'"[^"]*"', '""', page))
