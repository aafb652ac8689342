"""The data that the script of the page draws, as plain JSON: items with texts, maps of modules."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.errors import ProfileError
from lewis_hub.evaluate.samples import SampledMetric, Samples, TaskSamples, Texts
from lewis_hub.evaluate.scores import MERGED
from lewis_hub.report.facts import Guided
from lewis_hub.report.findings import metric_name, model_name
from lewis_hub.report.markdown import visible, visible_lines
from lewis_hub.report.profiles import Grid, arrange, clip, relative_change, short_name

MARKS = {1.0: "1", 0.0: "0", None: "-"}  # an item's value as a character

Document = dict[str, Any]


def embedded(document: Document) -> str:
    """JSON in which an HTML parser finds neither the end of a script nor a comment."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page_data(guided: Guided | None, samples: Samples) -> Document:
    """The data for the script."""
    shown = [name for name, task in samples.tasks.items() if task.n_with_texts]
    texts = [_texts(samples.tasks[name]) for name in shown]
    return {
        "experts": list(_experts(guided)) if guided else [],
        "metrics": list(_metrics(samples, shown)),
        **({"texts": texts} if texts else {}),
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


def _metrics(samples: Samples, shown: Sequence[str]) -> Iterator[Document]:
    """The metrics that are means over items, each with the values of every model."""
    for name, task in samples.tasks.items():
        for key, metric in task.metrics.items():
            labels = list(metric.values)
            yield {
                "task": visible(name),
                "metric": visible(metric_name(key)),
                "higher_is_better": metric.higher_is_better,
                "models": [
                    {"name": visible(model_name(label)), "items": _items(items)}
                    for label, items in metric.values.items()
                ],
                "merged": labels.index(MERGED),
                "against": labels.index(metric.against) if metric.against else None,
                "same": [metric.same.get(label) for label in labels],
                **(_spoken(task, metric, shown.index(name)) if name in shown else {}),
            }


def _spoken(task: TaskSamples, metric: SampledMetric, number: int) -> Document:
    """The number of the task's texts, and for each model the place of its answers in them."""
    spoken = list(task.answers)
    return {
        "texts": number,
        "answers": [spoken.index(one) if one in spoken else None for one in metric.values],
        "judged": [_sparse(metric.judged.get(label, ())) for label in metric.values],
    }


def _texts(task: TaskSamples) -> Document:
    return {
        "questions": _cleaned(task.questions),
        "targets": _cleaned(task.targets),
        "answers": [_cleaned(texts) for texts in task.answers.values()],
    }


def _cleaned(texts: Texts) -> list[str | None]:
    return [None if text is None else visible_lines(text) for text in texts]


def _sparse(texts: Texts) -> Mapping[str, str]:
    """Item -> text, where there is one."""
    found = enumerate(texts)
    return {str(index): visible_lines(text) for index, text in found if text is not None}


def _items(values: Sequence[float | None]) -> str | list[float | None]:
    """Right and wrong answers as a character each; other numbers are rounded."""
    if all(value in MARKS for value in values):
        return "".join(MARKS[value] for value in values)
    return [None if value is None else _rounded(value) for value in values]


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if isfinite(value) else None
