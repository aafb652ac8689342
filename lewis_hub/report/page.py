"""`lewis/report.html`: scores, items, modules and costs in one file that needs no network.

Its policy lets nothing run but the one script and the one style sheet that are written into it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from math import isfinite

from lewis_hub.evaluate.results import ModelResult
from lewis_hub.evaluate.scores import MetricScore, Scores
from lewis_hub.report import markdown, tables
from lewis_hub.report.explorer import Document, explored
from lewis_hub.report.facts import CardFacts
from lewis_hub.report.findings import (
    MERGED,
    metric_name,
    model_name,
    number,
    twins,
    was_scored,
)

FILE = "lewis/report.html"
INTERVAL = 1.96  # standard errors to each side of a mean: 95 %


@dataclass(frozen=True)
class Bar:
    """A number beside others; what is drawn lies between 0 and 100.

    Attributes:
        low: where its interval begins, and `high` where it ends; None where it has none.
    """

    name: str
    told: str
    share: float
    low: float | None = None
    high: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class Chart:
    """Bars on one scale."""

    title: str
    bars: tuple[Bar, ...]


def report_page(facts: CardFacts, results: Mapping[str, ModelResult]) -> str:
    """Write the page; the same facts and results give the same text.

    Args:
        facts: the card's.
        results: label, as in the scores -> what a model did; empty where nothing was scored.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    script, style = _source("report.js"), _source("report.css")
    scores = facts.scores if facts.scores and was_scored(facts.scores) else None
    found = explored(facts.guided, results)
    return environment.from_string(_source("report.html.j2")).render(
        title=markdown.visible(facts.title),
        script=Markup(script),  # noqa: S704 - ours, as is the style
        style=Markup(style),  # noqa: S704
        script_hash=_digest(script),
        style_hash=_digest(style),
        data=Markup(embedded(found)),  # noqa: S704 - `embedded` escapes it
        scores=list(_score_charts(scores)) if scores else [],
        twins=twins(scores) if scores else (),
        items=bool(found["metrics"]),
        experts=bool(found["experts"]),
        costs=list(_cost_charts(facts)),
        machine=markdown.visible(tables.machine(facts.machine)) if facts.machine else None,
        digest=markdown.visible(facts.digest),
    )


def embedded(document: Document) -> str:
    """JSON that no HTML parser takes for the end of a script, or for a comment."""
    told = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return told.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _score_charts(scores: Scores) -> Iterator[Chart]:
    for name, task in scores.tasks.items():
        for key in task.models.get(MERGED, {}):
            found = {label: m[key] for label, m in task.models.items() if key in m}
            known = {label: one for label, one in found.items() if isfinite(one.value)}
            top = max([1.0, *(abs(one.value) for one in known.values())])
            bars = [_score_bar(label, one, top) for label, one in known.items()]
            title = f"{name} ({metric_name(key)}), {task.n:,} items"
            yield Chart(markdown.visible(title), tuple(bars))


def _score_bar(label: str, score: MetricScore, top: float) -> Bar:
    shown, share = markdown.visible(model_name(label)), _share(score.value, top)
    strong = label == MERGED
    if not score.stderr:
        return Bar(shown, number(score.value), share, strong=strong)
    spread = INTERVAL * score.stderr
    low, high = (_share(end, top) for end in (score.value - spread, score.value + spread))
    return Bar(shown, f"{number(score.value)} ± {number(score.stderr)}", share, low, high, strong)


def _cost_charts(facts: CardFacts) -> Iterator[Chart]:
    costs = facts.costs
    amounts: dict[str, list[tuple[float | None, str]]] = {
        "Time": [(one.seconds, tables.duration(one.seconds)) for one in costs],
        "Peak memory": [(one.peak_rss_bytes, tables.size(one.peak_rss_bytes)) for one in costs],
        "Read": [(one.read_bytes, tables.size(one.read_bytes)) for one in costs],
        "Written": [(one.written_bytes, tables.size(one.written_bytes)) for one in costs],
        "From the Hub by ranges": [
            (one.fetched_bytes, tables.size(one.fetched_bytes)) for one in costs
        ],
    }
    for title, found in amounts.items():
        top = max((amount or 0.0 for amount, _ in found), default=0.0)
        if top:
            bars = [
                Bar(markdown.visible(cost.stage), told, _share(amount or 0.0, top))
                for cost, (amount, told) in zip(costs, found, strict=True)
            ]
            yield Chart(title, tuple(bars))


def _share(value: float, top: float) -> float:
    return round(min(max(100 * value / top, 0.0), 100.0), 2)


def _source(name: str) -> str:
    place = files("lewis_hub.templates").joinpath("report", name)
    return place.read_text(encoding="utf-8")


def _digest(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"
