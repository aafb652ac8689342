"""The pictures of a merge: what calibration measured and what the guide made of it."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import fsum, isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.checkpoint import names
from lewis_hub.errors import ProfileError
from lewis_hub.guides.schedule import DensitySchedule, ExpertSchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


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


DPI = 144
MOST_NUMBERED_BLOCKS = 16  # with more, a cell is too narrow for its number
MOST_NUMBERS = 100  # each takes about a kilobyte of the file
OUTLIER = "#d1495b"  # no colour of the scale


@dataclass(frozen=True)
class Theme:
    """Colours of one version of a picture."""

    name: Literal["light", "dark"]
    paper: str
    ink: str
    faint: str  # where a block has no such component


THEMES = (
    Theme("light", "#ffffff", "#1f2937", "#e5e7eb"),
    Theme("dark", "#0b0f19", "#e5e7eb", "#1f2937"),
)


@dataclass(frozen=True)
class HeatMap:
    """What to draw.

    Attributes:
        scale: what the colours mean.
        percent: whether numbers are percentages, rather than fractions.
        clipped: where the scale ends below the highest value; said in the picture.
    """

    title: str
    scale: str
    percent: bool
    bottom: float
    top: float
    grid: Grid
    clipped: Clip | None = None


def note_on(clipped: Clip) -> str:
    """Say where the colours end and what lies above, by name."""
    others = clipped.n_above - 1
    more = f", and {others} more" if others else ""
    return (
        f"Colours end at {_percent(clipped.limit)} (percentile {clipped.percentile:.1f}); above: "
        f"{clipped.top}, {_percent(clipped.top_value)}{more}."
    )


def _percent(value: float) -> str:
    return f"{value:.1f} %" if value < 10 else f"{value:,.0f} %"


@dataclass(frozen=True)
class _Layout:
    """Inches, from the lower left corner."""

    left: float
    below: float
    width: float
    height: float
    size: tuple[float, float]

    def box(self, left: float, width: float) -> tuple[float, float, float, float]:
        """A rectangle as high as the map, in fractions of the figure."""
        across, up = self.size
        return left / across, self.below / up, width / across, self.height / up


def _layout(grid: Grid, note: str) -> _Layout:
    n_columns = len(grid.blocks)
    cell = 0.62 if n_columns <= MOST_NUMBERED_BLOCKS else max(0.118, 9.4 / n_columns)
    left = 0.3 + 0.078 * max(map(len, grid.components))
    width, height = max(cell * n_columns, 3.2), max(0.3 * len(grid.components), 1.5)
    below = 0.55 + (0.24 + 0.15 * note.count("\n") if note else 0)
    return _Layout(left, below, width, height, (left + width + 1.0, below + height + 0.48))


def save(heat: HeatMap, theme: Theme, path: Path) -> None:
    """Draw it; the same map gives the same bytes under one version of matplotlib."""
    from matplotlib.figure import Figure

    note = note_on(heat.clipped) if heat.clipped else ""
    room = int(15 * _layout(heat.grid, "").size[0]) - 4  # characters of the note on a line
    note = "\n".join(textwrap.wrap(_drawable(note), room, break_on_hyphens=False))
    layout = _layout(heat.grid, note)
    across, up = layout.size
    with own_style(theme):
        figure = Figure(figsize=layout.size, dpi=DPI, facecolor=theme.paper)
        image = _heat_map(figure.add_axes(layout.box(layout.left, layout.width)), heat, theme)
        bar = figure.colorbar(
            image,
            cax=figure.add_axes(layout.box(layout.left + layout.width + 0.15, 0.14)),
            extend="max" if heat.clipped else "neither",
            extendfrac=0.06,
            label=heat.scale,
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        title, most = _drawable(heat.title), int(9.5 * across)
        title = title if len(title) <= most else title[: most - 1] + "…"
        figure.text(0.14 / across, 1 - 0.14 / up, title, size=10, weight="bold", va="top")
        figure.text(0.14 / across, 0.12 / up, note, size=8, va="bottom")
        figure.savefig(path, metadata={"Software": None})


def _heat_map(axes: Axes, heat: HeatMap, theme: Theme) -> AxesImage:
    from matplotlib import colormaps

    grid = heat.grid
    n_rows, n_columns = len(grid.components), len(grid.blocks)
    image = axes.imshow(
        grid.values,
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["viridis"].with_extremes(over=OUTLIER, bad=theme.faint),
        vmin=heat.bottom,
        vmax=heat.top if heat.top > heat.bottom else heat.bottom + 1,
    )
    axes.set_yticks(range(n_rows), list(map(_drawable, grid.components)))
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100) if n_columns <= 24 * s)
    places = range(0, n_columns, step)
    axes.set_xticks(places, [str(grid.blocks[place]) for place in places])
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    line = 1.2 if n_columns <= MOST_NUMBERED_BLOCKS else 0.4
    axes.hlines([i - 0.5 for i in range(1, n_rows)], -0.5, n_columns - 0.5, theme.paper, lw=line)
    axes.vlines([i - 0.5 for i in range(1, n_columns)], -0.5, n_rows - 0.5, theme.paper, lw=line)
    if n_columns <= MOST_NUMBERED_BLOCKS and len(grid.known) <= MOST_NUMBERS:
        _write_numbers(axes, heat, image)
    return image


def _write_numbers(axes: Axes, heat: HeatMap, image: AxesImage) -> None:
    colours = image.to_rgba(np.array(heat.grid.values))
    for row, values in enumerate(heat.grid.values):
        for column, value in enumerate(values):
            if not isnan(value):
                red, green, blue, _ = colours[row, column]
                light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
                axes.text(
                    column,
                    row,
                    f"{value:,.{1 if value < 10 else 0}f}" if heat.percent else f"{value:.2f}",
                    size=7.5,
                    color="#111827" if light else "#f9fafb",
                    ha="center",
                    va="center",
                )


def _drawable(text: str) -> str:
    """What the font surely has; names come from anywhere."""
    return "".join(c if c.isprintable() and c < "\u0250" else "?" for c in text)


@contextmanager
def own_style(theme: Theme) -> Iterator[None]:
    """Drawn the same whatever a user's matplotlibrc says."""
    import matplotlib

    style: dict[str, Any] = {
        "font.family": ["DejaVu Sans"],  # comes with matplotlib
        "font.size": 8.5,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "text.parse_math": False,  # a `$` in a name is a dollar
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield


Kind = Literal["importance", "density", "weight"]

WORDS = {  # measure -> what a map of it shows
    "lewis": "importance",
    "lewis_reference": "importance",
    "outliers": "share of outliers",
    "evenness": "evenness of input channels",
    "output_shift": "change of outputs",
    "task_vector": "size of the task vector",
}
PAIRED = ("output_shift", "task_vector")  # relative to the base's already


@dataclass(frozen=True)
class Plot:
    """A picture in its two versions.

    Attributes:
        expert: the source that it is of.
        light: file name, such as `density-math-light.png`.
        dark: the same picture for dark pages.
        caption: what it shows, in words.
        note: where its colours end below the highest values; empty where they do not.
    """

    kind: Kind
    expert: str
    light: str
    dark: str
    caption: str
    note: str = ""

    @property
    def files(self) -> tuple[str, str]:
        """Both file names."""
        return self.light, self.dark


def draw(
    profile: ImportanceProfile | None, schedule: DensitySchedule | None, folder: Path
) -> tuple[Plot, ...]:
    """Draw a map of what was measured and one of what was decided per expert into `folder`.

    The same data gives the same bytes under one version of matplotlib.

    Args:
        profile: None where nothing was measured; its experts get no importance map.
        schedule: None where no guide decided; no density map then.
        folder: is made where it is not there.

    Returns:
        The plots, importance before density, experts in the recipe's order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    profile = profile.by(profile.measures[0]) if profile and profile.measures else None
    measured = profile.experts if profile else ()
    scheduled = schedule.experts if schedule else ()
    sources = dict.fromkeys([e.source for e in measured] + [e.source for e in scheduled])
    slugs = dict(zip(sources, unique_slugs(sources), strict=True))
    maps: list[tuple[Kind, str, HeatMap | None]] = []
    if profile:
        maps += [("importance", one.source, _importance(profile, one)) for one in measured]
    maps += [("density", one.source, _density(one)) for one in scheduled]
    maps += [("weight", one.source, _weight(one)) for one in scheduled if one.weights]
    return tuple(
        _draw(kind, source, heat, f"{kind}-{slugs[source]}", folder)
        for kind, source, heat in maps
        if heat
    )


def _draw(kind: Kind, source: str, heat: HeatMap, stem: str, folder: Path) -> Plot:
    light, dark = (f"{stem}-{theme.name}.png" for theme in THEMES)
    for theme, name in zip(THEMES, (light, dark), strict=True):
        save(heat, theme, folder / name)
    note = note_on(heat.clipped) if heat.clipped else ""
    return Plot(kind, source, light, dark, f"{heat.title}, {heat.scale}.", note)


def _density(expert: ExpertSchedule) -> HeatMap | None:
    return _plain(f"Density of {short_name(expert.source)}", "fraction kept", expert.tensors)


def _weight(expert: ExpertSchedule) -> HeatMap | None:
    return _plain(f"Weight of {short_name(expert.source)}", "times its own", expert.weights)


def _plain(title: str, scale: str, values: Mapping[str, float]) -> HeatMap | None:
    grid = arrange(values)
    if grid is None:
        return None
    low, high = grid.known[0], grid.known[-1]
    return HeatMap(title, scale, percent=False, bottom=low, top=high, grid=grid)


def _importance(profile: ImportanceProfile, expert: SourceImportance) -> HeatMap | None:
    try:
        base: Mapping[str, float] | None = profile.base_of(expert).modules
    except ProfileError:
        base = None
    paired = expert.measure in PAIRED
    percents = {module: 100 * value for module, value in expert.modules.items()}
    grid = arrange(percents if paired else relative_change(expert.modules, base))
    if grid is None:
        return None
    clipped, name = clip(grid), short_name(expert.source)
    word = WORDS.get(expert.measure, expert.measure)
    return HeatMap(
        title=f"Change of {word}, base to {name}" if base else f"{word.capitalize()} in {name}",
        scale="% of the base's" if base or paired else "% of the component's mean",
        percent=True,
        bottom=0.0,
        top=clipped.limit if clipped else grid.known[-1],
        grid=grid,
        clipped=clipped,
    )


def short_name(source: str) -> str:
    """A pinned source for readers: a repo without its commit, a folder without the path to it."""
    name = re.sub(r"@[0-9a-f]{40}$", "", source)
    return Path(name).expanduser().resolve().name if name.startswith((".", "/", "~")) else name


def unique_slugs(sources: Iterable[str]) -> tuple[str, ...]:
    """A file name's part for each source: lower case letters, digits and `-`, no two alike."""
    taken: list[str] = []
    for source in sources:
        name = short_name(source).rstrip("/").rpartition("/")[2]
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower())[:60].strip("-") or "expert"
        slug, n = plain, 1
        while slug in taken:
            n += 1
            slug = f"{plain}-{n}"
        taken.append(slug)
    return tuple(taken)
