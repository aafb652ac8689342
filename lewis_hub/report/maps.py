"""The maps of a guide, as small multiples in one picture: a row per expert, a column per kind."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.errors import ProfileError
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.report.plots import (
    DPI,
    HIGHLIGHT,
    PAIRED,
    THEMES,
    WORDS,
    Picture,
    Theme,
    drawable,
    own_style,
    percentage,
    row_label,
    shortened,
)
from lewis_hub.report.profiles import Clip, Grid, arrange, clip, relative_change, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

STEM = "maps"
FONT = 9.5
WIDTH = 4.8  # inches: a phone shows it at half its size
MAX_WIDTH = 6.5
CELL, MIN_HEIGHT = 0.17, 0.55  # inches: of a component in a map
MAX_HEIGHT = 3.2
GAP, NAME = 0.18, 0.3  # inches: between columns, and above a map


@dataclass(frozen=True)
class Column:
    """The maps of one kind, on one colour scale: expert -> components by blocks."""

    kind: str  # importance, density or weight
    title: str
    scale: str  # label of the colour scale
    maps: Mapping[str, Grid]

    @property
    def percent(self) -> bool:
        """Whether values are percentages."""
        return self.scale.startswith("%")

    @cached_property
    def pooled(self) -> Grid:
        """All values as one grid, with the module of the highest."""
        grids = list(self.maps.values())
        highest = max(grids, key=lambda grid: grid.known[-1])
        rows = tuple(row for grid in grids for row in grid.values)
        width = max(map(len, rows))
        padded = tuple(row + (nan,) * (width - len(row)) for row in rows)
        return Grid(highest.components, highest.blocks, padded, highest.top)

    @cached_property
    def clipped(self) -> Clip | None:
        """The end of the scale if some values exceed it by far."""
        return clip(self.pooled) if self.percent else None


def draw_maps(
    profile: ImportanceProfile | None, schedule: DensitySchedule | None, folder: Path
) -> Picture | None:
    """Draw importance, densities and weights of all experts into one picture, light and dark.

    The same data give the same bytes with the same version of matplotlib. None: no module is in a
    block.
    """
    columns = map_columns(profile, schedule)
    if not columns:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    experts = list(dict.fromkeys(source for column in columns for source in column.maps))
    names = tuple(f"{STEM}-{theme.name}.png" for theme in THEMES)
    for theme, name in zip(THEMES, names, strict=True):
        _save(columns, experts, theme, folder / name)
    return Picture(names[0], names[1], _sentence(columns, experts), _notes(columns))


def map_columns(
    profile: ImportanceProfile | None, schedule: DensitySchedule | None
) -> list[Column]:
    """The columns that have values: change of importance, density, factor of the weight."""
    profile = profile.by(profile.measures[0]) if profile and profile.measures else None
    columns = [_importance(profile)] if profile else []
    scheduled = schedule.experts if schedule else ()
    for kind, title, scale, values in (
        ("density", "density", "fraction kept", {e.source: e.tensors for e in scheduled}),
        ("weight", "weight", "factor", {e.source: e.weights for e in scheduled}),
    ):
        columns.append(_column(kind, title, scale, values))
    return [column for column in columns if column.maps]


def _importance(profile: ImportanceProfile) -> Column:
    """The change from base to expert, or the experts' own values if the base was not measured."""
    experts = profile.experts
    measure = experts[0].measure if experts else profile.measures[0]
    word = WORDS.get(measure, measure)
    if measure in PAIRED:
        values = {e.source: {m: 100 * v for m, v in e.modules.items()} for e in experts}
        return _column("importance", word, "% of the base's", values)
    bases = {e.source: _base(profile, e) for e in experts}
    values = {e.source: relative_change(e.modules, bases[e.source]) for e in experts}
    if all(base is not None for base in bases.values()):
        return _column("importance", f"change of {word}", "% of the base's", values)
    return _column("importance", word, "% of the component's mean", values)


def _base(profile: ImportanceProfile, expert: SourceImportance) -> Mapping[str, float] | None:
    try:
        return profile.base_of(expert).modules
    except ProfileError:
        return None


def _column(kind: str, title: str, scale: str, values: Mapping[str, Mapping[str, float]]) -> Column:
    grids = {source: grid for source, found in values.items() if (grid := arrange(found))}
    return Column(kind, title, scale, grids)


def _sentence(columns: Sequence[Column], experts: Sequence[str]) -> str:
    """What the picture shows, and where the values are highest."""
    named = ", ".join(map(short_name, experts))
    highest = []
    for column in columns:
        source = max(column.maps, key=lambda source: column.maps[source].known[-1])
        grid = column.maps[source]
        value = percentage(grid.known[-1]) if column.percent else f"{grid.known[-1]:.2f}"
        expert = f" of {short_name(source)}" if len(experts) > 1 else ""
        highest.append(f"{column.title} is highest in {grid.top}{expert} ({value})")
    return f"Components (rows) by blocks (columns) of {named}: {', and '.join(highest)}."


def _notes(columns: Sequence[Column]) -> str:
    clips = [column.clipped for column in columns]
    return " ".join(clipped.sentence(percentage) for clipped in clips if clipped)


