"""Plots of compared profiles and of a search, each in a light and a dark version."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lewis_hub.report.profiles import (
    Clip,
    Grid,
    ProfileComparison,
    arrange,
    clip,
    relative_change,
    short_name,
    unique_slugs,
)
from lewis_hub.working_folder import hidden_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Value = float | bool | str

DPI = 144
MAX_NUMBERED_BLOCKS = 16  # with more, a cell is too narrow for its number
MAX_HEIGHT = 40.0  # inches of a map: a picture takes memory for each of its points
MAX_LABELS = 130  # of rows, at that height
MAX_LABEL = 48  # characters of a component; names in files may have a thousand
MAX_MAPS = 50  # of comparisons: two take a second
MAX_NUMBERS = 100  # each takes about a kilobyte of the file
HIGHLIGHT = "#d1495b"  # not a colour of the scale
WORDS = {  # measure -> its name on a map
    "lewis": "importance",
    "lewis_reference": "importance",
    "outliers": "share of outliers",
    "evenness": "evenness of input channels",
    "output_shift": "change of outputs",
    "task_vector": "size of the task vector",
}
PAIRED = ("output_shift", "task_vector")  # measures that are already relative to the base


@dataclass(frozen=True)
class Theme:
    """The colours of a version of a plot."""

    name: Literal["light", "dark"]
    paper: str
    ink: str
    faint: str  # of cells without a value


THEMES = (
    Theme("light", "#ffffff", "#1f2937", "#e5e7eb"),
    Theme("dark", "#0b0f19", "#e5e7eb", "#1f2937"),
)


@dataclass(frozen=True)
class Picture:
    """A picture in its two versions."""

    light: str  # file name, such as `maps-light.png`
    dark: str  # the file for dark pages
    caption: str  # a sentence on what it shows
    note: str = ""  # on values above the colour scale; empty if there are none

    @property
    def files(self) -> tuple[str, str]:
        """Both file names."""
        return self.light, self.dark


@dataclass(frozen=True)
class PlottedTrial:
    """A trial of a search; `value` is None if it was stopped early or failed."""

    number: int
    values: Mapping[str, Value]
    value: float | None


@dataclass(frozen=True)
class SearchPlot:
    """Trials as lines over the axes of a search."""

    title: str
    objective: str
    trials: tuple[PlottedTrial, ...]  # the completely scored ones are drawn
    best: int  # number of the highlighted trial
    lower_is_better: bool


def draw_comparisons(compared: Sequence[ProfileComparison], folder: Path) -> tuple[str, ...]:
    """Draw a map of each comparison, light and dark, into a folder; returns the file names.

    Of more than MAX_MAPS only the first are drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    slugs = unique_slugs([comparison.after for comparison in compared])
    for comparison, slug in [*zip(compared, slugs, strict=True)][:MAX_MAPS]:
        before = {row.module: row.before for row in comparison.rows}
        after = {row.module: row.after for row in comparison.rows}
        a, b = short_name(comparison.before), short_name(comparison.after)
        pair = f"{a} to {b}" if a != b else f"{a}, A to B"
        title = f"Change of {WORDS.get(comparison.measure, comparison.measure)}, {pair}"
        if heat := _heat_map(title, "% of A's", relative_change(after, before)):
            names += _save_both(heat, f"change-{slug}", folder)
    return tuple(names)


@dataclass(frozen=True)
class HeatMap:
    """Components by blocks: percentages, whose scale may end below the highest, or fractions."""

    title: str
    scale: str  # label of the colour scale
    grid: Grid

    @property
    def percent(self) -> bool:
        """Whether values are percentages."""
        return self.scale.startswith("%")

    @property
    def clipped(self) -> Clip | None:
        """The end of the scale if some values exceed it."""
        return clip(self.grid) if self.percent else None

    @property
    def note(self) -> str:
        """A sentence on the values above the scale; empty if there are none."""
        clipped = self.clipped
        return clipped.sentence(percentage) if clipped else ""


def _heat_map(title: str, scale: str, values: Mapping[str, float]) -> HeatMap | None:
    grid = arrange(values)
    return HeatMap(title, scale, grid) if grid else None


def percentage(value: float) -> str:
    """A percentage for readers."""
    return f"{value:.1f} %" if value < 10 else f"{value:,.0f} %"


def _save_both(heat: HeatMap, stem: str, folder: Path) -> tuple[str, str]:
    """Save the light and the dark version of a map; returns their file names."""
    light, dark = (f"{stem}-{theme.name}.png" for theme in THEMES)
    for name, picture in zip((light, dark), _pictures(heat), strict=True):
        (folder / name).write_bytes(picture)
    return light, dark


