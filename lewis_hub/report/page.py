"""`lewis/report.html`: scores, items, modules and costs in a single file that needs no network.

Its content security policy allows only the script and the style sheet inside the file.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from math import isfinite
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.display import size
from lewis_hub.errors import ProfileError
from lewis_hub.evaluate.scores import MERGED, ModelResult, Scores
from lewis_hub.report.cost import StageCost, duration
from lewis_hub.report.facts import CardFacts, Guided
from lewis_hub.report.findings import metric_name, model_name, number, twins
from lewis_hub.report.markdown import visible
from lewis_hub.report.profiles import Grid, arrange, clip, relative_change, short_name

if TYPE_CHECKING:
    from jinja2 import Template

FILE = "lewis/report.html"
MARKS = {1.0: "1", 0.0: "0", None: "-"}  # an item's value as a character
INTERVAL = 1.96  # standard errors to each side of a mean: 95 %

COSTS = {  # title of a chart -> the attribute that it shows
    "Time": "seconds",
    "Peak memory": "peak_rss_bytes",
    "Read": "read_bytes",
    "Written": "written_bytes",
    "Downloaded in ranges": "fetched_bytes",
}

Document = dict[str, Any]


def report_page(facts: CardFacts, results: Mapping[str, ModelResult]) -> str:
    """Write the page; `results` of models are by their labels in the scores."""
    script, style = _template("report.js"), _template("report.css")
    scores = facts.scores if facts.was_scored else None
    data = page_data(facts.guided, results)
    return _page().render(
        facts=facts,
        script=script,
        style=style,
        script_hash=_digest(script),
        style_hash=_digest(style),
        data=_embedded(data),
        scores=list(_score_charts(scores)) if scores else [],
        twins=twins(scores) if scores else (),
        items=bool(data["metrics"]),
        experts=bool(data["experts"]),
        costs=list(_cost_charts(facts.costs)),
    )


@cache
def _page() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    return environment.from_string(_template("report.html.j2"))


def _template(name: str) -> str:
    return files("lewis_hub.templates").joinpath("report", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"


def _embedded(document: Document) -> str:
    """JSON in which an HTML parser finds neither the end of a script nor a comment."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _score_charts(scores: Scores) -> Iterator[Document]:
    for name, task in scores.tasks.items():
        for key in task.models.get(MERGED, {}):
            known = {
                label: metrics[key]
                for label, metrics in task.models.items()
                if key in metrics and isfinite(metrics[key].value)
            }
            top = max([1.0, *(abs(score.value) for score in known.values())])
            bars = []
            for label, score in known.items():
                text, margin = number(score.value), 0.0
                if score.stderr:
                    text, margin = f"{text} ± {number(score.stderr)}", INTERVAL * score.stderr
                bar = _bar(model_name(label), text, score.value, top, margin)
                bars.append(bar | {"strong": label == MERGED})
            title = visible(f"{name} ({metric_name(key)}), {task.n:,} items")
            yield {"title": title, "bars": bars}


def _cost_charts(costs: Sequence[StageCost]) -> Iterator[Document]:
    for title, field in COSTS.items():
        values = [getattr(cost, field) for cost in costs]
        top = max((value or 0.0 for value in values), default=0.0)
        if top:
            bars = []
            for cost, value in zip(costs, values, strict=True):
                amount = duration if field == "seconds" else size
                text = "–" if value is None else amount(value)
                bars.append(_bar(cost.stage, text, value or 0.0, top))
            yield {"title": title, "bars": bars}


def _bar(name: str, label: str, value: float, top: float, margin: float = 0.0) -> Document:
    """A labelled bar and the interval around its end; lengths are between 0 and 100."""

    def percent(value: float) -> float:
        return round(min(max(100 * value / top, 0.0), 100.0), 2)

    return {
        "name": visible(name),
        "label": label,
        "length": percent(value),
        "interval": (percent(value - margin), percent(value + margin)) if margin else (),
        "strong": False,
    }


def page_data(guided: Guided | None, results: Mapping[str, ModelResult]) -> Document:
    """The data that the script of the page draws, as plain JSON."""
    return {
        "experts": list(_experts(guided)) if guided else [],
        "metrics": list(_metrics(results)),
    }


def _experts(guided: Guided) -> Iterator[Document]:
    measured = {entry.source: entry for entry in guided.profile.experts} if guided.profile else {}
    for expert in guided.schedule.experts:
        maps = [_map("density", "of the task vector", arrange(expert.tensors))]
        if guided.profile and expert.source in measured:
            maps += _importance(guided.profile, measured[expert.source])
        if any(maps):
            yield {"name": visible(short_name(expert.source)), "maps": [m for m in maps if m]}


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
        "components": [visible(component) for component in grid.components],
        "blocks": grid.blocks,
        "values": [[_rounded(value) for value in row] for row in grid.values],
        "bottom": _rounded(grid.known[0]),
        "top": _rounded(clipped.limit if clipped else grid.known[-1]),
        "note": visible(clipped.sentence("{:.4g}".format)) if clipped else "",
    }


def _metrics(results: Mapping[str, ModelResult]) -> Iterator[Document]:
    """The metrics that are means over items, each with the values of every model."""
    merged = results.get(MERGED, ModelResult({}))
    for name, task in merged.tasks.items():
        for key, metric in task.metrics.items():
            values = {
                label: result.tasks[name].metrics[key].values
                for label, result in results.items()
                if name in result.tasks and key in result.tasks[name].metrics
            }
            known = {label: items for label, items in values.items() if items is not None}
            if MERGED in known:
                yield {
                    "task": visible(name),
                    "metric": visible(metric_name(key)),
                    "higher_is_better": metric.higher_is_better is not False,
                    "models": [
                        {"name": visible(model_name(label)), "items": _items(items)}
                        for label, items in known.items()
                    ],
                    "merged": list(known).index(MERGED),
                }


def _items(values: Sequence[float | None]) -> str | list[float | None]:
    """Right and wrong answers as a character each; other numbers are rounded."""
    if all(value in MARKS for value in values):
        return "".join(MARKS[value] for value in values)
    return [None if value is None else _rounded(value) for value in values]


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if isfinite(value) else None