@dataclass(frozen=True)
class Layout:
    """Where maps lie; lengths are in inches, from the left and from the top."""

    width: float
    left: float  # of the first column
    each: float  # width of a map
    height: float  # of a map
    n_rows: int
    titles: tuple[str, ...]  # of the columns, each on as many lines as it needs
    lines: tuple[str, ...]  # of the note at the bottom

    @property
    def above(self) -> float:
        """The room for the titles."""
        return 0.14 + 0.17 * max(title.count("\n") + 1 for title in self.titles)

    @property
    def below(self) -> float:
        """The room for colour scales and note."""
        return 0.85 + 0.16 * len(self.lines)

    @property
    def up(self) -> float:
        """The height of the picture."""
        return self.above + self.n_rows * (self.height + NAME) + self.below

    def start(self, column: int) -> float:
        """The left end of a column, as a fraction."""
        return (self.left + column * (self.each + GAP)) / self.width

    def name(self, row: int) -> float:
        """The height of an expert's name, as a fraction from the bottom."""
        return 1 - (self.above + row * (self.height + NAME) + 0.19) / self.up

    def box(self, column: int, row: int) -> tuple[float, float, float, float]:
        """The place of a map."""
        bottom = self.above + (row + 1) * (self.height + NAME) - 0.05
        size = self.each / self.width, self.height / self.up
        return self.start(column), 1 - bottom / self.up, *size

    def bar(self, column: int) -> tuple[float, float, float, float]:
        """The place of a colour scale."""
        size = self.each / self.width, 0.09 / self.up
        return self.start(column), (0.42 + 0.16 * len(self.lines)) / self.up, *size


def _layout(columns: Sequence[Column], n_rows: int) -> Layout:
    grids = [grid for column in columns for grid in column.maps.values()]
    components = max((grid.components for grid in grids), key=len)
    left = 0.15 + 0.075 * max(len(row_label(component)) for component in components)
    n_blocks = max(len(grid.blocks) for grid in grids)
    width = min(max(WIDTH, left + len(columns) * (0.03 * n_blocks + GAP)), MAX_WIDTH)
    each = (width - left - 0.15 - GAP * (len(columns) - 1)) / len(columns)
    height = min(max(CELL * len(components), MIN_HEIGHT), MAX_HEIGHT)
    note = drawable(_notes(columns))
    lines = textwrap.wrap(note, int(13 * width), break_on_hyphens=False)
    titles = ("\n".join(textwrap.wrap(column.title, int(11.5 * each))) for column in columns)
    return Layout(width, left, each, height, n_rows, tuple(titles), tuple(lines))


def _save(columns: Sequence[Column], experts: Sequence[str], theme: Theme, path: Path) -> None:
    layout = _layout(columns, len(experts))
    margin = 0.12 / layout.width
    with own_style(theme.ink):
        from matplotlib.figure import Figure

        size = layout.width, layout.up
        figure = Figure(figsize=size, dpi=DPI, facecolor=theme.paper)
        for i, column in enumerate(columns):
            height = 1 - 0.08 / layout.up
            figure.text(layout.start(i), height, layout.titles[i], size=FONT, va="top")
            _draw_column(figure, layout, column, i, experts, theme)
        for k, source in enumerate(experts):
            name = shortened(drawable(short_name(source)), int(9.5 * layout.width))
            figure.text(margin, layout.name(k), name, size=FONT, weight="bold", va="bottom")
        note = "\n".join(layout.lines)
        figure.text(margin, 0.06 / layout.up, note, size=FONT - 1, va="bottom")
        figure.savefig(path, metadata={"Software": None})


def _draw_column(
    figure: Figure, layout: Layout, column: Column, place: int, experts: Sequence[str], theme: Theme
) -> None:
    rows = [k for k, source in enumerate(experts) if source in column.maps]
    for k in rows:
        axes = figure.add_axes(layout.box(place, k))
        image = _draw(axes, column, experts[k], theme)
        if place:
            axes.set_yticklabels([])
        if k != rows[-1]:
            axes.set_xticklabels([])
    below = figure.add_axes(layout.bar(place))
    bar = figure.colorbar(
        image,
        cax=below,
        orientation="horizontal",
        label=column.scale,
        extend="max" if column.clipped else "neither",
        extendfrac=0.04,
    )
    bar.outline.set_visible(False)
    below.tick_params(length=0, labelsize=FONT - 1)


def _draw(axes: Axes, column: Column, source: str, theme: Theme) -> AxesImage:
    from matplotlib import colormaps

    grid, pooled, clipped = column.maps[source], column.pooled, column.clipped
    bottom = 0.0 if column.percent else pooled.known[0]
    top = clipped.limit if clipped else pooled.known[-1]
    image = axes.imshow(
        grid.values,
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["viridis"].with_extremes(over=HIGHLIGHT, bad=theme.faint),
        vmin=bottom,
        vmax=top if top > bottom else bottom + 1,
    )
    n_rows, n_columns = len(grid.components), len(grid.blocks)
    axes.set_yticks(range(n_rows), list(map(row_label, grid.components)))
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, 200) if n_columns <= 6 * s)
    places = range(0, n_columns, step)
    axes.set_xticks(places, [str(grid.blocks[place]) for place in places])
    axes.tick_params(length=0, labelsize=FONT - 1)
    axes.spines[:].set_visible(False)
    return image