def _pictures(heat: HeatMap) -> tuple[bytes, ...]:
    """Draw a map as a PNG of each theme."""
    drawn_as = []
    with own_style():
        drawn = _draw(heat)
        for theme in THEMES:
            file = BytesIO()
            drawn.paint(theme)
            drawn.figure.savefig(file, metadata={"Software": None})
            drawn_as.append(file.getvalue())
    return tuple(drawn_as)


@dataclass(frozen=True)
class DrawnMap:
    """A map as matplotlib draws it: laid out once, and painted for each theme."""

    figure: Figure
    image: AxesImage
    lines: Sequence[LineCollection]  # between the cells

    def paint(self, theme: Theme) -> None:
        """Set all colours that are the theme's; numbers on cells have those of the cells."""
        self.figure.set_facecolor(theme.paper)
        self.image.set_cmap(self.image.get_cmap().with_extremes(bad=theme.faint))
        for lines in self.lines:
            lines.set_color(theme.paper)
        for text in self.figure.texts:
            text.set_color(theme.ink)
        for axes in self.figure.axes:
            axes.tick_params(length=0, labelcolor=theme.ink)
            axes.xaxis.label.set_color(theme.ink)
            axes.yaxis.label.set_color(theme.ink)


def _draw(heat: HeatMap) -> DrawnMap:
    """Draw a map without its colours; lengths are in inches from the lower left corner."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_columns, n_rows = len(heat.grid.blocks), len(heat.grid.components)
    cell = 0.62 if n_columns <= MAX_NUMBERED_BLOCKS else max(0.118, 9.4 / n_columns)
    left = 0.3 + 0.078 * max(len(row_label(component)) for component in heat.grid.components)
    width, height = max(cell * n_columns, 3.2), min(max(0.3 * n_rows, 1.5), MAX_HEIGHT)
    across = left + width + 1.0
    lines = textwrap.wrap(drawable(heat.note), int(15 * across) - 4, break_on_hyphens=False)
    below = 0.55 + (0.09 + 0.15 * len(lines) if lines else 0)
    up = below + height + 0.48

    def box(start: float, length: float) -> tuple[float, float, float, float]:
        return start / across, below / up, length / across, height / up

    figure = Figure(figsize=(across, up), dpi=DPI)
    FigureCanvasAgg(figure)  # both versions are rendered on it, with the sizes of its texts
    axes = figure.add_axes(box(left, width))
    image = _draw_image(axes, heat)
    bar = figure.colorbar(
        image,
        cax=figure.add_axes(box(left + width + 0.15, 0.14)),
        extend="max" if heat.clipped else "neither",
        extendfrac=0.06,
        label=heat.scale,
    )
    bar.outline.set_visible(False)
    title = shortened(drawable(heat.title), int(9.5 * across))
    figure.text(0.14 / across, 1 - 0.14 / up, title, size=10, weight="bold", va="top")
    figure.text(0.14 / across, 0.12 / up, "\n".join(lines), size=8, va="bottom")
    return DrawnMap(figure, image, _draw_lines(axes, n_rows, n_columns))


def _draw_image(axes: Axes, heat: HeatMap) -> AxesImage:
    from matplotlib import colormaps

    grid, clipped = heat.grid, heat.clipped
    bottom = 0.0 if heat.percent else grid.known[0]
    top = clipped.limit if clipped else grid.known[-1]
    n_rows, n_columns = len(grid.components), len(grid.blocks)
    image = axes.imshow(
        grid.values,
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["viridis"].with_extremes(over=HIGHLIGHT),
        vmin=bottom,
        vmax=top if top > bottom else bottom + 1,
    )
    labelled = range(0, n_rows, -(-n_rows // MAX_LABELS))
    axes.set_yticks(labelled, [row_label(grid.components[row]) for row in labelled])
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100) if n_columns <= 24 * s)
    places = range(0, n_columns, step)
    axes.set_xticks(places, [str(grid.blocks[place]) for place in places])
    axes.set_xlabel("block")
    axes.spines[:].set_visible(False)
    if n_columns <= MAX_NUMBERED_BLOCKS and len(grid.known) <= MAX_NUMBERS:
        _write_numbers(axes, heat, image)
    return image


def _draw_lines(axes: Axes, n_rows: int, n_columns: int) -> tuple[LineCollection, LineCollection]:
    width = 1.2 if n_columns <= MAX_NUMBERED_BLOCKS else 0.4
    return (
        axes.hlines([i - 0.5 for i in range(1, n_rows)], -0.5, n_columns - 0.5, lw=width),
        axes.vlines([i - 0.5 for i in range(1, n_columns)], -0.5, n_rows - 0.5, lw=width),
    )


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


def drawable(text: str) -> str:
    """The text with `?` for characters that the font may not have."""
    return "".join(c if c.isprintable() and c < "\u0250" else "?" for c in text)


def row_label(component: str) -> str:
    """A component as a map names its row: the margin is as wide as the longest."""
    return shortened(drawable(component), MAX_LABEL)


def shortened(text: str, most: int) -> str:
    """The text, or its beginning with `…` if it has more characters than `most`."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def draw_search(search: SearchPlot, folder: Path) -> tuple[str, ...]:
    """Draw a search, light and dark; returns the file names, none if there is nothing to draw."""
    complete = [trial for trial in search.trials if trial.value is not None]
    if not any(trial.values for trial in complete):
        return ()
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        _save_search(search, complete, theme, folder / f"search-{theme.name}.png")
    return tuple(f"search-{theme.name}.png" for theme in THEMES)


