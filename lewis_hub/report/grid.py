"""Numbers per module, laid out as components by blocks: what the heat maps show."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import fsum, isnan, nan

from lewis_hub.checkpoint import names

ORDINARY_PERCENTILE = 95
STANDS_OUT = 2.5  # times the percentile: below it a colour scale still shows the rest


@dataclass(frozen=True)
class Grid:
    """A value per component and block; NaN where a block has no such component.

    Attributes:
        components: in the model's order; routed experts of one block stand together as `*`.
        blocks: their numbers, ascending.
        values: one row per component, one column per block.
        top: the module of the highest value, or the first among its routed experts.
    """

    components: tuple[str, ...]
    blocks: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    top: str

    @property
    def known(self) -> tuple[float, ...]:
        """All values that there are, ascending."""
        return tuple(sorted(value for row in self.values for value in row if not isnan(value)))


@dataclass(frozen=True)
class Clip:
    """Where the colour scale ends because few modules lie far above all others."""

    limit: float  # the highest value that is shown as it is
    percentile: float  # of the limit among all values
    n_above: int
    top: str  # the highest of them
    top_value: float


def arrange(values: Mapping[str, float]) -> Grid | None:
    """Lay modules out by component and block; None where no module is in a block.

    Args:
        values: module or tensor -> value, in the model's order. Modules that differ only in an
            index inside the component, such as routed experts, count with their mean.
    """
    cells: defaultdict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for module, value in values.items():
        block = names.block(module)
        if block is not None and not isnan(value):
            cells[_folded(names.component(module)), block][module] = value
    if not cells:
        return None
    means = {place: _mean(modules.values()) for place, modules in cells.items()}
    components = tuple(dict.fromkeys(component for component, _ in cells))
    blocks = tuple(sorted({block for _, block in cells}))
    rows = tuple(
        tuple(means.get((component, block), nan) for block in blocks) for component in components
    )
    highest = cells[max(means, key=lambda place: means[place])]
    return Grid(components, blocks, rows, max(highest, key=lambda module: highest[module]))


def relative_change(
    expert: Mapping[str, float], base: Mapping[str, float] | None
) -> dict[str, float]:
    """|importance(expert) - importance(base)| in percent of the base's, per module.

    Without a base there is no change: the expert's own importance, in percent of its component's
    mean over the blocks. A module of no importance to start from is NaN.
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
    """Find values so far above the rest that one colour scale could not show both.

    Those are more than STANDS_OUT times the ORDINARY_PERCENTILE of all values. The scale then ends
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
