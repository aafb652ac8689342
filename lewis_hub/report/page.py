"""`lewis/report.html`: scores, items, modules and costs in one file that needs no network.

Its policy lets nothing run but the one script and the one style sheet that are written into it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import isfinite
from typing import Any

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.errors import ProfileError
from lewis_hub.evaluate.results import MetricResult, ModelResult
from lewis_hub.evaluate.scores import MetricScore, Scores
from lewis_hub.report import markdown, sections
from lewis_hub.report.facts import CardFacts, Guided
from lewis_hub.report.findings import MERGED, metric_name, model_name, number, twins, was_scored
from lewis_hub.report.plots import Clip, Grid, arrange, clip, relative_change, short_name

MARKS = {1.0: "1", 0.0: "0", None: "-"}  # an item's value in one character

Document = dict[str, Any]


def explored(guided: Guided | None, results: Mapping[str, ModelResult]) -> Document:
    """All that the script draws: plain JSON, a few bytes a module or item.

    Args:
        guided: None where no guide decided.
        results: label -> what a model did; empty where nothing was scored.
    """
    return {
        "experts": list(_experts(guided)) if guided else [],
        "metrics": list(_metrics(results)),
    }


def _experts(guided: Guided) -> Iterator[Document]:
    measured = {one.source: one for one in guided.profile.experts} if guided.profile else {}
    for expert in guided.schedule.experts:
        maps = [_map("density", "of the task vector kept", arrange(expert.tensors))]
        if guided.profile and expert.source in measured:
            maps += _importance(guided.profile, measured[expert.source])
        drawn = [one for one in maps if one]
        if drawn:
            yield {"name": _plain(short_name(expert.source)), "maps": drawn}


def _importance(profile: ImportanceProfile, expert: SourceImportance) -> list[Document | None]:
    own = _map("importance in the expert", "", arrange(expert.modules))
    try:
        base = profile.base_of(expert).modules
    except ProfileError:
        return [own]
    change = arrange(relative_change(expert.modules, base))
    return [
        _map("change of importance", "% of the base's", change),
        own,
        _map("importance in the base", "", arrange(base)),
    ]


def _map(title: str, unit: str, grid: Grid | None) -> Document | None:
    if grid is None:
        return None
    clipped = clip(grid)
    return {
        "title": title,
        "unit": unit,
        "components": [_plain(component) for component in grid.components],
        "blocks": grid.blocks,
        "values": [[_short(value) for value in row] for row in grid.values],
        "bottom": _short(grid.known[0]),
        "top": _short(clipped.limit if clipped else grid.known[-1]),
        "note": _note(clipped) if clipped else "",
    }


def _note(clipped: Clip) -> str:
    others = f", and {clipped.n_above - 1} more" if clipped.n_above > 1 else ""
    highest = f"{_plain(clipped.top)}, {clipped.top_value:.4g}"
    return f"Colours end at {clipped.limit:.4g}; above: {highest}{others}."


def _metrics(results: Mapping[str, ModelResult]) -> Iterator[Document]:
    """The metrics that are means over items, each with what every model did on every item."""
    merged = results.get(MERGED, ModelResult({}))
    for name, task in merged.tasks.items():
        for key, metric in task.metrics.items():
            rivals = {label: _of(result, name, key) for label, result in results.items()}
            known = {
                label: found.values
                for label, found in rivals.items()
                if found and found.values is not None
            }
            if MERGED in known:
                yield {
                    "task": _plain(name),
                    "metric": _plain(metric_name(key)),
                    "higher_is_better": metric.higher_is_better is not False,
                    "models": [
                        {"name": _plain(model_name(label)), "items": _items(values)}
                        for label, values in known.items()
                    ],
                    "merged": list(known).index(MERGED),
                }


def _of(result: ModelResult, task: str, metric: str) -> MetricResult | None:
    found = result.tasks.get(task)
    return found.metrics.get(metric) if found else None


def _items(values: Sequence[float | None]) -> str | list[float | None]:
    """Right and wrong as a character an item; other numbers as they are, shortened."""
    if all(value in MARKS for value in values):
        return "".join(MARKS[value] for value in values)
    return [None if value is None else _short(value) for value in values]


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if isfinite(value) else None


def _plain(name: str) -> str:
    return markdown.visible(name)


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
        machine=markdown.visible(sections.machine(facts.machine)) if facts.machine else None,
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
        "Time": [(one.seconds, sections.duration(one.seconds)) for one in costs],
        "Peak memory": [(one.peak_rss_bytes, sections.size(one.peak_rss_bytes)) for one in costs],
        "Read": [(one.read_bytes, sections.size(one.read_bytes)) for one in costs],
        "Written": [(one.written_bytes, sections.size(one.written_bytes)) for one in costs],
        "From the Hub by ranges": [
            (one.fetched_bytes, sections.size(one.fetched_bytes)) for one in costs
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
