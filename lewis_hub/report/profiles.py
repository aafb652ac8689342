"""Importance by component and block, and two importance profiles compared."""

from __future__ import annotations

import os
import re
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum, isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.checkpoint import names
from lewis_hub.errors import ProfileError
from lewis_hub.files import starts_like_path

ORDINARY_PERCENTILE = 95
MAX_COMPONENTS, MAX_BLOCKS = 500, 1000  # of a map; larger ones show nothing, and take gigabytes
MAX_CELLS = 20_000
STANDS_OUT = 2.5  # times the percentile: below it a colour scale still shows the other values


@dataclass(frozen=True)
class Grid:
    """A value per component and block; NaN where a block has no such component."""

    components: tuple[str, ...]  # in the model's order; routed experts of a block are one, `*`
    blocks: tuple[int, ...]  # their numbers, ascending
    values: tuple[tuple[float, ...], ...]  # a row per component, a column per block
    top: str  # the module of the highest value

    @property
    def known(self) -> tuple[float, ...]:
        """All values but NaN, ascending."""
        return tuple(sorted(value for row in self.values for value in row if not isnan(value)))


@dataclass(frozen=True)
class Clip:
    """The end of a colour scale that a few modules exceed by far."""

    limit: float  # the highest value inside the scale
    percentile: float  # of the limit among all values
    n_above: int
    top: str  # the module with the highest value
    top_value: float

    def sentence(self, shown: Callable[[float], str]) -> str:
        """A sentence on the end of the scale and the modules above it, with values as `shown`."""
        others = f", and {self.n_above - 1} more" if self.n_above > 1 else ""
        return (
            f"The colour scale ends at {shown(self.limit)} (percentile {self.percentile:.1f}). "
            f"Above it: {self.top}, {shown(self.top_value)}{others}."
        )


def arrange(values: Mapping[str, float]) -> Grid | None:
    """Arrange modules by component and block; None if none is in a block, or too many to draw.

    Args:
        values: module or tensor -> value, in the model's order. Modules that differ only in an
            index inside the component, such as routed experts, are shown by their mean.
    """
    cells: defaultdict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for module, value in values.items():
        block = names.block(module)
        if block is not None and not isnan(value):
            cells[_folded(names.component(module)), block][module] = value
    components = tuple(dict.fromkeys(component for component, _ in cells))
    blocks = tuple(sorted({block for _, block in cells}))
    is_drawable = len(components) <= MAX_COMPONENTS and len(blocks) <= MAX_BLOCKS
    if not cells or not is_drawable or len(components) * len(blocks) > MAX_CELLS:
        return None
    means = {place: _mean(modules.values()) for place, modules in cells.items()}
    rows = tuple(
        tuple(means.get((component, block), nan) for block in blocks) for component in components
    )
    highest = cells[max(means, key=lambda place: means[place])]
    return Grid(components, blocks, rows, max(highest, key=lambda module: highest[module]))


def relative_change(
    expert: Mapping[str, float], base: Mapping[str, float] | None
) -> dict[str, float]:
    """|importance(expert) - importance(base)| in percent of the base's, per module.

    Without a base: the expert's own importance in percent of its component's mean over the blocks.
    NaN where the percentage would be of zero.
    """
    if base is not None:
        return {
            module: 100 * abs(value - base[module]) / base[module] if base[module] else nan
            for module, value in expert.items()
            if module in base
        }
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for module, value in expert.items():
        groups[names.component(module)].append(value)
    means = {component: _mean(values) for component, values in groups.items()}
    return {
        module: 100 * value / mean if (mean := means[names.component(module)]) else nan
        for module, value in expert.items()
    }