def places(trials: Sequence[PlottedTrial], axis: str) -> dict[int, float]:
    """Number of each trial with this axis -> its position on it, from 0 to 1.

    Numbers are scaled from the lowest to the highest; choices are evenly spaced.
    """
    values = {trial.number: trial.values[axis] for trial in trials if axis in trial.values}
    if any(isinstance(value, str | bool) for value in values.values()):
        order = sorted({str(value) for value in values.values()})
        last = max(len(order) - 1, 1)
        return {number: order.index(str(value)) / last for number, value in values.items()}
    numbers = {number: float(value) for number, value in values.items()}
    low, high = min(numbers.values()), max(numbers.values())
    span = high - low
    return {number: (value - low) / span if span else 0.5 for number, value in numbers.items()}


def _save_search(
    search: SearchPlot, complete: Sequence[PlottedTrial], theme: Theme, path: Path
) -> None:
    names = list(dict.fromkeys(name for trial in complete for name in trial.values))
    positions = {name: places(complete, name) for name in names}
    values = [trial.value for trial in complete if trial.value is not None]
    # the better a trial, the higher its contrast with the paper
    low_is_dark = search.lower_is_better == (theme.name == "light")
    with own_style(theme.ink):
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

        scale = colormaps["viridis" if low_is_dark else "viridis_r"]
        colours: Any = ScalarMappable(Normalize(min(values), max(values)), scale)
        width = max(5.0, 1.25 * len(names) + 1.6)
        figure = Figure(figsize=(width, 3.6), dpi=DPI, facecolor=theme.paper, layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor(theme.paper)
        for trial in sorted(complete, key=lambda trial: trial.number == search.best):
            is_best = trial.number == search.best
            across = [i for i, name in enumerate(names) if name in trial.values]
            axes.plot(
                across,
                [positions[names[i]][trial.number] for i in across],
                color=HIGHLIGHT if is_best else colours.to_rgba(trial.value),
                lw=2.4 if is_best else 1.0,
                alpha=1.0 if is_best else 0.8,
                marker="o",
                ms=3,
            )
        for i, name in enumerate(names):
            axes.axvline(i, color=theme.faint, lw=1, zorder=0)
            _label_ends(
                axes,
                i,
                {positions[name][t.number]: t.values[name] for t in complete if name in t.values},
                theme,
            )
        axes.set_xticks(range(len(names)), [name.replace(".", ".\n", 1) for name in names])
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylim(-0.12, 1.12)
        axes.set_xlim(-0.4, len(names) - 0.6)
        axes.set_title(search.title, loc="left", size=10, weight="bold", color=theme.ink)
        bar = figure.colorbar(colours, ax=axes, label=search.objective)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        figure.savefig(path, metadata={"Software": None})


def _label_ends(axes: Axes, x: int, values: Mapping[float, Value], theme: Theme) -> None:
    """Write the values at both ends of an axis; `values` are by position."""
    for y in {min(values), max(values)}:
        value = values[y]
        axes.text(
            x,
            y + (0.04 if y > 0.5 else -0.04),
            f"{value:.3g}" if isinstance(value, float) else str(value).lower(),
            size=7.5,
            ha="center",
            va="bottom" if y > 0.5 else "top",
            color=theme.ink,
        )


@contextmanager
def own_style(ink: str = "black") -> Iterator[None]:
    """Apply our style, whatever a matplotlibrc contains; `ink` is the colour of texts.

    Nothing else imports matplotlib first: it would read the working folder.
    """
    with hidden_settings():
        import matplotlib

    style: dict[str, Any] = {
        "font.family": ["DejaVu Sans"],  # part of matplotlib
        "font.size": 8.5,
        "text.color": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "text.parse_math": False,  # a `$` in a name is a dollar
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield
