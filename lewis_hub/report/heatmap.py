"""One heat map, components by blocks, drawn to a PNG file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lewis_hub.report.grid import Clip, Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

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
