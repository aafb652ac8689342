"""The tables of `reproduce.py`, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Protocol

from reproduce_suites import Expected, Setting, Suite


class Measured(Protocol):
    """What was measured of a row: see `reproduce.Row`."""

    @property
    def scores(self) -> Mapping[str, float]: ...
    @property
    def abilities(self) -> Mapping[str, float]: ...
    @property
    def seconds(self) -> float | None: ...
    @property
    def peak_bytes(self) -> int | None: ...


def tables(
    suite: Suite,
    published: Mapping[str, Mapping[str, Mapping[str, Expected]]],
    found: Mapping[str, Mapping[str, Measured]],
    limit: int | None = None,
) -> str:
    """For each setting: every task of every row, then the rows as a whole.

    With a `limit` of items, nothing is judged: the published values are of all items.
    """
    lines = [f"The first {limit} items of each task: a trial.", ""] if limit else []
    for setting in suite.settings:
        known, rows = published[setting.name], found[setting.name]
        lines += [f"### {suite.name}: {setting.name}", "", *_tasks(setting, known, rows, limit), ""]
        lines += [*_summary(known, rows), ""]
    return "\n".join(lines)


def _tasks(
    setting: Setting,
    published: Mapping[str, Mapping[str, Expected]],
    rows: Mapping[str, Measured],
    limit: int | None,
) -> Iterator[str]:
    yield "| row | task | published | ours | difference | within two standard errors |"
    yield "|---|---|---:|---:|---:|---|"
    for name in dict.fromkeys([*rows, *published]):
        for task in setting.tasks:
            one = published.get(name, {}).get(task)
            value = one.value if one else None
            ours = rows[name].scores.get(task) if name in rows else None
            told = [_number(value), _number(ours), "", ""]
            if one and one.tolerance is not None and value is not None and ours is not None:
                told[2] = f"{ours - value:+.3f}"
                close = "yes" if abs(ours - value) <= one.tolerance else "no"
                told[3] = "" if limit else close
            yield f"| {' | '.join([name, task, *told])} |"


def _summary(
    published: Mapping[str, Mapping[str, Expected]],
    rows: Mapping[str, Measured],
) -> Iterator[str]:
    yield "| row | mean, published | mean | worst task | forgetting | seconds | peak memory |"
    yield "|---|---:|---:|---|---:|---:|---:|"
    base = rows.get("base")
    for name in dict.fromkeys([*rows, *published]):
        values = [one.value for one in published.get(name, {}).values()]
        known = [value for value in values if value is not None]
        mean = _number(fmean(known)) if known and len(known) == len(values) else ""
        told = [name, mean, *(_of_row(rows[name], base, name) if name in rows else [""] * 5)]
        yield f"| {' | '.join(told)} |"


def _of_row(row: Measured, base: Measured | None, name: str) -> Sequence[str]:
    worst = min(row.scores, key=row.scores.__getitem__)
    forgotten = ""
    if base and row.abilities and name != "base":
        less = fmean(base.abilities[task] - row.abilities[task] for task in row.abilities)
        forgotten = f"{less:+.3f}"
    return [
        _number(fmean(row.scores.values())),
        f"{worst} {row.scores[worst]:.3f}",
        forgotten,
        f"{row.seconds:.0f}" if row.seconds is not None else "",
        f"{row.peak_bytes / 1e6:,.0f} MB" if row.peak_bytes else "",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
