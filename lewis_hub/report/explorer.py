"""What `report.html` lets a reader look at: modules and items, as data for its script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from lewis_hub.errors import ProfileError
from lewis_hub.evaluate.results import MetricResult, ModelResult
from lewis_hub.guides.importance import ImportanceProfile, SourceImportance
from lewis_hub.report import markdown
from lewis_hub.report.facts import Guided
from lewis_hub.report.findings import MERGED, metric_name, model_name
from lewis_hub.report.grid import Clip, Grid, arrange, clip, relative_change
from lewis_hub.report.plots import short_name

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
