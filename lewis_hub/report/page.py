"""`lewis/report.html`: what a merge lost and won, how it was made, in a file without network.

Its content security policy allows only the script and the style sheet inside the file. The same
facts and samples give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import isfinite
from typing import TYPE_CHECKING, Any

from lewis_hub.display import size
from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.evaluate.samples import SampledMetric, Samples
from lewis_hub.evaluate.scores import EXPERT, MERGED, PairedTest, Scores, settings_words
from lewis_hub.guides.schedule import weighted_mean
from lewis_hub.report.card import calibrated_on, guidance_values
from lewis_hub.report.cost import StageCost, duration
from lewis_hub.report.facts import METHODS, CardFacts
from lewis_hub.report.findings import (
    findings,
    gate_sentences,
    interval,
    model_name,
    number,
    readable_metric,
    signed,
    twins,
    uncertainty,
)
from lewis_hub.report.markdown import as_html, visible, visible_lines
from lewis_hub.report.page_data import Document, embedded, page_data
from lewis_hub.report.profiles import short_name
from lewis_hub.report.verdict import verdict

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

FILE = "lewis/report.html"

COSTS = {  # title of a chart -> the attribute that it shows
    "Time": "seconds",
    "Peak memory": "peak_rss_bytes",
    "Read": "read_bytes",
    "Written": "written_bytes",
    "Downloaded in ranges": "fetched_bytes",
}


def report_page(facts: CardFacts, samples: Samples) -> str:
    """Write the page."""
    script, style = _template("report.js"), _template("report.css")
    scores = facts.scores if facts.was_scored else None
    data = page_data(facts.guided, samples)
    return _page().render(
        facts=facts,
        script=script,
        style=style,
        script_hash=_digest(script),
        style_hash=_digest(style),
        data=embedded(data),
        outcomes=list(outcomes(samples, scores)) if scores else [],
        notes=list(_notes(samples)),
        scores=list(_score_charts(scores)) if scores else [],
        items=bool(data["metrics"]),
        experts=bool(data["experts"]),
        costs=list(_cost_charts(facts.costs)),
        calibrated=calibrated_on(facts),
        **_findings(facts, scores),
        **guidance_values(facts.guided),
    )


@cache
def _page() -> Template:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["methods"] = METHODS
    environment.filters |= {
        "count": lambda value: f"{value:,}" if isinstance(value, int) else "–",
        "duration": duration,
        "html": lambda sentence: Markup(as_html(sentence)),
        "lines": visible_lines,
        "short_name": short_name,
        "visible": visible,
        "weighted_mean": weighted_mean,
    }
    return environment.from_string(_template("report.html.j2"))


def _template(name: str) -> str:
    return files("lewis_hub.templates").joinpath("report", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"


def _findings(facts: CardFacts, scores: Scores | None) -> Mapping[str, Any]:
    """The verdict, and gains and limits, as sentences in Markdown."""
    gains, limits = findings(scores) if scores else ([], [])
    return {
        "verdict": verdict(scores) if scores else None,
        "gains": gains,
        "limits": limits,
        "twins": twins(scores) if scores else (),
        "settings": settings_words(scores.settings) if scores and scores.settings else None,
        "guided_notes": facts.guided.notes if facts.guided else (),
        "gate": gate_notes(facts.gate) if facts.gate else "",
    }


def gate_notes(gate: GateVerdict) -> Markup:
    """A paragraph for each sentence of a verdict, as HTML."""
    from markupsafe import Markup

    note = Markup('<p class="note">Quality gate: {}</p>\n')
    return Markup("").join(note.format(visible(sentence)) for sentence in gate_sentences(gate))


@dataclass(frozen=True)
class Outcome:
    """The items that a merge lost and won by one metric against another model."""

    task: str
    metric: str
    against: str
    is_expert: bool
    n_lost: int
    n_won: int
    n_equal: int  # both right or both wrong, or the same number
    n_unknown: int  # one of the models has no result
    difference: str  # with its interval; empty without a test
    lost: float = 0.0  # the lengths of two bars, at most 50
    won: float = 0.0

    @property
    def n(self) -> int:
        """The number of items."""
        return self.n_lost + self.n_won + self.n_equal + self.n_unknown


def outcomes(samples: Samples, scores: Scores) -> Iterator[Outcome]:
    """What a merge lost and won on every task, against the best expert there."""
    for name, task in samples.tasks.items():
        for key, metric in task.metrics.items():
            if metric.against is None:
                continue
            tests = scores.tasks[name].paired if name in scores.tasks else ()
            found = (t for t in tests if (t.metric, t.against) == (key, metric.against))
            yield _outcome(name, key, metric, next(found, None))


def _outcome(task: str, key: str, metric: SampledMetric, test: PairedTest | None) -> Outcome:
    against = metric.against or ""
    pairs = list(zip(metric.values[MERGED], metric.values[against], strict=True))
    known = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
    higher = sum(mine > theirs for mine, theirs in known)
    lower = sum(mine < theirs for mine, theirs in known)
    n_won, n_lost = (higher, lower) if metric.higher_is_better else (lower, higher)
    difference = ""
    if test:
        low, high = map(signed, test.ci95)
        difference = f"{signed(test.difference)} ({low} to {high})"
    return Outcome(
        task=task,
        metric=readable_metric(key),
        against=model_name(against),
        is_expert=against.startswith(EXPERT),
        n_lost=n_lost,
        n_won=n_won,
        n_equal=len(known) - higher - lower,
        n_unknown=len(pairs) - len(known),
        difference=difference,
        lost=round(50 * n_lost / max(len(pairs), 1), 2),
        won=round(50 * n_won / max(len(pairs), 1), 2),
    )


def _notes(samples: Samples) -> Iterator[str]:
    """Why the questions and answers of items are not shown."""
    reasons: dict[str, list[str]] = {}
    for name, task in samples.tasks.items():
        if task.left_out:
            reasons.setdefault(task.left_out, []).append(name)
    for why, names in reasons.items():
        yield f"Questions and answers of {_listed(names)} are left out. {why}"
    for name, task in samples.tasks.items():
        n, n_kept = len(task.questions), task.n_with_texts
        if n_kept < n:
            yield (
                f"Questions and answers of {n_kept:,} of the {n:,} items of {name} are kept, those "
                "that the merge lost or won first: all texts of a report together are limited."
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} other tasks" if len(names) > 3 else shown


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
                text = " ".join(filter(None, (number(score.value), uncertainty(score, task.n))))
                ends = interval(score, task.n) or ()
                bar = _bar(model_name(label), text, score.value, top, ends)
                bars.append(bar | {"strong": label == MERGED})
            title = visible(f"{name}, {readable_metric(key)}")
            yield {"title": title, "n": task.n, "bars": bars}


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
            yield {"title": title, "n": None, "bars": bars}


def _bar(
    name: str, label: str, value: float, top: float, ends: tuple[float, float] | tuple[()] = ()
) -> Document:
    """A labelled bar and the interval around its end; lengths are between 0 and 100."""

    def percent(value: float) -> float:
        return round(min(max(100 * value / top, 0.0), 100.0), 2)

    return {
        "name": visible(name),
        "label": label,
        "length": percent(value),
        "interval": tuple(map(percent, ends)),
        "strong": False,
    }
