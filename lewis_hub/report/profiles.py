"""Two importance profiles side by side: which modules differ, how alike their ranks are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.errors import ProfileError
from lewis_hub.report.plots import (
    THEMES,
    WORDS,
    HeatMap,
    arrange,
    clip,
    relative_change,
    save,
    short_name,
    unique_slugs,
)


@dataclass(frozen=True)
class Row:
    """One module in both; `change` is a fraction of A's importance, None where that is zero."""

    module: str
    before: float
    after: float
    change: float | None


@dataclass(frozen=True)
class Comparison:
    """One measurement of A beside one of B, of the same kind.

    Attributes:
        measure: which number of a module it is.
        texts_before: in words, what A was measured on; empty where no texts are needed.
        texts_after: likewise.
        rows: modules that both have, in the model's order.
        spearman: rank correlation over them; None where it is not defined.
        only_before: modules that A alone has.
        only_after: modules that B alone has.
    """

    before: str
    after: str
    measure: str
    texts_before: str
    texts_after: str
    rows: tuple[Row, ...]
    spearman: float | None
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def by_change(self) -> tuple[Row, ...]:
        """The largest relative change first."""

        def key(row: Row) -> float:
            return -np.inf if row.change is None else -abs(row.change)

        return tuple(sorted(self.rows, key=key))

    @property
    def sentences(self) -> tuple[str, ...]:
        """What a reader should know, in words."""
        told = [f"A {self.before}, B {self.after}: {len(self.rows)} modules in both"]
        if self.spearman is not None:
            told[0] += f", Spearman's rank correlation {self.spearman:.4f} (n = {len(self.rows)})"
        sides = {"A": self.texts_before, "B": self.texts_after}
        if self.texts_before == self.texts_after:
            sides = {"both": self.texts_before}
        told += [f"Texts of {side}: {texts}" for side, texts in sides.items() if texts]
        for side, only in (("A", self.only_before), ("B", self.only_after)):
            if only:
                told.append(f"{len(only)} modules in {side} alone, such as {only[0]}")
        return tuple(told)

    def to_json(self) -> dict[str, Any]:
        """As plain data, largest change first; `n` is the number of modules that both have."""
        rows = [asdict(row) for row in self.by_change]
        return {**asdict(self), "rows": rows, "n": len(rows)}


def compare_profiles(before: ImportanceProfile, after: ImportanceProfile) -> tuple[Comparison, ...]:
    """Compare the measurements of each source that both profiles hold, in A's order.

    Only numbers of one measure are compared. Where each profile holds one measurement, those two
    are, whatever their sources are.

    Raises:
        ProfileError: no source is in both, or none by the same measure.
    """
    if not set(before.measures) & set(after.measures) and before.sources and after.sources:
        held = [" and ".join(profile.measures) for profile in (before, after)]
        problem = f"A holds the measure {held[0]}, B {held[1]}: numbers of another kind"
        remedy = "Compare profiles of guides that measure the same."
        raise ProfileError("compare", problem, remedy)
    pairs = _pairs(before.sources, after.sources)
    if not pairs:
        held = [_held(profile) for profile in (before, after)]
        problem = f"no source is in both: A holds {held[0] or 'none'}; B {held[1] or 'none'}"
        remedy = "Measure one model each: `lewis-hub importance MODEL --task TASK -o FOLDER`."
        raise ProfileError("compare", problem, remedy)
    return tuple(_compared(one, other) for one, other in pairs)


def _pairs(
    before: Sequence[SourceImportance], after: Sequence[SourceImportance]
) -> list[tuple[SourceImportance, SourceImportance]]:
    if len(before) == len(after) == 1:
        return [(before[0], after[0])]
    left, pairs = list(after), []
    for one in before:
        alike = (short_name(one.source), one.measure)
        named = (o for o in left if (short_name(o.source), o.measure) == alike)
        other = next(named, None)
        if other:
            left.remove(other)
            pairs.append((one, other))
    return pairs


def _compared(one: SourceImportance, other: SourceImportance) -> Comparison:
    a, b = one.modules, other.modules
    rows = [
        Row(module, a[module], b[module], b[module] / a[module] - 1 if a[module] else None)
        for module in a
        if module in b
    ]
    return Comparison(
        one.source,
        other.source,
        one.measure,
        _texts(one),
        _texts(other),
        tuple(rows),
        spearman([row.before for row in rows], [row.after for row in rows]),
        tuple(module for module in a if module not in b),
        tuple(module for module in b if module not in a),
    )


def _held(profile: ImportanceProfile) -> str:
    """The sources of a profile; each with its measure where there are several."""
    several = len(profile.measures) > 1
    told = (f"{s.source} ({s.measure})" if several else s.source for s in profile.sources)
    return ", ".join(dict.fromkeys(told))


def _texts(entry: SourceImportance) -> str:
    """What a source was measured on, in words."""
    told = entry.calibration
    data = " ".join(str(told[key]) for key in ("dataset", "config", "split") if told.get(key))
    if not data:
        return ""
    task = f"task {told['task']}, " if told.get("task") else ""
    return f"{task}{data}: {told.get('n_texts', '?')} texts, {entry.n_tokens:,} tokens"


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties having their mean rank; None where a side is constant."""
    ranks = [_ranks(np.asarray(side, dtype=np.float64)) for side in (first, second)]
    a, b = (side - side.mean() for side in ranks) if len(first) else ranks
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else None


def _ranks(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: np.ndarray[Any, np.dtype[np.float64]] = ends - (counts - 1) / 2
    return means[place]


def draw_comparisons(compared: Sequence[Comparison], folder: Path) -> tuple[str, ...]:
    """Draw a map of each comparison, light and dark, into a folder; returns the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    slugs = unique_slugs([one.after for one in compared])
    for one, slug in zip(compared, slugs, strict=True):
        heat = _map(one)
        for theme in THEMES if heat else ():
            names.append(f"change-{slug}-{theme.name}.png")
            assert heat
            save(heat, theme, folder / names[-1])
    return tuple(names)


def _map(one: Comparison) -> HeatMap | None:
    after: Mapping[str, float] = {row.module: row.after for row in one.rows}
    grid = arrange(relative_change(after, {row.module: row.before for row in one.rows}))
    if grid is None:
        return None
    clipped, a, b = clip(grid), short_name(one.before), short_name(one.after)
    word = WORDS.get(one.measure, one.measure)
    return HeatMap(
        title=f"Change of {word}, {f'{a} to {b}' if a != b else f'{a}, A to B'}",
        scale="% of A's",
        percent=True,
        bottom=0.0,
        top=clipped.limit if clipped else grid.known[-1],
        grid=grid,
        clipped=clipped,
    )