def clip(grid: Grid) -> Clip | None:
    """End the colour scale below values that are far above the others; None if there are none.

    Such values are more than STANDS_OUT times the ORDINARY_PERCENTILE of all values. The scale ends
    at the highest of the others.
    """
    known = grid.known
    ordinary = known[(len(known) - 1) * ORDINARY_PERCENTILE // 100]
    shown = [value for value in known if value <= STANDS_OUT * ordinary]
    if ordinary <= 0 or len(shown) == len(known):
        return None
    percentile = 100 * len(shown) / len(known)
    return Clip(shown[-1], percentile, len(known) - len(shown), grid.top, known[-1])


def _folded(component: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", component)


def _mean(values: Collection[float]) -> float:
    return fsum(values) / len(values)


@dataclass(frozen=True)
class ModuleChange:
    """A module in both; `change` is a fraction of A's importance, None where that is zero."""

    module: str
    before: float
    after: float
    change: float | None


@dataclass(frozen=True)
class ProfileComparison:
    """A measurement of profile A compared with one of profile B, by the same measure."""

    before: str
    after: str
    measure: str
    texts_before: str  # empty if the measure needs no texts
    texts_after: str
    rows: tuple[ModuleChange, ...]  # modules in both, in the model's order
    spearman: float | None  # rank correlation over them; None if it is not defined
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def by_change(self) -> tuple[ModuleChange, ...]:
        """The largest relative change first."""
        return tuple(
            sorted(self.rows, key=lambda row: -np.inf if row.change is None else -abs(row.change))
        )

    @property
    def sentences(self) -> tuple[str, ...]:
        """The comparison in sentences."""
        texts = [f"A: {self.before}, B: {self.after}, {len(self.rows)} modules in both"]
        if self.spearman is not None:
            texts[0] += f", Spearman's rank correlation {self.spearman:.4f} (n = {len(self.rows)})"
        sides = {"A": self.texts_before, "B": self.texts_after}
        if self.texts_before == self.texts_after:
            sides = {"both": self.texts_before}
        texts += [f"Texts of {side}: {data}" for side, data in sides.items() if data]
        for side, only in (("A", self.only_before), ("B", self.only_after)):
            if only:
                texts.append(f"{len(only)} modules only in {side}, such as {only[0]}")
        return tuple(texts)

    def to_json(self) -> dict[str, Any]:
        """As plain data, largest change first; `n` is the number of modules in both."""
        rows = [asdict(row) for row in self.by_change]
        return {**asdict(self), "rows": rows, "n": len(rows)}


def compare_profiles(
    before: ImportanceProfile, after: ImportanceProfile
) -> tuple[ProfileComparison, ...]:
    """Compare the measurements of each source that is in both profiles, in A's order.

    Only values of the same measure are compared. If each profile holds one measurement, those two
    are compared whatever their sources are.

    Raises:
        ProfileError: no source is in both, or none by the same measure.

    Example:
        >>> texts = lewis_hub.Calibration(dataset="zoo/reverse", text="{question}", samples=4)
        >>> models = ("zoo/base", "zoo/expert-reverse")
        >>> profiles = [lewis_hub.measure_model(m, texts, tmp_path / m) for m in models]
        >>> (comparison,) = lewis_hub.compare_profiles(*profiles)
        >>> comparison.spearman > 0.9
        True
    """
    if not set(before.measures) & set(after.measures) and before.sources and after.sources:
        held = [" and ".join(profile.measures) for profile in (before, after)]
        problem = f"the measure of A is {held[0]}, that of B is {held[1]}"
        remedy = "Compare profiles of guides with the same measure."
        raise ProfileError("compare", problem, remedy)
    pairs = _pairs(before.sources, after.sources)
    if not pairs:
        held = [_held(profile) for profile in (before, after)]
        problem = f"no source is in both: A holds {held[0] or 'none'}; B holds {held[1] or 'none'}"
        remedy = "Measure one model each: `lewis-hub importance MODEL --task TASK -o FOLDER`."
        raise ProfileError("compare", problem, remedy)
    return tuple(_compared(first, second) for first, second in pairs)


def _pairs(
    before: Sequence[SourceImportance], after: Sequence[SourceImportance]
) -> list[tuple[SourceImportance, SourceImportance]]:
    if len(before) == len(after) == 1:
        return [(before[0], after[0])]
    left: defaultdict[tuple[str, str], deque[SourceImportance]] = defaultdict(deque)
    for one in after:
        left[short_name(one.source), one.measure].append(one)
    same = [(first, left[short_name(first.source), first.measure]) for first in before]
    return [(first, others.popleft()) for first, others in same if others]


def _compared(first: SourceImportance, second: SourceImportance) -> ProfileComparison:
    a, b = first.modules, second.modules
    rows = [
        ModuleChange(module, a[module], b[module], b[module] / a[module] - 1 if a[module] else None)
        for module in a
        if module in b
    ]
    return ProfileComparison(
        before=first.source,
        after=second.source,
        measure=first.measure,
        texts_before=_texts(first),
        texts_after=_texts(second),
        rows=tuple(rows),
        spearman=spearman([row.before for row in rows], [row.after for row in rows]),
        only_before=tuple(module for module in a if module not in b),
        only_after=tuple(module for module in b if module not in a),
    )


def _held(profile: ImportanceProfile) -> str:
    several = len(profile.measures) > 1
    names = (f"{s.source} ({s.measure})" if several else s.source for s in profile.sources)
    return ", ".join(dict.fromkeys(names))


def _texts(entry: SourceImportance) -> str:
    """A description of the calibration texts of a source."""
    settings = entry.calibration
    keys = [key for key in ("dataset", "config", "split") if settings.get(key)]
    data = " ".join(str(settings[key]) for key in keys)
    if not data:
        return ""
    task = f"task {settings['task']}, " if settings.get("task") else ""
    return f"{task}{data}: {settings.get('n_texts', '?')} texts, {entry.n_tokens:,} tokens"


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation with mean ranks for ties; None if a side is constant."""
    ranks = [_ranks(np.asarray(side, dtype=np.float64)) for side in (first, second)]
    a, b = (side - side.mean() for side in ranks) if len(first) else ranks
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: NDArray[np.float64] = ends - (counts - 1) / 2
    return means[place]


def short_name(source: str) -> str:
    """The name of a pinned source for readers: without a repo's commit or a folder's path."""
    name = re.sub(r"@[0-9a-f]{40}$", "", source)
    # A document of a stranger may name any path: nothing is looked up on the disk.
    return Path(os.path.normpath(Path.cwd() / name)).name if starts_like_path(name) else name


def unique_slugs(sources: Iterable[str]) -> tuple[str, ...]:
    """A unique part of a file name for each source: lower case letters, digits and `-`."""
    taken: dict[str, None] = {}
    numbers: dict[str, int] = {}  # the last of each name
    for source in sources:
        name = short_name(source).rstrip("/").rpartition("/")[2]
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower())[:60].strip("-") or "expert"
        slug, n = plain, numbers.get(plain, 1)
        while slug in taken:
            n += 1
            slug = f"{plain}-{n}"
        numbers[plain] = n
        taken[slug] = None
    return tuple(taken)
